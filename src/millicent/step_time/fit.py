"""Learn the coefficients from measured steps, one at a time, in constant memory.

For a known break r = w/a (the number of rows at which computing takes as long as reading the weights) the model is
linear: t = c0 + a*max(r, rows) + s*sampled + k*kv + p*pairs. So one set of normal equations is kept for each r of a
grid, with older steps fading out, and whichever fits best is taken. Five unknowns that may not be negative are solved
exactly, by trying every set of them that is allowed to be positive. Steps count by relative error, so that a few long
prefills don't outweigh a thousand decode steps, and one that is far off (the machine was busy elsewhere) counts less.

Traffic that is all alike says nothing of other steps. What was known of those is kept: each fit also answers, with
little weight, to what the fit before it (or one that was loaded) predicts for a few steps of every kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from millicent.step_time.model import Coefficients, Work

# Rows at which a step may turn from bound by memory to bound by computing.
_BREAKS = (0, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
# Units in which the features are of the order of one, so that the equations are well conditioned.
_SCALES = (1.0, 16.0, 4.0, 4096.0, 65536.0)
_UNKNOWNS = len(_SCALES)
_SUBSETS = [subset for size in range(_UNKNOWNS + 1) for subset in combinations(range(_UNKNOWNS), size)]
_NS_PER_UNIT = 1e6
_LEAST_STEPS = 16
_FAR_OFF = 0.5  # relative error beyond which a step counts less
# Steps of every kind: `(rows, sampled, KV tokens, pairs)`. Together they weigh as much as _ANCHORS_WEIGH real steps.
_ANCHORS = (
    Work(1, 1, 64, 0),
    Work(4, 4, 1024, 0),
    Work(16, 16, 4096, 0),
    Work(32, 32, 32768, 0),
    Work(8, 8, 16384, 0),
    Work(32, 0, 0, 528),
    Work(128, 1, 0, 8256),
    Work(512, 1, 0, 131328),
    Work(256, 1, 0, 295040),
    Work(136, 9, 4096, 8256),
)
_ANCHORS_WEIGH = 2


class Fitter:
    """Feed it steps with `observe`; ask for `coefficients` now and then. `window_steps` is how many it remembers.

    `error` is the mean absolute relative error of predictions made before each step was seen.
    """

    def __init__(self, window_steps: int = 2000, known: Coefficients | None = None) -> None:
        """`known`: a fit to begin with."""
        self._keep = 1 - 1 / window_steps
        self._systems = [_System(break_rows) for break_rows in _BREAKS]
        self._current = known
        self._seen = 0
        self.error: float | None = None

    @property
    def steps(self) -> int:
        return self._seen

    def observe(self, work: Work, wall_ns: int) -> None:
        """One step: all its work, and the time it took."""
        if wall_ns <= 0:
            return
        weight = 1.0
        if self._current is not None:
            off = abs(self._current.step_ns(work) - wall_ns) / wall_ns
            self.error = off if self.error is None else self.error + (off - self.error) * 0.02
            weight = min(1.0, _FAR_OFF / off) if off else 1.0
        self._seen += 1
        for system in self._systems:
            system.add(work, wall_ns, weight, self._keep)

    def coefficients(self, least_steps: int = _LEAST_STEPS) -> Coefficients | None:
        """The best fit so far; what was known before, or None, until there is enough to fit."""
        if self._seen < least_steps:
            return self._current
        solved = [(*system.anchored(self._current).solve(), system) for system in self._systems]
        _, values, best = min(solved, key=lambda found: found[0])
        self._current = best.coefficients(values)
        return self._current


class _System:
    """Normal equations for one break: sums of features' products, weighted by 1/t^2 and fading."""

    def __init__(self, break_rows: int) -> None:
        self._break_rows = break_rows
        self._products = [[0.0] * _UNKNOWNS for _ in range(_UNKNOWNS)]
        self._targets = [0.0] * _UNKNOWNS
        self._square = 0.0

    def add(self, work: Work, wall_ns: float, weight: float, keep: float) -> None:
        time = wall_ns / _NS_PER_UNIT
        features = (
            1.0,
            max(self._break_rows, work.rows) / _SCALES[1],
            work.sampled_rows / _SCALES[2],
            work.kv_read_tokens / _SCALES[3],
            work.prefill_pairs / _SCALES[4],
        )
        importance = weight / (time * time)
        for i, row in enumerate(self._products):
            scaled = features[i] * importance
            self._targets[i] = self._targets[i] * keep + scaled * time
            for j in range(i, _UNKNOWNS):
                row[j] = row[j] * keep + scaled * features[j]
        self._square = self._square * keep + weight

    def anchored(self, known: Coefficients | None) -> _System:
        """These equations with what is known added."""
        if known is None:
            return self
        copy = _System(self._break_rows)
        copy._products = [row.copy() for row in self._products]
        copy._targets = self._targets.copy()
        copy._square = self._square
        for work in _ANCHORS:
            if wall_ns := known.step_ns(work):
                copy.add(work, wall_ns, _ANCHORS_WEIGH / len(_ANCHORS), 1.0)
        return copy

    def solve(self) -> tuple[float, list[float]]:
        """The least sum of squared relative errors with no unknown below zero, and where it is reached."""
        best_loss, best = self._square, [0.0] * _UNKNOWNS
        for subset in _SUBSETS:
            found = self._solve_subset(subset)
            if found is None or min(found, default=0.0) < 0:
                continue
            # At a least-squares solution over the subset: loss = t't - x'b.
            loss = self._square - sum(value * self._targets[i] for i, value in zip(subset, found, strict=True))
            if loss < best_loss - 1e-12 * self._square:
                best_loss = loss
                best = [0.0] * _UNKNOWNS
                for i, value in zip(subset, found, strict=True):
                    best[i] = value
        return best_loss, best

    def _solve_subset(self, subset: Sequence[int]) -> list[float] | None:
        """Cholesky on the chosen rows and columns; None where they don't determine a solution."""
        lower: list[list[float]] = []
        middle: list[float] = []
        for m, i in enumerate(subset):
            row: list[float] = []
            for n, j in enumerate(subset[:m]):
                shared = sum(row[q] * lower[n][q] for q in range(n))
                row.append((self._products[j][i] - shared) / lower[n][n])
            rest = self._products[i][i] - sum(value * value for value in row)
            if rest <= 1e-9 * self._products[i][i]:
                return None
            row.append(rest**0.5)
            lower.append(row)
            middle.append((self._targets[i] - sum(row[q] * middle[q] for q in range(m))) / row[m])
        values = [0.0] * len(subset)
        for m in reversed(range(len(subset))):
            later = sum(lower[q][m] * values[q] for q in range(m + 1, len(subset)))
            values[m] = (middle[m] - later) / lower[m][m]
        return values

    def coefficients(self, values: Sequence[float]) -> Coefficients:
        fixed, row, sampled, kv, pair = (
            value * _NS_PER_UNIT / scale for value, scale in zip(values, _SCALES, strict=True)
        )
        return Coefficients(fixed, row * self._break_rows, row, sampled, kv, pair)
