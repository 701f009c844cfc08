"""64 calls at once on a nearly empty hard budget, however long steps take and however slow the ledger is."""

from __future__ import annotations

import asyncio
import random
from decimal import Decimal

from hypothesis import given, settings
from hypothesis import strategies as st

from millicent.backends.fake import FakeAnswer, FakeBackend
from millicent.core.budgets import Budget, Every
from millicent.core.chunks import Text
from millicent.core.clock import NS_PER_MS, ManualClock
from millicent.core.errors import PaymentRequired
from millicent.core.identifiers import SequentialIds
from millicent.core.money import Money
from millicent.core.receipts import Receipt
from millicent.core.request import OutsideCost, Request
from millicent.core.steps import DeviceState
from millicent.core.usage import Provenance
from millicent.ledger.budgets import put_budget, read_balances
from millicent.ledger.memory import MemoryLedger
from millicent.meter.attribution import StepTimeShares
from millicent.meter.meter import Meter
from millicent.meter.placements import Placement
from millicent.pipeline.config import LimitsConfig
from millicent.pipeline.pipeline import Pipeline

# A millicent a millisecond.
PLACEMENT = Placement("fake", 2, Decimal(18), Provenance.MEASURED)
MILLICENT = 10_000
CALLS = 64


class SlowLedger(MemoryLedger):
    """Takes its time to answer whether a hold may grow: work goes on meanwhile."""

    def __init__(self, draw: random.Random, turns: int) -> None:
        super().__init__("gw")
        self._draw = draw
        self._turns = turns

    async def extend(self, receipt_id: str, hold: Money) -> bool:
        for _ in range(self._draw.randrange(self._turns + 1)):
            await asyncio.sleep(0)
        return await super().extend(receipt_id, hold)


