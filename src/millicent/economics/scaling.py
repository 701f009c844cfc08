"""Ten and a hundred times the traffic: what it costs, how long answers take, how many machines it needs, what breaks.

The traffic is the busiest stretch of what was recorded, and copies of it begun at other points (`arrivals.superposed`).
First it grows on what there is now, until something breaks; then machines are added until the latency target is met.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction

import msgspec

from millicent.core.budgets import Budget
from millicent.core.clock import NS_PER_HOUR
from millicent.core.errors import InvalidRequest
from millicent.core.money import Money
from millicent.core.usage import Provenance
from millicent.economics.arrivals import Arrival, busiest, span_of, superposed
from millicent.economics.basis import Basis
from millicent.economics.outcomes import Outcome, latency_of
from millicent.economics.recorded import Recorded
from millicent.economics.simulator import Course, Gate
from millicent.economics.traffic import HOURS_PER_MONTH

# So many requests are simulated at once, at most; the stretch has at least LEAST_STRETCH.
MOST_SIMULATED = 10_000
LEAST_STRETCH = 100
LADDER = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1000)
# Without a target: as long as 95 in 100 take at most twice what they take now.
ASSUMED_TARGET = 2
_MOST_MACHINES = 4096
_WITHIN = 30


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What may stand in the way. `gate` is the keys' rates; `connections` how many calls each placement elsewhere
    takes at once."""

    machines: int = 1
    max_concurrent: int | None = None
    budgets: tuple[Budget, ...] = ()
    connections: dict[str, int] = {}


class Break(msgspec.Struct, frozen=True):
    """`what` is latency, concurrency, rate, memory, budget or connections. It breaks at `multiple`, and held at
    `held_at`; None where it didn't hold at 1."""

    what: str
    name: str
    multiple: float
    held_at: float | None
    why: str


class Rung(msgspec.Struct, frozen=True):
    """So many times the traffic on what there is now."""

    multiple: int
    outcome: Outcome
    p95_wait_ns: int | None

    def carried(self, target_ns: int) -> bool:
        return not self.outcome.refused and self.p95_wait_ns is not None and self.p95_wait_ns <= target_ns


class Scaled(msgspec.Struct, frozen=True, kw_only=True):
    """So many times the traffic on as few machines as meet the target; None where none do, and where none are ours.
    Monthly amounts are at the recorded pace times the multiple, the machines being up all the time."""

    multiple: int
    machines: int | None = None
    outcome: Outcome | None = None
    p95_wait_ns: int | None
    requests_per_month: int
    busy_cost_per_month: Money | None = None
    wall_cost_per_month: Money | None = None


class Scale(msgspec.Struct, frozen=True, kw_only=True):
    """`target_ns` is what 95 in 100 may wait: for the first token where they stream, else for the whole answer.
    `elsewhere`: all of it was paid by the token; what was measured of its times is taken to stay."""

    model: str
    placement: str
    elsewhere: bool = False
    recorded: int
    stretch: int
    stretch_ns: int
    requests_per_month: int
    target_ns: int
    target_provenance: Provenance
    ladder: tuple[Rung, ...]
    breaks: tuple[Break, ...]
    scaled: tuple[Scaled, ...]


