"""What a backend answers with: text as it comes, then exactly one end."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from millicent.core.errors import MillicentError
from millicent.core.usage import Usage


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class Text(msgspec.Struct, frozen=True):
    """Decoded output, whole characters only. `tokens` is how many output tokens stand behind it (may be 0)."""

    text: str
    tokens: int


class End(msgspec.Struct, frozen=True):
    """The last chunk. `error` is set exactly when `reason` is error; usage covers what was done until then."""

    reason: FinishReason
    usage: Usage
    error: MillicentError | None = None


Chunk = Text | End
