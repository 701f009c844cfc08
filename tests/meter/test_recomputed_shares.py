"""What receipts were charged, worked out again from nothing but the raw step records and the fits that they name: the
step-time model's formula written out once more. And an hour of mixed traffic, added up by hand."""

from __future__ import annotations

from collections import defaultdict
from decimal import Decimal
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from millicent.core.accounts import DeviceSession
from millicent.core.clock import NS_PER_HOUR, NS_PER_S, ManualClock, hours_between
from millicent.core.fits import StepTimeFit
from millicent.core.identifiers import SequentialIds
from millicent.core.money import Money
from millicent.core.receipts import Attempt, Role
from millicent.core.steps import DeviceState, Overhead, OverheadKind, SequenceWork, StepRecord
from millicent.core.usage import Provenance
from millicent.meter.attribution import StepTimeShares
from millicent.meter.meter import Meter
from millicent.meter.placements import Placement
from millicent.meter.pricing import price

PLACEMENT = Placement("here", 1, Decimal("3.60"), Provenance.MEASURED)  # a tenth of a cent a second
FIT = StepTimeFit("fit_known", "cpu", "m", "", 2e6, 6e6, 5e5, 1e5, 2e3, 20.0, 100, 0.05, 0)


def shares_by_formula(fit: StepTimeFit | None, works: tuple[SequenceWork, ...]) -> tuple[list[float], float]:
    """(c0 + w)/n + max(0, a*rows - w) * rows_i/rows + s*sampled_i + k*kv_i + p*pairs_i, as parts of their sum, and how
    far off a part may be for whole picoseconds. A prompt pays for its pairs of query and key, a decode for the KV cache
    it reads."""
    even = [1 / len(works)] * len(works)
    if fit is None:
        return even, 0.0
    rows = [work.prefill_rows + work.decode_rows for work in works]
    beyond_ns = max(0.0, fit.row_ns * sum(rows) - fit.weights_ns)
    charged = []
    for work, own in zip(works, rows, strict=True):
        share = (fit.fixed_ns + fit.weights_ns) / len(works) + beyond_ns * own / sum(rows)
        share += fit.sampled_row_ns * work.sampled_rows
        if work.prefill_rows:
            before = work.kv_read_tokens - work.prefill_rows
            share += fit.pair_ns * sum(before + row + 1 for row in range(work.prefill_rows))
        else:
            share += fit.kv_token_ns * work.kv_read_tokens
        charged.append(share)
    whole = sum(charged)
    if whole * 1000 < 1:
        return even, 1.0
    return [share / whole for share in charged], len(works) / (1000 * whole)


@st.composite
def work(draw: st.DrawFn, sequence: int) -> SequenceWork:
    if draw(st.booleans()):
        rows = draw(st.integers(1, 6))  # five of them drafts, all rejected perhaps: computed all the same
        return SequenceWork(sequence, 0, rows, rows, draw(st.integers(rows, 3000)))
    rows = draw(st.integers(1, 512))
    before = draw(st.integers(0, 1500))
    return SequenceWork(sequence, rows, 0, draw(st.integers(0, 1)), before + rows, draw(st.integers(0, rows)))


@st.composite
def schedule(draw: st.DrawFn) -> list[tuple[int, tuple[SequenceWork, ...]]]:
    """Steps: how long each took, and who did what in it."""
    steps = []
    for _ in range(draw(st.integers(1, 40))):
        present = draw(st.lists(st.integers(1, 8), min_size=1, max_size=6, unique=True))
        wall_ns = draw(st.one_of(st.integers(10**6, 10**9), st.just(NS_PER_HOUR + 7)))
        steps.append((wall_ns, tuple(draw(work(sequence)) for sequence in present)))
    return steps


