from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millicent.engine.sampler import Draw, sample, uniform


def draw(
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    position: int = 0,
    min_p: float = 0.0,
    typical_p: float = 1.0,
) -> Draw:
    return Draw(temperature, top_p, top_k, seed, position, min_p, typical_p)


def random_logits(rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def kept_probabilities(logits: list[float], wanted: Draw) -> list[float]:
    """The plain definition, in float64: scale, keep the k best, then the smallest set of the likeliest that holds p."""
    scores = np.array(logits, dtype=np.float64) / wanted.temperature
    weights = np.exp(scores - scores.max())
    if wanted.top_k:
        weights[weights < np.sort(weights)[::-1][: wanted.top_k][-1]] = 0
    weights /= weights.sum()
    if wanted.top_p < 1:
        mass, kept = 0.0, []
        for token in sorted(range(len(weights)), key=lambda token: -weights[token]):
            if mass >= wanted.top_p:
                break
            kept.append(token)
            mass += weights[token]
        weights[[token for token in range(len(weights)) if token not in kept]] = 0
    if wanted.min_p:
        weights[weights < wanted.min_p * weights.max()] = 0
    if wanted.typical_p < 1:
        shares = weights / weights.sum()
        surprise = np.array([-math.log(share) if share else math.inf for share in shares])
        entropy = sum(share * bits for share, bits in zip(shares, surprise, strict=True) if share)
        mass, kept = 0.0, []
        for token in sorted(range(len(shares)), key=lambda token: abs(surprise[token] - entropy)):
            if mass >= wanted.typical_p:
                break
            kept.append(token)
            mass += shares[token]
        weights[[token for token in range(len(weights)) if token not in kept]] = 0
    kept_weights: list[float] = (weights / weights.sum()).tolist()
    return kept_weights


@settings(max_examples=60)
@given(
    vocabulary=st.sampled_from([1, 2, 40, 256, 300, 1000, 7000]),
    temperature=st.floats(0.1, 3),
    top_p=st.sampled_from([0.05, 0.3, 0.9, 0.99, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 50, 5000]),
    seed=st.integers(0, 2**63),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.3, 1.0]),
    typical_p=st.sampled_from([1.0, 1.0, 0.2, 0.9]),
)
def test_a_draw_is_the_inverse_of_the_reference_distribution(
    vocabulary: int, temperature: float, top_p: float, top_k: int, seed: int, min_p: float, typical_p: float
) -> None:
    logits = random_logits(1, vocabulary, seed % 1000)
    wanted = draw(temperature, top_p, top_k, seed, 3, min_p, typical_p)
    probabilities = kept_probabilities(logits[0].tolist(), wanted)
    (token,) = sample(logits, [wanted])
    assert token is not None
    assert probabilities[token] > 0
    # The uniform number lies in the token's part of the cumulative mass, but for rounding at its edges.
    upper = sum(probabilities[: token + 1])
    assert upper - probabilities[token] - 1e-5 <= uniform(seed, 3) <= upper + 1e-5


def test_many_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]])
    draws = [draw(seed=11, position=position) for position in range(8000)]
    tokens = sample(logits.expand(8000, 3), draws)
    shares = [tokens.count(token) / 8000 for token in range(3)]
    assert shares == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.02)


def test_temperature_zero_takes_the_first_of_equal_maxima() -> None:
    logits = torch.zeros(2, 300)
    logits[0, 40] = logits[0, 41] = logits[0, 299] = 5
    assert sample(logits, [draw(temperature=0), draw(temperature=0)]) == [40, 0]


def test_a_temperature_too_small_to_divide_by_is_greedy() -> None:
    logits = random_logits(1, 500)
    assert sample(logits, [draw(temperature=1e-300)]) == [int(logits.argmax())]
    assert sample(logits, [draw(temperature=2e-5)]) == [int(logits.argmax())]


def test_a_draw_does_not_depend_on_its_neighbours() -> None:
    logits = random_logits(8, 1000)
    draws = [draw(0.0), draw(), draw(top_k=5), draw(top_p=0.5), draw(0.7, 0.9, 40), draw(2.0), draw(0.0), draw(top_k=1)]
    together = sample(logits, draws)
    alone = [sample(logits[row : row + 1], [one])[0] for row, one in enumerate(draws)]
    backwards = sample(logits.flip(0), draws[::-1])[::-1]
    assert together == alone == backwards


def test_seed_and_position_decide_the_number() -> None:
    numbers = {uniform(seed, position) for seed in (0, 1, -1, 2**64 - 2) for position in range(50)}
    assert len(numbers) == 200
    assert all(0 <= number < 1 for number in numbers)
    # The number itself is promised: another one would change every seeded answer.
    assert uniform(42, 0) == 0.013842768924102522


def test_a_row_that_is_no_distribution_spoils_only_itself() -> None:
    logits = random_logits(5, 100)
    logits[1, 50] = float("nan")
    logits[2] = float("-inf")
    logits[3, 7] = float("inf")
    tokens = sample(logits, [draw(), draw(), draw(0.0), draw(), draw(0.0)])
    assert [token is None for token in tokens] == [False, True, True, True, False]


def test_tokens_of_probability_zero_are_never_drawn() -> None:
    logits = torch.full((1, 600), float("-inf"))
    logits[0, 300] = logits[0, 599] = 1.0
    drawn = {sample(logits, [draw(seed=seed)])[0] for seed in range(40)}
    assert drawn == {300, 599}


def test_tokens_tied_with_the_last_one_kept_are_kept() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    drawn = {sample(logits, [draw(top_k=2, seed=seed)])[0] for seed in range(60)}
    assert drawn == {0, 1, 2}
