"""What each feature costs, takes and earns; and one feature in full."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from millicent.core.errors import NotFound
from millicent.core.money import ZERO, Money
from millicent.core.periods import Period
from millicent.core.usage import Provenance
from millicent.dashboard.changed import effects_chart, rates_table
from millicent.dashboard.charts import Chart, Series
from millicent.dashboard.selection import TIMES, Selection, feature_address
from millicent.dashboard.site import Page, Site
from millicent.dashboard.tables import (
    Cell,
    Column,
    Table,
    Value,
    count,
    duration,
    if_any,
    known,
    money,
    part,
    table_of,
    tell,
    text,
)
from millicent.economics.margin import MarginRow
from millicent.economics.reports import Reports
from millicent.economics.targets import Target
from millicent.economics.unit import Spread, Unit, UnitReport
from millicent.ledger.queries import GroupBy, ReceiptFilter

# Features drawn one by one; the others are drawn together.
_DRAWN = 6
_HOURLY_NS = 48 * 3600 * 10**9


def features_page(site: Site, reports: Reports) -> Page:
    async def listed(request: Request) -> Response:
        selection = site.selection(request, TIMES, default_range="7d")
        found = await site.read(lambda: _listed(reports, selection))
        return site.answer(request, "features.html", selection=selection, **found)

    async def one(request: Request) -> Response:
        selection = site.selection(request, TIMES, default_range="7d")
        name = request.path_params["name"]
        found = await site.read(lambda: _one(reports, name, selection))
        return site.answer(request, "feature.html", selection=selection, name=name, **found)

    return Page(
        "Features", "Features", "/features", [site.get("/features", listed), site.get("/features/{name:path}", one)]
    )


def _listed(reports: Reports, selection: Selection) -> dict[str, Any]:
    report = reports.units("feature", selection.where, selection.zone)
    aims = {each.feature: each for each in reports.targets(selection.where)}
    earned = {row.group: row for row in reports.margins("feature", Period(report.from_ns, report.to_ns)).rows}
    return {
        "report": report,
        "estimated": Provenance.ESTIMATED,
        "shown": [
            _cost_chart(reports, selection, report),
            _features_table(report, aims, earned, selection),
            _gaps_table(report),
            devices_table(report),
        ],
    }


def _one(reports: Reports, name: str, selection: Selection) -> dict[str, Any]:
    where = msgspec.structs.replace(selection.where, feature=name)
    report = reports.units("model", where, selection.zone)
    whole = report.total
    aim = next((each for each in reports.targets(where) if each.feature == name), None)
    if not whole.requests and aim is None and name not in reports.ledger.first_days_ns():
        raise NotFound(f"no request has named the feature {name!r}: see /features for those there are")
    now = Period(report.from_ns, report.to_ns)
    before = Period(now.from_ns - now.ns, now.from_ns)
    change = reports.changes(before, now, ReceiptFilter(feature=name)).total
    drift = next((each for each in reports.drifts(ReceiptFilter(feature=name)) if each.feature == name), None)
    margin = next((row for row in reports.margins("feature", now).rows if row.group == name), None)
    times = reports.units(_step(now), where, selection.zone).units
    return {
        "whole": whole,
        "aim": aim,
        "margin": margin,
        "change": change,
        "drift": drift,
        "shown": [
            _over_time(times, "cost", "Cost", "usd", ("Cost",), selection),
            _over_time(times, "latency", "How long answers took", "ns", ("Median", "95%", "99%"), selection),
            _latency_table(whole),
            _models_table(report),
            _roles_table(whole),
            effects_chart("changed", "Why it changed, against as long before", change),
            rates_table("drift", "Beside last week and its baseline", [] if drift is None else [drift]),
        ],
    }


def _step(period: Period) -> GroupBy:
    return "hour" if period.ns <= _HOURLY_NS else "day"


def _cost_chart(reports: Reports, selection: Selection, report: UnitReport) -> Chart:
    """By hour or day, the dearest features each for itself."""
    by = _step(Period(report.from_ns, report.to_ns))
    ledger, zone = reports.ledger, selection.zone
    every = {each.group or "": each.cost for each in ledger.totals(by, selection.where, zone=zone)}
    labels = sorted(every)
    rest = [every[label] for label in labels]
    series = []
    for unit in [each for each in report.units if each.group is not None][:_DRAWN]:
        where = msgspec.structs.replace(selection.where, feature=unit.group)
        own = {each.group or "": each.cost for each in ledger.totals(by, where, zone=zone)}
        values = tuple(own.get(label, ZERO) for label in labels)
        rest = [left - value for left, value in zip(rest, values, strict=True)]
        series.append(Series(name=unit.group or "", values=values))
    if any(left != ZERO for left in rest):
        series.append(Series(name="all others", values=tuple(rest)))
    return Chart(
        name="cost",
        title=f"Cost by {by}",
        kind="stacked",
        x_title=f"{by.capitalize()} ({zone})",
        x=tuple(_label(label, by) for label in labels),
        series=tuple(series),
        unit="usd",
    )


def _over_time(
    times: Sequence[Unit], name: str, title: str, unit: str, names: Sequence[str], selection: Selection
) -> Chart:
    by: GroupBy = "hour" if any("T" in (each.group or "") for each in times) else "day"
    values: list[list[Value]] = [[] for _ in names]
    for each in times:
        if unit == "usd":
            values[0].append(each.cost)
            continue
        spread = None if each.took is None else each.took.total
        for line, ns in zip(values, _told(spread), strict=True):
            line.append(ns)
    return Chart(
        name=f"{name}-over-time",
        title=f"{title}, by {by}",
        kind="bar" if unit == "usd" else "line",
        x_title=f"{by.capitalize()} ({selection.zone})",
        x=tuple(_label(each.group or "", by) for each in times),
        series=tuple(Series(name=each, values=tuple(line)) for each, line in zip(names, values, strict=True)),
        unit=unit,
        note="" if unit == "usd" else "The whole answer, of those that succeeded; within 3.2%.",
    )


def _told(spread: Spread | None) -> tuple[int | None, int | None, int | None]:
    return (None, None, None) if spread is None else (spread.p50_ns, spread.p95_ns, spread.p99_ns)


def _label(label: str, by: GroupBy) -> str:
    return label[:16].replace("T", " ") if by == "hour" else label


def _features_table(
    report: UnitReport, aims: dict[str, Target], earned: dict[str | None, MarginRow], selection: Selection
) -> Table:
    earning = any(row.revenue is not None or row.other_cost != ZERO for row in earned.values())
    columns = (
        Column("Feature", "feature", number=False),
        Column("Requests", "requests", wide=True),
        Column("Cost", "cost_usd"),
        Column("Per request", "cost_per_request_usd"),
        Column("Per useful", "cost_per_useful_usd", wide=True),
        Column("95% within", "total_p95_ns", wide=True),
        Column("Cached", "cached_share", wide=True),
        Column("Cost target", "cost_verdict", number=False, wide=True),
        Column("Latency target", "latency_verdict", number=False, wide=True),
        *((Column("Margin", "margin_usd"),) if earning else ()),
    )
    rows = []
    for unit in report.units:
        row = earned.get(unit.group)
        rows.append(
            (
                _named(unit.group, selection),
                count(unit.requests),
                money(unit.cost),
                if_any(unit.cost_per_request),
                if_any(unit.cost_per_useful),
                duration(None if unit.took is None else unit.took.total.p95_ns),
                part(unit.cached),
                text(_cost_verdict(aims.get(unit.group or ""))),
                text(_latency_verdict(aims.get(unit.group or ""))),
                *((known(None if row is None else row.margin),) if earning else ()),
            )
        )
    return Table(name="features", title="Features", columns=columns, rows=tuple(rows))


def _named(feature: str | None, selection: Selection) -> Cell:
    if feature is None:
        return text("no feature", f"/receipts{selection.query(none='feature')}")
    return text(feature, feature_address(feature, selection.query()))


def _cost_verdict(aim: Target | None) -> str | None:
    if aim is None or aim.cost_target is None:
        return None
    return f"{aim.cost_verdict}: {aim.cost_target.human()}"


def _latency_verdict(aim: Target | None) -> str | None:
    if aim is None or aim.latency_target_ms is None:
        return None
    share = "" if aim.latency_share is None else f", {aim.latency_share:.1%} within"
    return f"{aim.latency_verdict}: {aim.latency_target_ms:,} ms{share}"


def _gaps_table(report: UnitReport) -> Table:
    return table_of(
        report.gaps,
        (Column("What isn't known", "what", number=False), lambda gap: text(gap.what)),
        (Column("Requests", "requests"), lambda gap: count(gap.requests)),
        (Column("Of all", "share"), lambda gap: part(gap.share)),
        (Column("Their cost", "cost_usd", wide=True), lambda gap: money(gap.cost)),
        (Column("What to do", "advice", number=False), lambda gap: text(gap.advice)),
        name="gaps",
        title="Gaps",
        empty="Everything is attributed and priced.",
    )


def devices_table(report: UnitReport) -> Table:
    return table_of(
        report.devices,
        (Column("Device", "device", number=False), lambda each: text(each.device)),
        (Column("Placement", "placement", number=False), lambda each: text(each.placement)),
        (Column("Busy", "busy_share"), lambda each: part(each.busy)),
        (Column("Output tokens/s", "output_tokens_per_s"), lambda each: _number(each.output_tokens_per_s)),
        (Column("At most", "maximum_tokens_per_s", wide=True), lambda each: _number(each.maximum_tokens_per_s)),
        (Column("By", "maximum_from", number=False, wide=True), lambda each: text(each.maximum_from)),
        (Column("Throughput", "throughput_share"), lambda each: part(each.throughput)),
        (Column("Cost", "cost_usd"), lambda each: money(each.cost)),
        (Column("Unused", "unused_usd"), lambda each: money(each.unused)),
        name="devices",
        title="Devices",
        note="Busy is the part of its time in which a device worked; throughput how much it made of what it could"
        " make.",
        empty="No machine of ours ran in this period.",
    )


def _latency_table(whole: Unit) -> Table:
    names = {"queue": "Queue", "ttft": "First token", "tpot": "Per token after it", "total": "Whole answer"}
    columns = (Column("", "part", number=False), *(Column(f"{p}%", f"p{p}_ns") for p in (50, 95, 99)))
    rows = tuple(
        (text(title), *(duration(ns) for ns in _told(None if whole.took is None else getattr(whole.took, name))))
        for name, title in names.items()
    )
    return Table(name="latency", title="So many answers came within", columns=columns, rows=rows)


def _models_table(report: UnitReport) -> Table:
    return table_of(
        report.units,
        (Column("Model", "model", number=False), lambda each: text(each.group)),
        (Column("Requests", "requests"), lambda each: count(each.requests)),
        (Column("Cost", "cost_usd"), lambda each: money(each.cost)),
        (Column("Per request", "cost_per_request_usd"), lambda each: if_any(each.cost_per_request)),
        (Column("Cached", "cached_share", wide=True), lambda each: part(each.cached)),
        name="models",
        title="By model",
    )


def _roles_table(whole: Unit) -> Table:
    spent = Money.total(whole.roles.values()).nanousd
    return table_of(
        sorted(whole.roles.items(), key=lambda each: -each[1].nanousd),
        (Column("What for", "role", number=False), lambda each: text(each[0])),
        (Column("Cost", "cost_usd"), lambda each: money(each[1])),
        (Column("Of all", "share"), lambda each: part(Decimal(each[1].nanousd) / spent if spent else None)),
        name="roles",
        title="The cost of predictivity",
    )


def _number(value: Decimal | None) -> Cell:
    return text(None) if value is None else Cell(tell(value, ""), round(value, 6))
