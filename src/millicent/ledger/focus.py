"""FOCUS 1.2 (FinOps Open Cost and Usage Specification): receipts and machines as rows of charges.

One row for each priced line of a receipt, and one for each part of a machine's hour that served nobody. What is
unpriced cannot be a FOCUS row, where a cost is never null: it goes to a list of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import msgspec

from millicent.core.accounts import Account
from millicent.core.clock import NS_PER_HOUR, NS_PER_S, hour_start_ns
from millicent.core.money import Money
from millicent.core.receipts import Line, Meter, Receipt, Role
from millicent.core.spreadsheets import inert
from millicent.core.usage import Provenance

Row = dict[str, str | None]

COLUMNS = (
    "BilledCost",
    "BillingAccountId",
    "BillingAccountName",
    "BillingCurrency",
    "BillingPeriodEnd",
    "BillingPeriodStart",
    "ChargeCategory",
    "ChargeClass",
    "ChargeDescription",
    "ChargeFrequency",
    "ChargePeriodEnd",
    "ChargePeriodStart",
    "ConsumedQuantity",
    "ConsumedUnit",
    "ContractedCost",
    "ContractedUnitPrice",
    "EffectiveCost",
    "InvoiceIssuerName",
    "ListCost",
    "ListUnitPrice",
    "PricingCategory",
    "PricingQuantity",
    "PricingUnit",
    "ProviderName",
    "PublisherName",
    "ResourceId",
    "ResourceName",
    "ResourceType",
    "ServiceCategory",
    "ServiceName",
    "ServiceSubcategory",
    "SkuId",
    "SkuMeter",
    "SkuPriceDetails",
    "SkuPriceId",
    "SubAccountId",
    "SubAccountName",
    "Tags",
    "x_AcceleratorCount",
    "x_AcceleratorSeconds",
    "x_Attempt",
    "x_Feature",
    "x_Key",
    "x_MachineHourCost",
    "x_MeanBatch",
    "x_Model",
    "x_Provenance",
    "x_ReceiptId",
    "x_Role",
    "x_SplitPart",
    "x_Status",
    "x_Tier",
    "x_User",
)
UNPRICED_COLUMNS = ("receipt", "created_at", "status", "model", "placement", "meter", "quantity", "unit")

# Lines of one meter that are different things: how long a cache keeps it, which way a picture goes, which tool.
_TOLD_APART = frozenset({Meter.CACHE_WRITE, Meter.IMAGE, Meter.AUDIO, Meter.TOOL_CALL})
# Who charges for what callers told of.
_OUTSIDE = "outside"
# What a rounded unit price may be off.
_OFF_NANOUSD = 1
_STEP = Decimal("1e-18")
# What a machine's hour was, besides serving.
_PARTS = ("overhead", "lost", "idle", "down")


def charges(receipt: Receipt) -> Iterator[Row]:
    """The lines that cost or give back something."""
    for line in receipt.lines:
        # A line of nothing, such as no time on a machine of unknown price, is no charge.
        if line.book == "actual" and line.amount is not None and (line.amount.nanousd or line.quantity):
            yield _charge(receipt, line, line.amount)


def unpriced(receipt: Receipt) -> Iterator[Row]:
    """The lines that nobody can price, or the receipt itself where it has none although something may have run."""
    lines: list[Line | None] = [line for line in receipt.lines if line.book == "actual" and line.amount is None]
    actual = any(line.book == "actual" for line in receipt.lines)
    ran = receipt.status == "interrupted" or receipt.usage.input_tokens != 0 or receipt.usage.output_tokens != 0
    if not actual and receipt.status not in {None, "refused"} and (ran or receipt.accelerator.serving_ns):
        lines.append(None)
    for line in lines:
        yield {
            "receipt": receipt.id,
            "created_at": _time(receipt.created_at_ns),
            "status": receipt.status,
            "model": receipt.model,
            "placement": receipt.placement,
            "meter": line.meter.value if line else None,
            "quantity": f"{line.quantity:f}" if line else None,
            "unit": line.unit if line else None,
        }


def machine_charges(accounts: Iterable[Account]) -> Iterator[Row]:
    """What each machine's hour cost beyond serving: with the serving lines, it adds up to the machine's cost."""
    for account in accounts:
        if account.cost is None or account.usd_per_hour is None:
            continue
        parts_ns = [getattr(account, f"{part}_ns") for part in _PARTS]
        costs = account.cost.split([account.serving_ns, *parts_ns])[1:]
        for part, part_ns, cost in zip(_PARTS, parts_ns, costs, strict=True):
            if part_ns:
                yield _machine_charge(account, part, part_ns, cost)


def unpriced_machines(accounts: Iterable[Account]) -> Iterator[Row]:
    for account in accounts:
        if account.cost is None:
            used_ns = account.wall_ns * account.accelerators - account.serving_ns
            yield dict.fromkeys(UNPRICED_COLUMNS) | {
                "created_at": _time(account.hour_ns),
                "placement": account.placement,
                "meter": Meter.ACCELERATOR.value,
                "quantity": f"{Decimal(used_ns).scaleb(-9):f}",
                "unit": "second",
            }


def _charge(receipt: Receipt, line: Line, amount: Money) -> Row:
    adjusts = line.role is Role.ADJUSTMENT or amount.nanousd < 0
    attempt = next((each for each in receipt.attempts if each.ordinal == line.attempt), None)
    placement = (attempt.placement if attempt else receipt.placement) or receipt.backend or "millicent"
    model = (attempt.model if attempt else receipt.served_model) or receipt.model
    if line.attempt == 0 and line.provenance is Provenance.REPORTED and not adjusts:
        # Somebody else's bill: not that of where the model ran.
        placement, model = _OUTSIDE, line.role.value
    sku = f"{placement}/{model}/{line.meter.value}"
    if line.attempt and line.note and line.meter in _TOLD_APART:
        sku += f"/{line.note}"
    quantity, price, unit = line.quantity, line.unit_price_usd, _unit(line.unit)
    if price is None or abs(Money.price(quantity, price).nanousd - amount.nanousd) > _OFF_NANOUSD:
        # Without a unit price, as a late line may come, or reduced to the hold by recovery: one unit of it.
        quantity, price, unit = Decimal(1), amount.usd, "Units"
    listed = _list_price(receipt, line, price)
    on_device = line.meter is Meter.ACCELERATOR
    who, device = receipt.attribution, receipt.accelerator
    row = _common(line.incurred_at_ns, placement, amount)
    return row | {
        "ChargeCategory": "Adjustment" if adjusts else "Usage",
        "ChargeClass": "Correction" if adjusts and _month(line.posted_at_ns) > _month(line.incurred_at_ns) else None,
        "ChargeDescription": f"{line.meter.value} of {model} on {placement} ({line.role.value})",
        "ConsumedQuantity": None if adjusts else f"{quantity:f}",
        "ConsumedUnit": None if adjusts else unit,
        "ContractedUnitPrice": None if adjusts else f"{price:f}",
        "ListUnitPrice": None if adjusts else f"{listed:f}",
        "ListCost": str(amount if adjusts or listed == price else Money.price(quantity, listed)),
        "PricingQuantity": None if adjusts else f"{quantity:f}",
        "PricingUnit": None if adjusts else unit,
        "PricingCategory": "Standard",
        "ResourceId": placement if on_device else None,
        "ResourceType": "Accelerator" if on_device else None,
        "ServiceName": model,
        "SkuId": sku,
        "SkuMeter": line.meter.value,
        "SkuPriceId": None if adjusts else f"{sku} at {listed:f}",
        "SubAccountId": _said(who.team),
        "SubAccountName": _said(who.team),
        "Tags": msgspec.json.encode(_tags(receipt)).decode(),
        "x_AcceleratorSeconds": f"{line.quantity:f}" if on_device else None,
        "x_Attempt": str(line.attempt),
        "x_Feature": _said(who.feature),
        "x_Key": who.key,
        "x_MeanBatch": f"{Decimal(device.batch_sum) / device.steps:.3f}" if on_device and device.steps else None,
        "x_Model": receipt.model,
        "x_Provenance": line.provenance.value,
        "x_ReceiptId": receipt.id,
        "x_Role": line.role.value,
        "x_SplitPart": "serving" if on_device else None,
        "x_Status": receipt.status,
        "x_Tier": _said(who.tier),
        "x_User": _said(who.user),
    }


def _list_price(receipt: Receipt, line: Line, price: Decimal) -> Decimal:
    """The unit price before the contract's discount, which is known of the attempt that answered."""
    answered = any(each.ordinal == line.attempt and each.placement == receipt.placement for each in receipt.attempts)
    paid = 1 - Decimal(receipt.prices.snapshot.get("discount", "0"))
    return (price / paid).quantize(_STEP).normalize() if answered and 0 < paid < 1 else price


