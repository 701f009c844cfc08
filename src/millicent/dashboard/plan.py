"""Plan: where to run it. The page, and the same as JSON; and what all plans are made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from millicent.core.clock import NS_PER_S, Clock
from millicent.core.errors import InvalidRequest
from millicent.core.money import Money
from millicent.core.usage import Provenance
from millicent.dashboard.charts import Chart, Series
from millicent.dashboard.figures import Figure
from millicent.dashboard.plan_json import where_body
from millicent.dashboard.selection import FILTERS
from millicent.dashboard.site import Page, Site
from millicent.dashboard.tables import Cell, Column, Table, count, duration, if_any, money, part, table_of, text
from millicent.economics.breakeven import BreakEven, machines
from millicent.economics.curves import Curve
from millicent.economics.machines import machine_from
from millicent.economics.margin import Books
from millicent.economics.places import Asked, Place
from millicent.economics.scenarios import Scenarios
from millicent.economics.standing import Configured
from millicent.economics.where import Setup, Where, verdict, where
from millicent.ledger.queries import LedgerQueries

# What the address may ask, beside the traffic's filters.
WHERE = FILTERS | {"latency_target_ms", "spares", "volume", "compare", "machine"}

# The same question is answered from what was found for as long; its traffic has hardly changed.
_KEPT_NS = 60 * NS_PER_S
_MOST_KEPT = 16
# A chart's lines and places.
_MOST_CURVES = 5
_MOST_STEPS = 40
_GRID = 24


@dataclass(frozen=True)
class Planning:
    """What the plans are made from. `setup` and `configured` are what is, as of now; `latency_targets_ms` are the
    features' own, `books` what the configuration says of revenue, `home` where the ledger and it lie."""

    queries: LedgerQueries
    clock: Clock
    setup: Callable[[], Setup]
    scenarios: Scenarios
    latency_targets_ms: Mapping[str, int]
    configured: Callable[[], Configured]
    books: Books
    home: Path


def where_page(planning: Planning, site: Site) -> Page:
    kept: dict[tuple[tuple[str, str], ...], tuple[int, Where]] = {}

    async def found_for(request: Request) -> tuple[Any, Where]:
        selection = site.selection(request, WHERE, default_range="30d")
        key = tuple(sorted(selection.params.items()))
        now_ns = planning.clock.now_ns()
        at_ns, found = kept.get(key, (0, None))
        if found is None or not 0 <= now_ns - at_ns < _KEPT_NS:
            found = await site.read(lambda: _compared(planning, selection.params, selection.where))
            while len(kept) >= _MOST_KEPT:
                del kept[next(iter(kept))]
            kept[key] = now_ns, found
        return selection, found

    async def show(request: Request) -> Response:
        selection, found = await found_for(request)
        shown: list[Chart | Table] = [_places(found), _break_evens(found), _sensitivities(found), _ranges(found)]
        if (chart := _staircases(found)) is not None:
            shown.append(chart)
        notes = {
            note: [each.name for each in found.places if note in each.notes]
            for note in dict.fromkeys(note for each in found.places for note in each.notes)
        }
        return site.answer(
            request,
            "plan_where.html",
            shown=shown,
            selection=selection,
            found=found,
            notes=notes,
            told=verdict(found),
        )

    async def as_json(request: Request) -> Response:
        _, found = await found_for(request)
        return told_as_json(where_body(found))

    routes = [site.get("/plan", show), Route("/v1/plan/where", as_json, methods=["GET"])]
    return Page("Plan", "Where to run it", "/plan", routes)


def told_as_json(body: object) -> Response:
    """Decimals become numbers with all their digits; money is a string before it comes here."""
    return Response(msgspec.json.Encoder(decimal_format="number").encode(body), media_type="application/json")


def _compared(planning: Planning, params: Mapping[str, str], chosen: Any) -> Where:
    """Raises InvalidRequest naming the parameter."""
    target = whole(params, "latency_target_ms")
    if target is None and chosen.feature:
        target = planning.latency_targets_ms.get(chosen.feature)
    stated = dict(machine_from(each) for each in listed(params.get("machine", ""), ";"))
    setup = planning.setup()
    if stated:
        setup = Setup(setup.placements, setup.apis, {**setup.machines, **stated}, setup.prices, setup.slots)
    asked = Asked(
        latency_target_ms=target, spares=whole(params, "spares", least=0) or 0, volume=whole(params, "volume")
    )
    compared = listed(params.get("compare", ""), ",")
    return where(planning.queries, planning.clock, setup, chosen, asked, compared=compared)


def whole(params: Mapping[str, str], name: str, *, least: int = 1) -> int | None:
    """None where it isn't given. Raises InvalidRequest naming it."""
    given = params.get(name)
    if given is None:
        return None
    if not (given.isascii() and given.isdigit() and len(given) <= 10 and least <= int(given) <= 10**9):
        raise InvalidRequest(f"{name}={given!r} must be a whole number from {least} to 1000000000", param=name)
    return int(given)


def listed(written: str, between: str) -> list[str]:
    return [each.strip() for each in written.split(between) if each.strip()]


