"""The step-time model and the shares it implies.

A step costs fixed time, reading the weights hidden under computing or the reverse, sampling, reading the KV cache, and
prefill attention:

    t = c0 + max(w, a*rows) + s*sampled_rows + k*kv_read + p*prefill_pairs

What one sequence of the n in a step is charged, with `rows_i` of the step's rows:

    share_i = (c0 + w)/n + max(0, a*rows - w) * rows_i/rows + s*sampled_i + k*kv_i + p*pairs_i

For everything but the `max` this is the Shapley value of the game "how long would a step with only these sequences
take" (Shapley 1953), which has this closed form because that part is additive but for a constant; what computing costs
beyond the weight reads is split by rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from millicent.core.fits import StepTimeFit
from millicent.core.steps import SequenceWork


class Work(msgspec.Struct, frozen=True, array_like=True):
    """What a step, or one sequence in it, asks for: token rows, rows sampled, KV tokens read by decode rows, and
    pairs of (row, attended token) in prefill attention."""

    rows: int
    sampled_rows: int
    kv_read_tokens: int
    prefill_pairs: int

    @classmethod
    def of(cls, work: SequenceWork) -> Work:
        prefills = work.prefill_rows > 0
        return cls(
            work.rows,
            work.sampled_rows,
            0 if prefills else work.kv_read_tokens,
            work.prefill_pairs if prefills else 0,
        )

    @classmethod
    def total(cls, works: Iterable[Work]) -> Work:
        rows = sampled = kv = pairs = 0
        for work in works:
            rows += work.rows
            sampled += work.sampled_rows
            kv += work.kv_read_tokens
            pairs += work.prefill_pairs
        return cls(rows, sampled, kv, pairs)


class Coefficients(msgspec.Struct, frozen=True):
    """Nanoseconds: `fixed_ns` (c0) per step, `weights_ns` (w) to read the weights, `row_ns` (a) per token row computed,
    `sampled_row_ns` (s), `kv_token_ns` (k) per KV token read, `pair_ns` (p) per prefill pair. None is negative.
    """

    fixed_ns: float
    weights_ns: float
    row_ns: float
    sampled_row_ns: float
    kv_token_ns: float
    pair_ns: float

    def step_ns(self, work: Work) -> float:
        """Predicted nanoseconds of a step with this work in all."""
        return self.fixed_ns + max(self.weights_ns, self.row_ns * work.rows) + self._own_ns(work)

    def longest_step_ns(self, rows: int, sequences: int, context_tokens: int) -> float:
        """Predicted nanoseconds of the longest step that rows, sequences and contexts of at most so many can make."""
        return self.step_ns(Work(rows, rows, sequences * context_tokens, rows * context_tokens))

    def shares(self, works: Sequence[Work]) -> list[float]:
        """Predicted nanoseconds of each sequence of one step; they sum to `step_ns` of the total."""
        rows = sum(work.rows for work in works)
        even_ns = (self.fixed_ns + self.weights_ns) / len(works)
        beyond_ns = max(0.0, self.row_ns * rows - self.weights_ns)
        per_row_ns = beyond_ns / rows if rows else 0.0
        return [even_ns + per_row_ns * work.rows + self._own_ns(work) for work in works]

    @classmethod
    def of(cls, fit: StepTimeFit) -> Coefficients:
        """Those of a version that the ledger keeps."""
        return cls(*(getattr(fit, name) for name in cls.__struct_fields__))

    def differs(self, other: Coefficients, works: Iterable[Work], percent: int) -> bool:
        """Whether predictions for these steps differ by more than so much of the other's, on average."""
        pairs = [(self.step_ns(work), other.step_ns(work)) for work in works]
        differences = [abs(ours / theirs - 1) for ours, theirs in pairs if theirs > 0]
        return not differences or 100 * sum(differences) > percent * len(differences)

    def _own_ns(self, work: Work) -> float:
        return (
            self.sampled_row_ns * work.sampled_rows
            + self.kv_token_ns * work.kv_read_tokens
            + self.pair_ns * work.prefill_pairs
        )
