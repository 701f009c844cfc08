"""The estimator that the attribution benchmark rests on, on games whose Shapley value is known."""

from __future__ import annotations

import itertools
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from shapley import Counts, by_definition, sampled

OWN = (1.0, 2.5, 4.0, 0.5)
FIXED = 40.0


def step(counts: Counts) -> float:
    """A fixed part, what each adds, and a computing part that hides until there is enough of it."""
    rows = sum(counts)
    return FIXED + 3.0 * max(0, rows - 5) + sum(number * own for number, own in zip(counts, OWN, strict=True))


def test_sampling_finds_the_value_that_the_definition_gives() -> None:
    """Eight players of four kinds: few enough for the definition."""
    kinds = [kind for kind in range(4) for _ in range(2)]
    costs = {
        frozenset(subset): step(tuple(sum(kinds[i] == kind for i in subset) for kind in range(4))) if subset else 0.0
        for size in range(9)
        for subset in itertools.combinations(range(8), size)
    }
    exact = by_definition(costs, range(8))
    values, errors = sampled(step, per_kind=2, kinds=4, sets=40, seed=1)
    for kind, (value, error) in enumerate(zip(values, errors, strict=True)):
        assert exact[2 * kind] == pytest.approx(exact[2 * kind + 1])
        assert abs(value - exact[2 * kind]) < 4 * error + 1e-9
    # The fixed part is forty times what the least of them adds; standing first equally often takes that noise out.
    assert max(errors) < 0.1
    assert sum(values) * 2 == pytest.approx(costs[frozenset(range(8))])


def test_noise_in_what_is_measured_shows_in_the_standard_error() -> None:
    draw = random.Random(3)
    values, errors = sampled(lambda counts: step(counts) + draw.gauss(0, 2.0), per_kind=2, kinds=4, sets=60, seed=1)
    exact = sampled(step, per_kind=2, kinds=4, sets=60, seed=1)[0]
    for value, error, true in zip(values, errors, exact, strict=True):
        assert 0.03 < error < 0.5
        assert abs(value - true) < 5 * error
