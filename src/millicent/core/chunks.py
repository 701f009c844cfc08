"""What a backend answers with: text or vectors as they come, then exactly one end."""

from __future__ import annotations

import base64
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


class Vector(msgspec.Struct, frozen=True):
    """The vector of input number `index`, little-endian float32; `input_tokens` is what was read for it."""

    index: int
    values: bytes
    input_tokens: int

    @property
    def line(self) -> str:
        """As text, in which an answer keeps it until it is written or given again."""
        return f"{self.index} {base64.b64encode(self.values).decode()}\n"


def vector_lines(text: str) -> list[str]:
    """The base64 of each vector in an answer's lines, in the order of the inputs."""
    found = (line.split(" ") for line in text.splitlines())
    return [values for _, values in sorted((int(index), values) for index, values in found)]


class End(msgspec.Struct, frozen=True):
    """The last chunk. `error` is set exactly when `reason` is error; usage covers what was done until then."""

    reason: FinishReason
    usage: Usage
    error: MillicentError | None = None


Chunk = Text | Vector | End
