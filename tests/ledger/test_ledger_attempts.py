"""Several attempts at one answer: durable one by one, held for together, settled after a crash."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest

from millicent.core.budgets import Balance, Budget, Every
from millicent.core.clock import NS_PER_S, ManualClock
from millicent.core.money import Money
from millicent.core.receipts import Attempt, Line, Meter, PriceSource, Receipt, Role, Status
from millicent.core.usage import Provenance
from millicent.ledger.budgets import put_budget, read_balances
from millicent.ledger.config import LedgerConfig
from millicent.ledger.queries import LedgerQueries
from millicent.ledger.sqlite import SqliteLedger

Make = Callable[..., Receipt]
T0 = ManualClock().now_ns()
RATE = {"rate_usd_per_hour": "36"}  # a cent a second


def line(attempt: int, role: Role, nanousd: int | None) -> Line:
    return Line(
        attempt=attempt,
        role=role,
        meter=Meter.INPUT,
        quantity=Decimal(100),
        unit="token",
        unit_price_usd=None,
        amount=None if nanousd is None else Money(nanousd),
        provenance=Provenance.REPORTED,
        incurred_at_ns=T0,
        posted_at_ns=T0 + 5,
    )


def followed(receipt: Receipt, hold: int | None, *, spent: int | None = 400, placement: str = "far") -> Receipt:
    """The receipt with its last attempt failed and one more begun."""
    *earlier, last = receipt.attempts
    ended = msgspec.structs.replace(last, ended_at_ns=T0 + 5, status=Status.FAILED, error="down")
    after = Attempt(last.ordinal + 1, "openai", placement, "gpt", Role.RETRY, T0 + 6)
    return msgspec.structs.replace(
        receipt,
        attempts=(*earlier, ended, after),
        lines=(*receipt.lines, line(last.ordinal, last.role, spent)),
        hold=None if hold is None else Money(hold),
        backend="openai",
        placement=placement,
        served_model="gpt",
        prices=PriceSource(),
    )


def closed(receipt: Receipt, nanousd: int) -> Receipt:
    *earlier, last = receipt.attempts
    ended = msgspec.structs.replace(last, ended_at_ns=T0 + 9, status=Status.SUCCEEDED)
    return msgspec.structs.replace(
        receipt,
        attempts=(*earlier, ended),
        lines=(*receipt.lines, line(last.ordinal, last.role, nanousd)),
        status=Status.SUCCEEDED,
        settled_at_ns=T0 + 9,
    )


class Books:
    def __init__(self, home: Path) -> None:
        self.path = home / "ledger.db"
        self.queries = LedgerQueries(self.path)
        self.clock = ManualClock()

    def ledger(self, gateway: str = "gw_1") -> SqliteLedger:
        return SqliteLedger(self.path, LedgerConfig(), self.clock, gateway)

    def receipt(self, receipt_id: str) -> Receipt:
        found = self.queries.receipt(receipt_id)
        assert found is not None
        return found


@pytest.fixture
def books(tmp_path: Path) -> Books:
    return Books(tmp_path)


async def limit(ledger: SqliteLedger, nanousd: int) -> Budget:
    budget = Budget(name="b", limit=Money(nanousd), every=Every.ONCE)
    await ledger.write(lambda connection: put_budget(connection, budget))
    return budget


async def balance(ledger: SqliteLedger, budget: Budget) -> Balance:
    [found] = await ledger.write(lambda connection: read_balances(connection, budget, T0))
    return found


def test_an_attempt_is_written_with_the_end_and_the_lines_of_the_one_before(books: Books, opened: Make) -> None:
    async def story() -> None:
        ledger = books.ledger()
        await ledger.start()
        first = opened(1, hold=Money(1_000))
        await ledger.open(first)
        second = followed(first, 1_400)
        for _ in range(2):  # it may be repeated
            assert await ledger.begin(second)
        assert books.receipt(first.id) == second
        assert books.queries.verify() == []
        done = closed(second, 700)
        await ledger.close(done, ())
        assert books.receipt(first.id) == done
        assert done.total == Money(1_100)
        with pytest.raises(ValueError, match="is not open"):
            await ledger.begin(followed(second, 2_000))
        assert books.queries.verify() == []
        await ledger.stop()

    asyncio.run(story())


def test_holds_grow_for_another_attempt_or_it_is_not_written(books: Books, opened: Make) -> None:
    async def story() -> None:
        ledger = books.ledger()
        await ledger.start()
        budget = await limit(ledger, 1_500)
        first = opened(1, hold=Money(1_000))
        assert await ledger.open(first)
        assert not await ledger.begin(followed(first, 1_501))
        assert not await ledger.begin(followed(first, None))  # nobody can say how much it takes
        assert books.receipt(first.id) == first
        second = followed(first, 1_500)
        assert await ledger.begin(second)
        assert (await balance(ledger, budget)).held == Money(1_500)
        # One that takes less than is held keeps what is held.
        third = followed(second, 1_200)
        assert await ledger.begin(third)
        assert (await balance(ledger, budget)).held == Money(1_500)
        await ledger.close(closed(third, 100), ())
        assert await balance(ledger, budget) == Balance("", 0, Money(900), Money(0))
        await ledger.stop()

    asyncio.run(story())


@pytest.mark.parametrize(
    ("prices", "costs"),
    [
        # An unpriced call may have cost anything: what was held is booked.
        (PriceSource(), [400, None]),
        # A second of our own machine, as the last checkpoint has it, would cost a cent: no more than is held.
        (PriceSource("placements.far", RATE), [400, 0]),
    ],
)
def test_a_crash_in_a_later_attempt_keeps_what_the_earlier_ones_cost(
    books: Books, opened: Make, prices: PriceSource, costs: list[int | None]
) -> None:
    async def life() -> None:
        ledger = books.ledger()
        await ledger.start()
        await limit(ledger, 1_000_000)
        first = opened(1, hold=Money(1_000))
        await ledger.open(first)
        assert await ledger.begin(msgspec.structs.replace(followed(first, 1_400), prices=prices))
        await ledger.stop()

    async def after() -> None:
        ledger = books.ledger("gw_2")
        books.clock.advance(NS_PER_S)
        await ledger.start()
        receipt = books.receipt("rcpt_0001")
        assert [each.status for each in receipt.attempts] == [Status.FAILED, Status.INTERRUPTED]
        assert receipt.status is Status.INTERRUPTED
        assert [None if each.amount is None else each.amount.nanousd for each in receipt.lines] == costs
        assert [each.attempt for each in receipt.lines] == [1, 2]
        known = None not in costs
        assert receipt.total == (Money(400) if known else None)
        budget = Budget(name="b", limit=Money(1_000_000), every=Every.ONCE)
        assert await balance(ledger, budget) == Balance("", 0, Money(400 if known else 1_400), Money(0))
        assert books.queries.verify() == []
        await ledger.stop()

    asyncio.run(life())
    asyncio.run(after())


def test_receipts_of_several_attempts_teach_no_durations(books: Books, opened: Make) -> None:
    async def story() -> None:
        ledger = books.ledger()
        await ledger.start()
        for number, several in enumerate((False, True)):
            receipt = opened(number)
            await ledger.open(receipt)
            if several:
                receipt = followed(receipt, None)
                await ledger.begin(receipt)
            await ledger.close(closed(receipt, 100), ())
        assert [each.id for each in books.queries.recent(10)] == ["rcpt_0000"]
        await ledger.stop()

    asyncio.run(story())
