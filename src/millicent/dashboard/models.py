"""What runs where, how it is, and what an hour of it costs; and the step that sets this machine's rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Protocol
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response

from millicent.core.accounts import Account
from millicent.core.clock import NS_PER_HOUR
from millicent.core.errors import ConfigError, InvalidRequest, LedgerUnavailable
from millicent.core.money import ZERO, Money
from millicent.core.usage import Provenance
from millicent.dashboard import figures, tables
from millicent.dashboard.configuration import OWNED, RENTED, append_table, placement_table
from millicent.dashboard.selection import TIMES, Selection
from millicent.dashboard.site import Page, Site
from millicent.dashboard.tables import Cell, Column, Table
from millicent.ledger.queries import Totals

RATE = "/models/rate"
# How deployments elsewhere are said to be, by what their breaker does.
_BREAKERS = {"closed": "healthy", "open": "failing, left alone", "half_open": "failing, being tried"}
_EFFECT_NS = 30 * 24 * NS_PER_HOUR


class Engine(Protocol):
    @property
    def device(self) -> str: ...

    @property
    def state(self) -> str: ...

    @property
    def message(self) -> str | None: ...

    @property
    def models(self) -> Mapping[str, str]: ...


class Deployment(Protocol):
    @property
    def model(self) -> str: ...

    @property
    def backend(self) -> str: ...

    @property
    def placement(self) -> str | None: ...

    @property
    def state(self) -> str: ...

    @property
    def running(self) -> int: ...


class Placed(Protocol):
    """A placement with its rate, as it is now."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def accelerators(self) -> int: ...

    @property
    def usd_per_hour(self) -> Decimal | None: ...

    @property
    def rate_provenance(self) -> Provenance: ...

    @property
    def provider(self) -> str | None: ...


class Fleet(Protocol):
    """Everything that answers. `rate_of` is dollars per accelerator-hour of what a placement's settings say, checked;
    `path` the configuration's file, and `check` refuses one that can't be read."""

    @property
    def path(self) -> Path: ...

    def engines(self) -> Sequence[Engine]: ...

    def deployments(self) -> Sequence[Deployment]: ...

    def placements(self) -> Sequence[Placed]: ...

    def rate_of(self, name: str, settings: Mapping[str, str]) -> Decimal | None: ...

    def check(self, path: Path) -> object: ...


def models_page(site: Site, fleet: Fleet) -> Page:
    async def show(request: Request) -> Response:
        selection = site.selection(request, default_range="30d")
        stale = await checkpointed(site)
        model_totals = await site.read(lambda: site.queries.totals("model", selection.where))
        placement_totals = await site.read(lambda: site.queries.totals("placement", selection.where))
        accounts = await site.read(lambda: _accounts(site, selection))
        shown = [
            _models(fleet, model_totals, selection),
            _placements(fleet, placement_totals, accounts, selection),
        ]
        assumed = [each for each in fleet.placements() if each.rate_provenance is Provenance.ASSUMED]
        return site.answer(
            request,
            "models.html",
            shown=shown,
            selection=selection,
            engines=fleet.engines(),
            assumed=assumed,
            stale=stale,
        )

    rate = _Rate(site, fleet)
    routes = [site.get("/models", show), site.get(RATE, rate.show), site.post(RATE, rate.save)]
    return Page("Models & placements", "Models & placements", "/models", routes)


async def checkpointed(site: Site) -> str | None:
    """Have accounts reach up to now; why they don't, where they can't."""
    try:
        await site.refresh()
    except LedgerUnavailable as error:
        return error.message
    return None


def _accounts(site: Site, selection: Selection) -> list[Account]:
    to_ns = site.clock.now_ns() + 1 if selection.where.to_ns is None else selection.where.to_ns
    return site.queries.accounts(selection.where.from_ns or 0, to_ns)


def _models(fleet: Fleet, totals: list[Totals], selection: Selection) -> Table:
    """Those that can be asked now, and those that were in the period."""
    used = {each.group: each for each in totals if each.group is not None}
    states = {name: state for engine in fleet.engines() for name, state in engine.models.items()}
    deployed: dict[str, list[Deployment]] = {}
    for each in fleet.deployments():
        deployed.setdefault(each.model, []).append(each)
    rows = []
    for name in sorted({*used, *deployed, *states}, key=lambda name: (-_cost(used.get(name)), name)):
        use = used.get(name)
        here = deployed.get(name, [])
        places = ", ".join(dict.fromkeys(each.placement or each.backend for each in here)) or "not served now"
        breakers = dict.fromkeys(_BREAKERS.get(each.state, each.state) for each in here)
        state = states.get(name) or ", ".join(breakers) or "—"
        rows.append(
            (
                tables.text(name, f"/receipts{selection.query(model=name, range=selection.range)}"),
                tables.text(state),
                tables.text(places),
                tables.count(sum(each.running for each in here)),
                tables.count(0 if use is None else use.requests),
                tables.count(0 if use is None else use.output_tokens),
                tables.duration(0 if use is None else use.serving_ns),
                _charged(use),
            )
        )
    columns = (
        Column("Model", "model", number=False),
        Column("State", "state", number=False),
        Column("Placements", "placements", number=False, wide=True),
        Column("Running", "running", wide=True),
        Column("Requests", "requests"),
        Column("Tokens out", "output_tokens", wide=True),
        Column("Device time", "serving_ns", wide=True),
        Column("Cost", "cost_usd"),
    )
    return Table(name="models", title="Models", columns=columns, rows=tuple(rows), empty="No model is served.")


