"""For any schedule: every nanosecond of every device-hour has exactly one owner, and repeating anything adds nothing.

The expectation is worked out from the raw events by another way than the meter's: intervals on a line, exact fractions.
"""

from __future__ import annotations

import sqlite3
import weakref
from collections import defaultdict
from contextlib import contextmanager
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import msgspec
from hypothesis import example, given, settings
from hypothesis import strategies as st

from millicent.core.accounts import Checkpoint
from millicent.core.clock import NS_PER_HOUR, NS_PER_S, ManualClock, hours_between
from millicent.core.identifiers import SequentialIds
from millicent.core.money import Money
from millicent.core.receipts import Attempt, HourShare, Receipt, Role, Status
from millicent.core.steps import DeviceState, Overhead, OverheadKind, SequenceWork, StepRecord
from millicent.core.usage import Provenance
from millicent.ledger.queries import LedgerQueries, ReceiptFilter
from millicent.ledger.recovery import recover
from millicent.ledger.schema import migrate
from millicent.ledger.store import close_receipt, open_receipt, write_checkpoint
from millicent.meter.meter import Meter
from millicent.meter.placements import Placement
from millicent.meter.pricing import price

if TYPE_CHECKING:
    from collections.abc import Iterator

DEVICE = "cpu:0"
RATE = Decimal("2.5")


