"""A selection of receipts as CSV or JSON: the page's address with another suffix.

Both carry the same columns with the same values. Money is exact decimal dollars; what is unknown or unpriced is
empty in CSV and null in JSON, never zero.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator

import msgspec

from millicent.core.clock import NS_PER_MS, NS_PER_S, iso_utc
from millicent.core.money import exact_usd
from millicent.core.receipts import Receipt
from millicent.core.spreadsheets import inert
from millicent.core.usage import Provenance
from millicent.dashboard.figures import total_provenance, usage_provenance
from millicent.ledger.queries import ReceiptPage

Cell = str | int | float | None

# What a column of `row` holds, for formats that must know before the first row; the others hold text.
_KINDS = {
    "stream": "boolean",
    "input_tokens": "integer",
    "output_tokens": "integer",
    "queue_ms": "real",
    "ttft_ms": "real",
    "tpot_ms": "real",
    "total_ms": "real",
    "accelerator_seconds": "real",
}


def row(receipt: Receipt) -> dict[str, Cell]:
    who, timing, device = receipt.attribution, receipt.timing, receipt.accelerator
    seen = device.provenance is not Provenance.UNKNOWN
    return {
        "id": receipt.id,
        "created_at": iso_utc(receipt.created_at_ns),
        "settled_at": None if receipt.settled_at_ns is None else iso_utc(receipt.settled_at_ns),
        "status": receipt.status or "running",
        "feature": who.feature,
        "user": who.user,
        "team": who.team,
        "key": who.key,
        "tier": who.tier,
        "conversation": who.conversation,
        "run": who.run,
        "model": receipt.model,
        "served_model": receipt.served_model,
        "placement": receipt.placement,
        "backend": receipt.backend,
        "dialect": receipt.dialect,
        "stream": receipt.stream,
        "finish_reason": receipt.finish_reason,
        "input_tokens": receipt.usage.input_tokens,
        "output_tokens": receipt.usage.output_tokens,
        "usage_provenance": usage_provenance(receipt).value,
        "queue_ms": _in_unit(timing.queue_ns, NS_PER_MS),
        "ttft_ms": _in_unit(timing.ttft_ns, NS_PER_MS),
        "tpot_ms": _in_unit(timing.tpot_ns, NS_PER_MS),
        "total_ms": _in_unit(timing.total_ns, NS_PER_MS),
        "accelerator_seconds": _in_unit(device.serving_ns, NS_PER_S) if seen else None,
        "accelerator_provenance": device.provenance.value,
        "total_usd": exact_usd(receipt.total),
        "total_provenance": total_provenance(receipt).value,
        "list_usd": exact_usd(receipt.list_price),
        "hold_usd": exact_usd(receipt.hold),
        "error": receipt.error,
    }


def _in_unit(ns: int | None, per_unit: int) -> float | None:
    return None if ns is None else ns / per_unit


def column_kinds() -> dict[str, str]:
    """Every column of `row`, in order: boolean, integer, real or text."""
    empty = Receipt(id="", created_at_ns=0, model="", dialect="", stream=False)
    return {name: _KINDS.get(name, "text") for name in row(empty)}


def as_csv(pages: Iterator[ReceiptPage]) -> Iterator[str]:
    """RFC 4180, a header first. Text a caller chose that a spreadsheet would run as a formula gets a leading `'`."""
    first = True
    for page in pages:
        text = io.StringIO()
        for receipt in page.receipts:
            cells = row(receipt)
            if first:
                csv.writer(text).writerow(cells)
                first = False
            csv.writer(text).writerow([_inert(name, cell) for name, cell in cells.items()])
        yield text.getvalue()
    if first:
        yield ",".join(column_kinds()) + "\r\n"


def _inert(name: str, cell: Cell) -> Cell:
    if isinstance(cell, bool):
        return "true" if cell else "false"
    return inert(cell) if isinstance(cell, str) and not name.endswith("_usd") else cell


def as_json(pages: Iterator[ReceiptPage]) -> Iterator[str]:
    """A list object, written as it is read; `next` is set when a limit cut it."""
    yield '{"object":"list","data":['
    separator, after = "", None
    for page in pages:
        for receipt in page.receipts:
            yield separator + msgspec.json.encode(row(receipt)).decode()
            separator = ","
        after = page.next
    yield f'],"has_more":{"false" if after is None else "true"},"next":{msgspec.json.encode(after).decode()}}}\n'


def pages(
    read: Callable[[int, str | None], ReceiptPage], *, after: str | None, limit: int | None, size: int
) -> Iterator[ReceiptPage]:
    """Pages of a selection from `after` on: up to `limit` receipts, or all of them."""
    left = limit
    while left is None or left > 0:
        page = read(size if left is None else min(size, left), after)
        yield page
        if page.next is None:
            return
        after = page.next
        left = None if left is None else left - len(page.receipts)
