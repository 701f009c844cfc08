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
