"""Identifiers, passed in: ordered by time, so that a ledger page is a range scan."""

from __future__ import annotations

import secrets
from typing import Protocol

from millicent.core.clock import NS_PER_MS, Clock

_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"


class Ids(Protocol):
    def new(self, prefix: str) -> str:
        """A fresh identifier, `prefix_` and 26 characters, sorting after those made in earlier milliseconds."""
        ...


class SystemIds:
    """ULIDs: 48 bits of milliseconds, 80 random bits, in lower-case Crockford base 32."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def new(self, prefix: str) -> str:
        return f"{prefix}_{_encode((self._clock.now_ns() // NS_PER_MS) << 80 | secrets.randbits(80))}"


class SequentialIds:
    """Counted identifiers: for tests and recorded answers."""

    def __init__(self) -> None:
        self._count = 0

    def new(self, prefix: str) -> str:
        self._count += 1
        return f"{prefix}_{_encode(self._count)}"


_PAIRS = [first + second for first in _CROCKFORD for second in _CROCKFORD]


def _encode(value: int) -> str:
    return "".join([_PAIRS[value >> shift & 1023] for shift in range(120, -1, -10)])
