"""Tallies for reports that are nothing without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from millicent.core.errors import InvalidRequest
from millicent.core.tallies import Sums, Tally
from millicent.ledger.queries import GroupBy, LedgerQueries, ReceiptFilter

T = TypeVar("T")


def tallied(ledger: LedgerQueries, by: Sequence[GroupBy], where: ReceiptFilter) -> dict[tuple[str | None, ...], Tally]:
    """Raises InvalidRequest where it would take reading too many receipts: rather than too few are told."""
    return _all(ledger.tallies(by, where))


def summed(ledger: LedgerQueries, by: Sequence[GroupBy], where: ReceiptFilter) -> dict[tuple[str | None, ...], Sums]:
    """The same without histograms."""
    return _all(ledger.sums(by, where))


def _all(found: dict[tuple[str | None, ...], T] | None) -> dict[tuple[str | None, ...], T]:
    if found is None:
        raise InvalidRequest(
            "these filters would take reading too many receipts one by one: filter by feature and model alone, or take"
            " less time"
        )
    return found
