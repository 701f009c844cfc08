"""`replay`: the ledger's traffic, or a trace, through another setup."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from millicent.cli.options import exact_json_option, filters

if TYPE_CHECKING:
    from collections.abc import Callable

    from millicent.economics.outcomes import Latencies, Outcome
    from millicent.economics.replaying import Replay


@click.command()
@filters
@click.option("--trace", type=click.Path(path_type=Path, dir_okay=False), help="A CSV of arrivals, instead.")
@click.option("--machines", type=click.IntRange(1, 4096), default=1, show_default=True, help="Side by side.")
@click.option("--times", type=click.IntRange(1, 1000), default=1, show_default=True, help="How many times the traffic.")
@click.option("--max-sequences", type=click.IntRange(1, 1024), help="[engine] max_sequences.")
@click.option("--step-tokens", type=click.IntRange(min=16), help="[engine] step_tokens.")
@click.option("--prefix-cache", type=click.Choice(["off", "tenant", "shared"]), help="[engine] prefix_cache.")
@click.option("--max-concurrent", type=click.IntRange(min=1), help="[limits] max_concurrent.")
@click.option("--kv-tokens", type=click.IntRange(min=1), help="Room for the KV cache of a machine, in tokens.")
@click.option(
    "--steps-take",
    type=click.FloatRange(0, 1000, min_open=True),
    default=1.0,
    show_default=True,
    help="Of another machine: 0.5 where each step takes half as long.",
)
@exact_json_option
def replay(
    trace: Path | None,
    machines: int,
    times: int,
    max_sequences: int | None,
    step_tokens: int | None,
    prefix_cache: Literal["off", "tenant", "shared"] | None,
    max_concurrent: int | None,
    kv_tokens: int | None,
    steps_take: float,
    json_: bool,
    **given: Any,
) -> None:
    """Run this ledger's traffic again, simulated, on a setup that is other in what the options say: before and after.

    By default the traffic of the last 30 days, at most 50,000 requests, of the engine that answered most of them.
    """
    from millicent.cli import show
    from millicent.cli.plan_scale import about, prepared, progress
    from millicent.dashboard.scale_json import basis_body, latencies_body, outcome_body
    from millicent.economics.recorded import main_engine
    from millicent.economics.replaying import Change
    from millicent.economics.replaying import replay as run_again

    settings, _, recorded, basis = prepared(given, None, trace)
    if basis is None:
        main_engine(recorded)  # says that there is none
        return
    change = Change(
        machines=machines,
        times=times,
        max_concurrent=max_concurrent,
        max_sequences=max_sequences,
        step_tokens=step_tokens,
        kv_blocks=None if kv_tokens is None else max(1, kv_tokens // basis.machine.block_tokens),
        prefix_cache=prefix_cache,
        steps_take=steps_take,
    )
    with progress() as said:
        found = run_again(
            basis,
            change,
            max_concurrent=settings.limits.max_concurrent,
            progress=lambda count: said(f"{count:,} requests simulated"),
        )
    if json_:
        body = {"object": "replay", "engine": basis_body(basis), "times": times}
        body["measured_latency_ms"] = None if found.measured is None else latencies_body(found.measured)
        show.as_json(body | {"before": outcome_body(found.before), "after": outcome_body(found.after)})
        return
    print("\n".join([*about(basis), "", _table(found)]))
    if not any(arrival.prefix for arrival in basis.arrivals):
        show.note("What prompts have in common isn't known of this traffic: the prefix cache has nothing to find.")


def _table(found: Replay) -> str:
    from millicent.cli import show

    header = ["", *(["MEASURED"] if found.measured else []), "BEFORE", "AFTER"]
    outcomes = (found.before, found.after)

    def simulated(name: str, told: Callable[[Outcome], str]) -> list[str]:
        return [name, *(["-"] if found.measured else []), *map(told, outcomes)]

    rows = [
        simulated("requests", lambda each: f"{each.requests:,}"),
        simulated("refused", lambda each: f"{sum(each.refused.values()):,}"),
        simulated("machines", lambda each: f"{each.machines:,}"),
        simulated("busy", lambda each: f"{each.utilization:.1%}"),
        simulated("prompt tokens from the cache", lambda each: f"{each.cached_tokens:,}"),
        simulated("thrown out for memory", lambda each: f"{each.preemptions:,}"),
        simulated("KV memory at most", lambda each: f"{each.kv_peak:.0%}"),
    ]
    whose: list[Latencies] = [*([found.measured] if found.measured else []), *(each.latency for each in outcomes)]
    for name in ("queue", "ttft", "tpot", "total"):
        for percentile in ("mean", "p50", "p95", "p99"):
            cells = [getattr(latency, name) for latency in whose]
            rows.append(
                [f"{name} {percentile}", *(show.duration(each and getattr(each, percentile)) for each in cells)]
            )
    rows.append(simulated("cost, as receipts have it", lambda each: show.amount(each.busy_cost)))
    rows.append(simulated("cost of the machines' time", lambda each: show.amount(each.wall_cost)))
    return show.table(header, rows, right=frozenset(header[1:]))
