"""Read-only questions to the ledger. Synchronous and safe to call from several threads."""

from __future__ import annotations

from typing import Literal

import msgspec

from millicent.core.accounts import Account
from millicent.core.money import Money
from millicent.core.receipts import Receipt

GroupBy = Literal["feature", "user", "team", "model", "key", "tier", "day", "hour", "status"]


class ReceiptFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Only receipts that match every field that is set. Times are UTC nanoseconds of creation, `to_ns` exclusive."""

    key: str | None = None
    team: str | None = None
    user: str | None = None
    feature: str | None = None
    tier: str | None = None
    conversation: str | None = None
    run: str | None = None
    model: str | None = None
    status: str | None = None
    from_ns: int | None = None
    to_ns: int | None = None


class ReceiptPage(msgspec.Struct, frozen=True):
    """Newest first. `next` is the `after` of the following page, None on the last."""

    receipts: tuple[Receipt, ...]
    next: str | None


class Totals(msgspec.Struct, frozen=True):
    """One group's sum. `group` is None for what is unattributed. Token counts leave out what is unknown;
    `unknown_usage` says on how many receipts. `unpriced` counts receipts without a total: they aren't in `cost`.
    `assumed` counts receipts whose total rests on an assumption. Only closed receipts are counted."""

    group: str | None
    requests: int
    input_tokens: int
    output_tokens: int
    serving_ns: int
    cost: Money
    unpriced: int
    assumed: int
    unknown_usage: int


class LedgerQueries:
    """Opened on the ledger's path; never writes, never waits for the writer."""

    def receipt(self, receipt_id: str) -> Receipt | None: ...

    def receipts(self, where: ReceiptFilter, *, limit: int = 50, after: str | None = None) -> ReceiptPage: ...

    def totals(self, by: GroupBy, where: ReceiptFilter) -> list[Totals]: ...

    def accounts(self, from_ns: int, to_ns: int) -> list[Account]:
        """As of the last checkpoint; ask the writer for one first where the running second matters."""
