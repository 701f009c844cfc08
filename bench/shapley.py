"""Shapley values of a game whose values are measured: by definition for a few players, sampled for many.

What is sampled is as unlike guessing as it can be. Players come in kinds, all of a kind being alike, so that a kind's
value is averaged over its players. An order of arrival is never drawn alone: every kind-sized rotation of it, forwards
and backwards, is run too, so that over one such set of orders each kind stands at every place about as often as any
other (what the first to arrive adds, the fixed cost of a step, is many times what a later one adds). Sets are
independent of each other: their spread is the standard error.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence

Counts = tuple[int, ...]
"""How many players of each kind are there."""


def by_definition(costs: Mapping[frozenset[int], float], players: Sequence[int]) -> list[float]:
    """What each adds, over all orders of arrival; `costs` of every subset, in the order of `players`."""
    added = dict.fromkeys(players, 0.0)
    for order in itertools.permutations(players):
        before: frozenset[int] = frozenset()
        for player in order:
            after = before | {player}
            added[player] += costs[after] - costs[before]
            before = after
    return [added[player] / math.factorial(len(players)) for player in players]


def sampled(
    cost: Callable[[Counts], float], per_kind: int, kinds: int, sets: int, seed: int
) -> tuple[list[float], list[float]]:
    """Each kind's value for one player, and its standard error, from two `sets` or more; `cost` is asked for every
    coalition of every order, and measures anew each time."""
    draw = random.Random(seed)
    values: list[list[float]] = []
    for _ in range(sets):
        order = [kind for kind in range(kinds) for _ in range(per_kind)]
        draw.shuffle(order)
        added = [0.0] * kinds
        shifts = range(0, len(order), per_kind)
        for shift in shifts:
            rotated = order[shift:] + order[:shift]
            for way in (rotated, rotated[::-1]):
                _walk(cost, way, added)
        orders = 2 * len(shifts)
        values.append([value / (orders * per_kind) for value in added])
    means = [statistics.fmean(column) for column in zip(*values, strict=True)]
    errors = [statistics.stdev(column) / math.sqrt(sets) for column in zip(*values, strict=True)]
    return means, errors


def _walk(cost: Callable[[Counts], float], order: Sequence[int], added: list[float]) -> None:
    counts = [0] * len(added)
    before = 0.0
    for kind in order:
        counts[kind] += 1
        after = cost(tuple(counts))
        added[kind] += after - before
        before = after
