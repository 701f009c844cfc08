"""How much a request may cost, and what happens when it costs more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from decimal import Decimal

import msgspec

from millicent.core.errors import LedgerUnavailable
from millicent.core.money import ZERO, Money
from millicent.core.protocols import Ledger
from millicent.meter.meter import Meter
from millicent.meter.quotes import serving_ns_within
from millicent.pipeline.answer import Answer
from millicent.pipeline.estimates import Plan

# What a request may cost before more is asked of its budgets; None where nobody can say. Hard budgets refuse that.
HoldOf = Callable[[Plan], Money | None]


def quoted_hold(plan: Plan) -> Money | None:
    """The quote's upper end, at most what the caller allows."""
    return plan.hold


class HoldWatch:
    """Tells when a running cost comes so near the hold that it would be too late after the next piece: beyond that come
    one that is on its way already, and one until the work has stopped. Where the hold is `enough` for the longest
    answer that there can be, only what has passed it all the same is too near."""

    def __init__(self, hold: Money, *, enough: bool = False) -> None:
        self.hold = hold
        self._enough = enough
        self._cost: Money | None = None
        self._dearest = hold.nanousd // 64  # until a piece has been seen

    def is_near(self, cost: Money) -> bool:
        """The first cost is that of reading the prompt: later ones are judged by each other."""
        if self._cost is not None:
            self._dearest = max(self._dearest, cost.nanousd - self._cost.nanousd)
        self._cost = cost
        return cost.nanousd + (0 if self._enough else 3 * self._dearest) > self.hold.nanousd


class Purse:
    """What one attempt at an answer may cost: the hold, where a hard budget bounds it, and what its caller's maximum
    leaves for it.

    Where time is paid for (`usd_per_hour` is its rate), the meter keeps it: it charges no more than that, and says in
    time when the steps under way could pass it. Where tokens have prices, the cost is looked at with every piece, and
    the maximum was turned into a limit on the output beforehand. When it comes near, more is asked of the budgets; if
    they have no more, or the maximum is reached, the output stops.
    """

    def __init__(
        self, answer: Answer, ledger: Ledger, meter: Meter, plan: Plan, *, bounded: bool, usd_per_hour: Decimal | None
    ) -> None:
        self._answer = answer
        self._ledger = ledger
        self._meter = meter
        # What was spent beside this attempt: outside costs, and attempts before it.
        lines = [line for line in answer.opened.lines if line.book == "actual"]
        self._before = Money.total(line.amount or ZERO for line in lines) + answer.reserved
        self._before_ns = meter.serving_ns(answer.receipt_id)
        self._hold = answer.opened.hold if bounded else None
        self._maximum = plan.maximum
        self._usd_per_hour = usd_per_hour
        self._asking: asyncio.Task[None] | None = None
        self._watch: HoldWatch | None = None
        if self._hold is not None and usd_per_hour is None:
            most = plan.most
            self._watch = HoldWatch(self._hold, enough=most is not None and self._before + most <= self._hold)
        self._bound_time()

    @property
    def watches_pieces(self) -> bool:
        return self._watch is not None

    async def spent(self, cost: Money | None) -> None:
        """A piece has come, and this is what the answer costs so far."""
        if self._watch is None or cost is None or not self._watch.is_near(cost):
            return
        if await self._grow(cost):
            assert self._hold is not None
            self._watch.hold = self._hold
        else:
            self._answer.stop()

    async def settle(self) -> None:
        """Nothing runs any more: wait until what was asked of the budgets is answered."""
        if self._asking is not None:
            await self._asking

    def _bound_time(self) -> None:
        limits = [] if self._maximum is None else [self._maximum]
        if self._hold is not None:
            limits.append(max(ZERO, self._hold - self._before))
        if self._usd_per_hour and limits:
            most_ns = serving_ns_within(min(limits), self._usd_per_hour)
            self._meter.bound(self._answer.receipt_id, self._before_ns + most_ns, self._near)

    def _near(self) -> None:
        """From the meter, which doesn't wait: work goes on while the ledger is asked, and is charged to the hold."""
        if self._hold is None:
            self._answer.stop()
        else:
            self._asking = asyncio.get_running_loop().create_task(self._ask())

    async def _ask(self) -> None:
        if not await self._grow():
            self._answer.stop()
        elif self._answer.closing is None:
            self._bound_time()

    async def _grow(self, cost: Money = ZERO) -> bool:
        """Twice the hold, as far as the maximum allows. False where the budgets lack it."""
        assert self._hold is not None
        wanted = Money(2 * max(self._hold.nanousd, cost.nanousd, 1))
        if self._maximum is not None:
            wanted = min(wanted, self._maximum + self._before)
        if wanted <= self._hold:
            return False
        try:
            extended = await self._ledger.extend(self._answer.receipt_id, wanted)
        except LedgerUnavailable:
            return False
        if extended:
            self._hold = wanted
            self._answer.opened = msgspec.structs.replace(self._answer.opened, hold=wanted)
        return extended
