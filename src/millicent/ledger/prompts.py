"""What was asked, in the order in which it was asked: for replaying a ledger's traffic through a lever."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

import msgspec

from millicent.core.money import Money
from millicent.core.receipts import Receipt
from millicent.ledger.reading import select
from millicent.ledger.rows import receipt_of


class Asked(msgspec.Struct, frozen=True):
    """A closed receipt without its lines and attempts, with its total; None where something is unpriced. Its `prompt`
    is None where it is of before prompts were hashed."""

    receipt: Receipt
    cost: Money | None


class AskedPage(msgspec.Struct, frozen=True):
    """Oldest first. `next` is the `after` of the following page, None on the last."""

    asked: tuple[Asked, ...]
    next: str | None


def asked(connection: sqlite3.Connection, where: str, values: Sequence[object], limit: int) -> AskedPage:
    """`where` and `values` say of which receipts."""
    sql = (
        "SELECT *, (SELECT iif(count(*) = count(amount_nanousd), sum(amount_nanousd), NULL) FROM lines AS l"  # noqa: S608 - our own text
        " WHERE l.receipt = receipts.id AND l.book = 'actual') AS cost_nanousd FROM receipts"
        f" WHERE status IS NOT NULL AND {where} ORDER BY created_at_ns, id LIMIT ?"
    )
    rows = select(connection, sql, (*values, limit + 1))
    found = tuple(
        Asked(receipt_of(row), None if row["cost_nanousd"] is None else Money(row["cost_nanousd"]))
        for row in rows[:limit]
    )
    return AskedPage(found, found[-1].receipt.id if len(rows) > limit else None)