class World(LedgerQueries):
    """A gateway over one device: its meter, a ledger's tables, and beside them what really happened."""

    def __init__(self, accelerators: int) -> None:
        self.accelerators = accelerators
        self.clock = ManualClock(start_ns=1_767_225_600 * NS_PER_S + 17)
        self.ids = SequentialIds()
        self.connection = sqlite3.connect(":memory:", isolation_level=None)
        migrate(self.connection, self.clock)
        self.placement = Placement("cpu", accelerators, RATE, Provenance.MEASURED)
        self.gateways = 0
        self.running: dict[str, tuple[int, Receipt]] = {}
        self.closes: list[tuple[Receipt, tuple[HourShare, ...]]] = []
        self.checkpoints: list[Checkpoint] = []
        self.sequence = 0
        self.steps = 0
        # What really happened: served fractions by receipt, and by hour everything else.
        self.served: dict[str, Fraction] = defaultdict(Fraction)
        self.true_hours: dict[str, dict[int, Fraction]] = defaultdict(lambda: defaultdict(Fraction))
        self.start()

    @contextmanager
    def _snapshot(self) -> Iterator[sqlite3.Connection | None]:
        yield self.connection

    def _is_live(self, gateway: str) -> bool:
        return gateway == self.gateway

    def start(self) -> None:
        self.gateways += 1
        self.gateway = f"gw_{self.gateways}"
        self.running = {}
        self.state = DeviceState.DOWN
        self.begun_ns = self.reported_ns = self.clock.now_ns()
        self.meter = Meter(self.clock, self.gateway, self.ids)
        self.meter.add_device(DEVICE, self.placement, self.accelerators)
        self.checkpoint()
        self.set_state(DeviceState.UP)

    def happened(self, what: str, start_ns: int, end_ns: int) -> None:
        for hour_ns, part_ns in hours_between(start_ns, end_ns):
            self.true_hours[what][hour_ns] += part_ns * self.accelerators

    def pass_time(self, ns: int) -> None:
        start_ns = self.clock.now_ns()
        self.clock.advance(ns)
        if self.state is DeviceState.DOWN:
            self.happened("down", start_ns, self.clock.now_ns())

    def set_state(self, state: DeviceState) -> None:
        self.state = state
        self.meter.device_state(DEVICE, state, self.clock.monotonic_ns())

    def open(self) -> None:
        self.sequence += 1
        now_ns = self.clock.now_ns()
        receipt = Receipt(
            id=self.ids.new("rcpt"),
            created_at_ns=now_ns,
            model="m",
            dialect="openai",
            stream=False,
            attempts=(Attempt(1, "local", "cpu", "m", Role.INFERENCE, now_ns),),
            prices=self.placement.prices,
        )
        self.meter.open(receipt.id, 1, (self.sequence,))
        open_receipt(self.connection, receipt, self.gateway)
        self.running[receipt.id] = (self.sequence, receipt)

    def close(self, pick: int) -> None:
        if not self.running:
            return
        receipt_id = sorted(self.running)[pick % len(self.running)]
        _, receipt = self.running.pop(receipt_id)
        reading = self.meter.close(receipt_id)
        now_ns = self.clock.now_ns()
        attempts = tuple(
            msgspec.structs.replace(attempt, ended_at_ns=now_ns, status=Status.SUCCEEDED)
            for attempt in receipt.attempts
        )
        closed = msgspec.structs.replace(
            receipt,
            status=Status.SUCCEEDED,
            settled_at_ns=now_ns,
            accelerator=reading.accelerator,
            lines=price(reading, attempts, self.placement, now_ns).lines,
            attempts=attempts,
        )
        close_receipt(self.connection, closed, reading.shares, self.gateway)
        self.closes.append((closed, reading.shares))

    def step(self, wall_ns: int, mask: int, *, stranger: bool) -> None:
        """A forward pass of some running sequences, and perhaps of one that nobody knows."""
        if self.state is DeviceState.DOWN:
            return
        chosen = [self.running[name] for i, name in enumerate(sorted(self.running)) if mask >> i & 1]
        numbers = [number for number, _ in chosen] + ([10**9] if stranger else [])
        if not numbers:
            return
        start_mono_ns, start_ns = self.clock.monotonic_ns(), self.clock.now_ns()
        self.pass_time(wall_ns)
        self.steps += 1
        works = tuple(SequenceWork(number, number % 3, 1 - (number % 3 > 0), 1, 9) for number in numbers)
        self.meter.step(StepRecord(DEVICE, "m", self.steps, start_mono_ns, wall_ns, works))
        part = Fraction(wall_ns * self.accelerators, len(numbers))
        for _, receipt in chosen:
            self.served[receipt.id] += part
        for hour_ns, piece_ns in hours_between(start_ns, self.clock.now_ns()):
            share = Fraction(piece_ns * self.accelerators, len(numbers))
            self.true_hours["serving"][hour_ns] += share * len(chosen)
            self.true_hours["lost"][hour_ns] += share * (len(numbers) - len(chosen))

    def overhead(self, wall_ns: int) -> None:
        if self.state is DeviceState.UP:
            start_mono_ns, start_ns = self.clock.monotonic_ns(), self.clock.now_ns()
            self.pass_time(wall_ns)
            self.meter.overhead(Overhead(DEVICE, "m", OverheadKind.LOAD, start_mono_ns, wall_ns))
            self.happened("overhead", start_ns, self.clock.now_ns())

    def engine_crash(self, wall_ns: int) -> None:
        """The engine dies in the middle of a step, and is gone until it is up again."""
        if self.state is DeviceState.UP:
            start_mono_ns, start_ns = self.clock.monotonic_ns(), self.clock.now_ns()
            self.pass_time(wall_ns)
            self.happened("lost", start_ns, self.clock.now_ns())
            self.set_state(DeviceState.DOWN)
            self.meter.lost(DEVICE, start_mono_ns, wall_ns)

    def checkpoint(self) -> None:
        checkpoint = self.meter.checkpoint()
        write_checkpoint(self.connection, checkpoint)
        self.checkpoints.append(checkpoint)
        if len(self.checkpoints) % 2:
            self.meter.written(checkpoint)

    def replay(self, pick: int) -> None:
        if self.closes:
            receipt, shares = self.closes[pick % len(self.closes)]
            close_receipt(self.connection, receipt, shares, self.gateway)
        write_checkpoint(self.connection, self.checkpoints[pick % len(self.checkpoints)])

    def crash(self, gone_ns: int) -> None:
        self.clock.advance(gone_ns)
        recover(self.connection, self.gateway, self.clock.now_ns())
        recover(self.connection, self.gateway, self.clock.now_ns())
        self.start()

    def stop(self) -> None:
        while self.running:
            self.close(0)
        write_checkpoint(self.connection, self.meter.stop())

    def balance(self) -> None:
        accounts = self.accounts(0, 2**62)
        posted: dict[int, int] = defaultdict(int)
        for hour_ns, serving_ns in self.connection.execute("SELECT hour_ns, serving_ns FROM device_time"):
            posted[hour_ns] += serving_ns
        for account in accounts:
            used_ns = account.serving_ns + account.overhead_ns + account.lost_ns + account.down_ns
            assert used_ns + account.idle_ns == account.wall_ns * account.accelerators
            assert account.idle_ns >= 0
            assert account.serving_ns == posted.pop(account.hour_ns, 0)
        assert not any(posted.values())
        receipts = self.receipts(ReceiptFilter(), limit=10**6).receipts
        assert sum(account.serving_ns for account in accounts) == sum(r.accelerator.serving_ns for r in receipts)
        closed = [receipt for receipt in receipts if receipt.status is not None]
        totals = self.totals("model", ReceiptFilter())
        assert sum(total.requests for total in totals) == len(closed)
        assert sum(total.serving_ns for total in totals) == sum(r.accelerator.serving_ns for r in closed)
        assert Money.total(total.cost for total in totals) == Money.total(r.total for r in closed if r.total)
        for receipt in receipts:
            accelerator = receipt.accelerator
            assert accelerator.prefill_ns + accelerator.decode_ns == accelerator.serving_ns


