"""Who used the devices, and what they did in every nanosecond of the watch.

Each report claims an interval of its device's time. Claims never overlap: what was claimed before stays as it was, so
that a device-hour can never hold more than its wall time. A step's time is cut at UTC hours and split among its
sequences in integer nanoseconds; what nobody claims is idle.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from millicent.core.accounts import Checkpoint, DeviceSession, HourTime, Reading
from millicent.core.clock import NS_PER_HOUR, Clock, hour_start_ns, hours_between
from millicent.core.identifiers import Ids
from millicent.core.money import apportion
from millicent.core.receipts import Accelerator, HourShare
from millicent.core.steps import DeviceState, Overhead, StepRecord
from millicent.core.usage import Provenance, Usage, weakest
from millicent.meter.attribution import StepTimeShares
from millicent.meter.energy import EnergyAccount, EnergyShare, EnergySource
from millicent.meter.placements import Placement
from millicent.meter.step_log import StepLog

Shares = Callable[[StepRecord], Sequence[int]]
"""A step's sequences to the weights by which its time is split: whole numbers, none negative. Those that learn
(StepTimeShares) are also given calibrations, and name the fit they used."""


# The sequence, in the stretches of a device elsewhere, that stands for what other gateways and people have there.
OTHERS = 0

# A report of an idle device reaches the meter within a day of its start; older hours are settled and forgotten.
_REPORTED_WITHIN_NS = 24 * NS_PER_HOUR
# When a step is told of, the next one runs already, and one more begins before a cancellation arrives.
_STEPS_UNDER_WAY = 2
# With room for so many steps like the last one, the next needn't be foreseen.
_WATCHED_STEPS = 32


def equal_shares(record: StepRecord) -> Sequence[int]:
    """Each sequence the same."""
    return [1] * len(record.sequences)


class Meter:
    """Implements core.protocols.Observer. Belongs to the event loop: call it from one thread.

    Receipts are open from `open` to `close`; only they are kept in memory, with the hours that may yet change.
    """

    def __init__(self, clock: Clock, gateway: str, ids: Ids, shares: Shares = equal_shares) -> None:
        self._clock = clock
        self._gateway = gateway
        self._ids = ids
        self._shares = shares
        self._fits = shares if isinstance(shares, StepTimeShares) else None
        self._sessions: dict[str, _Session] = {}
        self._energy: dict[str, EnergyAccount] = {}
        self._ended: list[DeviceSession] = []  # and not known to be written yet
        self._receipts: dict[str, _Receipt] = {}
        self._sequences: dict[int, tuple[_Receipt, int]] = {}
        self.steps = StepLog(clock)

    def add_device(
        self,
        device: str,
        placement: Placement,
        accelerators: int | None = None,
        *,
        energy: EnergySource | None = None,
    ) -> None:
        """Begin to watch a device, down until it is said to be up. Write a checkpoint before its first request.
        `energy` says what it draws; None where nobody knows."""
        if device in self._sessions:
            raise ValueError(f"device {device} is watched already")
        accelerators = placement.accelerators if accelerators is None else accelerators
        session = self._ids.new("sess")
        self._sessions[device] = _Session(session, self._gateway, device, placement, accelerators, self._clock)
        if energy is not None:
            self._energy[device] = EnergyAccount(energy, self._clock.monotonic_ns())

    def open(self, receipt_id: str, attempt: int, sequences: Sequence[int], *, estimated_on: str | None = None) -> None:
        """Before the attempt starts. Without `sequences` its device time cannot be known; `estimated_on` is the device
        whose steps nobody sees."""
        receipt = self._receipts.setdefault(receipt_id, _Receipt(receipt_id))
        if estimated_on is not None:
            receipt.known.append(Provenance.ESTIMATED)
            receipt.device = estimated_on
        else:
            receipt.known.append(Provenance.MEASURED if sequences else Provenance.UNKNOWN)
        receipt.sequences += sequences
        for sequence in sequences:
            self._sequences[sequence] = (receipt, attempt)

    def bound(self, receipt_id: str, serving_ns: int, near: Callable[[], None]) -> None:
        """Charge the receipt no more than `serving_ns` from now on: what steps take beyond that is overhead. Call
        `near`, once, while there is still room for the steps that are under way. A new bound replaces the old one."""
        receipt = self._receipts[receipt_id]
        receipt.bound_ns = serving_ns
        receipt.near = near

    def note_usage(self, receipt_id: str, usage: Usage) -> None:
        """The receipt's usage so far, all of it."""
        self._receipts[receipt_id].usage = lambda: usage

    def follow_usage(self, receipt_id: str, usage: Callable[[], Usage]) -> None:
        """The same, from whoever counts: asked when somebody wants to know."""
        self._receipts[receipt_id].usage = usage

    def reading(self, receipt_id: str) -> Reading:
        return self._receipts[receipt_id].reading()

    def serving_ns(self, receipt_id: str) -> int:
        """The device time so far, of the reading."""
        return self._receipts[receipt_id].serving_ns

    def end_attempt(self, receipt_id: str) -> Reading:
        """The reading after an attempt. What its sequences do from now on is lost."""
        receipt = self._receipts[receipt_id]
        if receipt.device is not None:
            self._settle_energy(receipt.device)
        for sequence in receipt.sequences:
            del self._sequences[sequence]
        receipt.sequences.clear()
        return receipt.reading()

    def close(self, receipt_id: str) -> Reading:
        """The final reading: the last attempt has ended."""
        reading = self.end_attempt(receipt_id)
        del self._receipts[receipt_id]
        return reading

    def device_state(self, device: str, state: DeviceState, at_ns: int) -> None:
        self._session(device).set_state(state, at_ns)

    def step(self, record: StepRecord) -> None:
        session = self._session(record.device)
        # Before the shares: they learn from this step, and may go on with another fit.
        version = None if self._fits is None else self._fits.version(record.device, record.model)
        weights = self._shares(record)
        self._split(session, record, weights, version)
        entries = (self._sequences.get(work.sequence) for work in record.sequences)
        self.steps.add(record, [None if entry is None else entry[0].id for entry in entries], weights)

    def stretch(self, record: StepRecord, weights: Sequence[int], steps: int, version: str | None) -> None:
        """About so many steps of a device that doesn't show them, taken together, and how to split their time, by the
        fit of this `version`. Work of sequence `OTHERS` is overhead: whose it is, this gateway can't know."""
        self._split(self._session(record.device), record, weights, version, steps)

    def _split(
        self, session: _Session, record: StepRecord, weights: Sequence[int], version: str | None, steps: int = 1
    ) -> None:
        energy = self._energy.get(record.device)
        entries = [self._sequences.get(work.sequence) for work in record.sequences]
        for hour_ns, accelerator_ns in session.claim(record.start_ns, record.wall_ns):
            if not entries:
                session.hours[hour_ns].lost_ns += accelerator_ns
                if energy is not None:
                    energy.used(None, accelerator_ns)
                continue
            parts = apportion(accelerator_ns, weights)
            for entry, work, part_ns in zip(entries, record.sequences, parts, strict=True):
                if energy is not None:
                    energy.used(None if entry is None else entry[0].energy, part_ns)
                if entry is None:
                    if work.sequence == OTHERS:
                        session.hours[hour_ns].overhead_ns += part_ns
                    else:
                        session.hours[hour_ns].lost_ns += part_ns
                    continue
                receipt, attempt = entry
                given_ns = receipt.room_for(part_ns)
                if given_ns < part_ns:
                    receipt.uncharged_ns += part_ns - given_ns
                    session.hours[hour_ns].overhead_ns += part_ns - given_ns
                receipt.shares[attempt, session.id, hour_ns] += given_ns
                receipt.step_ns += given_ns
                if work.prefill_rows:
                    receipt.prefill_ns += given_ns
                else:
                    receipt.decode_ns += given_ns
        self._count(record, entries, version, steps)
        if energy is not None and energy.is_due(self._clock.monotonic_ns()):
            self._settle_energy(record.device)

    def _count(
        self, record: StepRecord, entries: Sequence[tuple[_Receipt, int] | None], version: str | None, steps: int
    ) -> None:
        """The step has been charged: count it, and see that there is room for the next ones."""
        before = {entry[0].id: entry[0] for entry in entries if entry is not None}
        watched = any(receipt.is_watched for receipt in before.values())
        expected = self._expected(record) if watched else None
        # Several sequences of a receipt in a step are one step to it.
        for receipt in before.values():
            receipt.device = record.device
            receipt.step_time_version = version
            if receipt.first_step_ns is None:
                receipt.first_step_ns = record.start_ns
            receipt.steps += steps
            receipt.batch_sum += steps * len(entries)
        for i, (entry, work) in enumerate(zip(entries, record.sequences, strict=True)):
            if entry is None:
                continue
            receipt = entry[0]
            receipt.recomputed_tokens += work.recomputed_rows
            receipt.drafted_tokens += work.drafted_tokens
            receipt.accepted_tokens += work.accepted_tokens
            if expected is not None:
                receipt.next_ns += expected[i]
            elif work.prefill_rows and work.sampled_rows:
                # After the last of the prompt come steps of another size; nobody can say of which.
                receipt.step_ns = 0
        for receipt in before.values():
            receipt.expect(receipt.step_ns if expected is None else receipt.next_ns)

    def _expected(self, record: StepRecord) -> Sequence[int] | None:
        """Accelerator-nanoseconds that each sequence will be given of the next step; None where nobody can say."""
        shares = None if self._fits is None else self._fits.next_shares(record)
        accelerators = self._sessions[record.device].accelerators
        return None if shares is None else [share_ns * accelerators for share_ns in shares]

    def overhead(self, overhead: Overhead) -> None:
        session = self._session(overhead.device)
        for hour_ns, accelerator_ns in session.claim(overhead.start_ns, overhead.wall_ns):
            session.hours[hour_ns].overhead_ns += accelerator_ns
        if self._fits is not None:
            self._fits.calibrate(overhead.steps)

    def lost(self, device: str, start_ns: int, wall_ns: int) -> None:
        session = self._session(device)
        for hour_ns, accelerator_ns in session.claim(start_ns, wall_ns):
            session.hours[hour_ns].lost_ns += accelerator_ns

    def checkpoint(self) -> Checkpoint:
        """Everything that runs, now. Hours that no longer change are in it until `written` says they arrived.

        Where a placement's rate has changed, or the system clock was set, a new session begins: each account has one
        rate, and each session one clock.
        """
        self._renew()
        return self._checkpoint(closed=False)

    def written(self, checkpoint: Checkpoint) -> None:
        """The ledger has it: hours before the running one need not be sent again unless they change."""
        for session in checkpoint.sessions:
            watched = self._sessions.get(session.device)
            if watched is not None and watched.id == session.id:
                watched.written(session)
        self._ended = [session for session in self._ended if session not in checkpoint.sessions]

    def stop(self) -> Checkpoint:
        """End the watch over all devices: the last checkpoint, with their sessions closed. Stop backends first."""
        checkpoint = self._checkpoint(closed=True)
        self._sessions.clear()
        self._energy.clear()
        return checkpoint

    def _renew(self) -> None:
        """Time that is not reported yet counts for the new session as far as it lies in it."""
        for device, session in list(self._sessions.items()):
            if session.is_current():
                continue
            self._ended.append(session.seen(self._clock.monotonic_ns(), busy=False, closed=True))
            self._sessions[device] = session.successor(self._ids.new("sess"))

    def _checkpoint(self, *, closed: bool) -> Checkpoint:
        now_ns = self._clock.monotonic_ns()
        for device in self._energy:
            self._settle_energy(device)
        waiting = [receipt.device for receipt in self._receipts.values() if receipt.sequences]
        sessions = list(self._ended)
        for session in self._sessions.values():
            busy = not closed and any(device in {None, session.device} for device in waiting)
            sessions.append(session.seen(now_ns, busy=busy, closed=closed))
        running = tuple(receipt.reading() for receipt in self._receipts.values())
        return Checkpoint(self._clock.utc_ns(now_ns), tuple(sessions), running)

    def _settle_energy(self, device: str) -> None:
        if device in self._energy:
            self._energy[device].settle(self._clock.monotonic_ns(), self._sessions[device].accelerators)

    def _session(self, device: str) -> _Session:
        try:
            return self._sessions[device]
        except KeyError:
            raise ValueError(f"device {device} isn't watched: add_device comes before its first report") from None


