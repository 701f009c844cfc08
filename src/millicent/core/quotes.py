"""What a request is going to be: predicted before anything is spent."""

from __future__ import annotations

import msgspec

from millicent.core.money import Money
from millicent.core.usage import Provenance


class Interval(msgspec.Struct, frozen=True):
    """`low <= expected <= high`, in tokens or nanoseconds. The truth is inside at least nine times out of ten."""

    low: int
    expected: int
    high: int


class CostInterval(msgspec.Struct, frozen=True):
    low: Money
    expected: Money
    high: Money


class Quote(msgspec.Struct, frozen=True):
    """One model on one placement. What nobody can predict is None, and an unpriced cost is never zero.

    `cost.high` is the hold. `provenance` is estimated when it was learned from what was seen, assumed when it rests on
    a stated assumption, unknown when there is no price; `output_learned` says that of the length alone.
    """

    model: str
    placement: str
    input_tokens: int | None
    output_tokens: Interval
    ttft: Interval | None
    total: Interval | None
    cost: CostInterval | None
    provenance: Provenance
    output_learned: bool = False
