"""Whether each receipt adds up by itself: amounts, totals of usage, and what was saved."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from decimal import Decimal
from itertools import groupby

from millicent.core.money import Money
from millicent.ledger import rows

# A shown unit price of device time is rounded, so that its product may be on the other side of a tie.
_OFF_NANOUSD = 1
# Recovery charges at most the hold.
_REDUCED = "reduced to the hold"

_RECEIPTS = (
    "SELECT id, usage, input_tokens, output_tokens, list_nanousd, saved FROM receipts WHERE status IS NOT NULL"
    " ORDER BY id"
)
_LINES = (
    "SELECT l.receipt, l.attempt, l.quantity, l.unit_price_usd, l.amount_nanousd, l.note, l.book = 'actual'"
    " FROM lines AS l JOIN receipts AS r ON r.id = l.receipt WHERE r.status IS NOT NULL ORDER BY l.receipt"
)

_Line = tuple[str, int, str, str | None, int | None, str | None, int]


def problems(connection: sqlite3.Connection) -> list[str]:
    """One line each. Reads everything, a receipt at a time."""
    found = []
    lines = groupby(connection.execute(_LINES), key=lambda line: str(line[0]))
    receipt_id, own = next(lines, (None, iter(())))
    for closed_id, *figures in connection.execute(_RECEIPTS):
        charged: list[_Line] = []
        while receipt_id is not None and receipt_id <= closed_id:
            charged = [*own] if receipt_id == closed_id else charged
            receipt_id, own = next(lines, (None, iter(())))
        found += [f"receipt {closed_id} {what}" for what in _wrong(charged, *figures)]
    return found


def _wrong(
    lines: list[_Line], usage: str, read: int | None, written: int | None, listed: int | None, saved: str
) -> Iterator[str]:
    told = rows.usage_of(usage)
    if (told.input_tokens, told.output_tokens) != (read, written):
        yield f"has {read} tokens in and {written} out, and its usage {told.input_tokens} and {told.output_tokens}"
    for _, attempt, quantity, price, amount, note, _ in lines:
        if price is None or amount is None:
            continue
        product = Money.price(Decimal(quantity), Decimal(price)).nanousd
        if abs(product - amount) > _OFF_NANOUSD and not (amount < product and _REDUCED in (note or "")):
            yield f"has a line of {quantity} at ${price} each for {amount} nano-dollars (attempt {attempt})"
    if listed is not None:
        paid = listed - sum(rows.saved_of(saved).values())
        costs: dict[int, int | None] = {}
        for _, attempt, _, _, amount, _, ours in lines:
            if ours and attempt:  # 0 is what came from outside
                before = costs.get(attempt, 0)
                costs[attempt] = None if amount is None or before is None else before + amount
        known = [cost for cost in costs.values() if cost is not None]
        # What routing saved is counted against all attempts, the other levers against the one that answered.
        if known and paid not in {*known, sum(known)}:
            yield f"was listed at {listed} nano-dollars and saved {listed - paid}, and its attempts cost {sum(known)}"