@settings(max_examples=25, deadline=None)
@given(schedule(), st.integers(1, 3), st.sampled_from(["even", "known", "learning"]))
def test_any_schedule_is_charged_as_the_formula_says(
    steps: list[tuple[int, tuple[SequenceWork, ...]]], accelerators: int, begins: str
) -> None:
    clock, ids = ManualClock(start_ns=1_767_225_600 * NS_PER_S + 11), SequentialIds()
    shares = StepTimeShares(clock, ids)
    fits: dict[str, StepTimeFit] = {}
    if begins != "even":
        shares.load([FIT])
        fits[FIT.version] = FIT
    meter = Meter(clock, "gw", ids, shares)
    meter.add_device("cpu", PLACEMENT, accelerators)
    meter.device_state("cpu", DeviceState.UP, clock.monotonic_ns())
    receipts = {1: "a", 2: "a", 3: "b", 4: "c", 5: "d", 6: "e", 7: "e", 8: "e"}  # of some, several choices
    for name in sorted(set(receipts.values())):
        meter.open(name, 1, [sequence for sequence, owner in receipts.items() if owner == name])
    owed: dict[tuple[str, int], float] = defaultdict(float)
    rounding: dict[str, float] = defaultdict(float)
    counted: dict[str, list[int]] = {name: [0, 0] for name in receipts.values()}
    for index, (wall_ns, works) in enumerate(steps):
        version = shares.version("cpu", "m")
        start_ns, start_utc_ns = clock.monotonic_ns(), clock.now_ns()
        clock.advance(wall_ns)
        meter.step(StepRecord("cpu", "m", index, start_ns, wall_ns, works))
        fits |= {fit.version: fit for fit in shares.unsaved()}
        parts, off = shares_by_formula(fits[version] if version else None, works)
        for sequence_work, part in zip(works, parts, strict=True):
            name = receipts[sequence_work.sequence]
            counted[name][0] += sequence_work.recomputed_rows
            for hour_ns, part_ns in hours_between(start_utc_ns, clock.now_ns()):
                owed[name, hour_ns] += part * part_ns * accelerators
                rounding[name] += 1 + off * part_ns * accelerators
        for name in {receipts[sequence_work.sequence] for sequence_work in works}:
            counted[name][1] += 1
    readings = {name: meter.close(name) for name in counted}
    total_ns = sum(wall_ns for wall_ns, _ in steps) * accelerators
    assert sum(reading.accelerator.serving_ns for reading in readings.values()) == total_ns
    for name, reading in readings.items():
        charged = reading.accelerator
        assert sum(share.serving_ns for share in reading.shares) == charged.prefill_ns + charged.decode_ns
        assert [charged.recomputed_tokens, charged.steps] == counted[name]
        for share in reading.shares:
            # A nanosecond for each piece of each step; and weights are whole picoseconds of the prediction.
            exact = owed[name, share.hour_ns]
            assert abs(share.serving_ns - exact) <= rounding[name] + exact * 1e-9


