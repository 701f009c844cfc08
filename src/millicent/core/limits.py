"""What a caller sees of its rate limits."""

from __future__ import annotations

import msgspec


class Allowance(msgspec.Struct, frozen=True):
    """What is left of a rate per minute. `reset_ns`: how long until all of it is there again."""

    limit: int
    remaining: int
    reset_ns: int
