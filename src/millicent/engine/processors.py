"""What changes a row's logits before a token is drawn from them: penalties, biases, and tokens that may not come yet.

The order is that of the common libraries: repetition, then presence and frequency, then biases, then bans.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from millicent.core.request import Limits, Sampling

if TYPE_CHECKING:
    import numpy as np


class Adjustments:
    """One answer's. `note` tells of each output token; calling it changes logits (float32 [vocabulary]) in place.

    The repetition penalty (Keskar et al. 2019) concerns the prompt's tokens and the output's: positive logits are
    divided by it, negative ones multiplied. The presence penalty is taken off once for each token that is in the
    output, the frequency penalty as often as it is. `ends` may not come in the first `min_tokens` tokens.
    """

    def __init__(self, sampling: Sampling, limits: Limits, prompt: Sequence[int], ends: Collection[int]) -> None:
        import numpy as np

        self._sampling = sampling
        self._counts: dict[int, int] = {}
        self._seen = dict.fromkeys(prompt) if sampling.repetition_penalty != 1 else {}
        self._biased = np.array(list(sampling.logit_bias), dtype=np.int64)
        self._biases = np.array(list(sampling.logit_bias.values()), dtype=np.float32)
        self._ends = np.array(sorted(ends), dtype=np.int64)
        self._banned_tokens = limits.min_tokens
        self._tokens = 0

    def copy(self) -> Adjustments:
        """One that can be told of tokens that may never come."""
        ahead = copy.copy(self)
        vars(ahead).update(_counts=self._counts.copy(), _seen=self._seen.copy())
        return ahead

    def note(self, token: int) -> None:
        self._tokens += 1
        self._counts[token] = self._counts.get(token, 0) + 1
        if self._sampling.repetition_penalty != 1:
            self._seen[token] = None

    def __call__(self, scores: np.ndarray) -> None:
        import numpy as np

        sampling = self._sampling
        if self._seen:
            ids = np.fromiter(self._seen, dtype=np.int64, count=len(self._seen))
            found, penalty = scores[ids], np.float32(sampling.repetition_penalty)
            scores[ids] = np.where(found < 0, found * penalty, found / penalty)
        if self._counts and (sampling.presence_penalty or sampling.frequency_penalty):
            ids = np.fromiter(self._counts, dtype=np.int64, count=len(self._counts))
            counts = np.fromiter(self._counts.values(), dtype=np.float32, count=len(self._counts))
            scores[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        if len(self._biased):
            scores[self._biased] += self._biases
        if self._tokens < self._banned_tokens and len(self._ends):
            scores[self._ends] = -np.inf

    def changes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The same as numbers, for logits that lie elsewhere: tokens, each once; what those that are negative are
        multiplied by, and the others divided; then what is taken away; then what is added."""
        import numpy as np

        counted = self._counts if self._sampling.presence_penalty or self._sampling.frequency_penalty else {}
        ends = self._ends if self._tokens < self._banned_tokens else self._ends[:0]
        parts = [np.fromiter(ids, dtype=np.int64, count=len(ids)) for ids in (self._seen, counted)]
        seen, noted = parts
        tokens = np.unique(np.concatenate((seen, noted, self._biased, ends)))
        factors = np.ones(len(tokens), dtype=np.float32)
        minus, plus = np.zeros_like(factors), np.zeros_like(factors)
        factors[np.searchsorted(tokens, seen)] = self._sampling.repetition_penalty
        counts = np.fromiter(counted.values(), dtype=np.float32, count=len(counted))
        minus[np.searchsorted(tokens, noted)] = (
            self._sampling.presence_penalty + self._sampling.frequency_penalty * counts
        )
        plus[np.searchsorted(tokens, self._biased)] = self._biases
        plus[np.searchsorted(tokens, ends)] = -np.inf
        return tokens, factors, minus, plus


def adjustments(sampling: Sampling, limits: Limits, prompt: Sequence[int], ends: Collection[int]) -> Adjustments | None:
    """None where nothing is to be changed, which is what most requests ask for."""
    penalized = sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty
    if not (penalized or sampling.logit_bias or limits.min_tokens):
        return None
    return Adjustments(sampling, limits, prompt, ends)