def scale(
    basis: Basis,
    everything: Sequence[Recorded],
    limits: Limits,
    *,
    multiples: Sequence[int] = (10, 100),
    target_ns: int | None = None,
    gate: Callable[[], Gate] | None = None,
    most: int = MOST_SIMULATED,
    progress: Callable[[str], object] = str,
) -> Scale:
    """`everything` also has what ran elsewhere, which counts towards budgets and connections.

    Raises InvalidRequest where nothing can be seen of how often requests come.
    """
    check_paced(basis.arrivals)
    stretch = busiest(basis.arrivals, max(LEAST_STRETCH, most // max(multiples)))
    monthly = per_month(basis.arrivals)
    now, wait_ns = _pass(basis, stretch, 1, limits.machines)
    provenance = Provenance.MEASURED
    if target_ns is None:
        target_ns, provenance = ASSUMED_TARGET * (wait_ns or 0), Provenance.ASSUMED

    def present(multiple: int) -> tuple[Outcome, int | None]:
        progress(f"{multiple} times the traffic on what there is now")
        return _pass(basis, stretch, multiple, limits.machines, limits.max_concurrent, gate)

    ladder, breaks = climb(present, everything, max(multiples), target_ns, limits)
    return Scale(
        model=basis.model,
        placement=basis.placement,
        recorded=len(basis.recorded),
        stretch=len(stretch),
        stretch_ns=span_of(stretch),
        requests_per_month=monthly,
        target_ns=target_ns,
        target_provenance=provenance,
        ladder=tuple(ladder),
        breaks=tuple(breaks),
        scaled=tuple(
            _scaled(
                basis,
                most,
                stretch,
                multiple,
                target_ns,
                monthly * multiple,
                now,
                progress,
                (limits.machines, next((rung for rung in ladder if rung.multiple == multiple), None)),
            )
            for multiple in multiples
        ),
    )


def wait_p95(course: Course) -> int | None:
    """Of what callers wait for."""
    waits = [fate.ttft_ns if fate.arrival.streamed else fate.total_ns for fate in course.fates if fate.refused is None]
    found = latency_of(waits)
    return None if found is None else found.p95


def _pass(
    basis: Basis,
    stretch: Sequence[Arrival],
    multiple: int,
    machines: int,
    max_concurrent: int | None = None,
    gate: Callable[[], Gate] | None = None,
) -> tuple[Outcome, int | None]:
    arrivals = superposed(stretch, multiple)
    course, found = basis.run(arrivals, machines=machines, max_concurrent=max_concurrent, gate=gate)
    return found, wait_p95(course)


def climb(
    tried: Callable[[int], tuple[Outcome, int | None]],
    everything: Sequence[Recorded],
    largest: int,
    target_ns: int,
    limits: Limits,
) -> tuple[list[Rung], list[Break]]:
    """More and more on what there is, until the machines are full and nothing new can be seen; and what breaks, the
    first first. `tried` says what comes of so many times the traffic, and what 95 in 100 wait."""
    ladder: list[Rung] = []
    breaks: dict[str, Break] = {}
    for multiple in [each for each in LADDER if each < largest] + [largest]:
        found, wait_ns = tried(multiple)
        held_at = ladder[-1].multiple if ladder else None
        for what, name, why in broken(found, wait_ns, target_ns, limits):
            breaks.setdefault(name, Break(what, name, multiple, held_at, why))
        ladder.append(Rung(multiple, found, wait_ns))
        if found.utilization > 0.99 and any(each.what == "latency" for each in breaks.values()):
            break
    others = [*budget_breaks(everything, limits.budgets), *connection_breaks(everything, limits.connections)]
    return ladder, sorted([*breaks.values(), *others], key=lambda each: (each.multiple, each.what, each.name))


def broken(found: Outcome, wait_ns: int | None, target_ns: int, limits: Limits) -> list[tuple[str, str, str]]:
    """What, its name, and what is seen of it."""
    broken = []
    if wait_ns is not None and wait_ns > target_ns:
        seen = f"95 in 100 wait up to {wait_ns / 1e9:.2f} s, and the target is {target_ns / 1e9:.2f} s"
        broken.append(("latency", "latency target", seen))
    for reason, count in found.refused.items():
        if reason == "context_length_exceeded":
            continue
        part = f"{count} of {found.requests} requests are refused ({reason})"
        if reason == "too_many_requests":
            broken.append(("concurrency", f"[limits] max_concurrent = {limits.max_concurrent}", part))
        else:
            broken.append(("rate", "rate limits of keys", part))
    if found.preemptions:
        seen = f"KV memory is full: {found.preemptions} times a running answer was thrown out and computed again"
        broken.append(("memory", "KV memory", seen))
    return broken


def _scaled(
    basis: Basis,
    most: int,
    stretch: Sequence[Arrival],
    multiple: int,
    target_ns: int,
    requests: int,
    alone: Outcome,
    progress: Callable[[str], object],
    present: tuple[int, Rung | None],
) -> Scaled:
    """The fewest machines; of more than thirty, to within a thirtieth. `alone` is what comes of the traffic once, on
    what there is now, `present` how many machines that is, and what comes of all of it there, where that was seen.

    Of a multiple that is too large to be simulated a part is, on its part of the machines. Machines that share more
    requests wait for each other less, so that is too many machines rather than too few.
    """
    part = max(1, -(-multiple * len(stretch) // most))
    simulated = -(-multiple // part)

    def tried(machines: int) -> tuple[bool, Outcome, int | None]:
        progress(f"{multiple} times the traffic on {machines * part} machines")
        found, wait_ns = _pass(basis, stretch, simulated, machines)
        return wait_ns is not None and wait_ns <= target_ns, found, wait_ns

    # As many as would be busy, did nothing get cheaper by being done together.
    most_machines = min(_MOST_MACHINES, len(stretch) * simulated)
    too_few, enough = 0, min(most_machines, max(1, -(-alone.busy_ns * simulated // span_of(stretch))))
    best = tried(enough)
    while not best[0] and enough < most_machines:
        too_few = enough
        # As many as are busy, at least: with so few a queue only grows.
        enough = min(most_machines, max(enough + 1, enough * 3 // 2, -(-best[1].busy_ns // span_of(stretch))))
        best = tried(enough)
    while best[0] and enough - too_few > max(1, enough // _WITHIN):
        middle = (too_few + enough) // 2
        found = tried(middle)
        if found[0]:
            enough, best = middle, found
        else:
            too_few = middle
    met, found_outcome, wait_ns = best
    machines, whole = present
    if whole is not None and machines < enough * part and whole.carried(target_ns):
        # Seen with all of it, and so better than with a part.
        met, found_outcome, wait_ns, enough, part = True, whole.outcome, whole.p95_wait_ns, machines, 1
    if not met:
        return Scaled(multiple=multiple, p95_wait_ns=wait_ns, requests_per_month=requests)
    hour = basis.rates.hour
    return Scaled(
        multiple=multiple,
        machines=enough * part,
        outcome=found_outcome,
        p95_wait_ns=wait_ns,
        requests_per_month=requests,
        busy_cost_per_month=monthly_cost(found_outcome.busy_cost, requests, found_outcome.answered),
        wall_cost_per_month=None
        if hour is None
        else Money.of_time(enough * part * HOURS_PER_MONTH * NS_PER_HOUR, hour),
    )


def monthly_cost(amount: Money | None, requests: int, answered: int) -> Money | None:
    """What so many requests cost when so many of them cost this."""
    if amount is None or not answered:
        return None
    return Money.price(Decimal(requests), amount.usd / answered)


def check_paced(arrivals: Sequence[Arrival]) -> None:
    """Raises InvalidRequest where all came at one moment: nobody can say how often they come."""
    if arrivals[0].at_ns == arrivals[-1].at_ns:
        raise InvalidRequest(
            f"how often requests come can't be seen: there is {len(arrivals)} in this part of the ledger, or all are"
            " of one moment; answer some more, choose another time, or give a trace"
        )


def per_month(arrivals: Sequence[Arrival]) -> int:
    """At their pace; what came within an hour is an hour's, or a minute's trial would be a month of such minutes."""
    return round(Fraction(len(arrivals) * HOURS_PER_MONTH * NS_PER_HOUR, max(NS_PER_HOUR, span_of(arrivals))))


def budget_breaks(everything: Sequence[Recorded], budgets: Sequence[Budget]) -> list[Break]:
    """A hard budget refuses when the dearest period of its dearest subject has grown to its limit."""
    breaks = []
    for budget in budgets:
        spent: dict[tuple[str, int], int] = defaultdict(int)
        for each in everything:
            subject = budget.subject(each.receipt.attribution)
            if subject is not None and each.cost is not None:
                spent[subject, budget.every.period_ns(each.arrival.at_ns)[0]] += each.cost.nanousd
        dearest = max(spent.values(), default=0)
        if not budget.hard or dearest <= 0:
            continue
        multiple = float(Fraction(budget.limit.nanousd, dearest))
        seen = f"the dearest {budget.every.value} came to {Money(dearest).human()} of {budget.limit.human()}"
        breaks.append(Break("budget", f"[budgets.{budget.name}]", round(multiple, 2), None, seen))
    return breaks


def connection_breaks(everything: Sequence[Recorded], connections: dict[str, int]) -> list[Break]:
    """As many calls as there are connections may run, and as many again wait."""
    breaks = []
    for placement, most in connections.items():
        moments: list[tuple[int, int]] = []
        for each in everything:
            if each.place[0] == placement and each.receipt.timing.total_ns is not None:
                moments += [(each.arrival.at_ns, 1), (each.arrival.at_ns + each.receipt.timing.total_ns, -1)]
        running = peak = 0
        for _, change in sorted(moments):
            running += change
            peak = max(peak, running)
        if peak:
            seen = f"up to {peak} calls ran at once, and {2 * most} may run or wait"
            name = f"[placements.{placement}] max_connections = {most}"
            breaks.append(Break("connections", name, round(2 * most / peak, 2), None, seen))
    return breaks
