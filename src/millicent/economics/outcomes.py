"""What a simulated course comes to: money, latency, machines; the same figures as are measured of real traffic."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from decimal import Decimal

import msgspec

from millicent.core.money import Money
from millicent.core.receipts import Timing
from millicent.core.tallies import nearest_rank
from millicent.economics.simulator import Course, Fate


class Latency(msgspec.Struct, frozen=True):
    """Nanoseconds; percentiles by nearest rank."""

    mean: int
    p50: int
    p95: int
    p99: int


class Latencies(msgspec.Struct, frozen=True):
    """None of what wasn't seen. `tpot` is per output token after the first."""

    queue: Latency | None
    ttft: Latency | None
    tpot: Latency | None
    total: Latency | None


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One setup under one traffic. `busy_cost` is device time at the rate, as receipts have it; `wall_cost` all the
    machines' time, idle too; None without a rate. `in_time` is the share of those with a target that met it.

    `utilization` is the busy part of the machines' time, `kv_peak` the fullest that a machine's KV memory was.
    """

    machines: int
    requests: int
    answered: int
    refused: dict[str, int]
    wall_ns: int
    busy_ns: int
    utilization: float
    kv_peak: float
    preemptions: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    latency: Latencies
    in_time: float | None
    busy_cost: Money | None
    wall_cost: Money | None


def outcome(
    course: Course, kv_blocks: int, receipt_usd_per_hour: Decimal | None, usd_per_hour: Decimal | None
) -> Outcome:
    """An hour of one machine, as receipts are priced and as it costs. `kv_blocks` are those of each machine."""
    answered = [fate for fate in course.fates if fate.refused is None]
    targeted = [fate.in_time for fate in course.fates if fate.in_time is not None]
    busy_ns = round(math.fsum(load.busy_ns for load in course.loads))
    machines_ns = round(course.wall_ns) * len(course.loads)
    return Outcome(
        machines=len(course.loads),
        requests=len(course.fates),
        answered=len(answered),
        refused=dict(Counter(fate.refused for fate in course.fates if fate.refused is not None)),
        wall_ns=round(course.wall_ns),
        busy_ns=busy_ns,
        utilization=busy_ns / machines_ns if machines_ns else 0.0,
        kv_peak=max((load.kv_peak for load in course.loads), default=0) / kv_blocks,
        preemptions=sum(load.preemptions for load in course.loads),
        input_tokens=sum(fate.arrival.input_tokens for fate in answered),
        cached_tokens=sum(fate.cached_tokens for fate in answered),
        output_tokens=sum(fate.arrival.output_tokens for fate in answered),
        latency=latencies_of(answered),
        in_time=sum(targeted) / len(targeted) if targeted else None,
        busy_cost=None if receipt_usd_per_hour is None else Money.of_time(busy_ns, receipt_usd_per_hour),
        wall_cost=None if usd_per_hour is None else Money.of_time(machines_ns, usd_per_hour),
    )


def latencies_of(timed: Sequence[Fate] | Sequence[Timing]) -> Latencies:
    """As simulated, or as measured."""
    return Latencies(
        latency_of(each.queue_ns for each in timed),
        latency_of(each.ttft_ns for each in timed),
        latency_of(each.tpot_ns for each in timed),
        latency_of(each.total_ns for each in timed),
    )


def latency_of(values: Iterable[float | None]) -> Latency | None:
    """Of those that are known; None where none is."""
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return None
    p50, p95, p99 = (round(nearest_rank(ordered, percent)) for percent in (50, 95, 99))
    return Latency(round(math.fsum(ordered) / len(ordered)), p50, p95, p99)
