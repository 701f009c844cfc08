"""A reading becomes lines."""

from __future__ import annotations

import msgspec

from millicent.core.accounts import Reading
from millicent.core.money import Money
from millicent.core.receipts import Attempt, Line, PriceSource, device_line
from millicent.core.usage import Provenance, weakest
from millicent.meter.placements import Placement


class Priced(msgspec.Struct, frozen=True):
    """What pricing adds to a receipt."""

    lines: tuple[Line, ...]
    prices: PriceSource
    basis: str
    list_price: Money | None


def price(reading: Reading, attempts: tuple[Attempt, ...], placement: Placement, at_ns: int) -> Priced:
    """One accelerator line per attempt, on the placement's basis. No device time costs $0; unknown device time is
    unpriced. The list price of our own machines is what they cost: there are no levers below it yet."""
    rate = placement.receipt_usd_per_hour
    known = reading.accelerator.provenance
    unknown = known is Provenance.UNKNOWN
    provenance = Provenance.UNKNOWN if unknown or rate is None else weakest((known, placement.rate_provenance))
    lines = []
    for attempt in attempts:
        serving_ns = sum(share.serving_ns for share in reading.shares if share.attempt == attempt.ordinal)
        line = device_line(
            attempt.ordinal,
            attempt.role,
            serving_ns,
            rate,
            known if serving_ns == 0 else provenance,
            incurred_at_ns=attempt.started_at_ns,
            posted_at_ns=at_ns,
        )
        lines.append(msgspec.structs.replace(line, amount=None) if unknown else line)
    amounts = [line.amount for line in lines if line.amount is not None]
    list_price = Money.total(amounts) if amounts and len(amounts) == len(lines) else None
    return Priced(tuple(lines), placement.prices, placement.basis, list_price)
