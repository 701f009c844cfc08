from __future__ import annotations

from collections import defaultdict
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.core.accounts import Checkpoint, DeviceSession
from millicent.core.clock import NS_PER_HOUR, NS_PER_S, ManualClock, hours_between
from millicent.core.fits import StepTimeFit
from millicent.core.identifiers import SequentialIds
from millicent.core.receipts import HourShare
from millicent.core.steps import DeviceState, Overhead, OverheadKind, SequenceWork, StepRecord
from millicent.core.usage import Provenance, Usage
from millicent.meter.attribution import StepTimeShares
from millicent.meter.meter import Meter
from millicent.meter.placements import Placement

T0 = ManualClock().now_ns()
PLACEMENT = Placement("cpu", 1, Decimal("0.10"), Provenance.ASSUMED)


class Watch:
    """A meter over one device that is up since the clock began."""

    def __init__(self, accelerators: int = 1) -> None:
        self.clock = ManualClock()
        self.meter = Meter(self.clock, "gw_1", SequentialIds())
        self.meter.add_device("cpu:0", PLACEMENT, accelerators)
        self.meter.device_state("cpu:0", DeviceState.UP, 0)

    def step(self, start_ns: int, wall_ns: int, *works: SequenceWork) -> None:
        self.meter.step(StepRecord("cpu:0", "m", 0, start_ns, wall_ns, works))

    def session(self) -> DeviceSession:
        return self.session_of(self.meter.checkpoint())

    @staticmethod
    def session_of(checkpoint: Checkpoint) -> DeviceSession:
        (session,) = checkpoint.sessions
        return session


def decode(sequence: int) -> SequenceWork:
    return SequenceWork(sequence, 0, 1, 1, 9)


def prefill(sequence: int) -> SequenceWork:
    return SequenceWork(sequence, 5, 0, 0, 5)


def test_a_step_is_split_to_the_nanosecond_among_its_sequences() -> None:
    watch = Watch(accelerators=2)
    for number in (1, 2, 3):
        watch.meter.open(f"r{number}", 1, (number,))
    watch.step(0, 50, prefill(1), decode(2), decode(3))
    readings = [watch.meter.reading(f"r{number}").accelerator for number in (1, 2, 3)]
    assert [reading.serving_ns for reading in readings] == [34, 33, 33]
    assert [(reading.prefill_ns, reading.decode_ns) for reading in readings] == [(34, 0), (0, 33), (0, 33)]
    assert {(reading.steps, reading.batch_sum, reading.provenance) for reading in readings} == {
        (1, 3, Provenance.MEASURED)
    }


def test_guesses_are_counted_over_all_steps_and_cost_their_requests_own_time() -> None:
    watch = Watch()
    watch.meter.open("r", 1, (1,))
    watch.step(0, 50, SequenceWork(1, 0, 5, 5, 14, 0, 4, 2))
    watch.step(50, 20, decode(1))
    watch.step(70, 30, SequenceWork(1, 0, 3, 3, 16, 0, 2, 2))
    reading = watch.meter.reading("r").accelerator
    assert (reading.drafted_tokens, reading.accepted_tokens, reading.decode_ns) == (6, 4, 100)


def test_several_sequences_of_a_receipt_in_a_step_are_one_step_to_it_and_each_has_its_share() -> None:
    watch = Watch()
    watch.meter.open("many", 1, (1, 2, 3))
    watch.meter.open("one", 1, (4,))
    watch.step(0, 80, prefill(1), prefill(2), prefill(3), decode(4))
    many, one = (watch.meter.reading(name).accelerator for name in ("many", "one"))
    assert (many.serving_ns, many.steps, many.batch_sum) == (60, 1, 4)
    assert (one.serving_ns, one.steps, one.batch_sum) == (20, 1, 4)
    watch.meter.close("many")
    watch.step(80, 20, prefill(3), decode(4))
    assert watch.meter.reading("one").accelerator.serving_ns == 30


def test_a_step_over_the_hour_is_cut_at_the_hour_and_counted_once() -> None:
    watch = Watch()
    watch.meter.open("r", 1, (7,))
    watch.step(NS_PER_HOUR - 40, 100, decode(7))
    reading = watch.meter.close("r")
    session = watch.session().id
    assert reading.shares == (HourShare(1, session, T0, 40), HourShare(1, session, T0 + NS_PER_HOUR, 60))
    assert (reading.accelerator.serving_ns, reading.accelerator.steps) == (100, 1)


