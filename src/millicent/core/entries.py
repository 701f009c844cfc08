"""What came in, or was spent beside the models: amounts that the ledger keeps beside receipts."""

from __future__ import annotations

from typing import Literal

import msgspec

from millicent.core.money import Money

Kind = Literal["revenue", "cost"]


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """An amount for [from_ns, to_ns), UTC nanoseconds, over which it accrues evenly. `id` is the caller's, one for each
    kind, so that posting it again changes nothing; a negative amount corrects an earlier one."""

    id: str
    kind: Kind
    amount: Money
    from_ns: int
    to_ns: int
    feature: str | None = None
    user: str | None = None
    tier: str | None = None
    note: str | None = None
    posted_at_ns: int
