"""Log probabilities as the model gave them: before temperature, filters and penalties."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from millicent.engine.protocol import ScoredToken
from millicent.engine.sampler import top_k_ids

if TYPE_CHECKING:
    import numpy as np


def score(rows: Sequence[np.ndarray], tokens: Sequence[int], tops: Sequence[int]) -> list[ScoredToken]:
    """Each token's log probability in its row of logits (float32 [vocabulary]), and its `top` likeliest, best first and
    of equal ones the first. By the compiled kernels, or NumPy without them."""
    from millicent.engine.kernels.library import available

    if not rows:
        return []
    if available().instruction_set is None:
        best = list(map(best_by_numpy, rows, tops))
    else:
        from millicent.engine.kernels.sampling import best_tokens

        best = best_tokens(rows, max(tops))
    return [
        ScoredToken(
            token, float(logits[token]) - log_sum, tuple((one, float(logits[one]) - log_sum) for one in ids[:top])
        )
        for logits, token, top, (log_sum, ids) in zip(rows, tokens, tops, best, strict=True)
    ]


def score_drawn(
    tokens: Sequence[int | None], tops: Sequence[int | None], row_of: Callable[[int], np.ndarray]
) -> list[tuple[ScoredToken, ...]]:
    """The same for tokens that were drawn, each alone in a tuple; none where nobody asks, or none could be drawn."""
    wanted = [
        (index, token, top)
        for index, (token, top) in enumerate(zip(tokens, tops, strict=True))
        if token is not None and top is not None
    ]
    found: list[tuple[ScoredToken, ...]] = [()] * len(tokens)
    scored = score([row_of(index) for index, _, _ in wanted], *([one[at] for one in wanted] for at in (1, 2)))
    for (index, _, _), one in zip(wanted, scored, strict=True):
        found[index] = (one,)
    return found


def best_by_numpy(logits: np.ndarray, top: int) -> tuple[float, list[int]]:
    """What is taken off the logits to make them log probabilities, and the ids of the `top` likeliest."""
    import numpy as np

    largest = logits.max()
    shifted = logits - largest
    log_sum = float(largest) + math.log(np.exp(shifted, out=shifted).sum())
    if not top:
        return log_sum, []
    ids = top_k_ids(logits, top)
    return log_sum, ids[np.argsort(-logits[ids], kind="stable")][:top].tolist()