durations = st.one_of(
    st.integers(1, 5 * NS_PER_S), st.integers(1, 7), st.integers(NS_PER_HOUR // 3, 2 * NS_PER_HOUR + 1)
)
quiet_events = [
    st.tuples(st.just("pass_time"), durations),
    st.just(("open",)),
    st.just(("open",)),
    st.tuples(st.just("close"), st.integers(0, 9)),
    st.tuples(st.just("step"), durations, st.integers(1, 63)),
    st.tuples(st.just("step"), durations, st.integers(1, 63)),
    st.tuples(st.just("stranger"), durations, st.integers(0, 63)),
    st.tuples(st.just("overhead"), durations),
    st.tuples(st.just("engine_crash"), durations),
    st.just(("up",)),
    st.just(("checkpoint",)),
    st.tuples(st.just("replay"), st.integers(0, 99)),
]
crash_events = [*quiet_events, st.tuples(st.just("crash"), st.one_of(st.just(0), durations))]


def perform(world: World, event: tuple[Any, ...]) -> None:
    name, *values = event
    if name == "up":
        world.set_state(DeviceState.UP)
    elif name in {"step", "stranger"}:
        world.step(*values, stranger=name == "stranger")
    else:
        getattr(world, name)(*values)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3), st.lists(st.one_of(quiet_events), max_size=40))
def test_without_a_crash_every_account_is_what_happened(accelerators: int, events: list[tuple[Any, ...]]) -> None:
    world = World(accelerators)
    weakref.finalize(world, world.connection.close)
    for event in events:
        perform(world, event)
        world.balance()
    world.stop()
    world.balance()
    assert world.verify() == []
    assert world.count_open() == 0
    accounts = world.accounts(0, 2**62)
    assert sum(account.wall_ns for account in accounts) == world.clock.now_ns() - world.begun_ns
    truth = world.true_hours
    for account in accounts:
        hour_ns = account.hour_ns
        assert account.overhead_ns == truth["overhead"][hour_ns]
        assert account.down_ns == truth["down"][hour_ns]
        assert account.serving_ns + account.lost_ns == truth["serving"][hour_ns] + truth["lost"][hour_ns]
        # A share is within one nanosecond of its exact fraction, for each piece of each step.
        assert abs(account.lost_ns - truth["lost"][hour_ns]) <= world.steps
    for receipt, _ in world.closes:
        assert abs(receipt.accelerator.serving_ns - world.served[receipt.id]) <= 4 * world.steps
        assert receipt.total == Money.of_time(receipt.accelerator.serving_ns, RATE)


@settings(max_examples=150, deadline=None)
@example(1, [("open",), ("checkpoint",), ("step", 7, 1), ("checkpoint",), ("replay", 1)])
@given(st.integers(1, 3), st.lists(st.one_of(crash_events), max_size=40))
def test_through_any_crashes_every_account_balances(accelerators: int, events: list[tuple[Any, ...]]) -> None:
    world = World(accelerators)
    weakref.finalize(world, world.connection.close)
    begun_ns = world.begun_ns
    for event in events:
        perform(world, event)
        world.balance()
    world.crash(NS_PER_S)
    world.stop()
    world.balance()
    assert world.verify() == []
    assert world.count_open() == 0
    accounts = world.accounts(0, 2**62)
    assert sum(account.wall_ns for account in accounts) == world.clock.now_ns() - begun_ns
    # A crash can only move time from who was served to lost and down, never give anybody more.
    for receipt in world.receipts(ReceiptFilter(), limit=10**6).receipts:
        assert receipt.accelerator.serving_ns <= world.served[receipt.id] + 4 * world.steps