def test_another_way_to_share_replaces_the_equal_one() -> None:
    meter = Meter(ManualClock(), "gw_1", SequentialIds(), lambda record: [work.rows for work in record.sequences])
    meter.add_device("cpu:0", PLACEMENT)
    meter.open("r1", 1, (1,))
    meter.open("r2", 1, (2,))
    meter.step(StepRecord("cpu:0", "m", 0, 0, 60, (prefill(1), decode(2))))
    assert [meter.reading(name).accelerator.serving_ns for name in ("r1", "r2")] == [50, 10]


def test_work_of_a_sequence_that_nobody_knows_is_lost() -> None:
    watch = Watch()
    watch.meter.open("r", 1, (1,))
    watch.meter.close("r")
    watch.step(0, 10, decode(1), decode(99))
    watch.step(10, 5)
    watch.clock.advance(20)
    (hour,) = watch.session().hours
    assert (hour.wall_ns, hour.lost_ns) == (20, 15)


def test_time_claimed_twice_belongs_to_the_first_claim() -> None:
    watch = Watch()
    watch.meter.open("r", 1, (1,))
    watch.step(0, 100, decode(1))
    watch.meter.overhead(Overhead("cpu:0", "m", OverheadKind.LOAD, 60, 70))
    watch.meter.lost("cpu:0", 20, 50)
    (hour,) = watch.session().hours
    assert (hour.wall_ns, hour.overhead_ns, hour.lost_ns) == (130, 30, 0)
    assert watch.meter.reading("r").accelerator.serving_ns == 100


def test_a_busy_device_was_seen_at_its_last_report_and_an_idle_one_now() -> None:
    watch = Watch()
    watch.clock.advance(10)
    assert (watch.session().seen_at_ns, watch.session().busy) == (T0 + 10, False)
    watch.meter.open("r", 1, (1,))
    watch.clock.advance(100)
    assert (watch.session().seen_at_ns, watch.session().busy) == (T0 + 10, True)
    watch.step(30, 50, decode(1))
    assert watch.session().seen_at_ns == T0 + 80
    watch.meter.close("r")
    assert (watch.session().seen_at_ns, watch.session().busy) == (T0 + 110, False)


def test_work_on_one_device_does_not_keep_another_busy() -> None:
    watch = Watch()
    watch.meter.add_device("cpu:1", PLACEMENT)
    watch.meter.device_state("cpu:1", DeviceState.UP, 0)
    watch.meter.open("r", 1, (1,))
    assert [session.busy for session in watch.meter.checkpoint().sessions] == [True, True]
    watch.step(0, 10, decode(1))
    assert [session.busy for session in watch.meter.checkpoint().sessions] == [True, False]


def test_a_device_is_down_until_it_is_up_and_while_its_engine_is_gone() -> None:
    clock = ManualClock()
    meter = Meter(clock, "gw_1", SequentialIds())
    meter.add_device("cpu:0", PLACEMENT)
    clock.advance(30)
    assert meter.checkpoint().sessions[0].hours[0].down_ns == 30
    clock.advance(10)
    meter.device_state("cpu:0", DeviceState.UP, clock.monotonic_ns())
    clock.advance(60)
    meter.device_state("cpu:0", DeviceState.DOWN, clock.monotonic_ns())
    meter.device_state("cpu:0", DeviceState.DOWN, clock.monotonic_ns() + 1)
    clock.advance(5)
    (hour,) = meter.checkpoint().sessions[0].hours
    assert (hour.wall_ns, hour.down_ns) == (105, 45)


def test_a_report_that_comes_after_its_hour_was_written_still_counts() -> None:
    watch = Watch()
    watch.clock.advance(2 * NS_PER_HOUR)
    checkpoint = watch.meter.checkpoint()
    watch.meter.written(checkpoint)
    assert [hour.hour_ns for hour in watch.session().hours] == [T0 + 2 * NS_PER_HOUR]
    watch.meter.lost("cpu:0", 5, 10)
    first, last = watch.session().hours
    assert (first.hour_ns, first.wall_ns, first.lost_ns) == (T0, NS_PER_HOUR, 10)
    assert last.hour_ns == T0 + 2 * NS_PER_HOUR


