"""From logits to tokens, for a whole batch, each row independent of its neighbours.

Filters follow the usual order: temperature, then top-k, then top-p over what is left, renormalised. Tokens that tie
with the last one kept are kept too, so that the result doesn't hang on the order of a sort.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
    import torch

    with torch.inference_mode():
        # NumPy's argmax is vectorised, 80 times torch's on CPU. Both give the first of equal maxima, or a NaN.
        array = logits.numpy(force=True)
        greedy = array.argmax(axis=-1)
        largest = array[np.arange(len(draws)), greedy]
        tokens: list[int | None] = [
            token if finite else None
            for token, finite in zip(greedy.tolist(), np.isfinite(largest).tolist(), strict=True)
        ]
        rows = [row for row, draw in enumerate(draws) if draw.temperature >= _GREEDY_BELOW and tokens[row] is not None]
        if rows:
            chosen = logits if len(rows) == len(draws) else logits[rows]
            drawn = _draw(chosen, torch.from_numpy(largest[rows]), [draws[row] for row in rows])
            for row, token in zip(rows, drawn, strict=True):
                tokens[row] = token
        return tokens


def _draw(logits: torch.Tensor, largest: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    import torch

    temperatures = torch.tensor([draw.temperature for draw in draws], dtype=torch.float32)
    scores = (logits - largest[:, None]) / temperatures[:, None]
    _keep_top_k(scores, draws)
    probabilities = torch.softmax(scores, dim=-1)
    _keep_top_p(probabilities, draws)
    uniforms = torch.tensor([uniform(draw.seed, draw.position) for draw in draws], dtype=torch.float64)
    return _invert(probabilities, uniforms)


def _invert(weights: torch.Tensor, uniforms: torch.Tensor) -> list[int]:
    """Per row, the token in whose part of the cumulative mass, in the order of ids, the uniform number falls.

    Two levels, blocks and then tokens in the block, because a running sum over a whole vocabulary is slow. Sums are in
    float64: float32 ones would move the boundaries between tokens visibly.
    """
    import torch

    padded = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % _BLOCK_TOKENS))
    blocks = padded.view(len(weights), -1, _BLOCK_TOKENS)
    sums = blocks.sum(dim=-1, dtype=torch.float64)
    cumulative = sums.cumsum(dim=-1)
    targets = uniforms[:, None] * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, targets, right=True)
    before = cumulative.gather(1, block) - sums.gather(1, block)
    inside = blocks[torch.arange(len(weights)), block[:, 0]].cumsum(dim=-1, dtype=torch.float64)
    # The two levels round differently; kept in [0, mass of the block), the target meets a token of positive mass.
    within = (
        (targets - before).clamp(min=0).minimum(torch.nextafter(inside[:, -1:], torch.zeros(1, dtype=torch.float64)))
    )
    offset = torch.searchsorted(inside, within, right=True)
    tokens: list[int] = (block * _BLOCK_TOKENS + offset)[:, 0].tolist()
    return tokens


def _keep_top_k(scores: torch.Tensor, draws: Sequence[Draw]) -> None:
    """In place: minus infinity for all but the k best, in the rows that ask for it."""
    for row, draw in enumerate(draws):
        if 0 < draw.top_k < scores.shape[-1]:
            last_kept = scores[row].topk(draw.top_k).values[-1]
            scores[row].masked_fill_(scores[row] < last_kept, float("-inf"))


def _keep_top_p(probabilities: torch.Tensor, draws: Sequence[Draw]) -> None:
    """In place: zero for all but the smallest set of most likely tokens that holds `top_p` of the mass."""
    import numpy as np

    vocabulary = probabilities.shape[-1]
    for row, draw in zip(probabilities.numpy(), draws, strict=True):
        if draw.top_p >= 1:
            continue
        # All tokens below this together hold less than 1 - top_p: the set is among the others, mostly few.
        likely = row[row >= (1 - draw.top_p) / vocabulary]
        likely = np.sort(likely)[::-1]
        mass = likely.cumsum(dtype=np.float64)
        # A token is kept when what is likelier than it doesn't yet hold top_p.
        last_kept = likely[np.count_nonzero(mass[:-1] < draw.top_p)]
        np.multiply(row, row >= last_kept, out=row)
