"""`plan where`: API, rented, owned, provisioned and edge, side by side."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any

import click

from millicent.cli import home
from millicent.cli.options import exact_json_option, filters, where_of

if TYPE_CHECKING:
    from fractions import Fraction

    from millicent.economics.breakeven import Rule
    from millicent.economics.traffic import Traffic
    from millicent.economics.where import Where

# Of the ranges in which another place is the cheapest.
_SHOWN = 12


@click.command()
@filters
@click.option("--compare", multiple=True, metavar="MODEL", help="An API's model: gpt-5-mini, or groq/NAME. Repeat it.")
@click.option(
    "--machine",
    "stated",
    multiple=True,
    metavar="NAME,KEY=VALUE,...",
    help="A machine as in [machines.NAME]: gpu,usd_per_hour=2.5,output_tokens_per_s=2500. Repeat it.",
)
@click.option("--latency-target-ms", type=click.IntRange(min=1), help="Whole answers must take no longer, 95 in 100.")
@click.option(
    "--spares", type=click.IntRange(min=0), default=0, show_default=True, help="Machines beside those needed."
)
@click.option("--volume", type=click.IntRange(min=1), help="Requests a month; by default, at the ledger's pace.")
@click.option(
    "--price-fall",
    type=click.IntRange(0, 99),
    default=20,
    show_default=True,
    help="How much APIs get cheaper, % a year.",
)
@exact_json_option
def where(
    compare: tuple[str, ...],
    stated: tuple[str, ...],
    latency_target_ms: int | None,
    spares: int,
    volume: int | None,
    price_fall: int,
    json_: bool,
    **given: Any,
) -> None:
    """Compare places for this ledger's traffic: what each costs, how quick it is, and from which volume on it pays.

    By default the last 30 days. Machines that don't run here are described in [machines.NAME], or by --machine.
    """
    from millicent import config
    from millicent.cli import show
    from millicent.core.clock import SystemClock
    from millicent.dashboard.plan_json import where_body
    from millicent.economics.machines import machine_from
    from millicent.economics.places import Asked
    from millicent.economics.traffic import lately
    from millicent.economics.where import verdict
    from millicent.economics.where import where as compare_places

    settings = home.settings()
    setup = config.plan_setup(settings, SystemClock().now_ns(), dict(machine_from(text) for text in stated))
    chosen = lately(SystemClock(), where_of(given))
    if latency_target_ms is None and chosen.feature in settings.features:
        latency_target_ms = settings.features[chosen.feature].latency_target_ms
    found = compare_places(
        home.open_ledger(),
        SystemClock(),
        setup,
        chosen,
        Asked(latency_target_ms=latency_target_ms, spares=spares, volume=volume),
        compared=compare,
        falls_percent=Decimal(price_fall),
    )
    if json_:
        show.as_json(where_body(found))
        return
    print(_traffic(found.traffic))
    if not found.traffic.requests and volume is None:
        show.note("Nothing to plan by in this period: answer some requests first, or widen --since.")
        return
    print(f"Compared at {found.volume:,} requests a month{_spent(found)}.\n")
    print(_places(found))
    for each in found.places:
        if each.kind == "provisioned" and each.unused is not None:
            show.note(show.printable(f"{each.name}: {each.unused.human()} a month of what is committed goes unused."))
        if each.when_needed is not None:
            told = f"{each.name}: {each.when_needed.human()} a month if rented only for the hours that need it."
            show.note(show.printable(told))
    for note in dict.fromkeys(note for each in found.places for note in each.notes):
        about = ", ".join(each.name for each in found.places if note in each.notes)
        show.note(show.printable(f"{about}: {note}"))
    if told := verdict(found):
        print(f"\n{show.printable(told)}")
    print(_breaking(found))


def _traffic(traffic: Traffic) -> str:
    from millicent.cli import show

    if not traffic.hours or traffic.peak is None:
        return "No requests in this period."
    shape = ""
    if traffic.input_tokens is not None and traffic.output_tokens is not None:
        lengths = [
            f"{round(each.mean):,} tokens {what} (95 in 100 at most {each.p95:,})"
            for each, what in ((traffic.input_tokens, "in"), (traffic.output_tokens, "out"))
        ]
        cached = f"; {show.percent(traffic.cached)} of the input came from caches" if traffic.cached else ""
        shape = f"\nA request has {' and '.join(lengths)}{cached}, {traffic.provenance}."
    return (
        f"{traffic.requests:,} requests in {traffic.hours:,} hours from {show.moment(traffic.from_ns)} UTC; "
        f"the busiest hour had {traffic.busiest:,}, {float(traffic.peak):.1f} times the average.{shape}"
    )


def _spent(found: Where) -> str:
    parts = []
    if found.spent is not None:
        parts.append(f"receipts came to {found.spent.human()}")
    if found.accounts_spent is not None:
        parts.append(f"machines with their idle time to {found.accounts_spent.human()}")
    return f" (a month of what was seen: {', '.join(parts)})" if parts else ""


def _places(found: Where) -> str:
    from millicent.cli import show

    return show.table_of(
        found.places,
        ("PLACE", lambda each: each.name),
        ("KIND", lambda each: each.kind),
        ("A MONTH", lambda each: show.amount(each.monthly, "unknown")),
        ("A REQUEST", lambda each: show.amount(each.per_request, "unknown")),
        ("PER M TOKENS", lambda each: show.amount(each.per_million_tokens, "unknown")),
        ("MACHINES", lambda each: "-" if each.machines is None else f"{each.machines:,}"),
        ("USED", lambda each: show.percent(each.utilization)),
        ("P50", lambda each: show.duration(each.p50_ns)),
        ("P95", lambda each: show.duration(each.p95_ns) + (" late" if each.in_time is False else "")),
        ("KNOWN BY", lambda each: each.provenance),
        ("FROM", lambda each: each.source or "-"),
        right=frozenset({"A MONTH", "A REQUEST", "PER M TOKENS", "MACHINES", "USED", "P50", "P95"}),
    )


def _breaking(found: Where) -> str:
    from millicent.cli import show

    parts = []
    if len(found.cheapest) > 1:
        header: tuple[str, ...] = ("FROM REQUESTS A MONTH", "TO", "CHEAPEST")
        ranges = [(f"{each.from_volume:,}", f"{each.to_volume:,}", each.name) for each in found.cheapest[:_SHOWN]]
        parts.append(show.table(header, ranges, right=frozenset(header[:2])))
        if len(found.cheapest) > _SHOWN:
            parts.append(f"... and {len(found.cheapest) - _SHOWN} more ranges: --json has all.")
    if found.break_evens:
        header = ("MACHINE", "AGAINST", "PAYS FROM", "ALWAYS FROM", "ONE PAYS WHEN USED")
        rows = [
            (each.machine, each.api, _volume(each.pays_from), _volume(each.pays_always_from), _used(each.utilization))
            for each in found.break_evens
        ]
        parts.append(show.table(header, rows, right=frozenset(header[2:])))
    if found.sensitivities:
        header = (f"IF, FOR {found.sensitive}", "PAYS FROM", "ALWAYS FROM")
        cases = [(each.what, _volume(each.pays_from), _volume(each.pays_always_from)) for each in found.sensitivities]
        parts.append(show.table(header, cases, right=frozenset(header[1:])))
    parts.append(_rule(found.rule))
    return "\n" + "\n\n".join(parts)


def _rule(rule: Rule) -> str:
    said = '"Under a million requests a month take an API, over a hundred million host yourself"'
    if rule.verdict == "untested":
        return f"{said}: untested, since it takes an API and a machine whose costs are known."
    costs = [
        f"{volume}: API {api.human()}, machines {machine.human()}"
        for volume, api, machine in zip(("1M", "100M"), rule.api_at, rule.machine_at, strict=True)
        if api is not None and machine is not None
    ]
    return f"{said}: {rule.verdict} (below {rule.below}, above {rule.above}). At {'; at '.join(costs)}."


def _volume(volume: int | None) -> str:
    return "never" if volume is None else f"{volume:,}"


def _used(part: Fraction | None) -> str:
    from millicent.cli import show

    return "never" if part is None or part > 1 else show.percent(part)
