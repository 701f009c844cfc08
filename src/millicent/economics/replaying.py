"""The same traffic on another setup: before and after, both simulated, so that what differs is the change alone."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from millicent.economics.arrivals import superposed
from millicent.economics.basis import Basis
from millicent.economics.calibration import slower
from millicent.economics.outcomes import Latencies, Outcome, latencies_of
from millicent.economics.simulator import Machine
from millicent.economics.steady import PrefixCache


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What is other than it was; None is as before. `steps_take` is how long steps take then: 0.5 is half as long, on a
    machine twice as fast. `times` multiplies the traffic."""

    machines: int = 1
    times: int = 1
    max_concurrent: int | None = None
    max_sequences: int | None = None
    step_tokens: int | None = None
    kv_blocks: int | None = None
    prefix_cache: PrefixCache | None = None
    steps_take: float = 1.0

    def applied(self, machine: Machine) -> Machine:
        given = {
            name: value
            for name in ("max_sequences", "step_tokens", "kv_blocks", "prefix_cache")
            if (value := getattr(self, name)) is not None
        }
        changed = msgspec.structs.replace(machine, **given)
        return msgspec.structs.replace(changed, coefficients=slower(machine.coefficients, self.steps_take))


class Replay(msgspec.Struct, frozen=True):
    """`measured` is how it really was; None for a trace."""

    measured: Latencies | None
    before: Outcome
    after: Outcome


def replay(
    basis: Basis, change: Change, *, max_concurrent: int | None = None, progress: Callable[[int], object] | None = None
) -> Replay:
    """`max_concurrent` is what holds now."""
    is_real = list(basis.arrivals) == [each.arrival for each in basis.recorded]
    _, before = basis.run(basis.arrivals, max_concurrent=max_concurrent, progress=progress)
    _, after = basis.run(
        superposed(basis.arrivals, change.times),
        change.applied(basis.machine),
        machines=change.machines,
        max_concurrent=change.max_concurrent or max_concurrent,
        progress=progress,
    )
    return Replay(latencies_of([each.receipt.timing for each in basis.recorded]) if is_real else None, before, after)
