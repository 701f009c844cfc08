"""The lines of a closed receipt at other prices: for a new book, beside those that stand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from decimal import Decimal

import msgspec

from millicent.core.money import Money
from millicent.core.receipts import METERS, Line, Meter, Receipt, device_line
from millicent.core.usage import Leaf, Provenance, weakest
from millicent.meter.placements import Placement
from millicent.meter.prices import UNPRICED, PriceBook, TokenPrices
from millicent.meter.pricing import NOTES, discounted, storage_price, tier_of

ACTUAL = "actual"
# Read back from a line: its meter and note tell which leaf it charged.
_LEAVES = {(meter, NOTES.get(leaf)): leaf for leaf, meter in METERS.items()}


def repriced(
    receipt: Receipt, placements: Mapping[str, Placement], prices: PriceBook, at_ns: int, now_ns: int, book: str
) -> tuple[Line, ...]:
    """Every line that stands, at the prices in force at `at_ns`. Quantities are those that were measured; lines that
    somebody else charged keep their amounts, and a placement that is no longer known leaves its lines unpriced. A
    caller's `id` stays that of the line which it was given to."""
    return tuple(
        msgspec.structs.replace(line, book=book, posted_at_ns=now_ns, id=None)
        for line in _lines(receipt, placements, prices, at_ns, now_ns)
    )


def _lines(
    receipt: Receipt, placements: Mapping[str, Placement], prices: PriceBook, at_ns: int, now_ns: int
) -> Iterator[Line]:
    attempts = {attempt.ordinal: attempt for attempt in receipt.attempts}
    for line in receipt.lines:
        if line.book != ACTUAL:
            continue
        attempt = attempts.get(line.attempt)
        placement = placements.get(attempt.placement) if attempt is not None else None
        placement = None if placement is None else placement.at(at_ns)
        if line.meter is Meter.ACCELERATOR:
            yield _time(receipt, line, placement, now_ns)
        elif (line.meter, line.note) in _LEAVES or line.meter in _FEES:
            model = receipt.model if attempt is None else attempt.model
            tier, discount = UNPRICED, Decimal(0)
            if placement is not None and placement.kind == "api":
                found = prices.find(model, at_ns, placement.service, placement.provider)
                tier, discount = tier_of(found.service if found else None, receipt.usage), placement.discount
            yield _quantity(receipt, line, tier, discount)
        else:
            yield line


_FEES = (Meter.CACHE_STORAGE, Meter.TOOL_CALL, Meter.REQUEST_FEE)


def _time(receipt: Receipt, line: Line, placement: Placement | None, now_ns: int) -> Line:
    known = receipt.accelerator.provenance
    rate = None if placement is None or known is Provenance.UNKNOWN else placement.receipt_usd_per_hour
    sources = (known, Provenance.UNKNOWN if placement is None else placement.rate_provenance)
    return device_line(
        line.attempt,
        line.role,
        int(line.quantity.scaleb(9)),
        rate,
        Provenance.UNKNOWN if rate is None else weakest(sources),
        incurred_at_ns=line.incurred_at_ns,
        posted_at_ns=now_ns,
        note=line.note,
    )


def _quantity(receipt: Receipt, line: Line, tier: TokenPrices, discount: Decimal) -> Line:
    known = Provenance.MEASURED
    each: Decimal | None
    if line.meter is Meter.CACHE_STORAGE:
        each = storage_price(tier)
    elif line.meter is Meter.TOOL_CALL:
        each = tier.tools.get(line.note or "")
    elif line.meter is Meter.REQUEST_FEE:
        each = tier.request_fee
    else:
        leaf = _LEAVES[line.meter, line.note]
        each = tier.per_token[leaf]
        # A line that had a price says how its count is known; the receipt knows only of the attempt that answered.
        known = _provenance(receipt, leaf) if line.provenance is Provenance.UNKNOWN else line.provenance
    each = discounted(each, discount)
    amount = None if each is None or known is Provenance.UNKNOWN else Money.price(line.quantity, each)
    provenance = Provenance.UNKNOWN if amount is None else known
    return msgspec.structs.replace(line, unit_price_usd=each, amount=amount, provenance=provenance)


def _provenance(receipt: Receipt, leaf: Leaf) -> Provenance:
    count = receipt.usage.leaves.get(leaf)
    return Provenance.UNKNOWN if count is None else count.provenance
