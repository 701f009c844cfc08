"""A model without weights for the engine's tests: it keeps tokens in paged memory and derives logits from what it reads
back, so that a wrong block, position or order changes what it says. Bits don't depend on the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

import torch

from millicent.engine.batch import Piece
from millicent.engine.runner import OpenModel

if TYPE_CHECKING:
    from collections.abc import Iterable

EOS = 1


class ScriptedModel:
    """`before` is called with each batch before it is computed: to count, to wait, to raise."""

    def __init__(
        self,
        *,
        context_tokens: int = 256,
        vocabulary_size: int = 97,
        weight_bytes: int = 1000,
        kv_bytes_per_token: int = 10,
        before: Callable[[Sequence[Piece]], None] = lambda pieces: None,
    ) -> None:
        self.name = "scripted"
        self.context_tokens = context_tokens
        self.vocabulary_size = vocabulary_size
        self.eos_tokens: frozenset[int] = frozenset()
        self.weight_bytes = weight_bytes
        self.kv_bytes_per_token = kv_bytes_per_token
        self.batches: list[list[Piece]] = []
        self._before = before
        self._block_tokens = 0
        self._cache: list[int | None] = []

    def allocate(self, blocks: int, block_tokens: int) -> None:
        assert not self._cache, "allocate is called once"
        self._block_tokens = block_tokens
        self._cache = [None] * (blocks * block_tokens)

    def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        self._before(pieces)
        self.batches.append(list(pieces))
        rows = []
        for piece in pieces:
            for position, token in enumerate(piece.tokens, piece.start):
                self._cache[self._slot(piece, position)] = token
            context = [self._cache[self._slot(piece, i)] for i in range(piece.start + len(piece.tokens))]
            assert None not in context, "a row was read before it was written"
            sizes = range(len(context) - piece.logit_rows + 1, len(context) + 1)
            rows += [self.logits(token for token in context[:size] if token is not None) for size in sizes]
        return torch.stack(rows) if rows else torch.empty(0, self.vocabulary_size)

    def logits(self, context: Iterable[int]) -> torch.Tensor:
        digest = blake2b(bytes(token % 256 for token in context), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        logits = torch.randn(self.vocabulary_size, generator=generator) * 2
        logits[EOS] -= 3
        return logits

    def _slot(self, piece: Piece, position: int) -> int:
        return piece.blocks[position // self._block_tokens] * self._block_tokens + position % self._block_tokens


class Letters:
    """Token t is the letter at t, so that texts can be compared; stop strings as in `millicent.text`."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stop = ""
        self._stop = tuple(stop)
        self._text = ""

    def push(self, token: int, *, heed_stops: bool = True) -> str:
        if not heed_stops:
            return letter(token)
        before = len(self._text)
        self._text += letter(token)
        for stop in self._stop:
            if stop in self._text:
                self.stop = stop
                return self._text[before : self._text.index(stop)]
        return self._text[before:]

    def finish(self) -> str:
        return ""


def letter(token: int) -> str:
    return chr(0x4E00 + token)


def opened(model: ScriptedModel) -> OpenModel:
    return OpenModel(model, frozenset({EOS}), Letters)
