"""What is unusual now, and what was: each alert says what changed, who caused it and since when."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol, TypeVar
from urllib.parse import urlencode

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from millicent.core.clock import NS_PER_S, iso_utc
from millicent.dashboard import zones
from millicent.dashboard.figures import Figure
from millicent.dashboard.selection import FIELDS, NAMELESS
from millicent.dashboard.site import Page, Site
from millicent.dashboard.tables import Cell, Column, Table, table_of, text
from millicent.watch.findings import Cause
from millicent.watch.listing import alert_body
from millicent.watch.store import Alert, read_alerts, undelivered

T = TypeVar("T")
_SHOWN = 100
_MOST = 1000
_ZONE = frozenset({"zone"})


class Asks(Protocol):
    """`ledger.queries.LedgerQueries.ask`."""

    def __call__(self, question: Callable[[sqlite3.Connection], T]) -> T | None: ...


class _Open(NamedTuple):
    """An alert, and where the receipts under it are, in all and of each cause."""

    alert: Alert
    receipts: str
    causes: Sequence[tuple[Cause, str]]


def alerts_page(site: Site, *, ask: Asks, rules: Sequence[str], told: Sequence[str]) -> Page:
    """`rules` are watched; of those, `told` have a webhook."""

    async def show(request: Request) -> Response:
        selection = site.selection(request, _ZONE)
        found = await site.read(lambda: ask(partial(read_alerts, limit=_SHOWN))) or []
        lost = await site.read(lambda: ask(undelivered)) or []
        now = [_open(alert) for alert in found if alert.resolved_at_ns is None]
        with zones.shown_in(selection.zone):
            past = _past([alert for alert in found if alert.resolved_at_ns is not None])
        return site.answer(
            request,
            "alerts.html",
            shown=[past],
            selection=selection,
            alerts=now,
            rules=rules,
            told=told,
            undelivered=lost,
        )

    async def listed(request: Request) -> Response:
        site.selection(request, frozenset())
        found = await site.read(lambda: ask(partial(read_alerts, limit=_MOST))) or []
        body = {"object": "list", "data": [alert_body(alert) for alert in found], "has_more": len(found) == _MOST}
        return Response(msgspec.json.encode(body), media_type="application/json")

    routes = [site.get("/alerts", show), site.get("/alerts.json", listed)]
    return Page("Alerts", "Alerts", "/alerts", routes, period=False)


def _open(alert: Alert) -> _Open:
    causes = [(cause, _receipts(alert, (cause.dimension, cause.member))) for cause in alert.causes]
    return _Open(alert, _receipts(alert), causes)


def _receipts(alert: Alert, *more: tuple[str, str]) -> str:
    """The address of the receipts since then."""
    subject = alert.subject
    # From the second before: addresses have no finer times.
    params = {"from": iso_utc(alert.since_ns - alert.since_ns % NS_PER_S)[:19]}
    for name, value in ((subject.dimension, subject.member), *more):
        if name in FIELDS and value:
            params[name] = value
        elif name in NAMELESS:
            params["none"] = name
    return f"/receipts?{urlencode(params)}"


def _past(alerts: Sequence[Alert]) -> Table:
    return table_of(
        alerts,
        (Column("What changed", "title", number=False), lambda alert: text(alert.title, href=_receipts(alert))),
        (Column("Kind", "kind", number=False, wide=True), lambda alert: text(alert.subject.kind)),
        (Column("Since", "since", number=False, wide=True), lambda alert: _time(alert.since_ns)),
        (Column("Over at", "resolved_at", number=False), lambda alert: _time(alert.resolved_at_ns or 0)),
        (Column("Alert", "id", number=False, wide=True), lambda alert: text(alert.id)),
        name="past",
        title="Over",
        empty="Nothing was unusual so far.",
    )


def _time(ns: int) -> Cell:
    return Cell(Figure(zones.when(ns), "", iso_utc(ns)), iso_utc(ns))
