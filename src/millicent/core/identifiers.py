"""Identifiers, passed in: ordered by time, so that a ledger page is a range scan."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Protocol

from millicent.core.clock import NS_PER_MS, Clock

_RANDOM_CHARACTERS = 16
_FETCHED_AT_ONCE = 256
_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"
# Five bits of each random byte.
_DRAWN = (_CROCKFORD * 8).encode()


class Ids(Protocol):
    def new(self, prefix: str) -> str:
        """A fresh identifier, `prefix_` and 26 characters, sorting after those made in earlier milliseconds."""
        ...


class SystemIds:
    """ULIDs: 48 bits of milliseconds, 80 random bits, in lower-case Crockford base 32. The bits are fetched from the
    system for many at a time: each time it is asked, another thread may go first. Belongs to one thread."""

    def __init__(self, clock: Clock, random_bytes: Callable[[int], bytes] = secrets.token_bytes) -> None:
        self._clock = clock
        self._fetch = random_bytes
        self._random: list[str] = []

    def new(self, prefix: str) -> str:
        if not self._random:
            drawn = self._fetch(_RANDOM_CHARACTERS * _FETCHED_AT_ONCE).translate(_DRAWN).decode()
            self._random = [drawn[at : at + _RANDOM_CHARACTERS] for at in range(0, len(drawn), _RANDOM_CHARACTERS)]
        return f"{prefix}_{_encode(self._clock.now_ns() // NS_PER_MS, 50)}{self._random.pop()}"


class SequentialIds:
    """Counted identifiers: for tests and recorded answers."""

    def __init__(self) -> None:
        self._count = 0

    def new(self, prefix: str) -> str:
        self._count += 1
        return f"{prefix}_{_encode(self._count, 130)}"


_PAIRS = [first + second for first in _CROCKFORD for second in _CROCKFORD]


def _encode(value: int, bits: int) -> str:
    return "".join([_PAIRS[value >> shift & 1023] for shift in range(bits - 10, -1, -10)])
