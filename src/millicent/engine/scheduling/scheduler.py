"""Continuous batching with chunked prefill: what each forward pass works on.

Sequences are served in order of arrival. A step has a budget of token rows: sequences that decode take one row each
and come first, prefill fills what is left, and newcomers are admitted while blocks for all their tokens are free.
When a decoding sequence needs a block and none is free, the youngest running sequence gives its blocks back and
returns to the head of the queue, to be computed again later. So running sequences are always the oldest ones, and the
oldest always makes progress.
"""

from __future__ import annotations

from collections import deque

from millicent.core.errors import InvalidRequest
from millicent.core.steps import SequenceWork
from millicent.engine.batch import Piece
from millicent.engine.scheduling.blocks import BlockPool
from millicent.engine.scheduling.sequences import Sequence


class Scheduler:
    """`schedule` plans a step; the caller passes each piece to `advance`, runs it, and appends the tokens it samples.

    `deterministic` makes a sequence's pieces independent of everything else: prefill is cut at multiples of
    `step_tokens`, and rows after the prompt are computed one at a time, also when they are computed again. The caller
    then gives every piece a forward pass of its own.
    """

    def __init__(
        self,
        *,
        blocks: int,
        block_tokens: int,
        context_tokens: int,
        max_sequences: int,
        step_tokens: int,
        deterministic: bool = False,
    ) -> None:
        self.pool = BlockPool(blocks)
        self.context_tokens = min(context_tokens, blocks * block_tokens)
        self._block_tokens = block_tokens
        self._max_sequences = max_sequences
        self._step_tokens = step_tokens
        self._deterministic = deterministic
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._sequences: dict[int, Sequence] = {}

    def __len__(self) -> int:
        """Sequences that aren't finished."""
        return len(self._sequences)

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._sequences

    @property
    def running(self) -> int:
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Queue it. Raises InvalidRequest when it could never run."""
        if not sequence.tokens:
            raise InvalidRequest("the prompt has no tokens; send at least one", param="prompt")
        if len(sequence.tokens) + 1 > self.context_tokens:
            raise InvalidRequest(
                f"the prompt has {len(sequence.tokens)} tokens, which leaves no room for output in a context of"
                f" {self.context_tokens}; shorten it",
                code="context_length_exceeded",
            )
        self._sequences[sequence.id] = sequence
        self._waiting.append(sequence)

    def remove(self, sequence: int) -> None:
        """Finished, cancelled or failed: its blocks are free again. Unknown numbers are ignored."""
        gone = self._sequences.pop(sequence, None)
        if gone is None:
            return
        self._release(gone)
        if gone in self._running:
            self._running.remove(gone)
        else:
            self._waiting.remove(gone)

    def schedule(self) -> list[Piece]:
        """The next step's work. Not empty while there are sequences."""
        plan = self._decodes()
        # With one row for each sequence in the budget, decoding can never starve a prefill, nor the reverse.
        budget = self._step_tokens
        if not self._deterministic:
            budget = max(budget, self._max_sequences) - len(plan)
        for sequence in self._running:
            if self._rows(sequence) > 1:
                budget -= self._prefill(sequence, budget, plan)
        while budget > 0 and self._waiting and self._admits(self._waiting[0]):
            sequence = self._waiting.popleft()
            sequence.blocks = self.pool.take(self._blocks_for(len(sequence.tokens)))
            self._running.append(sequence)
            budget -= self._prefill(sequence, budget, plan)
        return plan

    def advance(self, piece: Piece) -> SequenceWork:
        """Count the piece as computed; what it asks of the forward pass."""
        sequence = self._sequences[piece.sequence]
        rows = len(piece.tokens)
        end = piece.start + rows
        recomputed = max(0, min(end, sequence.reached) - piece.start)
        decodes = rows == 1 and recomputed == 0 and piece.start >= sequence.prompt_tokens
        sequence.computed = end
        sequence.reached = max(end, sequence.reached)
        return SequenceWork(
            sequence=sequence.id,
            prefill_rows=0 if decodes else rows,
            decode_rows=1 if decodes else 0,
            sampled_rows=1 if piece.sample else 0,
            kv_read_tokens=end,
            recomputed_rows=recomputed,
        )

    def _decodes(self) -> list[Piece]:
        plan: list[Piece] = []
        position = 0
        while position < len(self._running):  # the list may lose its tail on the way
            sequence = self._running[position]
            position += 1
            if self._rows(sequence) == 1 and self._grow(sequence):
                plan.append(self._piece(sequence, 1))
        return plan

    def _prefill(self, sequence: Sequence, budget: int, plan: list[Piece]) -> int:
        """Plan the sequence's next chunk; the rows it takes."""
        rows = self._rows(sequence)
        if rows > budget:
            if self._deterministic:  # a chunk is never cut to what happens to be left
                return 0
            rows = budget
        if rows > 0:
            plan.append(self._piece(sequence, rows))
        return rows

    def _rows(self, sequence: Sequence) -> int:
        """How many rows the sequence would compute next, given the whole budget."""
        if not self._deterministic:
            return len(sequence.tokens) - sequence.computed
        if sequence.computed >= sequence.prompt_tokens:
            return 1
        boundary = (sequence.computed // self._step_tokens + 1) * self._step_tokens
        return min(boundary, sequence.prompt_tokens) - sequence.computed

    def _piece(self, sequence: Sequence, rows: int) -> Piece:
        end = sequence.computed + rows
        return Piece(
            sequence=sequence.id,
            tokens=sequence.tokens[sequence.computed : end],
            start=sequence.computed,
            blocks=sequence.blocks,
            sample=end == len(sequence.tokens),
        )

    def _admits(self, sequence: Sequence) -> bool:
        """Every running sequence keeps a block to grow into: a newcomer shouldn't be preempted at once."""
        if len(self._running) >= self._max_sequences:
            return False
        return self.pool.free >= self._blocks_for(len(sequence.tokens)) + len(self._running)

    def _grow(self, sequence: Sequence) -> bool:
        """A block for the next row, taken from the youngest if need be; False when this one is the youngest."""
        if len(sequence.blocks) * self._block_tokens > sequence.computed:
            return True
        while not self.pool.free:
            youngest = self._running.pop()
            self._release(youngest)
            self._waiting.appendleft(youngest)
            if youngest is sequence:
                return False
        sequence.blocks += self.pool.take(1)
        return True

    def _release(self, sequence: Sequence) -> None:
        self.pool.give_back(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)
