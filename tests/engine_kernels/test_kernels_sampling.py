from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millicent.engine.kernels.sampling import best_tokens
from millicent.engine.kernels.sampling import choose as choose_rows
from millicent.engine.logprobs import best_by_numpy
from millicent.engine.sampler import Draw, choose, uniform

PER_SHAPE = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def drawn(scores: np.ndarray, draw: Draw) -> int | None:
    """By the kernels."""
    number = uniform(draw.seed, draw.position)
    row = (scores, number, draw.temperature, draw.top_p, draw.min_p, draw.typical_p, draw.top_k)
    (token,) = choose_rows([row])
    return None if token < 0 else token


@PER_SHAPE
@given(
    vocabulary=st.sampled_from([1, 2, 63, 64, 65, 257, 1000, 5003]),
    spread=st.sampled_from([0.0, 0.1, 1.0, 4.0, 30.0]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 3.0]),
    top_p=st.sampled_from([0.0, 0.3, 0.9, 0.999, 1.0]),
    top_k=st.sampled_from([0, 0, 1, 7, 100, 3000]),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.5, 1.0]),
    typical_p=st.sampled_from([1.0, 1.0, 0.2, 0.95]),
    banned=st.sampled_from([0.0, 0.5, 0.99]),
    seed=st.integers(0, 2**32),
)
def test_the_kernels_draw_what_numpy_draws(
    instruction_set: str,
    vocabulary: int,
    spread: float,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    typical_p: float,
    banned: float,
    seed: int,
) -> None:
    generator = np.random.default_rng(seed)
    scores = (generator.standard_normal(vocabulary) * spread).astype(np.float32)
    scores[generator.random(vocabulary) < banned] = -np.inf
    draw = Draw(temperature, top_p, top_k, seed, 5, min_p, typical_p)
    assert drawn(scores, draw) == choose(scores, draw)


@pytest.mark.parametrize("columns", [1, 64, 300])
def test_the_first_of_the_greatest_is_taken_without_temperature(instruction_set: str, columns: int) -> None:
    scores = np.zeros(columns, dtype=np.float32)
    scores[columns // 2 :] = 3.0
    assert drawn(scores, Draw(0.0, 1.0, 0, 0, 0)) == columns // 2


@pytest.mark.parametrize("strange", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_no_distribution_gives_no_token(instruction_set: str, strange: float, temperature: float) -> None:
    scores = np.zeros(300, dtype=np.float32)
    scores[271] = strange
    assert drawn(scores, Draw(temperature, 1.0, 0, 0, 0)) is None
    nothing = np.full(300, -np.inf, dtype=np.float32)
    assert drawn(nothing, Draw(temperature, 1.0, 0, 0, 0)) is None


def test_filters_hold_over_a_large_vocabulary_of_many_near_equals(instruction_set: str) -> None:
    scores = np.random.default_rng(3).standard_normal(60_000).astype(np.float32)
    for draw in (
        Draw(1.0, 0.9, 0, 1, 0),
        Draw(1.0, 1.0, 20_000, 2, 0),
        Draw(1.0, 1.0, 0, 3, 0, typical_p=0.5),
        Draw(2.0, 0.99, 0, 4, 0, min_p=0.001, typical_p=0.9),
    ):
        assert drawn(scores, draw) == choose(scores, draw)


def test_all_alike_stay_in_together(instruction_set: str) -> None:
    scores = np.zeros(4000, dtype=np.float32)
    for draw in (Draw(1.0, 0.1, 0, 9, 0), Draw(1.0, 1.0, 3, 9, 0), Draw(1.0, 1.0, 0, 9, 0, typical_p=0.1)):
        assert drawn(scores, draw) == choose(scores, draw) == int(uniform(9, 0) * 4000)


@PER_SHAPE
@given(
    vocabulary=st.sampled_from([1, 2, 63, 64, 65, 257, 1000, 5003]),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    steps=st.sampled_from([0.0, 0.5]),
    top=st.sampled_from([0, 1, 5, 20, 10_000]),
    banned=st.sampled_from([0.0, 0.9]),
    seed=st.integers(0, 2**32),
)
def test_the_kernels_score_what_numpy_scores(
    instruction_set: str, vocabulary: int, spread: float, steps: float, top: int, banned: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    rows = (generator.standard_normal((3, vocabulary)) * spread).astype(np.float32)
    if steps:
        rows = np.round(rows / np.float32(steps)) * np.float32(steps)  # many equals
    rows[:, 1:][generator.random((3, vocabulary - 1)) < banned] = -np.inf
    for row, (log_sum, ids) in zip(rows, best_tokens(list(rows), top), strict=True):
        expected_sum, expected = best_by_numpy(row, top)
        assert log_sum == pytest.approx(expected_sum, abs=2e-5)
        assert ids == expected


@pytest.mark.parametrize("strange", [np.nan, np.inf])
def test_a_row_that_is_no_distribution_has_no_log_probabilities(instruction_set: str, strange: float) -> None:
    scores = np.zeros(300, dtype=np.float32)
    scores[271] = strange
    ((log_sum, ids),) = best_tokens([scores], 2)
    assert np.isnan(log_sum)
    assert ids == [-1, -1]
