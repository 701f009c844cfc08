"""Log probabilities as the model gave them: before temperature, filters and penalties."""

from __future__ import annotations

from typing import TYPE_CHECKING

from millicent.engine.protocol import ScoredToken

if TYPE_CHECKING:
    import numpy as np


def score(logits: np.ndarray, token: int, top: int) -> ScoredToken:
    """The token's log probability in a row of logits (float32 [vocabulary]), and the `top` likeliest, best first."""
    import numpy as np

    largest = logits.max()
    log_sum = float(largest) + float(np.log(np.exp(logits - largest).sum(dtype=np.float64)))
    top = min(top, len(logits))
    best: list[int] = []
    if top:
        least = np.partition(logits, -top)[-top]
        ids = np.flatnonzero(logits >= least)
        best = ids[np.argsort(-logits[ids], kind="stable")][:top].tolist()  # of equal ones the first
    likeliest = tuple((one, float(logits[one]) - log_sum) for one in best)
    return ScoredToken(token, float(logits[token]) - log_sum, likeliest)
