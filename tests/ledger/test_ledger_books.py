"""A new book of lines beside the one that stands."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest

from millicent.core.clock import ManualClock
from millicent.core.money import Money
from millicent.core.receipts import HourShare, Meter, Receipt, outside_line
from millicent.core.request import OutsideCost
from millicent.core.usage import Provenance
from millicent.ledger.config import LedgerConfig
from millicent.ledger.memory import MemoryLedger
from millicent.ledger.queries import LedgerQueries, ReceiptFilter
from millicent.ledger.sqlite import SqliteLedger
from millicent.meter.placements import Placement
from millicent.meter.prices import PriceBook
from millicent.meter.repricing import repriced
from support import receipts

DEARER = {"this-machine": Placement("this-machine", 1, Decimal("7.2"), Provenance.MEASURED)}


def at_dearer_prices(receipt: Receipt, placements: dict[str, Placement]) -> Receipt:
    lines = repriced(receipt, placements, PriceBook({}), 0, receipts.END_NS + 5, "dearer")
    return msgspec.structs.replace(receipt, lines=lines)


def test_a_receipt_is_repriced_from_its_measured_time() -> None:
    (line,) = at_dearer_prices(receipts.settled(), DEARER).lines
    # 0.25 s at $7.20 an hour
    assert (line.amount, line.book, line.meter) == (Money(500_000), "dearer", Meter.ACCELERATOR)
    assert (line.provenance, line.posted_at_ns) == (Provenance.MEASURED, receipts.END_NS + 5)


def test_without_the_placement_a_line_is_unpriced_not_free() -> None:
    (line,) = at_dearer_prices(receipts.settled(), {}).lines
    assert (line.amount, line.provenance) == (None, Provenance.UNKNOWN)


def test_time_that_nobody_knew_stays_unpriced() -> None:
    (line,) = at_dearer_prices(receipts.unknown(), DEARER).lines
    assert line.amount is None


def test_the_old_book_is_untouched_and_each_has_its_own_totals() -> None:
    async def story() -> None:
        ledger = MemoryLedger()
        receipt = receipts.settled()
        await ledger.close(receipt, (HourShare(1, "s", receipts.START_NS, 250_000_000),))
        lines = at_dearer_prices(receipt, DEARER).lines
        for _ in range(2):  # the second time adds nothing
            await ledger.add_lines({receipt.id: lines})
        kept = ledger.queries.receipt(receipt.id)
        assert kept is not None
        assert kept.total == receipt.total == Money(25_000)
        assert len(kept.lines) == 2
        assert ledger.queries.books() == ["actual", "dearer"]
        (actual,) = ledger.queries.totals("model", ReceiptFilter())
        (dearer,) = ledger.queries.totals("model", ReceiptFilter(), "dearer")
        (nothing,) = ledger.queries.totals("model", ReceiptFilter(), "empty")
        assert (actual.cost, dearer.cost, nothing.cost) == (Money(25_000), Money(500_000), Money(0))
        assert (actual.unpriced, dearer.unpriced, nothing.unpriced) == (0, 0, 1)

    asyncio.run(story())


def test_a_line_with_an_id_of_its_callers_is_repriced_without_it() -> None:
    async def story() -> None:
        ledger = MemoryLedger()
        receipt = receipts.settled()
        await ledger.close(receipt, (HourShare(1, "s", receipts.START_NS, 250_000_000),))
        cost = OutsideCost("retrieval", "other", Decimal(2), "query", Money(500), id="one")
        await ledger.post_lines(receipt.id, (outside_line(cost, receipts.END_NS + 1),))
        kept = ledger.queries.receipt(receipt.id)
        assert kept is not None
        await ledger.add_lines({receipt.id: at_dearer_prices(kept, DEARER).lines})
        (dearer,) = ledger.queries.totals("model", ReceiptFilter(), "dearer")
        assert dearer.cost == Money(500_500)

    asyncio.run(story())


def test_an_open_receipt_gets_no_book() -> None:
    async def story() -> None:
        ledger = MemoryLedger()
        await ledger.open(receipts.running())
        with pytest.raises(ValueError, match="not closed"):
            await ledger.add_lines({receipts.running().id: receipts.settled().lines})

    asyncio.run(story())


def test_what_was_answered_lately_is_there_to_learn_from(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    assert LedgerQueries(path).recent(5) == []

    async def story() -> None:
        ledger = SqliteLedger(path, LedgerConfig(), ManualClock(), "gw_1")
        await ledger.start()
        for number in range(3):
            receipt = receipts.settled(f"rcpt_{number}")
            await ledger.close(msgspec.structs.replace(receipt, created_at_ns=receipt.created_at_ns + number), ())
        await ledger.stop()

    asyncio.run(story())
    assert [receipt.id for receipt in LedgerQueries(path).recent(2)] == ["rcpt_1", "rcpt_2"]
