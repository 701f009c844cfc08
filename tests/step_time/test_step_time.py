"""The model's shares are fair and add up; the fit finds what was there."""

import random
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.core.steps import SequenceWork
from millicent.step_time import Coefficients, Fitter, Work

coefficient = st.floats(0, 1e7, allow_subnormal=False)
coefficients = st.builds(Coefficients, coefficient, coefficient, coefficient, coefficient, coefficient, coefficient)
works = st.builds(Work, st.integers(1, 512), st.integers(0, 4), st.integers(0, 8192), st.integers(0, 100_000))


@given(coefficients, st.lists(works, min_size=1, max_size=40))
def test_shares_sum_to_the_predicted_step(model: Coefficients, step: list[Work]) -> None:
    assert sum(model.shares(step)) == pytest.approx(model.step_ns(Work.total(step)), rel=1e-9)


def shapley(model: Coefficients, step: list[Work]) -> list[float]:
    """By definition: the mean, over all orders of arrival, of what each adds."""
    added = [0.0] * len(step)
    orders = list(permutations(range(len(step))))
    for order in orders:
        before, present = 0.0, []
        for i in order:
            present.append(step[i])
            after = model.step_ns(Work.total(present))
            added[i] += after - before
            before = after
    return [value / len(orders) for value in added]


@given(coefficients, st.lists(works, min_size=1, max_size=5))
def test_where_weights_dominate_the_closed_form_is_the_shapley_value(model: Coefficients, step: list[Work]) -> None:
    # Reading the weights hides all computing: the model is additive but for a constant.
    rows = sum(work.rows for work in step)
    bound = Coefficients(
        model.fixed_ns, model.row_ns * rows, model.row_ns, model.sampled_row_ns, model.kv_token_ns, model.pair_ns
    )
    assert bound.shares(step) == pytest.approx(shapley(bound, step), rel=1e-6, abs=1e-3)


@given(coefficients, works, st.integers(2, 6))
def test_equal_work_is_charged_equally(model: Coefficients, work: Work, count: int) -> None:
    assert len(set(model.shares([work] * count))) == 1


def test_work_is_told_apart_by_what_it_does() -> None:
    assert Work.of(SequenceWork(1, 4, 0, 1, 10)) == Work(4, 1, 0, 6 * 4 + 10)
    assert Work.of(SequenceWork(1, 0, 1, 1, 10)) == Work(1, 1, 10, 0)


def a_step(draw: random.Random) -> list[Work]:
    decodes = [Work(1, 1, draw.randrange(1, 4000), 0) for _ in range(draw.randrange(0, 33))]
    if decodes and draw.random() < 0.6:
        return decodes
    rows, before = draw.choice([16, 100, 256, 512]), draw.randrange(0, 2000)
    return [*decodes, Work(rows, draw.randrange(2), 0, rows * before + rows * (rows + 1) // 2)]


@pytest.mark.parametrize(
    "truth",
    [
        Coefficients(1e6, 15e6, 0.1e6, 50e3, 300, 5),
        Coefficients(2e6, 30e6, 1.9e6, 200e3, 1000, 20),
        Coefficients(0, 4e6, 4e6, 0, 2000, 0),
    ],
)
def test_the_fit_predicts_steps_it_has_not_seen(truth: Coefficients) -> None:
    draw = random.Random(7)
    fitter = Fitter()
    for _ in range(1500):
        work = Work.total(a_step(draw))
        noise = draw.gauss(1, 0.03) if draw.random() > 0.01 else 6.0  # the machine is busy elsewhere now and then
        fitter.observe(work, int(truth.step_ns(work) * noise))
        if fitter.steps % 200 == 0:
            fitter.coefficients()
    fitted = fitter.coefficients()
    assert fitted is not None
    held_out = [Work.total(a_step(draw)) for _ in range(200)]
    errors = [abs(fitted.step_ns(work) / truth.step_ns(work) - 1) for work in held_out]
    assert sum(errors) / len(errors) < 0.05
    assert fitter.error is not None


def test_a_change_of_speed_is_learned_within_a_window() -> None:
    fitter = Fitter(window_steps=200)
    for slowness in (1, 2):
        for i in range(1000):
            work = Work(1 + i % 8, 1 + i % 8, 100, 0)
            fitter.observe(work, (10_000_000 + 100_000 * work.rows) * slowness)
            if i % 50 == 0:
                fitter.coefficients()
    fitted = fitter.coefficients()
    assert fitted is not None
    assert fitted.step_ns(Work(4, 4, 100, 0)) == pytest.approx(20_800_000, rel=0.03)


def test_too_little_to_fit_is_no_fit() -> None:
    fitter = Fitter()
    fitter.observe(Work(1, 1, 1, 0), 1000)
    assert fitter.coefficients() is None
    assert fitter.error is None


@given(st.lists(st.tuples(works, st.integers(0, 10**10)), min_size=20, max_size=60))
def test_no_measurement_however_odd_makes_a_negative_coefficient(steps: list[tuple[Work, int]]) -> None:
    fitter = Fitter()
    for work, wall_ns in steps:
        fitter.observe(work, wall_ns)
    fitted = fitter.coefficients()
    if fitted is not None:
        assert min(fitted.fixed_ns, fitted.weights_ns, fitted.row_ns, fitted.sampled_row_ns) >= 0
        assert min(fitted.kv_token_ns, fitted.pair_ns) >= 0
