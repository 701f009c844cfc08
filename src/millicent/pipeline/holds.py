"""How much a request may cost, and what happens when it costs more."""

from __future__ import annotations

from collections.abc import Callable

from millicent.core.clock import NS_PER_MS
from millicent.core.money import Money
from millicent.core.protocols import Call
from millicent.meter.placements import Placement

# What a call may cost at most; None where nobody can say. Hard budgets refuse that.
HoldOf = Callable[[Call, Placement], Money | None]

# A machine that nobody has measured: slower than any that serves people. A hold is given back when it isn't needed.
_INPUT_TOKEN_NS = 10 * NS_PER_MS
_OUTPUT_TOKEN_NS = 100 * NS_PER_MS


def cautious_hold(call: Call, placement: Placement) -> Money | None:
    """The price of the device's whole time for as long as the call could last on a very slow machine."""
    rate = placement.receipt_usd_per_hour
    if rate is None or call.input_tokens is None or call.max_output_tokens is None:
        return None
    longest_ns = call.input_tokens * _INPUT_TOKEN_NS + call.max_output_tokens * _OUTPUT_TOKEN_NS
    return Money.of_time(longest_ns * placement.accelerators, rate)


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
