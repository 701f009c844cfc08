"""How much a request may cost, and what happens when it costs more."""

from __future__ import annotations

from collections.abc import Callable

from millicent.core.money import Money
from millicent.pipeline.estimates import Plan

# What a request may cost before more is asked of its budgets; None where nobody can say. Hard budgets refuse that.
HoldOf = Callable[[Plan], Money | None]


def quoted_hold(plan: Plan) -> Money | None:
    """The quote's upper end, at most what the caller allows."""
    return plan.hold


class HoldWatch:
    """Tells when a running cost comes so near the hold that the next two steps could pass it: one that runs already,
    and one until the work has stopped."""

    def __init__(self, hold: Money) -> None:
        self.hold = hold
        self._cost: Money | None = None
        self._dearest = hold.nanousd // 64  # until a step has been seen

    def is_near(self, cost: Money) -> bool:
        """The first cost is that of reading the prompt: later steps are judged by each other."""
        if self._cost is not None:
            self._dearest = max(self._dearest, cost.nanousd - self._cost.nanousd)
        self._cost = cost
        return cost.nanousd + 2 * self._dearest > self.hold.nanousd
