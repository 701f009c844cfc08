"""What was asked is read again in the order in which it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from millicent.core.errors import InvalidRequest
from millicent.core.money import Money
from millicent.core.receipts import Receipt, Status
from millicent.core.request import Attribution
from millicent.ledger.memory import MemoryLedger
from millicent.ledger.prompts import Asked
from millicent.ledger.queries import LedgerQueries, ReceiptFilter

Make = Callable[..., Receipt]


def test_what_was_asked_comes_oldest_first_page_by_page_with_its_cost(opened: Make, closed: Make) -> None:
    async def story() -> None:
        ledger = MemoryLedger()
        for number in (3, 1, 2, 5, 4):
            open_one = opened(number, attribution=Attribution(feature="odd" if number % 2 else "even"))
            await ledger.close(closed(open_one, nanousd=None if number == 2 else 10 * number), ())
        await ledger.open(opened(6))
        found: list[Asked] = []
        after = None
        while True:
            page = ledger.queries.asked(ReceiptFilter(), limit=2, after=after)
            found += page.asked
            if (after := page.next) is None:
                break
        assert [each.receipt.id for each in found] == [f"rcpt_{number:04d}" for number in range(1, 6)]
        assert [each.cost for each in found] == [Money(10), None, Money(30), Money(40), Money(50)]
        kept = [each.receipt.prompt for each in found]
        assert [prompt.segments[1].length for prompt in kept if prompt is not None] == [1, 2, 3, 4, 5]
        odd = ledger.queries.asked(ReceiptFilter(feature="odd", from_ns=found[1].receipt.created_at_ns))
        assert [each.receipt.id for each in odd.asked] == ["rcpt_0003", "rcpt_0005"]
        with pytest.raises(InvalidRequest, match="after: no receipt rcpt_9"):
            ledger.queries.asked(ReceiptFilter(), after="rcpt_9")

    asyncio.run(story())


def test_a_receipt_of_before_prompts_were_hashed_has_none(opened: Make, closed: Make, tmp_path: Path) -> None:
    async def story() -> None:
        ledger = MemoryLedger()
        await ledger.close(closed(opened(1, prompt=None)), ())
        (only,) = ledger.queries.asked(ReceiptFilter()).asked
        assert (only.receipt.prompt, only.receipt.status) == (None, Status.SUCCEEDED)

    asyncio.run(story())
    assert LedgerQueries(tmp_path / "none.db").asked(ReceiptFilter()).asked == ()


def test_what_was_asked_is_fixed_when_the_receipt_is_opened(opened: Make, closed: Make) -> None:
    async def story() -> None:
        ledger = MemoryLedger()
        open_one = opened(1)
        await ledger.open(open_one)
        await ledger.close(closed(msgspec.structs.replace(open_one, prompt=None)), ())
        (only,) = ledger.queries.asked(ReceiptFilter()).asked
        assert only.receipt.prompt == open_one.prompt

    asyncio.run(story())
