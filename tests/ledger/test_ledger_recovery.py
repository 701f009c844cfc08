"""What a crash leaves behind, and what becomes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from millicent.core.accounts import Account, Checkpoint, DeviceSession, HourTime, Reading
from millicent.core.clock import NS_PER_HOUR, NS_PER_S, ManualClock
from millicent.core.errors import LedgerUnavailable
from millicent.core.money import Money
from millicent.core.receipts import RATE_KEY, Accelerator, HourShare, PriceSource, Receipt, Role, Status
from millicent.core.usage import Leaf, Provenance, Usage
from millicent.ledger.config import LedgerConfig
from millicent.ledger.queries import LedgerQueries, ReceiptFilter
from millicent.ledger.sqlite import SqliteLedger

Make = Callable[..., Receipt]
T0 = ManualClock().now_ns()


class Machine:
    """One ledger file, gateways that die on it, and a clock."""

    def __init__(self, home: Path) -> None:
        self.clock = ManualClock()
        self.path = home / "ledger.db"
        self.queries = LedgerQueries(self.path)

    def gateway(self, name: str) -> SqliteLedger:
        return SqliteLedger(self.path, LedgerConfig(), self.clock, name)

    def live_and_die(self, life: Callable[[SqliteLedger], Coroutine[Any, Any, None]], name: str = "gw_1") -> None:
        """What `stop` leaves is what a crash after the last commit leaves: nothing is settled."""

        async def run() -> None:
            ledger = self.gateway(name)
            await ledger.start()
            await life(ledger)
            await ledger.stop()

        asyncio.run(run())

    def recover(self, name: str = "gw_2") -> None:
        async def nothing(ledger: SqliteLedger) -> None:
            return

        self.live_and_die(nothing, name)

    def account(self, hour: int = 0) -> Account:
        (account,) = self.queries.accounts(T0 + hour * NS_PER_HOUR, T0 + hour * NS_PER_HOUR + 1)
        parts = account.serving_ns + account.overhead_ns + account.lost_ns + account.idle_ns + account.down_ns
        assert parts == account.wall_ns * account.accelerators
        assert account.idle_ns >= 0
        return account


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def session(
    seen_ns: int, *, busy: bool = True, hours: tuple[HourTime, ...] | None = None, acc: int = 1
) -> DeviceSession:
    return DeviceSession(
        id="sess_1",
        gateway="gw_1",
        device="cpu:0",
        placement="cpu",
        accelerators=acc,
        usd_per_hour=Decimal("3.60"),
        rate_provenance=Provenance.MEASURED,
        started_at_ns=T0,
        seen_at_ns=T0 + seen_ns,
        busy=busy,
        closed=False,
        hours=(HourTime(T0, seen_ns),) if hours is None else hours,
    )


def reading(receipt: Receipt, serving_ns: int) -> Reading:
    accelerator = Accelerator(serving_ns, serving_ns, 0, 2, 6, Provenance.MEASURED)
    usage = Usage.of(Provenance.MEASURED, input_fresh=11, output_text=4)
    return Reading(receipt.id, usage, accelerator, (HourShare(1, "sess_1", T0, serving_ns),))


def test_an_interrupted_receipt_is_closed_from_its_last_checkpoint_as_an_estimate(
    machine: Machine, opened: Make
) -> None:
    async def life(ledger: SqliteLedger) -> None:
        await ledger.open(opened(1))
        await ledger.checkpoint(Checkpoint(T0, (session(NS_PER_S),), (reading(opened(1), NS_PER_S // 2),)))

    machine.live_and_die(life)
    machine.clock.advance(10 * NS_PER_S)
    machine.recover()
    receipt = machine.queries.receipt(opened(1).id)
    assert receipt is not None
    assert receipt.status is Status.INTERRUPTED
    assert receipt.settled_at_ns == T0 + 10 * NS_PER_S
    assert receipt.usage.leaves[Leaf.OUTPUT_TEXT].tokens == 4
    assert {count.provenance for count in receipt.usage.leaves.values()} == {Provenance.ESTIMATED}
    assert receipt.accelerator == Accelerator(NS_PER_S // 2, NS_PER_S // 2, 0, 2, 6, Provenance.ESTIMATED)
    (line,) = receipt.lines
    assert (line.amount, line.provenance) == (Money(500_000), Provenance.ESTIMATED)
    (attempt,) = receipt.attempts
    assert (attempt.status, attempt.ended_at_ns) == (Status.INTERRUPTED, T0 + 10 * NS_PER_S)
    assert machine.queries.count_open() == 0
    assert machine.queries.verify() == []


def test_recovering_again_adds_nothing(machine: Machine, opened: Make) -> None:
    async def life(ledger: SqliteLedger) -> None:
        await ledger.open(opened(1))
        await ledger.checkpoint(Checkpoint(T0, (session(NS_PER_S),), (reading(opened(1), 5),)))

    machine.live_and_die(life)
    machine.clock.advance(2 * NS_PER_S)
    machine.recover()
    once = machine.queries.receipts(ReceiptFilter()), machine.queries.accounts(0, 2**62)
    machine.clock.advance(2 * NS_PER_S)
    machine.recover("gw_3")
    assert (machine.queries.receipts(ReceiptFilter()), machine.queries.accounts(0, 2**62)) == once


def test_an_interrupted_receipt_costs_at_most_its_hold(machine: Machine, opened: Make) -> None:
    async def life(ledger: SqliteLedger) -> None:
        await ledger.open(opened(1, hold=Money(70)))
        await ledger.checkpoint(Checkpoint(T0, (session(NS_PER_S),), (reading(opened(1), NS_PER_S),)))

    machine.live_and_die(life)
    machine.recover()
    receipt = machine.queries.receipt(opened(1).id)
    assert receipt is not None
    assert receipt.total == Money(70)
    assert "hold" in str(receipt.lines[0].note)


def test_the_rate_on_the_receipt_goes_before_the_sessions(machine: Machine, opened: Make) -> None:
    standard = PriceSource("placements.cpu", {RATE_KEY: "7.20"})

    async def life(ledger: SqliteLedger) -> None:
        await ledger.open(opened(1, prices=standard, basis="standard"))
        await ledger.checkpoint(Checkpoint(T0, (session(NS_PER_S),), (reading(opened(1), NS_PER_S),)))

    machine.live_and_die(life)
    machine.recover()
    receipt = machine.queries.receipt(opened(1).id)
    assert receipt is not None
    assert (receipt.total, receipt.basis, receipt.prices) == (Money(2_000_000), "standard", standard)


def test_a_price_on_an_assumed_rate_stays_assumed(machine: Machine, opened: Make) -> None:
    assumed = msgspec.structs.replace(session(NS_PER_S), rate_provenance=Provenance.ASSUMED)

    async def life(ledger: SqliteLedger) -> None:
        await ledger.open(opened(1))
        await ledger.checkpoint(Checkpoint(T0, (assumed,), (reading(opened(1), 9),)))

    machine.live_and_die(life)
    machine.recover()
    receipt = machine.queries.receipt(opened(1).id)
    assert receipt is not None
    assert receipt.lines[0].provenance is Provenance.ASSUMED


def test_a_receipt_without_device_time_to_know_is_unpriced_never_zero(machine: Machine, opened: Make) -> None:
    async def life(ledger: SqliteLedger) -> None:
        await ledger.open(opened(1))

    machine.live_and_die(life)
    machine.recover()
    receipt = machine.queries.receipt(opened(1).id)
    assert receipt is not None
    assert (receipt.total, receipt.accelerator.provenance) == (None, Provenance.UNKNOWN)


API = {"kind": "api", "input": "3", "input_cached": "0.3", "output": "15", "discount": "0.1", "request_fee": "0.001"}


def of_tokens(**tokens: int) -> Reading:
    usage = Usage.of(Provenance.ESTIMATED, **tokens)
    return Reading("rcpt_0001", usage, Accelerator())


@pytest.mark.parametrize(
    ("seen", "prices", "hold", "amounts"),
    [
        # (1000 x 3 + 200 x 15) / 10^6 x 0.9, and 0.001 x 0.9
        ({"input_fresh": 1000, "output_text": 200}, API, 10**9, [2_700_000, 2_700_000, 900_000]),
        ({"input_fresh": 1000, "input_cache_read": 0, "output_text": 200}, API, 3_000_000, [2_700_000, 300_000, 0]),
        ({"input_fresh": 1000, "output_text": 200}, {"kind": "api", "input": "3"}, 10**9, []),
        ({"input_fresh": 1000, "output_reasoning": 200}, API, 10**9, []),
        ({}, API, 10**9, []),
    ],
)
def test_what_had_come_of_an_answer_that_is_paid_by_the_token_is_priced_within_the_hold(
    machine: Machine, opened: Make, seen: dict[str, int], prices: dict[str, str], hold: int, amounts: list[int]
) -> None:
    receipt = opened(1, prices=PriceSource("prices.m", prices), hold=Money(hold))

    async def life(ledger: SqliteLedger) -> None:
        await ledger.open(receipt)
        await ledger.checkpoint(Checkpoint(T0, (), (of_tokens(**seen),)))

    machine.live_and_die(life)
    machine.recover()
    found = machine.queries.receipt(receipt.id)
    assert found is not None
    assert [line.amount for line in found.lines] == [Money(each) for each in amounts]
    assert {line.provenance for line in found.lines} <= {Provenance.ESTIMATED}
    assert found.total == (Money(sum(amounts)) if amounts else None)
    assert machine.queries.verify() == []


def test_a_later_attempt_is_not_charged_for_what_an_earlier_one_used(machine: Machine, opened: Make) -> None:
    receipt = opened(1, prices=PriceSource("prices.m", API), hold=Money(10**9))
    (first,) = receipt.attempts
    ended = msgspec.structs.replace(first, ended_at_ns=T0 + 1, status=Status.FAILED)
    again = msgspec.structs.replace(first, ordinal=2, role=Role.RETRY, started_at_ns=T0 + 1)

    async def life(ledger: SqliteLedger) -> None:
        await ledger.open(receipt)
        await ledger.checkpoint(Checkpoint(T0, (), (of_tokens(input_fresh=1000, output_text=200),)))
        assert await ledger.begin(msgspec.structs.replace(receipt, attempts=(ended, again)))

    machine.live_and_die(life)
    machine.recover()
    found = machine.queries.receipt(receipt.id)
    assert found is not None
    assert found.total is None


def test_a_receipt_priced_by_device_time_that_no_checkpoint_saw_costs_an_estimated_nothing(
    machine: Machine, opened: Make
) -> None:
    async def life(ledger: SqliteLedger) -> None:
        await ledger.open(opened(1, prices=PriceSource("placements.cpu", {RATE_KEY: "7.20"})))

    machine.live_and_die(life)
    machine.recover()
    receipt = machine.queries.receipt(opened(1).id)
    assert receipt is not None
    assert (receipt.total, receipt.lines[0].provenance) == (Money(0), Provenance.ESTIMATED)


def test_after_a_crash_a_busy_device_lost_a_second_and_was_down_since(machine: Machine) -> None:
    async def life(ledger: SqliteLedger) -> None:
        await ledger.checkpoint(Checkpoint(T0, (session(NS_PER_S, acc=2),), ()))

    machine.live_and_die(life)
    machine.clock.advance(10 * NS_PER_S)
    machine.recover()
    account = machine.account()
    assert (account.wall_ns, account.idle_ns) == (10 * NS_PER_S, 2 * NS_PER_S)
    assert (account.lost_ns, account.down_ns) == (2 * NS_PER_S, 16 * NS_PER_S)


def test_after_a_crash_an_idle_device_lost_nothing(machine: Machine) -> None:
    async def life(ledger: SqliteLedger) -> None:
        await ledger.checkpoint(Checkpoint(T0, (session(NS_PER_S, busy=False),), ()))

    machine.live_and_die(life)
    machine.clock.advance(3 * NS_PER_S)
    machine.recover()
    assert (machine.account().lost_ns, machine.account().down_ns) == (0, 2 * NS_PER_S)


def test_what_was_posted_after_the_last_sight_is_served_not_lost(machine: Machine, opened: Make, closed: Make) -> None:
    served_ns = NS_PER_S * 3 // 4

    async def life(ledger: SqliteLedger) -> None:
        await ledger.checkpoint(Checkpoint(T0, (session(NS_PER_S),), ()))
        await ledger.close(closed(opened(1), serving_ns=served_ns), (HourShare(1, "sess_1", T0, served_ns),))

    machine.live_and_die(life)
    machine.clock.advance(2 * NS_PER_S)
    machine.recover()
    account = machine.account()
    assert (account.serving_ns, account.lost_ns, account.down_ns) == (served_ns, NS_PER_S // 4, 0)
    assert account.idle_ns == NS_PER_S
    assert machine.queries.verify() == []


def test_a_gap_over_the_hour_is_split_at_the_hour(machine: Machine) -> None:
    last_half_second = NS_PER_HOUR - NS_PER_S // 2

    async def life(ledger: SqliteLedger) -> None:
        await ledger.checkpoint(Checkpoint(T0, (session(last_half_second),), ()))

    machine.live_and_die(life)
    machine.clock.advance(NS_PER_HOUR + NS_PER_S)
    machine.recover()
    assert (machine.account(0).wall_ns, machine.account(0).lost_ns) == (NS_PER_HOUR, NS_PER_S // 2)
    assert (machine.account(1).lost_ns, machine.account(1).down_ns) == (NS_PER_S // 2, NS_PER_S // 2)
    assert machine.queries.verify() == []


def test_with_the_clock_set_back_a_session_still_covers_what_was_posted(
    machine: Machine, opened: Make, closed: Make
) -> None:
    async def life(ledger: SqliteLedger) -> None:
        await ledger.checkpoint(Checkpoint(T0, (session(NS_PER_S),), ()))
        shares = (HourShare(1, "sess_1", T0, 2 * NS_PER_S),)
        await ledger.close(closed(opened(1), serving_ns=2 * NS_PER_S), shares)

    machine.live_and_die(life)
    machine.clock = ManualClock(start_ns=T0 - NS_PER_HOUR)
    machine.recover()
    assert (machine.account().serving_ns, machine.account().idle_ns) == (2 * NS_PER_S, 0)
    assert machine.queries.verify() == []


def test_a_gateway_that_lives_is_left_alone(machine: Machine, opened: Make) -> None:
    async def scenario() -> None:
        first, second = machine.gateway("gw_1"), machine.gateway("gw_2")
        await first.start()
        await first.open(opened(1))
        await second.start()
        assert await second.recover() == 0
        assert machine.queries.count_open() == 1
        assert machine.queries.verify() == []
        await first.stop()
        (problem,) = machine.queries.verify()
        assert "gw_1 is gone" in problem
        assert await second.recover() == 1
        assert machine.queries.verify() == []
        await second.stop()

    asyncio.run(scenario())


def test_two_gateways_cannot_go_by_one_name(machine: Machine) -> None:
    async def scenario() -> None:
        first, second = machine.gateway("gw_1"), machine.gateway("gw_1")
        await first.start()
        with pytest.raises(LedgerUnavailable, match="running already"):
            await second.start()
        await first.stop()
        await second.start()
        await second.stop()

    asyncio.run(scenario())


def test_a_gateway_settles_what_it_left_open_under_the_same_name(machine: Machine, opened: Make) -> None:
    async def life(ledger: SqliteLedger) -> None:
        await ledger.open(opened(1))

    machine.live_and_die(life)
    machine.recover("gw_1")
    assert machine.queries.count_open() == 0
