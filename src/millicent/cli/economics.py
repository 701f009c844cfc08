"""The parts of `report` about what is earned and why a cost changed, and the import of revenue and outside costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, cast

import click

from millicent.cli import show
from millicent.core.clock import NS_PER_MS

if TYPE_CHECKING:
    from millicent.core.entries import Kind
    from millicent.core.money import Money
    from millicent.economics.changes import Change, Rates
    from millicent.economics.margin import By, MarginRow
    from millicent.economics.plans import Mend
    from millicent.economics.reports import Reports
    from millicent.economics.unit import Spread, Unit, UnitReport
    from millicent.ledger.queries import GroupBy, LedgerQueries, ReceiptFilter

# The options of `report` that are answered here, but for `--change`, which takes a value.
FLAGS = ("units", "targets", "margin", "drift")
_NAMED_GAPS = 5
_NAMED_USERS = 10


def show_report(
    name: str, ledger: LedgerQueries, by: str, where: ReceiptFilter, zone: str, change: str | None, *, json_: bool
) -> None:
    from millicent.cli.home import settings
    from millicent.config import economics_setting
    from millicent.core.clock import SystemClock
    from millicent.economics.bodies import body_of
    from millicent.economics.reports import Reports

    if name in {"change", "drift"} and (where.from_ns is not None or where.to_ns is not None):
        raise click.UsageError(f"--{name} has times of its own: leave out --since and --until")
    if zone != "UTC" and name != "units":
        raise click.UsageError(f"--{name} goes by UTC: leave out --timezone")
    reports = Reports(ledger, SystemClock(), economics_setting(settings()))
    if name == "units":
        found = reports.units(cast("GroupBy", by), where, zone)
        show.as_json(body_of(found)) if json_ else _show_units(found)
    elif name == "margin":
        _margin(reports, by, where, json_=json_)
    elif name == "change":
        _change(reports, change or "", where, json_=json_)
    elif name == "targets":
        _targets(reports, where, json_=json_)
    else:
        _drift(reports, where, json_=json_)


def _show_units(report: UnitReport) -> None:
    costs = (report.by.upper(), "REQUESTS", "COST", "FULLY LOADED", "PER REQUEST", "PER USEFUL", "TOKENS PER USEFUL")
    header = (*costs, "CACHED", "CACHE HITS", "ROUTED", "JOULES")
    rows = [_unit_row(each, each.group or "unattributed") for each in report.units]
    print(show.table(header, [*rows, _unit_row(report.total, "total")], right=frozenset(header[1:])))
    if report.cost_per_group is not None and report.by in {"user", "conversation", "run", "key", "team"}:
        print(f"\nA {report.by} costs {report.cost_per_group.human()} on average.")
    latencies = [(each.group or "unattributed", each) for each in report.units] + [("total", report.total)]
    took = (report.by.upper(), *(f"{what} P50/P95/P99" for what in ("QUEUE", "FIRST TOKEN", "PER TOKEN", "TOTAL")))
    timed = [
        (name, *map(_spread, (each.took.queue, each.took.ttft, each.took.tpot, each.took.total)))
        for name, each in latencies
        if each.took is not None
    ]
    if timed:
        print("\n" + show.table(took, timed, right=frozenset(took[1:])))
    if report.devices:
        devices = show.table_of(
            report.devices,
            ("DEVICE", lambda each: each.device),
            ("PLACEMENT", lambda each: each.placement),
            ("BUSY", lambda each: show.percent(each.busy)),
            ("TOKENS/S", lambda each: _number(each.output_tokens_per_s)),
            (
                "AT MOST",
                lambda each: (
                    f"{_number(each.maximum_tokens_per_s)}{f' ({each.maximum_from})' if each.maximum_from else ''}"
                ),
            ),
            ("THROUGHPUT", lambda each: show.percent(each.throughput)),
            ("COST", lambda each: show.amount(each.cost)),
            ("UNUSED", lambda each: show.amount(each.unused)),
            right=frozenset({"BUSY", "TOKENS/S", "AT MOST", "THROUGHPUT", "COST", "UNUSED"}),
        )
        print(f"\n{devices}")
    if (soon := report.forecast) is not None:
        rests = f"{soon.origins} past forecasts" if soon.origins else f"the {soon.days} whole days known"
        print(
            f"\nThis month: {soon.spent.human()} so far, {soon.expected.human()} expected at its end"
            f" ({soon.low.human()} to {soon.high.human()}, from {rests})."
        )
    for gap in report.gaps[:_NAMED_GAPS]:
        show.note(f"{show.percent(gap.share)} of requests: {gap.what}; {gap.advice}.")
    if report.total.took is None:
        show.note(
            "Percentiles by this would take reading too many receipts: narrow it with --since, or ask --by feature."
        )


def _unit_row(unit: Unit, name: str) -> tuple[str, ...]:
    return (
        name,
        f"{unit.requests:,}",
        show.amount(unit.cost, "unknown"),
        show.amount(unit.fully_loaded, "unknown"),
        show.amount(unit.cost_per_request, "-"),
        show.amount(unit.cost_per_useful, "-"),
        _number(unit.tokens_per_useful),
        show.percent(unit.cached),
        show.percent(unit.cache_hits),
        show.percent(unit.routed),
        _number(unit.joules),
    )


def _targets(reports: Reports, where: ReceiptFilter, *, json_: bool) -> None:
    from millicent.economics.bodies import body_of

    found = reports.targets(where)
    if json_:
        show.as_json({"object": "list", "data": [body_of(each) for each in found]})
        return
    if not found:
        show.note("No feature has a target: set cost_target_usd or latency_target_ms in [features.NAME].")
        return
    print(
        show.table_of(
            found,
            ("FEATURE", lambda each: each.feature),
            ("OWNER", lambda each: each.owner or "-"),
            ("REQUESTS", lambda each: f"{each.requests:,}"),
            ("COST TARGET", lambda each: show.amount(each.cost_target, "-")),
            ("MEAN COST", lambda each: show.amount(each.mean_cost, "-")),
            ("WITHIN", lambda each: show.percent(each.cost_share)),
            ("", lambda each: each.cost_verdict or ""),
            ("LATENCY TARGET", lambda each: _milliseconds(each.latency_target_ms)),
            ("P95", lambda each: show.duration(each.latency_p95_ns)),
            ("WITHIN", lambda each: show.percent(each.latency_share)),
            ("", lambda each: each.latency_verdict or ""),
            right=frozenset({"REQUESTS", "COST TARGET", "MEAN COST", "WITHIN", "LATENCY TARGET", "P95"}),
        )
    )


def _margin(reports: Reports, by: str, where: ReceiptFilter, *, json_: bool) -> None:
    from millicent.core.periods import Period, month_of
    from millicent.economics.bodies import body_of

    if by not in {"feature", "tier", "user"}:
        raise click.UsageError("--margin is --by feature, tier or user: nothing else earns")
    period = None
    if where.from_ns is not None or where.to_ns is not None:
        to_ns = 2**62 if where.to_ns is None else where.to_ns
        from_ns = month_of(to_ns - 1).from_ns if where.from_ns is None else where.from_ns
        period = Period(from_ns, max(from_ns, to_ns))
    report = reports.margins(cast("By", by), period)
    if json_:
        show.as_json(body_of(report))
        return
    header = (
        by.upper(),
        "REQUESTS",
        "REVENUE",
        "AI COST",
        "OTHER COSTS",
        "MARGIN",
        "OF REVENUE",
        "AI/REVENUE",
        "TARGET",
    )
    rows = [_margin_row(each, each.group or f"no {by}") for each in report.rows]
    print(show.table(header, [*rows, _margin_row(report.total, "total")], right=frozenset(header[1:])))
    print(f"\nFrom {show.moment(report.from_ns)} to {show.moment(report.to_ns)} UTC.")
    for feature, mends in report.mends.items():
        print()
        _print_mends(feature, mends)
    for plan in report.plans:
        print(
            f"\n{plan.plan}: {plan.users:,} users, {plan.revenue.human()} revenue, {plan.ai_cost.human()} for models;"
            f" {plan.over:,} cost more than the plan leaves for them, {plan.losing:,} more than they pay."
        )
        _print_mends(plan.plan, plan.mends)
    if report.over:
        over = show.table_of(
            report.over[:_NAMED_USERS],
            ("USER", lambda each: each.user),
            ("TIER", lambda each: each.tier),
            ("PAYS", lambda each: each.paid.human()),
            ("COSTS", lambda each: each.cost.human()),
            ("MAY COST", lambda each: each.allowed.human()),
            right=frozenset({"PAYS", "COSTS", "MAY COST"}),
        )
        print(f"\n{over}")
    if report.total.unpriced:
        show.note(f"{report.total.unpriced:,} unpriced requests are in no cost: the margin is at most this.")
    if report.total.revenue is None:
        show.note("No revenue is known: set it in [features.NAME] or [plans.NAME], or import it; see docs/margin.md.")


def _print_mends(name: str, mends: Sequence[Mend]) -> None:
    for mend in mends:
        print(f"  {show.printable(name)} would meet its target with {mend.what}:")
        print("\n".join(f"    {show.printable(line)}" for line in mend.lines))


def _margin_row(row: MarginRow, name: str) -> tuple[str, ...]:
    return (
        name,
        f"{row.requests:,}",
        show.amount(row.revenue, "unknown"),
        show.amount(row.ai_cost, "unknown"),
        row.other_cost.human(),
        show.amount(row.margin, "unknown"),
        show.percent(row.margin_share),
        show.percent(row.ai_share),
        "-"
        if not row.target
        else show.percent(row.target) + ("" if row.needed is None else f" (needs {row.needed.human()})"),
    )


def _change(reports: Reports, text: str, where: ReceiptFilter, *, json_: bool) -> None:
    from millicent.core.periods import parse_two
    from millicent.economics.bodies import body_of

    report = reports.changes(*parse_two(text), where)
    if json_:
        show.as_json(body_of(report))
        return
    shown = [name for name in _EFFECTS if name in report.total.effects]
    header = ("FEATURE", "BEFORE", "AFTER", "DIFFERENCE", *(_EFFECTS[name].upper() for name in shown))
    rows = [_change_row(each, each.group or "unattributed", shown) for each in report.features]
    print(show.table(header, [*rows, _change_row(report.total, "total", shown)], right=frozenset(header[1:])))
    before, after = report.total.was.unpriced, report.total.became.unpriced
    if before or after:
        show.note(f"Unpriced requests are left out: {before:,} before, {after:,} after.")


_EFFECTS = {
    "volume": "volume",
    "model_mix": "model mix",
    "input_tokens": "prompts",
    "output_tokens": "outputs",
    "price": "price",
    "cache": "cache",
    "other": "retries, checks",
    "new": "new",
    "gone": "gone",
}


def _change_row(change: Change, name: str, shown: Sequence[str]) -> tuple[str, ...]:
    effects = (change.effects.get(factor) for factor in shown)
    return (
        name,
        change.before.human(),
        change.after.human(),
        _signed(change.difference),
        *("-" if effect is None else _signed(effect) for effect in effects),
    )


def _drift(reports: Reports, where: ReceiptFilter, *, json_: bool) -> None:
    from millicent.economics.bodies import body_of

    found = reports.drifts(where)
    if json_:
        show.as_json({"object": "list", "data": [body_of(each) for each in found]})
        return
    header = ("FEATURE", "WEEK", "REQUESTS", "PER REQUEST", "TOKENS IN", "TOKENS OUT", "CACHED", "MOVED BY A FIFTH")
    rows = []
    for each in found:
        sides: Mapping[str, Rates] = {
            "now": each.now,
            "before": each.week_ago,
            f"baseline {each.baseline_from}": each.baseline,
        }
        for week, rates in sides.items():
            moved = ", ".join(each.moved).replace("_", " ") if week == "now" else ""
            rows.append(
                (
                    (each.feature or "unattributed") if week == "now" else "",
                    week,
                    f"{rates.requests:,}",
                    show.amount(rates.cost_per_request, "-"),
                    _number(rates.input_tokens),
                    _number(rates.output_tokens),
                    show.percent(rates.cached),
                    moved,
                )
            )
    print(show.table(header, rows, right=frozenset(header[2:7])))


def import_entries(rows: Sequence[Mapping[str, str]], kind: Kind, *, dry_run: bool, json_: bool) -> None:
    from millicent.cli.home import write_ledger
    from millicent.core.clock import SystemClock
    from millicent.core.money import Money
    from millicent.ledger.entries import add_entries
    from millicent.wire.entries import entries_of_rows

    entries = entries_of_rows(rows, kind, SystemClock().now_ns())
    added = 0 if dry_run else write_ledger(lambda connection: add_entries(connection, entries))
    total = Money.total(each.amount for each in entries)
    if json_:
        show.as_json({"kind": kind, "rows": len(entries), "added": added, "amount_usd": str(total), "dry_run": dry_run})
        return
    verb = "would be added or are there already" if dry_run else f"read, {added:,} of them new"
    print(f"{len(entries):,} rows {verb}; {total.human()} in all.")


def _signed(amount: Money) -> str:
    return f"+{amount.human()}" if amount.nanousd > 0 else amount.human()


def _spread(spread: Spread) -> str:
    if spread.p50_ns is None:
        return "-"
    return " / ".join(show.duration(ns) for ns in (spread.p50_ns, spread.p95_ns, spread.p99_ns))


def _milliseconds(ms: int | None) -> str:
    return show.duration(None if ms is None else ms * NS_PER_MS)


def _number(value: Decimal | None) -> str:
    return "-" if value is None else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