def test_an_hour_is_sent_until_it_was_written() -> None:
    watch = Watch()
    watch.clock.advance(3 * NS_PER_HOUR)
    assert len(watch.session().hours) == 4
    checkpoint = watch.meter.checkpoint()
    watch.meter.written(checkpoint)
    assert len(watch.session().hours) == 1


def test_an_hour_that_changed_while_it_was_being_written_is_sent_again() -> None:
    watch = Watch()
    watch.clock.advance(NS_PER_HOUR - 10)
    checkpoint = watch.meter.checkpoint()
    watch.clock.advance(20)
    watch.meter.lost("cpu:0", NS_PER_HOUR - 5, 10)
    watch.meter.written(checkpoint)
    first, second = watch.session().hours
    assert (first.hour_ns, first.wall_ns, first.lost_ns) == (T0, NS_PER_HOUR, 5)
    assert (second.wall_ns, second.lost_ns) == (10, 5)


def test_a_year_of_idling_keeps_no_more_than_a_day_of_hours() -> None:
    watch = Watch()
    for _ in range(24 * 365):
        watch.clock.advance(NS_PER_HOUR)
        watch.meter.written(watch.meter.checkpoint())
    assert len(watch.meter._sessions["cpu:0"].hours) <= 26
    assert len(watch.meter._sessions["cpu:0"]._written) <= 26


def test_closed_receipts_leave_nothing_behind() -> None:
    watch = Watch()
    for number in range(1000):
        watch.meter.open(f"r{number}", 1, (number,))
        watch.step(number, 1, decode(number))
        watch.meter.close(f"r{number}")
    assert not watch.meter._receipts
    assert not watch.meter._sequences


def test_attempts_of_one_receipt_add_up_and_stay_apart() -> None:
    watch = Watch()
    watch.meter.open("r", 1, (1,))
    watch.step(0, 10, decode(1))
    watch.meter.open("r", 2, (2,))
    watch.step(10, 30, decode(2))
    usage = Usage.of(Provenance.MEASURED, input_fresh=3)
    watch.meter.note_usage("r", usage)
    reading = watch.meter.close("r")
    assert [(share.attempt, share.serving_ns) for share in reading.shares] == [(1, 10), (2, 30)]
    assert (reading.usage, reading.accelerator.serving_ns) == (usage, 40)


def test_device_time_that_no_step_shows_is_unknown() -> None:
    watch = Watch()
    watch.meter.open("r", 1, ())
    assert watch.meter.reading("r").accelerator.provenance is Provenance.UNKNOWN
    assert not watch.session().busy


def test_a_checkpoint_holds_what_runs() -> None:
    watch = Watch()
    watch.meter.open("r1", 1, (1,))
    watch.meter.open("r2", 1, ())
    assert [reading.receipt for reading in watch.meter.checkpoint().running] == ["r1", "r2"]


def test_stopping_closes_the_watch_at_now() -> None:
    watch = Watch()
    watch.meter.open("r", 1, (1,))
    watch.clock.advance(NS_PER_S)
    session = watch.session_of(watch.meter.stop())
    assert (session.closed, session.busy, session.seen_at_ns) == (True, False, T0 + NS_PER_S)
    assert watch.meter.checkpoint().sessions == ()


