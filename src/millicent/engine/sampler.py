"""From logits to tokens, for a whole batch, each row independent of its neighbours.

Filters follow the usual order: temperature, top-k, top-p, min-p, typical-p, each over what the one before left.
Tokens that tie with the last one kept are kept too, so that the result doesn't hang on the order of a sort.

The compiled kernels do it (`native/sampling.h`); NumPy does without them, and is what they are checked against. With
the same seed, choice and position both draw the same token, unless the number falls within a rounding error of the edge
between two. A row's time goes into passes over its vocabulary, so there are as few as can be: filters find a bound that
leaves few candidates, and everything exact happens among those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

# Below this the distribution is the argmax, to float32's precision, and dividing by it would overflow.
_GREEDY_BELOW = 1e-5
_BLOCK_TOKENS = 256
_GROUP_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row is drawn. `seed` and `position`, the index of the output token, decide the random number.

    `adjust` changes the row's logits first, in place: penalties, biases, bans.
    """

    temperature: float
    top_p: float
    top_k: int
    seed: int
    position: int
    min_p: float = 0.0
    typical_p: float = 1.0
    adjust: Callable[[np.ndarray], None] | None = None


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing else: no generator state, so preemption and batching can't move it."""
    key = (seed % 2**64).to_bytes(8, "little") + position.to_bytes(8, "little")
    return (int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 12) / 2**52


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int | None]:
    """One token per row of `logits` (float32 [rows, vocabulary]); None where a row isn't a distribution (NaN, inf)."""
    from millicent.engine.kernels.library import available

    if not draws:
        return []
    array = logits.numpy(force=True)
    rows = [array[row] if draw.adjust is None else _adjusted(array[row], draw.adjust) for row, draw in enumerate(draws)]
    if available().instruction_set is None:
        return list(map(choose, rows, draws))
    return _choose_natively(rows, draws)


def _adjusted(scores: np.ndarray, adjust: Callable[[np.ndarray], None]) -> np.ndarray:
    scores = scores.copy()
    adjust(scores)
    return scores


def _choose_natively(rows: Sequence[np.ndarray], draws: Sequence[Draw]) -> list[int | None]:
    from millicent.engine.kernels.sampling import choose as choose_all

    tokens = choose_all(
        [
            (
                scores,
                uniform(draw.seed, draw.position) if draw.temperature >= _GREEDY_BELOW else 0.0,
                draw.temperature,
                draw.top_p,
                draw.min_p,
                draw.typical_p,
                draw.top_k,
            )
            for scores, draw in zip(rows, draws, strict=True)
        ]
    )
    return [None if token < 0 else token for token in tokens]


def choose(scores: np.ndarray, draw: Draw) -> int | None:
    """One row's token, by NumPy alone."""
    import numpy as np

    best = int(scores.argmax())  # the first of equal maxima, or a NaN
    if not np.isfinite(scores[best]):
        return None
    return best if draw.temperature < _GREEDY_BELOW else _draw(scores, float(scores[best]), draw)


def _draw(scores: np.ndarray, largest: float, draw: Draw) -> int:
    """A token of one row, which is left as it is."""
    import numpy as np

    ids: np.ndarray | None = None
    if 0 < draw.top_k < len(scores):
        ids = top_k_ids(scores, draw.top_k)
    elif draw.min_p > 0 and draw.top_p >= 1:  # which needs no probabilities: most tokens are out before `exp`
        ids = np.flatnonzero(scores >= largest + draw.temperature * np.log(draw.min_p) - 1e-3)
    if ids is not None:
        scores = scores[ids]
    weights = _weights(scores, largest, draw.temperature)
    for kept in _filters(weights, draw):
        ids = kept if ids is None else ids[kept]
        weights = weights[kept]
    index = _invert(weights, uniform(draw.seed, draw.position))
    return index if ids is None else int(ids[index])


