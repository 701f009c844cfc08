"""A reading becomes lines: device time at a placement's rate, or usage at a provider's prices."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal

import msgspec

from millicent.core.accounts import Reading
from millicent.core.money import Money
from millicent.core.receipts import METERS, Attempt, Line, Meter, PriceSource, device_line
from millicent.core.usage import Leaf, Provenance, Usage, weakest
from millicent.meter.placements import Placement
from millicent.meter.prices import UNPRICED, PriceList, Prices, TokenPrices

# What tells a leaf from others on its meter.
NOTES: dict[Leaf, str] = {
    Leaf.INPUT_CACHE_WRITE_5M: "kept for 5 minutes",
    Leaf.INPUT_CACHE_WRITE_1H: "kept for 1 hour",
    Leaf.INPUT_IMAGE: "input",
    Leaf.INPUT_AUDIO: "input",
    Leaf.OUTPUT_IMAGE: "output",
    Leaf.OUTPUT_AUDIO: "output",
}
_CACHE_LEAVES = (Leaf.INPUT_CACHE_READ, Leaf.INPUT_CACHE_WRITE_5M, Leaf.INPUT_CACHE_WRITE_1H)


class Priced(msgspec.Struct, frozen=True):
    """What pricing adds to a receipt. `saved` sums to the list price less what the lines come to."""

    lines: tuple[Line, ...]
    prices: PriceSource
    basis: str
    list_price: Money | None
    saved: dict[str, Money] = {}


class Consumption(msgspec.Struct, frozen=True):
    """What a provider charges for: tokens, and what isn't tokens. `stored_token_hours` is cached tokens x hours."""

    usage: Usage
    requests: int = 1
    tool_calls: Mapping[str, int] = {}
    stored_token_hours: Decimal = Decimal(0)


def price(
    reading: Reading, attempts: tuple[Attempt, ...], placement: Placement, at_ns: int, prices: Prices | None = None
) -> Priced:
    """Device time on the placement's basis; on an `api` placement, usage at `prices`, None being unpriced."""
    if placement.kind == "api":
        return _priced_usage(Consumption(reading.usage), attempts[-1], placement, at_ns, prices)
    return _priced_time(reading, attempts, placement, at_ns)


def token_lines(
    consumption: Consumption,
    prices: TokenPrices,
    attempt: Attempt,
    at_ns: int,
    *,
    discount: Decimal = Decimal(0),
) -> tuple[Line, ...]:
    """One line per kind of usage that there was. Unit prices are per token, less the contract's discount. What has no
    price, and what nobody counted, is unpriced."""
    quantities: list[tuple[Meter, Decimal | None, str, Decimal | None, Provenance, str | None]] = []
    for leaf, count in consumption.usage.leaves.items():
        if count.tokens != 0:
            tokens = None if count.tokens is None else Decimal(count.tokens)
            each = prices.per_token[leaf]
            quantities.append((METERS[leaf], tokens, "token", each, count.provenance, NOTES.get(leaf)))
    known = Provenance.MEASURED
    if consumption.stored_token_hours:
        per_hour = storage_price(prices)
        quantities.append((Meter.CACHE_STORAGE, consumption.stored_token_hours, "token-hour", per_hour, known, None))
    for tool, calls in consumption.tool_calls.items():
        quantities.append((Meter.TOOL_CALL, Decimal(calls), "call", prices.tools.get(tool), known, tool))
    if prices.request_fee is not None and consumption.requests:
        requests = Decimal(consumption.requests)
        quantities.append((Meter.REQUEST_FEE, requests, "request", prices.request_fee, known, None))
    return tuple(
        [
            _line(attempt, meter, quantity, unit, discounted(each, discount), provenance, at_ns, note)
            for meter, quantity, unit, each, provenance, note in quantities
        ]
    )


def tier_of(prices: PriceList | None, usage: Usage) -> TokenPrices:
    """The prices that hold for an input of this length; none where it isn't known and they depend on it."""
    if prices is None or not prices.long_context:
        return prices or UNPRICED
    read = usage.input_tokens
    return UNPRICED if read is None else prices.tier(read)


def price_source(prices: Prices | None, tier: TokenPrices, placement: Placement) -> PriceSource:
    """For the receipt of what is paid for by the token."""
    if prices is None:
        return PriceSource()
    snapshot = {"kind": "api", "service": placement.service, **tier.snapshot}
    if placement.discount:
        snapshot["discount"] = format(placement.discount, "f")
    return PriceSource(prices.source, snapshot)


def total(lines: tuple[Line, ...]) -> Money | None:
    """None when something is unpriced, or there is nothing."""
    amounts = [line.amount for line in lines if line.amount is not None]
    return Money.total(amounts) if amounts and len(amounts) == len(lines) else None


def discounted(each: Decimal | None, discount: Decimal) -> Decimal | None:
    """A unit price, less the contract's discount."""
    return each * (1 - discount) if each is not None and discount else each