@given(
    st.lists(
        st.tuples(
            st.integers(1, 2 * NS_PER_HOUR),  # how long it runs, half of it in a step
            st.sampled_from([0, 0, -1, 1, -NS_PER_HOUR, 3 * NS_PER_HOUR, -26 * NS_PER_HOUR]),  # and how it is set then
        ),
        min_size=1,
        max_size=12,
    )
)
def test_whatever_the_clock_is_set_to_every_nanosecond_counts_once_in_the_hour_it_then_showed(
    script: list[tuple[int, int]],
) -> None:
    watch = Watch()
    watch.meter.open("r", 1, (1,))
    sessions: dict[str, DeviceSession] = {}
    expected: dict[int, int] = defaultdict(int)
    ran_ns = served_ns = 0
    for length_ns, set_ns in script:
        start_ns = watch.clock.now_ns()
        watch.clock.advance(length_ns)
        for hour_ns, part_ns in hours_between(start_ns, start_ns + length_ns):
            expected[hour_ns] += part_ns
        watch.step(watch.clock.monotonic_ns() - length_ns // 2, length_ns // 2, decode(1))
        ran_ns, served_ns = ran_ns + length_ns, served_ns + length_ns // 2
        watch.clock.set(set_ns)
        sessions |= {session.id: session for session in watch.meter.checkpoint().sessions}
    reading = watch.meter.close("r")
    sessions |= {session.id: session for session in watch.meter.stop().sessions}
    walls: dict[int, int] = defaultdict(int)
    for session in sessions.values():
        assert sum(hour.wall_ns for hour in session.hours) == session.seen_at_ns - session.started_at_ns
        for hour in session.hours:
            walls[hour.hour_ns] += hour.wall_ns
            assert hour.wall_ns <= NS_PER_HOUR
    assert {hour_ns: wall_ns for hour_ns, wall_ns in walls.items() if wall_ns} == expected
    assert sum(walls.values()) == ran_ns
    assert sum(share.serving_ns for share in reading.shares) == served_ns == reading.accelerator.serving_ns
    shares = {(share.session, share.hour_ns): share.serving_ns for share in reading.shares}
    times = {(session.id, hour.hour_ns): hour.wall_ns for session in sessions.values() for hour in session.hours}
    assert all(serving_ns <= times[place] for place, serving_ns in shares.items())


def test_a_step_that_runs_while_the_clock_is_set_counts_from_then_on_by_the_new_clock() -> None:
    watch = Watch()
    watch.meter.open("r", 1, (1,))
    watch.clock.advance(100)
    watch.clock.set(-2 * NS_PER_HOUR)
    before, after = watch.meter.checkpoint().sessions
    assert (before.closed, before.seen_at_ns) == (True, T0 + 100)
    assert (after.closed, after.started_at_ns) == (False, T0 + 100 - 2 * NS_PER_HOUR)
    watch.clock.advance(50)
    watch.step(40, 110, decode(1))
    assert watch.meter.close("r").shares == (HourShare(1, after.id, T0 - 2 * NS_PER_HOUR, 50),)


def test_a_device_must_be_watched_once_before_it_reports() -> None:
    watch = Watch()
    with pytest.raises(ValueError, match="watched already"):
        watch.meter.add_device("cpu:0", PLACEMENT)
    with pytest.raises(ValueError, match="gpu:3 isn't watched"):
        watch.meter.lost("gpu:3", 0, 1)


def test_a_bound_warns_while_there_is_room_for_the_steps_under_way_and_nothing_is_charged_beyond() -> None:
    watch = Watch(accelerators=2)
    watch.meter.open("r", 1, (1,))
    warned: list[int] = []
    watch.meter.bound("r", 100, lambda: warned.append(watch.meter.reading("r").accelerator.serving_ns))
    for step in range(4):
        watch.step(10 * step, 10, decode(1))
    # After 60 of 100 the next one takes it to 80 and the one after to 100; after 80, to 120.
    assert warned == [80]
    watch.step(40, 500, decode(1))
    reading = watch.meter.close("r")
    assert reading.accelerator.serving_ns == reading.shares[0].serving_ns == 100
    assert reading.uncharged_ns == 980
    watch.clock.advance(540)
    assert sum(hour.overhead_ns for hour in watch.session().hours) == 980


def test_what_is_foreseen_of_the_next_step_follows_the_step_time_model_and_its_error() -> None:
    """One token after a long prompt takes far less than the prompt did; the next part of a prompt, a little more."""
    watch = Watch()
    shares = StepTimeShares(watch.clock, SequentialIds())
    fit = StepTimeFit("fit_1", "cpu:0", "m", "", 0.0, 1000.0, 100.0, 0.0, 1.0, 1.0, 100, 0.25, 0)
    shares.load([fit])
    reading = StepRecord("cpu:0", "m", 0, 0, 10**6, (SequenceWork(1, 50, 0, 0, 50), SequenceWork(2, 0, 1, 1, 200)))
    # 1000 ns of weights for both, 4100 more for computing 51 rows; a prompt has its pairs, a decode its KV.
    prompt_ns, decode_ns = 500 + 4100 * 50 / 51 + 50 * 50 + 50 * 51 / 2, 500 + 4100 / 51 + 201
    assert shares.next_shares(reading) == [int(prompt_ns * 1.5), int(decode_ns * 1.5)]
    last = StepRecord("cpu:0", "m", 1, 0, 10**6, (SequenceWork(1, 50, 0, 1, 100),))
    assert shares.next_shares(last) == [int((1000 + 101) * 1.5)]
    assert shares.next_shares(StepRecord("cpu:0", "other", 1, 0, 10**6, last.sequences)) is None