class Rush:
    def __init__(self, seed: int, limit: int, hold: int, slowest: int, turns: int, *, learns: bool) -> None:
        draw = random.Random(seed)
        self.clock, self.ids = ManualClock(), SequentialIds()
        self.draw, self.slowest = draw, slowest
        shares = StepTimeShares(self.clock, self.ids)
        self.meter = Meter(self.clock, "gw", self.ids, shares) if learns else Meter(self.clock, "gw", self.ids)
        self.meter.add_device("fake", PLACEMENT)
        self.meter.device_state("fake", DeviceState.UP, self.clock.monotonic_ns())
        self.ledger = SlowLedger(draw, turns)
        self.budget = Budget(name="small", limit=Money(limit * MILLICENT), every=Every.ONCE)
        self.begun_ns = self.clock.now_ns()
        self.backend = FakeBackend(self.answer, observer=self.meter, clock=self.clock, sleep=self.work)
        self.pipeline = Pipeline(
            backends=[self.backend],
            ledger=self.ledger,
            meter=self.meter,
            placements={"fake": PLACEMENT},
            clock=self.clock,
            limits=LimitsConfig(),
            fits=shares if learns else None,
            hold=lambda plan: Money(hold * MILLICENT) if plan.maximum is None else plan.maximum,
        )

    def answer(self, request: Request) -> FakeAnswer:
        del request
        chunks = tuple(Text("x", 1) for _ in range(self.draw.randrange(1, 12)))
        return FakeAnswer(chunks, delay_s=1.0, input_tokens=self.draw.randrange(1, 400))

    async def work(self, _: float) -> None:
        """Mostly a millisecond; now and then a step that nobody could foresee."""
        await asyncio.sleep(0)
        slow = self.draw.random() < 0.1
        self.clock.advance(self.draw.randrange(1, self.slowest + 1) * NS_PER_MS if slow else NS_PER_MS)

    async def call(self, number: int, patience: int) -> Receipt | None:
        """`patience`: after so many pieces the client leaves; 0: it doesn't."""
        cost = OutsideCost("retrieval", "other", Decimal(1), "item", Money(MILLICENT))
        request = Request(
            id=self.ids.new("rcpt"),
            dialect="test",
            model="fake",
            prompt="x",
            outside_costs=(cost,) if number % 5 == 0 else (),
            max_cost=Money(9 * MILLICENT) if number % 7 == 0 else None,
        )
        for _ in range(self.draw.randrange(30)):
            await asyncio.sleep(0)
        try:
            answer = await self.pipeline.admit(request)
        except PaymentRequired:
            return None
        while await answer.take() is not None:
            patience -= 1
            if patience == 0:
                answer.cancel()
        assert answer.settled is not None
        if request.max_cost is not None:
            own = answer.settled.total - Money.total(cost.amount for cost in request.outside_costs)  # type: ignore[operator]
            assert own <= request.max_cost
        return answer.settled

    async def run(self) -> list[Receipt]:
        budget = self.budget
        await self.ledger.write(lambda connection: put_budget(connection, budget))
        await self.pipeline.start()
        found = await asyncio.gather(*(self.call(number, self.draw.randrange(40)) for number in range(CALLS)))
        await self.pipeline.drain(10)
        await self.pipeline.close()
        return [receipt for receipt in found if receipt is not None]

    async def spent(self) -> tuple[Money, Money]:
        [balance] = await self.ledger.write(
            lambda connection: read_balances(connection, self.budget, self.clock.now_ns())
        )
        return balance.spent, balance.held


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    limit=st.integers(0, 300),
    hold=st.integers(1, 40),
    slowest=st.sampled_from([1, 10, 1000]),
    turns=st.sampled_from([0, 3, 50]),
    learns=st.booleans(),
)
def test_a_hard_budget_is_never_overspent_and_every_account_balances(
    seed: int, limit: int, hold: int, slowest: int, turns: int, learns: bool
) -> None:
    async def story() -> None:
        rush = Rush(seed, limit, hold, slowest, turns, learns=learns)
        receipts = await rush.run()
        spent, held = await rush.spent() if receipts else (Money(0), Money(0))
        totals = [receipt.total for receipt in receipts]
        assert spent == Money.total(total for total in totals if total is not None)
        assert spent <= rush.budget.limit
        assert held == Money(0)
        for receipt in receipts:
            assert receipt.total is not None
            assert receipt.hold is not None
            assert receipt.total <= receipt.hold
        accounts = rush.ledger.queries.accounts(0, 2**62)
        served_ns = sum(receipt.accelerator.serving_ns for receipt in receipts)
        assert sum(account.serving_ns for account in accounts) == served_ns
        for account in accounts:
            used_ns = account.serving_ns + account.overhead_ns + account.lost_ns + account.down_ns
            assert used_ns + account.idle_ns == account.wall_ns * account.accelerators
        # Work was all that happened, so what nobody pays for is the operator's, and no time is idle.
        wall_ns = sum(account.wall_ns for account in accounts)
        assert wall_ns == rush.clock.now_ns() - rush.begun_ns
        assert rush.ledger.queries.verify() == []

    asyncio.run(asyncio.wait_for(story(), 60))


def test_a_step_that_nobody_could_foresee_is_charged_up_to_the_hold_and_the_receipt_says_so() -> None:
    async def story() -> None:
        async def one_slow_step(_: float) -> None:
            await asyncio.sleep(0.001)
            rush.clock.advance(1000 * NS_PER_MS)

        rush = Rush(5, 30, 20, 1, 0, learns=False)
        rush.backend.sleep = one_slow_step
        await rush.ledger.write(lambda connection: put_budget(connection, rush.budget))
        receipt = await rush.call(1, 0)
        await rush.pipeline.drain(10)
        assert receipt is not None
        assert (receipt.finish_reason, receipt.total) == ("length", Money(20 * MILLICENT))
        assert receipt.accelerator.serving_ns == 20 * 2 * NS_PER_MS
        [line] = receipt.lines
        assert line.note == "1.96 s beyond what it may cost are not charged"

    asyncio.run(asyncio.wait_for(story(), 60))
