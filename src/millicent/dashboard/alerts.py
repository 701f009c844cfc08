"""What is unusual now, and what was: each alert says what changed, who caused it and since when."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from millicent.core.clock import NS_PER_HOUR, iso_utc
from millicent.core.errors import InvalidRequest
from millicent.dashboard import zones
from millicent.dashboard.figures import Figure
from millicent.dashboard.site import Page, Site
from millicent.dashboard.tables import Cell, Column, Table, table_of, text
from millicent.watch.findings import Cause
from millicent.watch.listing import alert_body, receipts_address, standing
from millicent.watch.store import Alert, mute, read_alerts, read_mutes, undelivered

T = TypeVar("T")
_SHOWN = 100
_MOST = 1000
_ZONE = frozenset({"zone"})
# For so many hours.
MUTES = {"1": "an hour", "8": "8 hours", "24": "a day", "168": "a week"}


class Asks(Protocol):
    """`ledger.queries.LedgerQueries.ask`."""

    def __call__(self, question: Callable[[sqlite3.Connection], T]) -> T | None: ...


class Writes(Protocol):
    """`SqliteLedger.write`."""

    def __call__(self, operation: Callable[[sqlite3.Connection], None]) -> Awaitable[None]: ...


class _Open(NamedTuple):
    """An alert and its figures, and where the receipts under it are, in all and of each cause."""

    alert: Alert
    figures: Mapping[str, str]
    receipts: str
    causes: Sequence[tuple[Cause, str]]


def alerts_page(site: Site, *, ask: Asks, write: Writes, rules: Sequence[str], told: Sequence[str]) -> Page:
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
            muted=await site.read(lambda: ask(partial(read_mutes, now_ns=site.clock.now_ns()))) or {},
            mutes=MUTES,
            undelivered=lost,
        )

    async def muted(_: Request, form: Mapping[str, str]) -> Response:
        rule, hours = form.get("rule", ""), form.get("hours", "")
        if rule not in told or hours not in {*MUTES, "0"}:
            raise InvalidRequest(f"rule={rule[:40]!r}, hours={hours[:40]!r}: choose them on the Alerts page")
        until_ns = site.clock.now_ns() + int(hours) * NS_PER_HOUR
        await write(partial(mute, rule=rule, until_ns=until_ns))
        return site.redirect("/alerts")

    async def listed(request: Request) -> Response:
        site.selection(request, frozenset())
        found = await site.read(lambda: ask(partial(read_alerts, limit=_MOST))) or []
        body = {"object": "list", "data": [alert_body(alert) for alert in found], "has_more": len(found) == _MOST}
        return Response(msgspec.json.encode(body), media_type="application/json")

    routes = [site.get("/alerts", show), site.get("/alerts.json", listed), site.post("/alerts/mute", muted)]
    return Page("Alerts", "Alerts", "/alerts", routes, period=False)


def _open(alert: Alert) -> _Open:
    causes = [(cause, receipts_address(alert, cause)) for cause in alert.causes]
    return _Open(alert, standing(alert), receipts_address(alert), causes)


def _past(alerts: Sequence[Alert]) -> Table:
    return table_of(
        alerts,
        (Column("What changed", "title", number=False), lambda alert: text(alert.title, href=receipts_address(alert))),
        (Column("At worst", "peak", number=False, wide=True), lambda alert: text(alert.peak)),
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