def _machine_charge(account: Account, part: str, part_ns: int, cost: Money) -> Row:
    assert account.usd_per_hour is not None
    price = (account.usd_per_hour / 3600).quantize(_STEP).normalize()
    seconds = f"{Decimal(part_ns).scaleb(-9):f}"
    sku = f"{account.placement}/{account.device}/{part}"
    return _common(account.hour_ns, account.placement, cost) | {
        "ChargeCategory": "Usage",
        "ChargeDescription": f"{part} time of {account.device} on {account.placement}",
        "ConsumedQuantity": seconds,
        "ConsumedUnit": "Seconds",
        "ContractedUnitPrice": f"{price:f}",
        "ListUnitPrice": f"{price:f}",
        "PricingCategory": "Standard",
        "PricingQuantity": seconds,
        "PricingUnit": "Seconds",
        "ResourceId": account.placement,
        "ResourceType": "Accelerator",
        "ServiceName": account.device,
        "SkuId": sku,
        "SkuMeter": Meter.ACCELERATOR.value,
        "SkuPriceId": f"{sku} at {price:f}",
        "x_AcceleratorCount": str(account.accelerators),
        "x_AcceleratorSeconds": seconds,
        "x_MachineHourCost": None if account.cost is None else str(account.cost),
        "x_Provenance": account.rate_provenance.value,
        "x_SplitPart": part,
    }


