"""Tallies for reports that are nothing without them."""

from __future__ import annotations

from collections.abc import Sequence

from millicent.core.errors import InvalidRequest
from millicent.core.tallies import Tally
from millicent.ledger.queries import GroupBy, LedgerQueries, ReceiptFilter


def tallied(ledger: LedgerQueries, by: Sequence[GroupBy], where: ReceiptFilter) -> dict[tuple[str | None, ...], Tally]:
    """Raises InvalidRequest where it would take reading too many receipts: rather than too few are told."""
    found = ledger.tallies(by, where)
    if found is None:
        raise InvalidRequest(
            "these filters would take reading too many receipts one by one: filter by feature and model alone, or take"
            " less time"
        )
    return found