class _Receipt:
    """One open receipt's sums, over its attempts."""

    __slots__ = (
        "accepted_tokens", "batch_sum", "bound_ns", "decode_ns", "device", "drafted_tokens", "energy",
        "first_step_ns", "id", "known", "near", "next_ns", "prefill_ns", "recomputed_tokens", "sequences", "shares",
        "step_ns", "step_time_version", "steps", "uncharged_ns", "usage",
    )  # fmt: skip

    def __init__(self, receipt_id: str) -> None:
        self.id = receipt_id
        self.usage: Callable[[], Usage] = Usage
        self.known: list[Provenance] = []
        self.sequences: list[int] = []
        self.device: str | None = None
        self.first_step_ns: int | None = None
        self.shares: dict[tuple[int, str, int], int] = defaultdict(int)
        self.prefill_ns = 0
        self.decode_ns = 0
        self.step_ns = 0  # the share of the step that is being counted
        self.next_ns = 0  # and what is foreseen of the next
        self.uncharged_ns = 0
        self.steps = 0
        self.batch_sum = 0
        self.recomputed_tokens = 0
        self.drafted_tokens = 0
        self.accepted_tokens = 0
        self.step_time_version: str | None = None
        self.energy = EnergyShare()
        self.bound_ns: int | None = None
        self.near: Callable[[], None] | None = None

    @property
    def serving_ns(self) -> int:
        return self.prefill_ns + self.decode_ns

    def room_for(self, part_ns: int) -> int:
        """As much of it as the receipt may still be charged."""
        if self.bound_ns is None:
            return part_ns
        return min(part_ns, max(0, self.bound_ns - self.serving_ns))

    @property
    def is_watched(self) -> bool:
        """Whether it comes so near its bound that what is foreseen of the next step counts."""
        if self.near is None or self.bound_ns is None:
            return False
        return self.serving_ns + _WATCHED_STEPS * max(1, self.step_ns) > self.bound_ns

    def expect(self, next_step_ns: int) -> None:
        """A step has been counted: is there room for those under way?"""
        self.step_ns = self.next_ns = 0
        if self.bound_ns is None or self.near is None:
            return
        # At least a nanosecond: where nobody can say what comes, the last of the room is the last call.
        if self.serving_ns + _STEPS_UNDER_WAY * max(1, next_step_ns) > self.bound_ns:
            near, self.near = self.near, None
            near()

    def reading(self) -> Reading:
        provenance = weakest(self.known)
        shares = tuple(HourShare(*key, serving_ns) for key, serving_ns in self.shares.items())
        accelerator = Accelerator(
            self.serving_ns,
            self.prefill_ns,
            self.decode_ns,
            self.steps,
            self.batch_sum,
            provenance,
            self.recomputed_tokens,
            self.step_time_version,
            self.drafted_tokens,
            self.accepted_tokens,
        )
        return Reading(
            self.id,
            self.usage(),
            accelerator,
            shares,
            self.first_step_ns,
            self.energy.energy,
            self.uncharged_ns,
        )


