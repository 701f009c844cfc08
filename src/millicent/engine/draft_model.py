"""A smaller model that guesses what a larger one says next.

It has the same tokenizer, and a KV cache of its own with the same blocks. So what it has of a sequence needs no
accounts but how far it got; it catches up where it is worth it to guess, and not before. A guess is drawn as the
larger model's token will be, with the same number of the same seed: the more alike the two models are, the more often
both draw the same.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from millicent.core.steps import SequenceWork
from millicent.engine.batch import Model, Piece
from millicent.engine.sampler import Draw, sample
from millicent.engine.scheduling.sequences import Sequence as Scheduled

if TYPE_CHECKING:
    import numpy as np

    from millicent.engine.grammars import Grammar
    from millicent.engine.processors import Adjustments
    from millicent.step_time import Coefficients


class Ahead:
    """What an answer may say next: its rules go on as if the guesses had come.

    `adjust` and `grammar` are copies, which may be told of tokens that never come. `draw` is that of the next token.
    """

    def __init__(
        self,
        sequence: Scheduled,
        draw: Draw,
        adjust: Adjustments | None,
        grammar: Grammar | None,
        *,
        ends: Collection[int],
        wanted: int,
    ) -> None:
        self.sequence = sequence
        self.guesses: list[int] = []
        self._draw = replace(draw, adjust=self._change if adjust is not None or grammar is not None else None)
        self._adjust = adjust
        self._grammar = grammar
        self._ends = ends
        self._wanted = wanted

    @property
    def done(self) -> bool:
        return len(self.guesses) >= self._wanted

    def draw(self) -> Draw:
        return replace(self._draw, position=self._draw.position + len(self.guesses))

    def take(self, token: int | None) -> None:
        if token is None or (self._grammar is not None and self._grammar.error):
            self._wanted = len(self.guesses)
            return
        self.guesses.append(token)
        if self._adjust is not None:
            self._adjust.note(token)
        if self._grammar is not None and token not in self._ends:
            self._grammar.take(token)
        if token in self._ends or (self._grammar is not None and (self._grammar.finished or self._grammar.error)):
            self._wanted = len(self.guesses)  # nothing can come after this

    def _change(self, scores: np.ndarray) -> None:
        if self._adjust is not None:
            self._adjust(scores)
        if self._grammar is not None:
            self._grammar.mask(scores)


@dataclass(slots=True)
class _Held:
    """What the cache holds of a sequence: rows of its first `sure` tokens, then of guesses, right or wrong.

    It is in those blocks: a sequence that begins again has another list.
    """

    sequence: Scheduled
    blocks: list[int]
    sure: int
    guesses: list[int] = field(default_factory=list)


class DraftModel:
    def __init__(
        self,
        model: Model,
        *,
        vocabulary_size: int,
        blocks: int,
        block_tokens: int,
        step_tokens: int,
        deterministic: bool,
    ) -> None:
        """`vocabulary_size` is the larger model's; `blocks` are shared with it by number."""
        self.name = model.name
        self.context_tokens = model.context_tokens
        self.costs: Coefficients | None = None
        self.model = model
        self._vocabulary_size = vocabulary_size
        self._block_tokens = block_tokens
        self._step_tokens = step_tokens
        self._deterministic = deterministic
        self._held: dict[int, _Held] = {}
        self._contents: dict[int, bytes] = {}  # blocks whose rows are all there, to the keys of what they stand for
        self._aheads: list[Ahead] = []
        self._first: set[int] = set()  # sequences whose first pass of this round is still to come
        model.allocate(blocks, block_tokens)

    def begin(self, aheads: Sequence[Ahead]) -> None:
        """Guess for these. Call `next_pass` and `run` until there is none."""
        self._aheads = list(aheads)
        self._first = {ahead.sequence.id for ahead in aheads}

    def forget(self, sequence: int) -> None:
        self._held.pop(sequence, None)
        self._aheads = [ahead for ahead in self._aheads if ahead.sequence.id != sequence]

    def next_pass(self) -> list[Piece]:
        """The next rows of those that want guesses; none when all have theirs.

        What it lacks of a sequence it computes first, as much as fits a step; one that takes longer waits for its turn.
        """
        budget = self._step_tokens
        pieces: list[Piece] = []
        for ahead in list(self._aheads):
            if ahead.done:
                continue
            sequence, held = ahead.sequence, self._catch_up(ahead.sequence)
            tokens = sequence.tokens[held.sure :] if not ahead.guesses else ahead.guesses[-1:]
            start = held.sure + len(held.guesses)
            rows = min(len(tokens), budget)
            if rows < len(tokens):
                self._aheads.remove(ahead)
            if rows:
                budget -= rows
                pieces.append(Piece(sequence.id, tokens[:rows], start, held.blocks, sample=rows == len(tokens)))
            if pieces and self._deterministic:
                break
        return pieces

    def run(self, pieces: Sequence[Piece]) -> None:
        """One forward pass, and a guess for each that has reached the end of its sequence."""
        logits = self.model.forward(pieces)
        aheads = {ahead.sequence.id: ahead for ahead in self._aheads}
        for piece in pieces:
            self._note(self._held[piece.sequence], piece, aheads.get(piece.sequence))
        drawing = [aheads[piece.sequence] for piece in pieces if piece.sample]
        if not drawing:
            return
        if logits.shape[1] != self._vocabulary_size:  # they are padded differently
            from torch.nn import functional

            logits = functional.pad(logits, (0, self._vocabulary_size - logits.shape[1]), value=-float("inf"))
        for ahead, token in zip(drawing, sample(logits, [ahead.draw() for ahead in drawing]), strict=True):
            ahead.take(token)

    @staticmethod
    def work(piece: Piece, sequence: Scheduled) -> SequenceWork:
        rows = len(piece.tokens)
        prefills = piece.start < sequence.prompt_tokens
        return SequenceWork(
            sequence=piece.sequence,
            prefill_rows=rows if prefills else 0,
            decode_rows=0 if prefills else rows,
            sampled_rows=int(piece.sample),
            kv_read_tokens=piece.start + rows,
        )

    def _catch_up(self, sequence: Scheduled) -> _Held:
        """What is there of the sequence, guesses that turned out right included. Its last token's row is wanted."""
        held = self._held.get(sequence.id)
        if held is None or held.blocks is not sequence.blocks:
            held = self._held[sequence.id] = _Held(sequence, sequence.blocks, self._shared(sequence))
        elif sequence.id in self._first:
            right = sequence.tokens[held.sure : held.sure + len(held.guesses)]
            while held.guesses and right and held.guesses[0] == right[0]:
                held.sure += 1
                del held.guesses[0], right[0]
        if sequence.id in self._first:
            self._first.discard(sequence.id)
            held.guesses.clear()
            held.sure = min(held.sure, len(sequence.tokens) - 1)
        return held

    def _shared(self, sequence: Scheduled) -> int:
        """Rows at its beginning that were computed for others that begin alike."""
        blocks = 0
        for block, key in zip(sequence.blocks, sequence.keys, strict=False):
            if self._contents.get(block) != key:
                break
            blocks += 1
        return blocks * self._block_tokens

    def _note(self, held: _Held, piece: Piece, ahead: Ahead | None) -> None:
        """The piece's rows are there."""
        size = self._block_tokens
        end = piece.start + len(piece.tokens)
        for block in held.blocks[piece.start // size : -(-end // size)]:
            self._contents.pop(block, None)
        if ahead is not None and ahead.guesses:
            held.guesses += piece.tokens
            return
        held.sure = end
        keys = held.sequence.keys
        for index in range(piece.start // size, min(end // size, len(keys))):
            self._contents[held.blocks[index]] = keys[index]
