"""From logits to tokens, for a whole batch, each row independent of its neighbours.

Filters follow the usual order: temperature, then top-k, then top-p over what is left, renormalised. Tokens that tie
with the last one kept are kept too, so that the result doesn't hang on the order of a sort.

On the CPU this is NumPy's work: its argmax is 80 times torch's, and it wakes no threads for what takes microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

# Below this the distribution is the argmax, to float32's precision, and dividing by it would overflow.
_GREEDY_BELOW = 1e-5
_BLOCK_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row is drawn. `seed` and `position`, the index of the output token, decide the random number."""

    temperature: float
    top_p: float
    top_k: int
    seed: int
    position: int


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing else: no generator state, so preemption and batching can't move it."""
    key = (seed % 2**64).to_bytes(8, "little") + position.to_bytes(8, "little")
    return (int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 12) / 2**52


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int | None]:
    """One token per row of `logits` (float32 [rows, vocabulary]); None where a row isn't a distribution (NaN, inf)."""
    import numpy as np

    array = logits.numpy(force=True)
    greedy = array.argmax(axis=-1)  # the first of equal maxima, or a NaN
    largest = array[np.arange(len(draws)), greedy]
    tokens: list[int | None] = [
        token if finite else None for token, finite in zip(greedy.tolist(), np.isfinite(largest).tolist(), strict=True)
    ]
    rows = [row for row, draw in enumerate(draws) if draw.temperature >= _GREEDY_BELOW and tokens[row] is not None]
    if rows:
        chosen = array if len(rows) == len(draws) else array[rows]
        for row, token in zip(rows, _draw(chosen, largest[rows], [draws[row] for row in rows]), strict=True):
            tokens[row] = token
    return tokens


def _draw(logits: np.ndarray, largest: np.ndarray, draws: Sequence[Draw]) -> list[int]:
    import numpy as np

    temperatures = np.array([draw.temperature for draw in draws], dtype=np.float32)
    # Probabilities but for a factor, which nothing below needs. In place: allocating takes longer than computing.
    weights = logits - largest[:, None]
    weights /= temperatures[:, None]
    np.exp(weights, out=weights)
    _filter(weights, logits, draws)
    return _invert(weights, [uniform(draw.seed, draw.position) for draw in draws])


def _filter(weights: np.ndarray, logits: np.ndarray, draws: Sequence[Draw]) -> None:
    """Zero, in place, what top-k and top-p leave out, in the rows that ask for them."""
    import numpy as np

    for row, scores, draw in zip(weights, logits, draws, strict=True):
        if 0 < draw.top_k < len(row):
            np.multiply(row, scores >= np.partition(scores, -draw.top_k)[-draw.top_k], out=row)
        if draw.top_p < 1:
            np.multiply(row, row >= _last_kept(row, draw.top_p), out=row)


def _last_kept(row: np.ndarray, top_p: float) -> float:
    """The least weight in the smallest set of the likeliest tokens that holds `top_p` of the row's mass."""
    import numpy as np

    whole = float(row.sum(dtype=np.float64))
    # All tokens below this together hold less than 1 - top_p: the set is among the others, mostly few.
    likely = np.sort(row[row >= (1 - top_p) * whole / len(row)])[::-1]
    mass = likely.cumsum(dtype=np.float64)
    # A token is kept when what is likelier than it doesn't yet hold top_p.
    return float(likely[np.count_nonzero(mass[:-1] < top_p * whole)])


def _invert(weights: np.ndarray, uniforms: Sequence[float]) -> list[int]:
    """Per row, the token in whose part of the cumulative mass, in the order of ids, the uniform number falls.

    Two levels, blocks and then tokens in the block, because a running sum over a whole vocabulary is slow. Sums are in
    float64: float32 ones would move the boundaries between tokens visibly.
    """
    import numpy as np

    starts = np.arange(0, weights.shape[-1], _BLOCK_TOKENS)
    block_ends = np.add.reduceat(weights, starts, axis=-1, dtype=np.float64).cumsum(axis=-1)
    tokens = []
    for row, ends, number in zip(weights, block_ends, uniforms, strict=True):
        target = number * ends[-1]
        # The first block, then the first token in it, whose cumulative mass exceeds the target: its own is positive.
        block = int(np.searchsorted(ends, target, side="right"))
        start = block * _BLOCK_TOKENS
        inside = row[start : start + _BLOCK_TOKENS].cumsum(dtype=np.float64)
        # The two levels round differently: kept below the block's mass, and at least 0, the target stays inside it.
        within = min(max(target - (ends[block - 1] if block else 0.0), 0.0), np.nextafter(inside[-1], 0.0))
        tokens.append(start + int(np.searchsorted(inside, within, side="right")))
    return tokens