def _places(found: Where) -> Table:
    return table_of(
        found.places,
        (Column("Place", "place", number=False), lambda each: text(each.name)),
        (Column("Kind", "kind", number=False, wide=True), lambda each: text(each.kind)),
        (Column("A month", "monthly_usd"), lambda each: estimated(each.monthly, each.provenance)),
        (Column("A request", "per_request_usd", wide=True), lambda each: estimated(each.per_request, each.provenance)),
        (
            Column("A million tokens", "per_million_tokens_usd", wide=True),
            lambda each: estimated(each.per_million_tokens, each.provenance),
        ),
        (Column("Machines", "machines", wide=True), lambda each: machines_told(each.machines)),
        (Column("Used", "utilization", wide=True), lambda each: part(each.utilization)),
        (
            Column("Only when needed", "rented_when_needed_usd", wide=True),
            lambda each: if_any(each.when_needed, each.provenance),
        ),
        (Column("Median time", "p50_ns", wide=True), lambda each: _time(each.p50_ns, each)),
        (Column("95th percentile", "p95_ns"), _p95),
        name="places",
        title=f"{found.volume:,} requests a month, place by place",
        empty="Nothing to compare: name an API's model or a machine below.",
    )


def _p95(place: Place) -> Cell:
    p95 = _time(place.p95_ns, place)
    late = p95.figure._replace(unit=f"{p95.figure.unit}, late")
    return p95._replace(figure=late) if place.in_time is False else p95


def _time(duration_ns: int | None, place: Place) -> Cell:
    return duration(duration_ns, None if duration_ns is None else place.latency_provenance)


def estimated(amount: Money | None, provenance: Provenance) -> Cell:
    """What nobody knows is no price that is missing: it is said so."""
    if amount is None:
        return Cell(Figure("unknown", "", "see the notes below; it is not zero"), None)
    return money(amount, provenance)


def machines_told(number: int | None) -> Cell:
    """APIs have none."""
    return text(None) if number is None else count(number)


def _volume(volume: int | None) -> Cell:
    return Cell(Figure("never", "", "at no volume up to a billion a month"), None) if volume is None else count(volume)


def _break_evens(found: Where) -> Table:
    return table_of(
        found.break_evens,
        (Column("Machine", "machine", number=False), lambda each: text(each.machine)),
        (Column("Against", "api", number=False, wide=True), lambda each: text(each.api)),
        (Column("Pays from", "pays_from_requests"), lambda each: _volume(each.pays_from)),
        (Column("Always from", "pays_always_from_requests"), lambda each: _volume(each.pays_always_from)),
        (Column("One pays when used", "one_machine_pays_from_utilization", wide=True), _used),
        name="break-evens",
        title="From which volume a machine pays, in requests a month",
        empty="It takes an API and a machine whose costs are known.",
        note="Between the two columns further machines cost more than they carry, step by step.",
    )


def _used(even: BreakEven) -> Cell:
    if even.utilization is None or even.utilization > 1:
        return Cell(Figure("never", "", "even a full machine costs more"), None)
    return part(even.utilization)


def _sensitivities(found: Where) -> Table:
    return table_of(
        found.sensitivities,
        (Column("If", "what", number=False), lambda each: text(each.what)),
        (Column("Pays from", "pays_from_requests"), lambda each: _volume(each.pays_from)),
        (Column("Always from", "pays_always_from_requests"), lambda each: _volume(each.pays_always_from)),
        name="sensitivities",
        title=f"What moves that, for {found.sensitive or 'a machine'}",
        empty="It takes an API and a machine whose costs are known.",
    )


def _ranges(found: Where) -> Table:
    return table_of(
        found.cheapest,
        (Column("From", "from_requests"), lambda each: count(each.from_volume)),
        (Column("To", "to_requests"), lambda each: count(each.to_volume)),
        (Column("Place", "place", number=False), lambda each: text(each.name)),
        name="cheapest",
        title="Cheapest by requests a month",
        empty="No place's cost is known.",
        most=12,
    )


def _staircases(found: Where) -> Chart | None:
    """The cheapest API and the machines that pay somewhere, else the cheapest one, as far as that is seen; both ends of
    every step."""
    apis = [each.curve for each in found.places if each.kind == "api" and each.curve is not None][:1]
    pays = {each.machine: each.pays_always_from or each.pays_from for each in found.break_evens}
    others = machines(found.places)
    others = [each for each in others if pays.get(each.name)][: _MOST_CURVES - 1] or others[:1]
    if not others:
        return None
    first = min(others, key=lambda curve: pays.get(curve.name) or 0)
    step = _round_up(max(2 * found.volume, (pays.get(first.name) or 0) * 3 // 2, (first.capacity or 0) * 2) // _GRID)
    volumes = _drawn_at([*apis, *others], step)
    return Chart(
        name="staircases",
        title="A month's cost by volume",
        kind="line",
        x_title="Requests a month",
        x=tuple(volumes),
        series=tuple(
            Series(name=each.name, values=tuple(Money(round(each.cost(volume))) for volume in volumes))
            for each in [*apis, *others]
        ),
        unit="usd",
        scale="linear",
        provenance=Provenance.ESTIMATED,
        note="Machines are whole: each step is one more. An API's cost is a straight line.",
    )


def _drawn_at(curves: Sequence[Curve], step: int) -> list[int]:
    """A grid, and both sides of each step of staircases that have few enough."""
    end = step * _GRID
    volumes = set(range(0, end + 1, step))
    for each in curves:
        if each.capacity is not None and end // each.capacity <= _MOST_STEPS:
            for start in each.step_starts(end):
                volumes |= {start - 1, start}
    return sorted(volumes)


def _round_up(volume: int) -> int:
    """The next of 1, 2, 2.5 and 5 times a power of ten, from 10 on."""
    power: int = 10 ** max(len(str(volume)) - 1, 1)
    return next(power * tenths // 10 for tenths in (10, 20, 25, 50, 100) if power * tenths // 10 >= volume)
