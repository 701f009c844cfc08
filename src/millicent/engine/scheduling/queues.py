"""Who waits, and whose turn it is: by priority, then fairness between tenants, then deadline, then arrival."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator

from millicent.engine.scheduling.sequences import Sequence

_WINDOW = 32  # how far prefix locality looks down a queue, and how often one can be overtaken


class FairShare:
    """A virtual counter for each tenant: what its work would have cost, each piece in a step of its own.

    The tenant with the lowest is next (virtual token counters, Sheng et al. 2024). A tenant that comes, or comes back,
    starts level with the lowest of those that are there: being away saves nothing up. So the counters of two tenants
    that both have work waiting stay within what one engine-full of work costs of each other.
    """

    def __init__(self) -> None:
        self._counters: dict[int, int] = {}
        self._sequences: dict[int, int] = {}

    def counter(self, tenant: int) -> int:
        return self._counters[tenant]

    def enter(self, tenant: int) -> None:
        """One more sequence of this tenant is here."""
        if tenant not in self._sequences:
            lowest = min((self._counters[other] for other in self._sequences), default=0)
            self._counters[tenant] = max(self._counters.get(tenant, 0), lowest)
        self._sequences[tenant] = self._sequences.get(tenant, 0) + 1

    def leave(self, tenant: int) -> None:
        self._sequences[tenant] -= 1
        if self._sequences[tenant]:
            return
        del self._sequences[tenant]
        # What is at or below the lowest says nothing any more; with nobody left, nothing does.
        lowest = min((self._counters[other] for other in self._sequences), default=None)
        self._counters = {
            other: counter
            for other, counter in self._counters.items()
            if lowest is not None and (other in self._sequences or counter > lowest)
        }

    def charge(self, tenant: int, cost_ns: int) -> None:
        self._counters[tenant] += cost_ns


class WaitingQueues:
    """Sequences that don't run, one queue for each priority and tenant."""

    def __init__(self, fair: FairShare) -> None:
        self._fair = fair
        self._queues: dict[tuple[int, int], list[Sequence]] = {}

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for queue in self._queues.values() for sequence in queue)

    def add(self, sequence: Sequence) -> None:
        queue = self._queues.setdefault((sequence.priority, sequence.tenant), [])
        bisect.insort(queue, sequence, key=lambda other: other.place)

    def remove(self, sequence: Sequence) -> None:
        key = (sequence.priority, sequence.tenant)
        self._queues[key].remove(sequence)
        if not self._queues[key]:
            del self._queues[key]

    def better_than(self, priority: int) -> bool:
        """Whether one waits with a better priority than this."""
        return any(key[0] < priority for key in self._queues)

    def next(self, locality: Callable[[Sequence], int | None]) -> Sequence | None:
        """Whose turn it is. `locality` is how many of a sequence's tokens needn't be computed, None for one that does
        better to wait a little; then the one after it has its turn."""
        for key in sorted(self._queues, key=lambda key: (key[0], self._fair.counter(key[1]), key[1])):
            found = _nearest(self._queues[key], locality)
            if found is not None:
                return found
        return None


def _nearest(queue: list[Sequence], locality: Callable[[Sequence], int | None]) -> Sequence | None:
    """Of the first few that could begin, with the same deadline or without one, the one with the longest cached prefix.

    Each overtakes the first; once that has been overtaken as often as there are places to look at, it goes.
    """
    first: Sequence | None = None
    best: Sequence | None = None
    most = -1
    for sequence in queue[:_WINDOW]:
        tokens = locality(sequence)
        if tokens is None:
            continue
        first = first or sequence
        if sequence.deadline_ns != first.deadline_ns:
            break
        if tokens > most:
            best, most = sequence, tokens
        if first.overtaken >= _WINDOW:
            break
    if first is not None and best is not first:
        first.overtaken += 1
    return best
