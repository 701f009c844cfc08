"""Steps are split by what each sequence added to them, once the meter has seen enough of them."""

import random

from hypothesis import given
from hypothesis import strategies as st

from millicent.core.clock import ManualClock
from millicent.core.identifiers import SequentialIds
from millicent.core.money import apportion
from millicent.core.steps import SequenceWork, StepRecord
from millicent.meter.attribution import StepTimeShares
from millicent.step_time import Coefficients, Work

TRUTH = Coefficients(1e6, 9e6, 0.3e6, 100e3, 400, 8)


def decode(sequence: int, context: int) -> SequenceWork:
    return SequenceWork(sequence, 0, 1, 1, context)


def prefill(sequence: int, rows: int) -> SequenceWork:
    return SequenceWork(sequence, rows, 0, 1, rows)


def record(*sequences: SequenceWork) -> StepRecord:
    wall_ns = int(TRUTH.step_ns(Work.total(Work.of(work) for work in sequences)))
    return StepRecord("cpu", "m", 0, 0, wall_ns, sequences)


def learned() -> StepTimeShares:
    shares = StepTimeShares(ManualClock(), SequentialIds())
    draw = random.Random(3)
    for _ in range(600):
        works = [decode(i, draw.randrange(1, 4000)) for i in range(draw.randrange(1, 17))]
        if draw.random() < 0.4:
            works.append(prefill(99, draw.choice([8, 64, 200, 512])))
        shares(record(*works))
    return shares


def test_a_step_of_an_unknown_model_is_split_evenly() -> None:
    assert StepTimeShares(ManualClock(), SequentialIds())(record(decode(1, 10), prefill(2, 512))) == [1, 1]


def test_a_long_prefill_pays_for_the_time_it_adds_and_not_its_neighbour() -> None:
    step = record(decode(1, 100), prefill(2, 512))
    weights = learned()(step)
    charged = apportion(step.wall_ns, weights)
    expected = TRUTH.shares([Work.of(work) for work in step.sequences])
    assert sum(charged) == step.wall_ns
    for got, fair in zip(charged, expected, strict=True):
        assert abs(got - fair) < 0.05 * fair


def test_models_and_devices_are_learned_apart() -> None:
    shares = learned()
    other = StepRecord("cpu", "other", 0, 0, 10**7, (decode(1, 10), prefill(2, 512)))
    assert shares(other) == [1, 1]


@given(st.lists(st.integers(1, 4000), max_size=32), st.integers(0, 10**12))
def test_weights_can_always_be_apportioned(contexts: list[int], wall_ns: int) -> None:
    shares = StepTimeShares(ManualClock(), SequentialIds())
    for _ in range(20):
        step = StepRecord("cpu", "m", 0, 0, wall_ns, tuple(decode(i, c) for i, c in enumerate(contexts)))
        weights = shares(step)
        assert len(weights) == len(contexts)
        assert all(weight >= 0 for weight in weights)


def calibration() -> tuple[StepRecord, ...]:
    shapes = [(1,), (1, 1, 1, 1), (16,), (1,) * 8, (48,), (16, 1, 1), (1,) * 16, (128,), (256,), (64, 1, 1, 1)]
    return tuple(
        record(*(decode(i, 100) if rows == 1 else prefill(i, rows) for i, rows in enumerate(shape))) for shape in shapes
    )


def test_a_calibrated_model_is_fair_from_the_first_step_and_says_by_which_fit() -> None:
    shares = StepTimeShares(ManualClock(), SequentialIds())
    steps = calibration()
    # One in three was disturbed; its twins weren't.
    disturbed = tuple(StepRecord(*(s.device, s.model, s.index, s.start_ns, s.wall_ns * 9, s.sequences)) for s in steps)
    shares.calibrate(steps + disturbed + steps)
    [fit] = shares.unsaved()
    assert shares.version("cpu", "m") == fit.version
    step = record(decode(1, 100), prefill(2, 512))
    weights = shares(step)
    fair = TRUTH.shares([Work.of(work) for work in step.sequences])
    for got, expected in zip(apportion(step.wall_ns, weights), fair, strict=True):
        assert abs(got - expected) < 0.1 * expected
    shares.saved((fit,))
    assert shares.unsaved() == ()


def test_a_fit_that_was_loaded_is_used_at_once_and_under_its_version() -> None:
    first = StepTimeShares(ManualClock(), SequentialIds(), "fp32")
    first.calibrate(calibration())
    again = StepTimeShares(ManualClock(), SequentialIds(), "fp32")
    again.load(first.unsaved())
    step = record(decode(1, 100), prefill(2, 512))
    assert again.version("cpu", "m") == first.version("cpu", "m")
    assert again(step) == first(step)
    assert again.unsaved() == ()


def test_traffic_that_is_all_alike_does_not_unlearn_the_rest() -> None:
    shares = StepTimeShares(ManualClock(), SequentialIds())
    shares.calibrate(calibration())
    for i in range(3000):
        shares(record(*(decode(j, 100 + i % 900) for j in range(1 + i % 4))))
    step = record(decode(1, 100), prefill(2, 512))
    fair = TRUTH.shares([Work.of(work) for work in step.sequences])
    charged = apportion(step.wall_ns, shares(step))
    assert abs(charged[1] - fair[1]) < 0.1 * fair[1]


def test_a_fit_that_says_the_same_is_no_new_version() -> None:
    shares = StepTimeShares(ManualClock(), SequentialIds())
    shares.calibrate(calibration())
    version = shares.version("cpu", "m")
    for i in range(1500):
        shares(record(*(decode(j, 50 + i % 300) for j in range(1 + i % 8))))
    assert shares.version("cpu", "m") == version
