"""The latest steps of every device, and who had a part in them: for the eye, never for the bill.

They are in memory only, the newest up to a bound; what a request used is on its receipt for good.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from millicent.core.clock import Clock
from millicent.core.money import apportion
from millicent.core.steps import SeenStep, SeenWork, StepRecord

# About 25 MB where every step has one sequence, less where they have many.
MAX_SEQUENCES = 50_000


class StepLog:
    """Belongs to the meter's thread; `around` may be asked for there only."""

    def __init__(self, clock: Clock, max_sequences: int = MAX_SEQUENCES) -> None:
        self._clock = clock
        self._most = max_sequences
        self._steps: deque[tuple[StepRecord, Sequence[str | None], Sequence[int]]] = deque()
        self._sequences = 0

    def add(self, record: StepRecord, receipts: Sequence[str | None], weights: Sequence[int]) -> None:
        """`receipts` are those of its sequences, None for what is nobody's any more; `weights` split its time."""
        self._steps.append((record, receipts, weights))
        self._sequences += len(receipts)
        while self._sequences > self._most:
            self._sequences -= len(self._steps.popleft()[1])

    def around(self, receipt_id: str) -> list[SeenStep]:
        """The steps of its device, oldest first, from its first to its last: its own and, between them, others'."""
        steps = list(self._steps)
        own = [i for i, (_, receipts, _) in enumerate(steps) if receipt_id in receipts]
        if not own:
            return []
        device = steps[own[0]][0].device
        return [self._seen(*step) for step in steps[own[0] : own[-1] + 1] if step[0].device == device]

    def _seen(self, record: StepRecord, receipts: Sequence[str | None], weights: Sequence[int]) -> SeenStep:
        shares = apportion(record.wall_ns, weights) if weights else []
        work = [
            SeenWork(receipt, each.prefill_rows, each.decode_rows, share_ns)
            for receipt, each, share_ns in zip(receipts, record.sequences, shares, strict=True)
        ]
        return SeenStep(record.index, self._clock.utc_ns(record.start_ns), record.wall_ns, tuple(work))