def _filters(weights: np.ndarray, draw: Draw) -> Iterator[np.ndarray]:
    """What each filter keeps, in order, as indices of what the one before kept."""
    import numpy as np

    if draw.top_p < 1:
        yield (kept := _nucleus(weights, draw.top_p))
        weights = weights[kept]
    if draw.min_p > 0:
        yield (kept := np.flatnonzero(weights >= draw.min_p * weights.max()))
        weights = weights[kept]
    if draw.typical_p < 1:
        yield _typical(weights, draw.typical_p)


def _weights(scores: np.ndarray, largest: float, temperature: float) -> np.ndarray:
    """Probabilities but for a factor, which nothing that follows needs."""
    import numpy as np

    found: np.ndarray = (scores - np.float32(largest)) * np.float32(1 / temperature)
    np.exp(found, out=found)
    return found


def top_k_ids(scores: np.ndarray, k: int) -> np.ndarray:
    """The ids of the k best, in order, with what ties with the last."""
    import numpy as np

    if k >= len(scores):
        return np.arange(len(scores))
    groups = len(scores) // _GROUP_TOKENS
    candidates = None
    if k <= groups:
        # At least k scores reach the k-th best of any groups' maxima, so all of the k best do.
        maxima = scores[: groups * _GROUP_TOKENS].reshape(_GROUP_TOKENS, groups).max(axis=0)
        candidates = np.flatnonzero(scores >= np.partition(maxima, -k)[-k])
        scores = scores[candidates]
    kept = np.flatnonzero(scores >= np.partition(scores, -k)[-k])
    return kept if candidates is None else candidates[kept]


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """The ids of the smallest set of the likeliest tokens that holds `top_p` of the mass."""
    import numpy as np

    whole = float(weights.sum())
    top_p = max(top_p, 1e-6)  # at 0 rounding could leave none
    for count in (_BLOCK_TOKENS, len(weights)):
        # All tokens below (1 - top_p) / len together hold less than 1 - top_p, so the set is among the others. Mostly
        # it is among the few above a much higher bound, which their own mass then proves.
        candidates = np.flatnonzero(weights >= (1 - top_p) * whole / count)
        likely = weights[candidates]
        ordered = np.sort(likely)[::-1]
        mass = ordered.cumsum(dtype=np.float64)
        if len(mass) and mass[-1] >= top_p * whole:
            break
    # A token is kept when what is likelier than it doesn't yet hold top_p.
    last = ordered[np.count_nonzero(mass[:-1] < top_p * whole)]
    kept: np.ndarray = candidates[likely >= last]
    return kept


def _typical(weights: np.ndarray, typical_p: float) -> np.ndarray:
    """The ids of the smallest set of the tokens nearest to the expected surprise that holds `typical_p` of the mass
    (Meister et al. 2022)."""
    import numpy as np

    probabilities = weights / weights.sum(dtype=np.float64)
    surprise = -np.log(np.maximum(probabilities, 1e-300))
    deviation = np.abs(surprise - np.dot(probabilities, surprise))
    order = np.argsort(deviation)
    mass = probabilities[order].cumsum()
    return np.flatnonzero(deviation <= deviation[order[np.count_nonzero(mass[:-1] < typical_p)]])


def _invert(weights: np.ndarray, number: float) -> int:
    """The index in whose part of the cumulative mass, in order, the number in [0, 1) falls.

    Two levels, blocks and then tokens in the block, because a running sum over a whole vocabulary is slow.
    """
    import numpy as np

    ends = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK_TOKENS)).cumsum(dtype=np.float64)
    target = number * ends[-1]
    # The first block, then the first token in it, whose cumulative mass exceeds the target: its own is positive.
    block = int(np.searchsorted(ends, target, side="right"))
    start = block * _BLOCK_TOKENS
    inside = weights[start : start + _BLOCK_TOKENS].cumsum(dtype=np.float64)
    # The two levels round differently: kept below the block's mass, and at least 0, the target stays inside it.
    within = min(max(target - (ends[block - 1] if block else 0.0), 0.0), np.nextafter(inside[-1], 0.0))
    return start + int(np.searchsorted(inside, within, side="right"))
