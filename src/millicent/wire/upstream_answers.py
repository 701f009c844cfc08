"""What readers of upstreams' answers share, whatever the dialect."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from millicent.core.chunks import FinishReason, Text
from millicent.core.money import Money
from millicent.core.usage import Usage

# English text in the tokenizers of the day: about four characters to a token.
CHARACTERS_PER_TOKEN = 4


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