class Hour:
    """One device for an hour, with a fit that is known: 2 ms a step, 6 ms to read the weights, 0.5 ms a row beyond what
    they hide, 0.1 ms a token drawn, 2 us for each of a decode's KV tokens, 20 ns for each pair of a prompt's."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        shares = StepTimeShares(self.clock, SequentialIds())
        shares.load([FIT])
        self.meter = Meter(self.clock, "gw", SequentialIds(), shares)
        self.meter.add_device("cpu", PLACEMENT)
        self.steps = 0

    def step(self, ms: int, *works: SequenceWork) -> None:
        start_ns = self.clock.monotonic_ns()
        self.clock.advance(ms * 10**6)
        self.meter.step(StepRecord("cpu", "m", self.steps, start_ns, ms * 10**6, works))
        self.steps += 1

    def session(self) -> DeviceSession:
        [session] = self.meter.checkpoint().sessions
        return session


def test_an_hour_of_mixed_traffic_added_up_by_hand() -> None:
    hour = Hour()
    clock, meter = hour.clock, hour.meter
    clock.advance(10 * NS_PER_S)  # ten seconds until the engine is up: down
    meter.device_state("cpu", DeviceState.UP, clock.monotonic_ns())
    clock.advance(20 * NS_PER_S)  # twenty to load the model: the model's own
    meter.overhead(Overhead("cpu", "m", OverheadKind.LOAD, clock.monotonic_ns() - 20 * NS_PER_S, 20 * NS_PER_S))
    for number, name in enumerate(("ada", "bob", "eve"), start=1):
        meter.open(name, 1, (number,))
    # Ada's prompt of 100, alone: all 60 ms are hers.
    hour.step(60, SequenceWork(1, 100, 0, 1, 100))
    # Bob's prompt of 40, 24 of it from the cache, so 16 rows; beside Ada's first token after hers. By the formula Bob
    # costs 4 + 2.5 * 16/17 + 0.1 + 20 ns * (16 * 24 + 136) = 6.4633 ms, Ada 4 + 2.5/17 + 0.1 + 0.202 = 4.4491 ms.
    hour.step(21, SequenceWork(2, 16, 0, 1, 40), SequenceWork(1, 0, 1, 1, 101))
    # Ada draws one; Bob has four rows in the step, three of them guesses that were wrong: he pays for all four.
    # 4 + 0.1 + 0.204 = 4.304 ms for Ada; 4 + 0.4 + 0.088 = 4.488 ms for Bob; five rows hide behind the weights.
    hour.step(10, SequenceWork(1, 0, 1, 1, 102), SequenceWork(2, 0, 4, 4, 44))
    # Eve's prompt is cut off by a crash after 5 s: lost. The engine is back 30 s later.
    clock.advance(5 * NS_PER_S)
    meter.device_state("cpu", DeviceState.DOWN, clock.monotonic_ns())
    meter.lost("cpu", clock.monotonic_ns() - 5 * NS_PER_S, 5 * NS_PER_S)
    clock.advance(30 * NS_PER_S)
    meter.device_state("cpu", DeviceState.UP, clock.monotonic_ns())
    readings = {name: meter.close(name) for name in ("ada", "bob", "eve")}
    clock.advance(NS_PER_HOUR - (clock.now_ns() % NS_PER_HOUR))

    bob_ns, ada_ns = Fraction(64633411765, 10**4), Fraction(44490588235, 10**4)
    second, third = Fraction(21 * 10**6), Fraction(10**7)
    charged = {name: reading.accelerator.serving_ns for name, reading in readings.items()}
    assert abs(charged["ada"] - (6 * 10**7 + second * ada_ns / (ada_ns + bob_ns) + third * 4304 / 8792)) < 2
    assert abs(charged["bob"] - (second * bob_ns / (ada_ns + bob_ns) + third * 4488 / 8792)) < 2
    assert charged["eve"] == 0
    assert charged["ada"] + charged["bob"] == 91 * 10**6
    session = hour.session()
    [time] = [each for each in session.hours if each.hour_ns == session.started_at_ns]
    assert (time.wall_ns, time.overhead_ns, time.lost_ns, time.down_ns) == (
        NS_PER_HOUR, 20 * NS_PER_S, 5 * NS_PER_S, 40 * NS_PER_S,
    )  # fmt: skip
    # 3600 - 20 - 5 - 40 - 0.091 s are idle, and the hour's $3.60 are all somebody's.
    idle_ns = time.wall_ns - time.overhead_ns - time.lost_ns - time.down_ns - charged["ada"] - charged["bob"]
    assert idle_ns == 3_534_909 * 10**6
    attempt = Attempt(1, "local", "here", "m", Role.INFERENCE, 0)
    lines = [line for reading in readings.values() for line in price(reading, (attempt,), PLACEMENT, 1).lines]
    # 91 ms at a tenth of a cent a second: 0.0091 cents, to a nano-dollar for each line's rounding.
    total = Money.total(line.amount for line in lines if line.amount is not None)
    assert abs(total.nanousd - 91_000) <= 1
    assert lines[-1].amount == Money(0)
