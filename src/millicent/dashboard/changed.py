"""Why a cost changed between two periods, and which features drift."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from starlette.requests import Request
from starlette.responses import Response

from millicent.core.money import Money
from millicent.core.periods import day_of, parse_period
from millicent.dashboard.charts import Chart, Series
from millicent.dashboard.site import Page, Site
from millicent.dashboard.tables import Cell, Column, Table, count, if_any, money, part, tell, text
from millicent.economics.changes import FACTORS, GONE, NEW, Change, Drift, Rates
from millicent.economics.reports import Reports

EFFECTS = {
    "volume": "Volume",
    "model_mix": "Models",
    "input_tokens": "Prompts",
    "output_tokens": "Outputs",
    "price": "Prices",
    "cache": "Caches",
    "other": "Retries",
    NEW: "New",
    GONE: "Gone",
}
_REST = "The rest"
# As many as have room for a name each.
_DRAWN = 6
_PERIODS = frozenset({"before", "after"})


def changes_page(site: Site, reports: Reports) -> Page:
    async def show(request: Request) -> Response:
        given = {name: value for name, value in request.query_params.items() if name in _PERIODS and value.strip()}
        selection = site.selection(request, _PERIODS_AND_TIMES)
        asked = _asked(given, site.clock.now_ns())
        before, after = (parse_period(each) for each in asked)
        report = await site.read(lambda: reports.changes(before, after))
        drifts = await site.read(reports.drifts)
        shown = (
            effects_chart("effects", "What the difference is made of", report.total),
            _features_table(report.features, report.total),
            rates_table("drift", "This week beside the last one and beside each feature's baseline", drifts),
        )
        return site.answer(
            request, "changes.html", shown=shown, selection=selection, report=report, before=asked[0], after=asked[1]
        )

    return Page("Features", "What changed", "/changes", [site.get("/changes", show)], period=False)


_PERIODS_AND_TIMES = _PERIODS | {"range", "from", "to", "zone"}


def _asked(given: dict[str, str], now_ns: int) -> tuple[str, str]:
    """The periods as written; without them the last seven whole days and the seven before."""
    today = day_of(now_ns)

    def week(last: int) -> str:
        return f"{today - timedelta(days=last + 6)}/{today - timedelta(days=last)}"

    return given.get("before", week(8)), given.get("after", week(1))


def effects_chart(name: str, title: str, change: Change) -> Chart:
    """What each thing added to the cost, or took off it; the least together."""
    by_size = sorted(change.effects, key=lambda factor: -abs(change.effects[factor].nanousd))
    drawn = by_size if len(by_size) <= _DRAWN else by_size[: _DRAWN - 1]
    amounts = {EFFECTS[factor]: change.effects[factor] for factor in EFFECTS if factor in drawn}
    if rest := by_size[len(drawn) :]:
        amounts[_REST] = Money.total(change.effects[factor] for factor in rest)
    return Chart(
        name=name,
        title=title,
        kind="bar",
        x_title="What changed",
        x=tuple(amounts),
        series=(Series(name="Added cost", values=tuple(amounts.values())),),
        unit="usd",
        note="Volume: more or fewer requests. Prompts and outputs: how long they are. Retries: with checks and fees."
        " Parts sum to the difference exactly.",
    )


def _features_table(features: Sequence[Change], total: Change) -> Table:
    there = [factor for factor in (*FACTORS, NEW, GONE) if factor in total.effects]
    columns = (
        Column("Feature", "feature", number=False),
        Column("Before", "before_usd"),
        Column("After", "after_usd"),
        Column("Difference", "difference_usd"),
        *(Column(EFFECTS[factor], f"{factor}_usd", wide=True) for factor in there),
    )

    def row(change: Change, name: str) -> tuple[Cell, ...]:
        return (
            text(name),
            money(change.before),
            money(change.after),
            money(change.difference),
            *(money(change.effects.get(factor, Money(0))) for factor in there),
        )

    return Table(
        name="changes",
        title="By feature",
        columns=columns,
        rows=tuple(row(each, each.group or "no feature") for each in features),
        total=row(total, "total"),
    )


def rates_table(name: str, title: str, drifts: Sequence[Drift]) -> Table:
    columns = (
        Column("Feature", "feature", number=False),
        Column("Week", "week", number=False),
        Column("Requests", "requests", wide=True),
        Column("Per request", "cost_per_request_usd"),
        Column("Tokens in", "input_tokens", wide=True),
        Column("Tokens out", "output_tokens", wide=True),
        Column("Cached", "cached_share", wide=True),
        Column("Moved by a fifth", "moved", number=False),
    )
    rows = []
    for each in drifts:
        for week, rates in (
            ("the last seven days", each.now),
            ("the seven before", each.week_ago),
            (f"baseline, from {each.baseline_from}", each.baseline),
        ):
            moved = ", ".join(each.moved).replace("_", " ") if rates is each.now else ""
            rows.append((text(each.feature or "no feature"), text(week), *_rates(rates), text(moved)))
    return Table(name=name, title=title, columns=columns, rows=tuple(rows))


def _rates(rates: Rates) -> tuple[Cell, ...]:
    tokens = (rates.input_tokens, rates.output_tokens)
    return (
        count(rates.requests),
        if_any(rates.cost_per_request),
        *(text(None) if each is None else Cell(tell(each, ""), round(each, 3)) for each in tokens),
        part(rates.cached),
    )