def storage_price(prices: TokenPrices) -> Decimal | None:
    """Of one token for an hour."""
    return None if prices.cache_storage is None else prices.cache_storage.scaleb(-6)


def _line(
    attempt: Attempt,
    meter: Meter,
    quantity: Decimal | None,
    unit: str,
    each: Decimal | None,
    provenance: Provenance,
    at_ns: int,
    note: str | None,
) -> Line:
    amount = None if quantity is None or each is None else Money.price(quantity, each)
    return Line(
        attempt=attempt.ordinal,
        role=attempt.role,
        meter=meter,
        quantity=Decimal(0) if quantity is None else quantity,
        unit=unit,
        unit_price_usd=each,
        amount=amount,
        provenance=Provenance.UNKNOWN if amount is None else provenance,
        incurred_at_ns=attempt.started_at_ns,
        posted_at_ns=at_ns,
        note=note,
    )


def _priced_usage(
    consumption: Consumption, attempt: Attempt, placement: Placement, at_ns: int, prices: Prices | None
) -> Priced:
    usage = consumption.usage
    tier = tier_of(prices.service if prices else None, usage)
    lines = token_lines(consumption, tier, attempt, at_ns, discount=placement.discount)
    if prices is None:
        return Priced(lines, PriceSource(), "list", None)
    source = price_source(prices, tier, placement)
    # Each stage takes one lever away; the difference to the next is what that lever saved.
    standard = tier_of(prices.standard, usage)
    paid = total(lines)
    undiscounted = total(token_lines(consumption, tier, attempt, at_ns)) if placement.discount else paid
    at_standard = undiscounted if standard == tier else total(token_lines(consumption, standard, attempt, at_ns))
    uncached = at_standard
    if any(leaf in usage.leaves for leaf in _CACHE_LEAVES):
        fresh = msgspec.structs.replace(consumption, usage=_without_caches(usage))
        uncached = total(token_lines(fresh, standard, attempt, at_ns))
    stages = {
        "prefix_cache": uncached,
        "batch" if placement.service == "batch" else "service_tier": at_standard,
        "contract": undiscounted,
    }
    amounts = [amount for amount in (*stages.values(), paid) if amount is not None]
    if len(amounts) <= len(stages):
        return Priced(lines, source, "list", None)
    saved = {lever: amounts[i] - amounts[i + 1] for i, lever in enumerate(stages)}
    return Priced(
        lines, source, "list", amounts[0], {lever: amount for lever, amount in saved.items() if amount.nanousd}
    )


def _uncharged(uncharged_ns: int) -> str | None:
    """What a receipt says of device time beyond its hold or its caller's maximum."""
    if not uncharged_ns:
        return None
    return f"{Decimal(uncharged_ns).scaleb(-9).normalize():f} s beyond what it may cost are not charged"


def _without_caches(usage: Usage) -> Usage:
    """The same input, all of it fresh."""
    leaves = {leaf: count for leaf, count in usage.leaves.items() if leaf not in _CACHE_LEAVES}
    cached = [usage.leaves[leaf] for leaf in _CACHE_LEAVES if leaf in usage.leaves]
    counts = [*cached, *([leaves[Leaf.INPUT_FRESH]] if Leaf.INPUT_FRESH in leaves else [])]
    if counts:
        known = weakest(count.provenance for count in counts)
        tokens = None if known is Provenance.UNKNOWN else sum(count.tokens or 0 for count in counts)
        leaves[Leaf.INPUT_FRESH] = msgspec.structs.replace(counts[0], tokens=tokens, provenance=known)
    return Usage(leaves)


def _priced_time(reading: Reading, attempts: tuple[Attempt, ...], placement: Placement, at_ns: int) -> Priced:
    """One accelerator line per attempt. No device time costs $0; unknown device time is unpriced. List is the
    placement's rate without the contract's discount: there is no other lever below it yet."""
    rate = placement.receipt_usd_per_hour
    known = reading.accelerator.provenance
    unknown = known is Provenance.UNKNOWN
    provenance = Provenance.UNKNOWN if unknown or rate is None else weakest((known, placement.rate_provenance))
    lines = []
    listed = []
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
            note=_uncharged(reading.uncharged_ns) if attempt is attempts[-1] else None,
        )
        lines.append(msgspec.structs.replace(line, amount=None) if unknown else line)
        list_rate = placement.receipt_list_usd_per_hour
        listed.append(Money(0) if list_rate is None else Money.of_time(serving_ns, list_rate))
    effective = total(tuple(lines))
    if effective is None:
        return Priced(tuple(lines), placement.prices, placement.basis, None)
    list_price = Money.total(listed)
    saved = {"contract": list_price - effective} if list_price != effective else {}
    return Priced(tuple(lines), placement.prices, placement.basis, list_price, saved)
