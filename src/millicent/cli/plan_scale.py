"""`plan scale`: ten and a hundred times the traffic."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from millicent.cli import home
from millicent.cli.options import exact_json_option, filters, where_of

if TYPE_CHECKING:
    from millicent.config import Config
    from millicent.core.budgets import Budget
    from millicent.economics.basis import Basis
    from millicent.economics.recorded import Recorded
    from millicent.economics.scaling import Scale
    from millicent.ledger.queries import LedgerQueries, ReceiptFilter

_DAYS = 30


@click.command()
@filters
@click.option("--times", multiple=True, type=click.IntRange(2, 1000), help="How many times the traffic. [10 and 100]")
@click.option("--latency-target-ms", type=click.IntRange(min=1), help="95 in 100 must not wait longer.")
@click.option("--machines", type=click.IntRange(1, 4096), default=1, show_default=True, help="That there are now.")
@click.option("--kv-tokens", type=click.IntRange(min=1), help="Room for the KV cache of a machine, in tokens.")
@click.option("--trace", type=click.Path(path_type=Path, dir_okay=False), help="A CSV of arrivals, instead.")
@click.option(
    "--requests", type=click.IntRange(1_000, 1_000_000), default=10_000, show_default=True, help="To simulate at most."
)
@exact_json_option
def scale(
    times: tuple[int, ...],
    latency_target_ms: int | None,
    machines: int,
    kv_tokens: int | None,
    trace: Path | None,
    requests: int,
    json_: bool,
    **given: Any,
) -> None:
    """Grow this ledger's traffic, simulated: what breaks first, how many machines it takes, and what it costs.

    The engine's own scheduler runs on the step times that were learned here. By default the last 30 days' traffic.
    """
    from millicent.cli import show
    from millicent.cli.simulated_rates import rate_gate
    from millicent.core.clock import NS_PER_MS
    from millicent.dashboard.scale_json import scale_body
    from millicent.economics.scaling import Limits
    from millicent.economics.scaling import scale as grow
    from millicent.economics.scaling_elsewhere import scale_elsewhere

    settings, queries, everything, basis = prepared(given, kv_tokens, trace)
    limits = Limits(
        machines=machines,
        max_concurrent=settings.limits.max_concurrent,
        budgets=_budgets(settings, queries),
        connections={name: each.max_connections for name, each in settings.upstreams.items()},
    )
    feature = settings.features.get(given.get("feature") or "")
    if latency_target_ms is None and feature is not None:
        latency_target_ms = feature.latency_target_ms
    asked: dict[str, Any] = {
        "multiples": sorted(set(times)) or (10, 100),
        "target_ns": None if latency_target_ms is None else latency_target_ms * NS_PER_MS,
        "gate": rate_gate(settings, queries),
        "most": requests,
    }
    with progress() as said:
        if basis is None:
            found = scale_elsewhere(everything, limits, **asked)
        else:
            found = grow(basis, everything, limits, progress=said, **asked)
    if json_:
        show.as_json(scale_body(found, basis))
        return
    whose = [f"{found.recorded:,} answers, paid by the token."] if basis is None else about(basis)
    print("\n".join([*whose, "", *_growth(found), "", *_breaks(found), "", *_machines(found)]))


def prepared(
    given: dict[str, Any], kv_tokens: int | None, trace: Path | None
) -> tuple[Config, LedgerQueries, list[Recorded], Basis | None]:
    """The configuration, the ledger, what it recorded, and the engine that it shows, if one does; with a trace's
    arrivals in place of the recorded ones, where there is one."""
    import msgspec

    from millicent.economics.arrivals import read_trace
    from millicent.economics.recorded import main_engine

    settings, queries = home.settings(), home.open_ledger()
    with progress() as said:
        _, recorded = read_traffic(queries, given, said)
        if trace is not None:
            main_engine(recorded)
        basis = engine_basis(settings, queries, recorded, said, kv_tokens)
    if trace is not None and basis is not None:
        basis = msgspec.structs.replace(basis, arrivals=tuple(read_trace(trace)))
    return settings, queries, recorded, basis


def read_traffic(
    queries: LedgerQueries, given: dict[str, Any], said: Callable[[str], object]
) -> tuple[ReceiptFilter, list[Recorded]]:
    """What was asked for; by default the last 30 days."""
    import msgspec

    from millicent.core.clock import NS_PER_HOUR, SystemClock
    from millicent.economics.recorded import read_recorded

    where = where_of(dict(given))
    if where.from_ns is None:
        where = msgspec.structs.replace(where, from_ns=SystemClock().now_ns() - _DAYS * 24 * NS_PER_HOUR)
    return where, read_recorded(queries, where, progress=lambda count: said(f"{count:,} receipts read"))


def engine_basis(
    settings: Config,
    queries: LedgerQueries,
    recorded: Sequence[Recorded],
    said: Callable[[str], object],
    kv_tokens: int | None = None,
) -> Basis | None:
    """The engine that answered most of it; None where none shows its steps."""
    from millicent.cli.engine_shape import engine_shape
    from millicent.economics.basis import basis_of
    from millicent.economics.recorded import main_engine

    if not any(each.decoded for each in recorded):
        return None
    _, model = main_engine(recorded)
    said(f"Learning how {model} behaves here")
    return basis_of(queries, recorded, engine_shape(settings, model, kv_tokens=kv_tokens))


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], object]]:
    """What is being done, on stderr while somebody watches."""
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield status.update


def about(basis: Basis) -> list[str]:
    """Whose traffic, on what, and how far the simulator can be trusted."""
    from millicent.cli import show

    lines = [f"{len(basis.recorded):,} answers of {basis.model} on {basis.placement}."]
    if basis.fidelity is None:
        lines.append("Too few answers to compare the simulator with: its figures are a first guess.")
    else:
        off = basis.fidelity
        lines.append(
            f"On the newest {off.answers:,}, learning from those before, it is off by {off.mean_total:+.1%} in mean "
            f"latency, {off.p95_total:+.1%} in the 95th percentile, {off.cost:+.1%} in cost."
        )
    if not basis.memory_known:
        lines.append("How much KV memory a machine has isn't known here: it is taken to be enough (--kv-tokens).")
    return [show.printable(line) for line in lines]


def _growth(found: Scale) -> list[str]:
    from millicent.cli import show

    header = ("TRAFFIC", "REQUESTS/S", "BUSY", "KV MEMORY", "REFUSED", "P50 TOTAL", "P95 TOTAL", "P95 WAIT")
    rows = []
    for rung in found.ladder:
        each, total = rung.outcome, rung.outcome.latency.total
        rows.append(
            (
                f"{rung.multiple}x",
                f"{each.requests / (found.stretch_ns / 1e9):.2f}",
                f"{each.utilization:.0%}",
                f"{each.kv_peak:.0%}",
                f"{sum(each.refused.values()):,}",
                show.duration(None if total is None else total.p50),
                show.duration(None if total is None else total.p95),
                show.duration(rung.p95_wait_ns),
            )
        )
    title = f"On what there is now, {found.stretch} requests of the busiest {found.stretch_ns / 1e9:,.0f} s and more:"
    return [title, show.table(header, rows, right=frozenset(header))]


def _breaks(found: Scale) -> list[str]:
    from millicent.cli import show

    if not found.breaks:
        return [f"Nothing breaks up to {found.ladder[-1].multiple} times the traffic."]
    lines = ["What breaks, the first first:"]
    for each in found.breaks:
        held = "" if each.held_at is None else f" (at {each.held_at:g}x it held)"
        lines.append(f"  {each.multiple:g}x  {each.name}{held}: {each.why}.")
    return [show.printable(line) for line in lines]


def _machines(found: Scale) -> list[str]:
    from millicent.cli import show

    if found.elsewhere:
        costs = [
            (f"{each.multiple}x", f"{each.requests_per_month:,}", show.amount(each.busy_cost_per_month))
            for each in found.scaled
        ]
        names = ("TRAFFIC", "REQUESTS/MONTH", "RECEIPTS/MONTH")
        return ["What it costs, times staying as they were measured:", show.table(names, costs, right=frozenset(names))]
    known = "assumed: twice what 95 in 100 wait now" if found.target_provenance == "assumed" else "stated"
    header = ("TRAFFIC", "REQUESTS/MONTH", "MACHINES", "BUSY", "P95 WAIT", "RECEIPTS/MONTH", "MACHINES/MONTH")
    rows = [
        (
            f"{each.multiple}x",
            f"{each.requests_per_month:,}",
            "none do" if each.machines is None else f"{each.machines:,}",
            "-" if each.outcome is None else f"{each.outcome.utilization:.0%}",
            show.duration(each.p95_wait_ns),
            "-" if each.machines is None else show.amount(each.busy_cost_per_month),
            "-" if each.machines is None else show.amount(each.wall_cost_per_month),
        )
        for each in found.scaled
    ]
    title = f"Machines so that 95 in 100 wait at most {show.duration(found.target_ns)} ({known}):"
    return [title, show.table(header, rows, right=frozenset(header))]


def _budgets(settings: Config, queries: LedgerQueries) -> tuple[Budget, ...]:
    """The configured ones, and those made elsewhere."""
    from millicent.ledger.budgets import read_budgets

    configured = [each.budget(name) for name, each in settings.budgets.items()]
    made = [each for each in queries.ask(read_budgets) or () if each.name not in settings.budgets]
    return (*configured, *made)
