"""Growth of what is paid by the token: costs grow with it, times stay as they were measured, and limits here refuse."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import msgspec

from millicent.core.errors import InvalidRequest
from millicent.core.money import Money
from millicent.core.usage import Provenance
from millicent.economics.arrivals import Arrival, busiest_from, moments, span_of
from millicent.economics.outcomes import Outcome, outcome
from millicent.economics.recorded import Recorded
from millicent.economics.scaling import (
    ASSUMED_TARGET,
    LEAST_STRETCH,
    MOST_SIMULATED,
    Limits,
    Scale,
    Scaled,
    check_paced,
    climb,
    monthly_cost,
    per_month,
    wait_p95,
)
from millicent.economics.simulator import Course, Fate, Gate


def scale_elsewhere(
    everything: Sequence[Recorded],
    limits: Limits,
    *,
    multiples: Sequence[int] = (10, 100),
    target_ns: int | None = None,
    gate: Callable[[], Gate] | None = None,
    most: int = MOST_SIMULATED,
) -> Scale:
    """Raises InvalidRequest where nothing was paid by the token, or all of it at one moment."""
    paid = [each for each in everything if each.receipt.prices.snapshot.get("kind") == "api"]
    if not paid:
        raise InvalidRequest(
            "nothing in this part of the ledger can be grown: it has no answers of an engine that shows its steps, and"
            " none that were paid by the token; choose another time, or give a trace"
        )
    arrivals = [each.arrival for each in paid]
    check_paced(arrivals)
    length = max(LEAST_STRETCH, most // max(multiples))
    first = busiest_from(arrivals, length)
    stretch = paid[first : first + length]
    _, now_ns = _pass(stretch, 1, limits, None)
    target = ASSUMED_TARGET * (now_ns or 0) if target_ns is None else target_ns
    ladder, breaks = climb(
        lambda multiple: _pass(stretch, multiple, limits, gate), everything, max(multiples), target, limits
    )
    monthly = per_month(arrivals)
    return Scale(
        model=", ".join(sorted({each.place[1] for each in paid})),
        placement=", ".join(sorted({each.place[0] for each in paid})),
        elsewhere=True,
        recorded=len(paid),
        stretch=len(stretch),
        stretch_ns=span_of([each.arrival for each in stretch]),
        requests_per_month=monthly,
        target_ns=target,
        target_provenance=Provenance.ASSUMED if target_ns is None else Provenance.MEASURED,
        ladder=tuple(ladder),
        breaks=tuple(breaks),
        scaled=tuple(
            Scaled(
                multiple=multiple,
                p95_wait_ns=now_ns,
                requests_per_month=monthly * multiple,
                busy_cost_per_month=monthly_cost(_cost(paid), monthly * multiple, len(paid)),
            )
            for multiple in multiples
        ),
    )


def _pass(
    stretch: Sequence[Recorded], multiple: int, limits: Limits, gate: Callable[[], Gate] | None
) -> tuple[Outcome, int | None]:
    """Everything that isn't refused takes as long as it took."""
    door = None if gate is None else gate()
    running: list[tuple[int, int, Arrival]] = []
    fates: list[Fate] = []
    answered: list[Recorded] = []
    for at_ns, i in moments([each.arrival for each in stretch], multiple):
        arrival = msgspec.structs.replace(stretch[i].arrival, at_ns=at_ns)
        while running and running[0][0] <= at_ns:
            ended_ns, _, ended = heapq.heappop(running)
            if door is not None:
                door.leave(ended, ended_ns, 0)
        fate = Fate(arrival)
        if limits.max_concurrent is not None and len(running) >= limits.max_concurrent:
            fate.refused = "too_many_requests"
        elif door is not None:
            fate.refused = door.enter(arrival, at_ns)
        if fate.refused is None:
            timing = stretch[i].receipt.timing
            fate.ttft_ns, fate.total_ns = timing.ttft_ns, timing.total_ns
            heapq.heappush(running, (at_ns + (timing.total_ns or 0), len(fates), arrival))
            answered.append(stretch[i])
        fates.append(fate)
    ends = [fate.arrival.at_ns + (fate.total_ns or 0) for fate in fates]
    course = Course(fates, [], max(ends) - fates[0].arrival.at_ns)
    return msgspec.structs.replace(outcome(course, 1, None, None), busy_cost=_cost(answered)), wait_p95(course)


def _cost(recorded: Sequence[Recorded]) -> Money | None:
    """None where one is unpriced."""
    amounts = [each.cost for each in recorded if each.cost is not None]
    return Money.total(amounts) if len(amounts) == len(recorded) else None