def _charged(use: Totals | None) -> Cell:
    """What its receipts sum up to; unpriced where none has a price."""
    return tables.money(ZERO if use is None else use.known_cost)


def _cost(totals: Totals | None) -> int:
    return 0 if totals is None else totals.cost.nanousd


def _placements(fleet: Fleet, totals: list[Totals], accounts: list[Account], selection: Selection) -> Table:
    used = {each.group: each for each in totals}
    rows = []
    for place in fleet.placements():
        use = used.get(place.name)
        own = [each for each in accounts if each.placement == place.name]
        priced = [each.cost for each in own if each.cost is not None]
        rate = figures.rate(place.usd_per_hour) if place.kind != "api" else figures.Figure("per token", "", "")
        rows.append(
            (
                tables.text(place.name, f"/receipts{selection.query(placement=place.name, range=selection.range)}"),
                tables.text(f"{place.kind}, {place.provider}" if place.provider else place.kind),
                tables.text(None) if place.kind == "api" else tables.count(place.accelerators),
                Cell(rate, place.usd_per_hour, None if place.usd_per_hour is None else place.rate_provenance),
                tables.count(0 if use is None else use.requests),
                _charged(use),
                tables.share(
                    sum(each.serving_ns for each in own), sum(each.wall_ns * each.accelerators for each in own)
                ),
                tables.money(Money.total(priced) if len(priced) == len(own) else None) if own else tables.text(None),
            )
        )
    columns = (
        Column("Placement", "placement", number=False),
        Column("Kind", "kind", number=False),
        Column("Accelerators", "accelerators", wide=True),
        Column("Rate of one", "usd_per_hour"),
        Column("Requests", "requests", wide=True),
        Column("On receipts", "receipts_usd"),
        Column("Busy share", "busy_share", wide=True),
        Column("Paid for the time", "time_usd", wide=True),
    )
    note = (
        "On receipts: what requests were charged, for the time they used. Paid for the time: the rate, for as long as "
        "it was up, idle hours too; the accounts show where it went."
    )
    return Table(
        name="placements",
        title="Placements",
        columns=columns,
        rows=tuple(rows),
        note=note,
        empty="None is configured.",
    )


class _Rate:
    """The first-run step: what an hour of this machine costs, in three fields instead of a manual."""

    def __init__(self, site: Site, fleet: Fleet) -> None:
        self._site = site
        self._fleet = fleet

    async def show(self, request: Request) -> Response:
        fields = {*RENTED, *OWNED, "kind", "saved"}
        asked = {name: value.strip() for name, value in request.query_params.items() if name in fields and value}
        place = self._place()
        problem, lines, rate, effect = None, "", None, None
        if "kind" in asked and "saved" not in asked:
            try:
                lines = placement_table(place.name, asked)
                rate = self._fleet.rate_of(place.name, _settings(asked))
                effect = await self._site.read(lambda: self._effect(place, rate))
            except (ConfigError, InvalidRequest) as error:
                problem = error.message
        return self._site.answer(
            request,
            "rate.html",
            selection=self._site.selection(request, TIMES | frozenset(fields)),
            place=place,
            asked=asked,
            problem=problem,
            lines=lines,
            rate=rate,
            effect=effect,
            file=self._fleet.path,
            owned=OWNED,
        )

    async def save(self, request: Request, form: Mapping[str, str]) -> Response:
        del request
        asked = {name: value.strip() for name, value in form.items() if value.strip()}
        place = self._place()
        lines = placement_table(place.name, asked)
        self._fleet.rate_of(place.name, _settings(asked))
        await self._site.read(lambda: append_table(self._fleet.path, lines, self._fleet.check))
        return self._site.redirect(f"{RATE}?{urlencode({'saved': 'yes'})}")

    def _place(self) -> Placed:
        """The machine whose rate nobody said; else the first there is."""
        places = self._fleet.placements()
        return next((each for each in places if each.rate_provenance is Provenance.ASSUMED), places[0])

    def _effect(self, place: Placed, rate: Decimal | None) -> tuple[int, Money, Money] | None:
        """Serving time of the last 30 days, and what it costs at the rate of now and at the new one."""
        now_ns = self._site.clock.now_ns()
        accounts = self._site.queries.accounts(now_ns - _EFFECT_NS, now_ns + 1)
        serving_ns = sum(each.serving_ns for each in accounts if each.placement == place.name)
        if rate is None or place.usd_per_hour is None or not serving_ns:
            return None
        return serving_ns, Money.of_time(serving_ns, place.usd_per_hour), Money.of_time(serving_ns, rate)


def _settings(asked: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in asked.items() if name in (*RENTED, *OWNED, "kind")}
