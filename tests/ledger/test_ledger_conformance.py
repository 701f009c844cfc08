"""What every ledger does, on disk or in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from millicent.core.accounts import Checkpoint, DeviceSession, HourTime, Reading
from millicent.core.clock import NS_PER_HOUR, NS_PER_S, ManualClock
from millicent.core.errors import InvalidRequest
from millicent.core.money import Money
from millicent.core.receipts import Accelerator, HourShare, Receipt, Role, Status
from millicent.core.request import Attribution
from millicent.core.usage import Provenance, Usage
from millicent.ledger.config import LedgerConfig
from millicent.ledger.memory import MemoryLedger
from millicent.ledger.queries import LedgerQueries, ReceiptFilter
from millicent.ledger.sqlite import SqliteLedger

Make = Callable[..., Receipt]
Test = Callable[[MemoryLedger | SqliteLedger, LedgerQueries], Coroutine[Any, Any, None]]
Run = Callable[[Test], None]

T0 = ManualClock().now_ns()


@pytest.fixture(params=["sqlite", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """Runs a test against a started ledger, then asks the ledger whether everything adds up."""

    async def against(test: Test) -> None:
        if request.param == "memory":
            memory = MemoryLedger("gw_1")
            await memory.start()
            await test(memory, memory.queries)
            assert memory.queries.verify() == []
            await memory.stop()
            return
        path = tmp_path / "ledger.db"
        sqlite = SqliteLedger(path, LedgerConfig(), ManualClock(), "gw_1")
        queries = LedgerQueries(path)
        await sqlite.start()
        try:
            await test(sqlite, queries)
            assert queries.verify() == []
        finally:
            await sqlite.stop()

    return lambda test: asyncio.run(against(test))


def session(*, seen_s: int, busy: bool = True, closed: bool = False, hours: tuple[HourTime, ...] = ()) -> DeviceSession:
    return DeviceSession(
        id="sess_1",
        gateway="gw_1",
        device="cpu:0",
        placement="cpu",
        accelerators=2,
        usd_per_hour=Decimal("0.90"),
        rate_provenance=Provenance.MEASURED,
        started_at_ns=T0,
        seen_at_ns=T0 + seen_s * NS_PER_S,
        busy=busy,
        closed=closed,
        hours=hours or (HourTime(T0, seen_s * NS_PER_S),),
    )


def first_checkpoint() -> Checkpoint:
    return Checkpoint(T0, (session(seen_s=0),), ())


def test_an_open_receipt_comes_back_as_it_was_written(run: Run, opened: Make) -> None:
    async def test(ledger: MemoryLedger | SqliteLedger, queries: LedgerQueries) -> None:
        receipt = opened(1, attribution=Attribution(key="k", user="u", tags={"a": "b"}))
        await ledger.open(receipt)
        assert queries.receipt(receipt.id) == receipt
        assert queries.count_open() == 1

    run(test)


def test_a_closed_receipt_comes_back_with_every_field(
    run: Run, opened: Make, closed: Make, shares: tuple[HourShare, ...]
) -> None:
    async def test(ledger: MemoryLedger | SqliteLedger, queries: LedgerQueries) -> None:
        await ledger.checkpoint(first_checkpoint())
        await ledger.open(opened(1))
        receipt = closed(opened(1))
        await ledger.close(receipt, shares)
        assert queries.receipt(receipt.id) == receipt
        assert queries.count_open() == 0

    run(test)


def test_a_receipt_that_was_never_opened_is_written_whole_when_it_closes(run: Run, opened: Make, closed: Make) -> None:
    async def test(ledger: MemoryLedger | SqliteLedger, queries: LedgerQueries) -> None:
        refused = closed(opened(1), status=Status.REFUSED, lines=(), accelerator=Accelerator(), error="over budget")
        await ledger.close(refused, ())
        assert queries.receipt(refused.id) == refused

    run(test)


def test_closing_again_changes_nothing_even_with_other_figures(
    run: Run, opened: Make, closed: Make, shares: tuple[HourShare, ...]
) -> None:
    async def test(ledger: MemoryLedger | SqliteLedger, queries: LedgerQueries) -> None:
        await ledger.checkpoint(first_checkpoint())
        receipt = closed(opened(1))
        await ledger.close(receipt, shares)
        await ledger.close(receipt, shares)
        await ledger.close(closed(opened(1), nanousd=9, serving_ns=9_000, error="late"), shares)
        await ledger.open(opened(1))
        assert queries.receipt(receipt.id) == receipt
        assert queries.totals("model", ReceiptFilter())[0].cost == Money(1_500)

    run(test)


def test_a_checkpoint_after_the_close_leaves_the_receipt_alone(
    run: Run, opened: Make, closed: Make, shares: tuple[HourShare, ...]
) -> None:
    async def test(ledger: MemoryLedger | SqliteLedger, queries: LedgerQueries) -> None:
        await ledger.checkpoint(first_checkpoint())
        receipt = closed(opened(1))
        await ledger.close(receipt, shares)
        stale = Reading(receipt.id, Usage(), Accelerator(), (HourShare(1, "sess_1", T0, 5),))
        await ledger.checkpoint(Checkpoint(T0 + 5, (session(seen_s=1),), (stale,)))
        assert queries.receipt(receipt.id) == receipt

    run(test)


def test_a_checkpoint_shows_on_the_running_receipt_and_repeating_it_adds_nothing(run: Run, opened: Make) -> None:
    async def test(ledger: MemoryLedger | SqliteLedger, queries: LedgerQueries) -> None:
        await ledger.open(opened(1))
        usage = Usage.of(Provenance.MEASURED, input_fresh=5)
        accelerator = Accelerator(NS_PER_S, NS_PER_S, 0, 1, 1, Provenance.MEASURED)
        reading = Reading(opened(1).id, usage, accelerator, (HourShare(1, "sess_1", T0, NS_PER_S),))
        checkpoint = Checkpoint(T0, (session(seen_s=2),), (reading,))
        await ledger.checkpoint(checkpoint)
        once = queries.receipt(opened(1).id), queries.accounts(T0, T0 + 1)
        await ledger.checkpoint(checkpoint)
        assert (queries.receipt(opened(1).id), queries.accounts(T0, T0 + 1)) == once
        assert once[0] is not None
        assert (once[0].usage, once[0].accelerator) == (usage, accelerator)

    run(test)


def test_an_older_checkpoint_does_not_turn_a_session_back(run: Run) -> None:
    async def test(ledger: MemoryLedger | SqliteLedger, queries: LedgerQueries) -> None:
        await ledger.checkpoint(Checkpoint(T0, (session(seen_s=5),), ()))
        await ledger.checkpoint(Checkpoint(T0, (session(seen_s=3),), ()))
        assert queries.accounts(T0, T0 + 1)[0].wall_ns == 5 * NS_PER_S
        await ledger.checkpoint(Checkpoint(T0, (session(seen_s=6, closed=True),), ()))
        await ledger.checkpoint(Checkpoint(T0, (session(seen_s=9),), ()))
        assert queries.accounts(T0, T0 + 1)[0].wall_ns == 6 * NS_PER_S

    run(test)


def test_an_account_is_the_equality_with_its_cost(
    run: Run, opened: Make, closed: Make, shares: tuple[HourShare, ...]
) -> None:
    async def test(ledger: MemoryLedger | SqliteLedger, queries: LedgerQueries) -> None:
        hours = (HourTime(T0, 10 * NS_PER_S, 300, 20, 1),)
        await ledger.checkpoint(Checkpoint(T0, (session(seen_s=10, hours=hours),), ()))
        await ledger.close(closed(opened(1)), shares)
        (account,) = queries.accounts(T0, T0 + NS_PER_HOUR)
        assert (account.serving_ns, account.overhead_ns, account.lost_ns, account.down_ns) == (700, 300, 20, 1)
        assert account.idle_ns == 20 * NS_PER_S - 1_021
        # 20 accelerator-seconds at $0.90 an hour.
        assert account.cost == Money(5_000_000)
        assert queries.accounts(T0 + NS_PER_HOUR, T0 + 2 * NS_PER_HOUR) == []
        assert queries.accounts(T0 - 5, T0) == []

    run(test)


def test_work_posted_after_the_last_checkpoint_stretches_the_wall_rather_than_making_idle_negative(
    run: Run, opened: Make, closed: Make
) -> None:
    async def test(ledger: MemoryLedger | SqliteLedger, queries: LedgerQueries) -> None:
        await ledger.checkpoint(first_checkpoint())
        await ledger.close(closed(opened(1), serving_ns=701), (HourShare(1, "sess_1", T0, 701),))
        (account,) = queries.accounts(T0, T0 + 1)
        assert (account.wall_ns, account.serving_ns, account.idle_ns) == (351, 701, 1)

    run(test)


def test_pages_walk_every_receipt_once_newest_first(run: Run, opened: Make) -> None:
    async def test(ledger: MemoryLedger | SqliteLedger, queries: LedgerQueries) -> None:
        for number in range(7):
            # Two of each share their creation time: the identifier decides.
            await ledger.open(opened(number, created_at_ns=T0 + number // 2))
        seen: list[str] = []
        after = None
        while True:
            page = queries.receipts(ReceiptFilter(), limit=3, after=after)
            seen += [receipt.id for receipt in page.receipts]
            after = page.next
            if after is None:
                break
        assert seen == [f"rcpt_{number:04d}" for number in reversed(range(7))]

    run(test)


def test_a_page_after_no_receipt_is_refused_by_name(run: Run) -> None:
    async def test(ledger: MemoryLedger | SqliteLedger, queries: LedgerQueries) -> None:
        with pytest.raises(InvalidRequest, match="rcpt_none") as refused:
            queries.receipts(ReceiptFilter(), after="rcpt_none")
        assert refused.value.param == "after"
        with pytest.raises(InvalidRequest, match="at least 1"):
            queries.receipts(ReceiptFilter(), limit=0)

    run(test)


@pytest.mark.parametrize("field", ["key", "team", "user", "feature", "tier", "conversation", "run"])
def test_receipts_are_filtered_by_whom_they_are_for(run: Run, opened: Make, field: str) -> None:
    async def test(ledger: MemoryLedger | SqliteLedger, queries: LedgerQueries) -> None:
        await ledger.open(opened(1, attribution=msgspec.structs.replace(Attribution(), **{field: "x"})))
        await ledger.open(opened(2, attribution=msgspec.structs.replace(Attribution(), **{field: "y"})))
        await ledger.open(opened(3))
        found = queries.receipts(msgspec.structs.replace(ReceiptFilter(), **{field: "x"})).receipts
        assert [receipt.id for receipt in found] == ["rcpt_0001"]

    run(test)


def test_receipts_are_filtered_by_model_status_and_time(run: Run, opened: Make, closed: Make) -> None:
    async def test(ledger: MemoryLedger | SqliteLedger, queries: LedgerQueries) -> None:
        none = {"accelerator": Accelerator()}
        await ledger.close(closed(opened(1, model="a"), **none), ())
        await ledger.close(closed(opened(2, model="b"), status=Status.FAILED, **none), ())
        await ledger.open(opened(3, model="b"))

        def found(**where: Any) -> list[str]:
            return [receipt.id[-1] for receipt in queries.receipts(ReceiptFilter(**where)).receipts]

        assert found(model="b") == ["3", "2"]
        assert found(status="failed") == ["2"]
        assert found(from_ns=T0 + 2) == ["3", "2"]
        assert found(to_ns=T0 + 2) == ["1"]
        assert found(model="b", status="failed", from_ns=T0, to_ns=T0 + 9) == ["2"]
        assert found(model="a", status="failed") == []

    run(test)


def test_totals_count_unpriced_assumed_and_unknown_apart(run: Run, opened: Make, closed: Make, unknown: Usage) -> None:
    async def test(ledger: MemoryLedger | SqliteLedger, queries: LedgerQueries) -> None:
        assumed = msgspec.structs.replace(closed(opened(1)).lines[0], provenance=Provenance.ASSUMED)
        none = {"accelerator": Accelerator()}
        search = Attribution(feature="search")
        await ledger.close(closed(opened(1, attribution=search), lines=(assumed,), **none), ())
        await ledger.close(closed(opened(2, attribution=search), nanousd=None, **none), ())
        await ledger.close(closed(opened(3, attribution=search), lines=(), usage=unknown, **none), ())
        await ledger.close(closed(opened(4), nanousd=7, **none), ())
        await ledger.open(opened(5, attribution=search))
        by_feature, unattributed = queries.totals("feature", ReceiptFilter())
        assert (by_feature.group, by_feature.requests, by_feature.cost) == ("search", 3, Money(1_500))
        assert (by_feature.unpriced, by_feature.assumed, by_feature.unknown_usage) == (2, 1, 1)
        assert (by_feature.input_tokens, by_feature.output_tokens) == (24, 6)
        assert (unattributed.group, unattributed.requests, unattributed.cost) == (None, 1, Money(7))
        assert queries.totals("feature", ReceiptFilter(feature="other")) == []

    run(test)


@pytest.mark.parametrize(
    ("by", "groups"),
    [
        ("user", ["u"]),
        ("team", ["t"]),
        ("model", ["smol"]),
        ("key", ["k"]),
        ("tier", ["gold"]),
        ("status", ["succeeded"]),
        ("day", ["2026-01-01", "2026-01-02"]),
        ("hour", ["2026-01-01T00:00:00Z", "2026-01-02T01:00:00Z"]),
    ],
)
def test_totals_group_by_every_dimension(run: Run, opened: Make, closed: Make, by: Any, groups: list[str]) -> None:
    async def test(ledger: MemoryLedger | SqliteLedger, queries: LedgerQueries) -> None:
        whom = Attribution(key="k", team="t", user="u", tier="gold")
        for number, created_at_ns in [(1, T0 + 25 * NS_PER_HOUR), (2, T0)]:
            receipt = opened(number, attribution=whom, created_at_ns=created_at_ns)
            await ledger.close(closed(receipt, accelerator=Accelerator()), ())
        totals = queries.totals(by, ReceiptFilter())
        assert [total.group for total in totals] == groups
        assert sum(total.cost.nanousd for total in totals) == 3_000

    run(test)


def test_a_further_attempt_is_opened_by_opening_again(run: Run, opened: Make) -> None:
    async def test(ledger: MemoryLedger | SqliteLedger, queries: LedgerQueries) -> None:
        receipt = opened(1)
        await ledger.open(receipt)
        retry = msgspec.structs.replace(receipt.attempts[0], ordinal=2, role=Role.RETRY)
        await ledger.open(msgspec.structs.replace(receipt, attempts=(*receipt.attempts, retry)))
        found = queries.receipt(receipt.id)
        assert found is not None
        assert [attempt.role for attempt in found.attempts] == [Role.INFERENCE, Role.RETRY]

    run(test)


def test_half_a_receipt_is_refused(run: Run, opened: Make, closed: Make) -> None:
    async def test(ledger: MemoryLedger | SqliteLedger, queries: LedgerQueries) -> None:
        with pytest.raises(ValueError, match="only an open one"):
            await ledger.open(closed(opened(1)))
        with pytest.raises(ValueError, match="cannot be closed"):
            await ledger.close(opened(1), ())
        assert queries.receipts(ReceiptFilter()).receipts == ()

    run(test)