class _Hour:
    __slots__ = ("down_ns", "lost_ns", "overhead_ns", "wall_ns")

    def __init__(self) -> None:
        self.wall_ns = 0
        self.overhead_ns = 0
        self.lost_ns = 0
        self.down_ns = 0

    def time(self, hour_ns: int) -> HourTime:
        return HourTime(hour_ns, self.wall_ns, self.overhead_ns, self.lost_ns, self.down_ns)


class _Session:
    """One device's watch. Reports come in monotonic time; it is kept in UTC, as the clock showed it when the session
    began, so that no nanosecond is counted twice or left out when the clock is set. Everything before
    `_claimed_until_ns` is spoken for or idle."""

    def __init__(
        self, session: str, gateway: str, device: str, placement: Placement, accelerators: int, clock: Clock
    ) -> None:
        self.id = session
        self.device = device
        self.hours: dict[int, _Hour] = defaultdict(_Hour)
        self._clock = clock
        # UTC nanoseconds of the monotonic clock's zero.
        self._zero_ns = clock.utc_ns(0)
        now_ns = self._zero_ns + clock.monotonic_ns()
        self.terms = placement.at(now_ns)
        self._gateway = gateway
        self._placement = placement
        self.accelerators = accelerators
        self._started_at_ns = now_ns
        self._seen_at_ns = now_ns
        self._claimed_until_ns = now_ns
        self._down_since_ns: int | None = now_ns
        self._written: dict[int, HourTime] = {}

    def is_current(self) -> bool:
        """Whether the clock and the rate are still those it began with."""
        rate = self._placement.at(self._clock.now_ns()).usd_per_hour
        return self._clock.utc_ns(0) == self._zero_ns and rate == self.terms.usd_per_hour

    def successor(self, session: str) -> _Session:
        """The session that takes over now, in the same state. Time that is not reported yet counts for it as far as it
        lies in it."""
        fresh = _Session(session, self._gateway, self.device, self._placement, self.accelerators, self._clock)
        if self._down_since_ns is None:
            fresh.set_state(DeviceState.UP, self._clock.monotonic_ns())
        return fresh

    def claim(self, start_ns: int, wall_ns: int) -> list[tuple[int, int]]:
        """What is still free of the interval, by UTC hour, in accelerator-nanoseconds."""
        end_ns = self._zero_ns + start_ns + wall_ns
        start_ns = max(self._zero_ns + start_ns, self._claimed_until_ns)
        if end_ns <= start_ns:
            return []
        self._claimed_until_ns = end_ns
        self._see(end_ns)
        return [(hour_ns, part_ns * self.accelerators) for hour_ns, part_ns in hours_between(start_ns, end_ns)]

    def set_state(self, state: DeviceState, at_ns: int) -> None:
        if state is DeviceState.DOWN and self._down_since_ns is None:
            self._down_since_ns = self._zero_ns + at_ns
        elif state is DeviceState.UP and self._down_since_ns is not None:
            self._count_down(at_ns)
            self._down_since_ns = None

    def seen(self, now_ns: int, *, busy: bool, closed: bool) -> DeviceSession:
        """The session as of now. While work runs it was seen at the last report: what came after isn't known yet."""
        if self._down_since_ns is not None:
            self._count_down(now_ns)
            busy = False
        if not busy:
            self._see(self._zero_ns + now_ns)
            self._claimed_until_ns = max(self._claimed_until_ns, self._seen_at_ns - _REPORTED_WITHIN_NS)
        last_ns = hour_start_ns(self._seen_at_ns)
        times = [self.hours[hour_ns].time(hour_ns) for hour_ns in sorted({*self.hours, last_ns})]
        return DeviceSession(
            id=self.id,
            gateway=self._gateway,
            device=self.device,
            placement=self._placement.name,
            accelerators=self.accelerators,
            usd_per_hour=self.terms.usd_per_hour,
            rate_provenance=self.terms.rate_provenance,
            started_at_ns=self._started_at_ns,
            seen_at_ns=self._seen_at_ns,
            busy=busy,
            closed=closed,
            hours=tuple(time for time in times if time.hour_ns == last_ns or time != self._written.get(time.hour_ns)),
        )

    def written(self, session: DeviceSession) -> None:
        self._written.update({time.hour_ns: time for time in session.hours})
        changing_ns = hour_start_ns(self._claimed_until_ns)
        for hour_ns in [hour_ns for hour_ns in self.hours if hour_ns < changing_ns]:
            if self._written.get(hour_ns) == self.hours[hour_ns].time(hour_ns):
                del self.hours[hour_ns], self._written[hour_ns]

    def _count_down(self, until_ns: int) -> None:
        if self._down_since_ns is not None:
            start_ns = self._down_since_ns - self._zero_ns
            for hour_ns, accelerator_ns in self.claim(start_ns, until_ns - start_ns):
                self.hours[hour_ns].down_ns += accelerator_ns

    def _see(self, until_ns: int) -> None:
        for hour_ns, part_ns in hours_between(self._seen_at_ns, until_ns):
            self.hours[hour_ns].wall_ns += part_ns
        self._seen_at_ns = max(self._seen_at_ns, until_ns)
