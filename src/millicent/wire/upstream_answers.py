"""What readers of upstreams' answers share, whatever the dialect."""

from __future__ import annotations

from abc import ABC, abstractmethod
from decimal import Decimal
from typing import Any

import msgspec

from millicent.core.chunks import FinishReason, Text
from millicent.core.money import Money
from millicent.core.usage import Usage

# English text in the tokenizers of the day: about four characters to a token.
CHARACTERS_PER_TOKEN = 4
# No call has as many, or costs as much.
_MOST_TOKENS = 10**9
_MOST_USD = 1_000_000


class AnswerReader(ABC):
    """Chunks or events of an answer, or the whole of it, to text.

    `failure` is what came with an error in place of an answer; `failed` a finish reason that is none. `over`: there is
    nothing more to read, even if more comes.
    """

    def __init__(self) -> None:
        self.id: str | None = None
        self.served_model: str | None = None
        self.cost: Money | None = None
        self.failure: dict[str, Any] | None = None
        self.failed: str | None = None
        self.over = False
        self._pieces = 0
        self._characters = 0

    @property
    @abstractmethod
    def usage(self) -> Usage | None:
        """Disjoint leaves, as they were reported; None before anything was."""

    @property
    @abstractmethod
    def ended(self) -> bool:
        """Has every choice said how it ended?"""

    @property
    @abstractmethod
    def reasons(self) -> tuple[FinishReason, ...]:
        """How each choice ended; stop where it wasn't said."""

    @abstractmethod
    def take(self, data: bytes) -> list[Text]:
        """Raises msgspec.DecodeError, UnicodeDecodeError and RecursionError for what is none."""

    @property
    def output_estimate(self) -> int:
        """Tokens of what came: hardly any server sends a piece of less than one, and English has four characters in
        each."""
        return max(self._pieces, -(-self._characters // CHARACTERS_PER_TOKEN))

    def _counted(self, characters: int) -> int:
        """How much a piece of so many characters adds to the estimate."""
        before = self.output_estimate
        self._pieces += 1
        self._characters += characters
        return self.output_estimate - before


def believable(counts: object) -> bool:
    """Whether these can be numbers of tokens. Where one of them can't, all are as good as none."""
    if isinstance(counts, int):
        return 0 <= counts <= _MOST_TOKENS
    if isinstance(counts, list):
        return all(map(believable, counts))
    if isinstance(counts, msgspec.Struct):
        return all(believable(getattr(counts, field)) for field in counts.__struct_fields__)
    return True


def believed_cost(usd: Decimal | None) -> Money | None:
    """None for what is no cost of a call."""
    return None if usd is None or not (usd.is_finite() and 0 <= usd <= _MOST_USD) else Money.from_usd(usd)
