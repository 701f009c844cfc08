"""Log probabilities as the model gave them: before temperature, filters and penalties."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from millicent.engine.protocol import ScoredToken
from millicent.engine.sampler import top_k_ids

if TYPE_CHECKING:
    import numpy as np


def score(logits: np.ndarray, token: int, top: int) -> ScoredToken:
    """The token's log probability in a row of logits (float32 [vocabulary]), and the `top` likeliest, best first."""
    import numpy as np

    largest = logits.max()
    shifted = logits - largest
    log_sum = float(largest) + math.log(np.exp(shifted, out=shifted).sum())
    best: list[int] = []
    if top:
        ids = top_k_ids(logits, top)
        best = ids[np.argsort(-logits[ids], kind="stable")][:top].tolist()  # of equal ones the first
    likeliest = tuple((one, float(logits[one]) - log_sum) for one in best)
    return ScoredToken(token, float(logits[token]) - log_sum, likeliest)