def _common(at_ns: int, provider: str, amount: Money) -> Row:
    start_ns = hour_start_ns(at_ns)
    first, following = _month_bounds(at_ns)
    return dict.fromkeys(COLUMNS) | {
        "BilledCost": str(amount),
        "BillingAccountId": provider,
        "BillingAccountName": provider,
        "BillingCurrency": "USD",
        "BillingPeriodEnd": following,
        "BillingPeriodStart": first,
        "ChargeFrequency": "Usage-Based",
        "ChargePeriodEnd": _time(start_ns + NS_PER_HOUR),
        "ChargePeriodStart": _time(start_ns),
        "ContractedCost": str(amount),
        "EffectiveCost": str(amount),
        "InvoiceIssuerName": provider,
        "ListCost": str(amount),
        "ProviderName": provider,
        "PublisherName": provider,
        "ServiceCategory": "AI and Machine Learning",
        "ServiceSubcategory": "Generative AI",
    }


def _tags(receipt: Receipt) -> dict[str, str]:
    """The caller's own, and ours, which begin with `millicent/`."""
    who = receipt.attribution
    ours: dict[str, Any] = {"feature": who.feature, "user": who.user, "tier": who.tier, "run": who.run}
    mine = {name: value for name, value in who.tags.items() if not name.startswith("millicent/")}
    return mine | {f"millicent/{name}": value for name, value in ours.items() if value}


def _said(words: str | None) -> str | None:
    """What a caller chose, so that a spreadsheet doesn't run it."""
    return inert(words) if words else None


def _unit(unit: str) -> str:
    """As the unit format wants them: capitalised, in the plural; of `token-hour` both parts, the last one plural."""
    *parts, last = [part[:1].upper() + part[1:] for part in unit.split("-")]
    if last.endswith("y") and last[-2:-1] not in "aeiou":
        last = f"{last[:-1]}ies"
    elif last.endswith(("ch", "sh", "x", "z")):
        last += "es"
    elif not last.endswith("s"):
        last += "s"
    return "-".join((*parts, last))


def _time(utc_ns: int) -> str:
    return datetime.fromtimestamp(utc_ns // NS_PER_S, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _month(utc_ns: int) -> str:
    return _time(utc_ns)[:7]


def _month_bounds(utc_ns: int) -> tuple[str, str]:
    moment = datetime.fromtimestamp(utc_ns // NS_PER_S, UTC)
    year, month = (moment.year + 1, 1) if moment.month == 12 else (moment.year, moment.month + 1)
    return f"{moment.year:04d}-{moment.month:02d}-01T00:00:00Z", f"{year:04d}-{month:02d}-01T00:00:00Z"
