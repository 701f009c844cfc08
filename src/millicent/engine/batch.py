"""What a forward pass is asked, and what a model is to its scheduler: the seam between integers and tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Piece:
    """What one sequence does in a forward pass: rows `start .. start + len(tokens) - 1` of its context.

    `blocks` is its block table, long enough for those rows; `sample` says that a token is drawn after the last row.
    Its last `drafts` tokens are guesses: a token is drawn before each of them too, and shows whether it was right.
    Logits are given for the rows that tokens are drawn after, or for all of them where `every_row` asks for it.
    """

    sequence: int
    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    sample: bool
    every_row: bool = False
    drafts: int = 0

    @property
    def logit_rows(self) -> int:
        """How many of its last rows have their logits in the result."""
        return len(self.tokens) if self.every_row else int(self.sample) + self.drafts


class Model(Protocol):
    """A loaded model with its paged KV cache."""

    name: str
    context_tokens: int
    vocabulary_size: int
    eos_tokens: frozenset[int]
    weight_bytes: int
    kv_bytes_per_token: int

    def allocate(self, blocks: int, block_tokens: int) -> None:
        """Make room for that many KV blocks. Called once, before the first forward."""
        ...

    def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """One pass over all pieces. Logits, float32 [their logit rows, vocabulary], in the order of the pieces."""
        ...


class Encoder(Protocol):
    """A loaded model that turns texts into vectors. Nothing of one text stays for the next: there is no cache."""

    name: str
    context_tokens: int
    vocabulary_size: int
    dimensions: int
    weight_bytes: int

    def encode(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """One pass over all texts, each a list of tokens. Vectors, float32 [texts, dimensions]."""
        ...
