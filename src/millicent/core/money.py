"""Exact money: integers of nano-dollars, rounded half-even once per line, split without losing a unit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from decimal import ROUND_HALF_EVEN, Context, Decimal

import msgspec

NANOUSD_PER_USD = 10**9
_NANOUSD_PER_DOLLAR = Decimal(NANOUSD_PER_USD)
_NANOUSD_PER_CENT = Decimal(10**7)
_NANOUSD_PER_MILLICENT = Decimal(10**4)

# ns x usd/hour, divided by this, is nano-dollars: 3.6e12 ns an hour, 1e9 nano-dollars a dollar.
_HOUR_NS_PER_NANOUSD = 3600

# Wide enough that no product of a quantity and a unit price loses a digit before the one rounding.
_EXACT = Context(prec=60)


class Money(msgspec.Struct, frozen=True, order=True):
    """An amount in integer nano-dollars (1e-9 USD). Negative amounts are credits and adjustments."""

    nanousd: int

    @classmethod
    def from_usd(cls, usd: Decimal | str | int) -> Money:
        """The nearest nano-dollar to `usd`, half-even."""
        return cls(round(_EXACT.multiply(Decimal(usd), _NANOUSD_PER_DOLLAR)))  # which is half-even

    @classmethod
    def price(cls, quantity: Decimal | int, unit_price_usd: Decimal) -> Money:
        """`quantity` units at `unit_price_usd` each, rounded half-even once."""
        return cls(round(_EXACT.multiply(_EXACT.multiply(quantity, unit_price_usd), _NANOUSD_PER_DOLLAR)))

    @classmethod
    def of_time(cls, accelerator_ns: int, usd_per_hour: Decimal) -> Money:
        """`accelerator_ns` at `usd_per_hour` each: ns x rate / 3.6e12 dollars, rounded once, half-even."""
        nano_hours = _EXACT.multiply(Decimal(accelerator_ns), usd_per_hour)
        numerator, denominator = nano_hours.as_integer_ratio()
        whole, rest = divmod(numerator, denominator * _HOUR_NS_PER_NANOUSD)
        half = 2 * rest - denominator * _HOUR_NS_PER_NANOUSD
        return cls(whole + (half > 0 or (half == 0 and whole % 2 == 1)))

    @classmethod
    def total(cls, amounts: Iterable[Money]) -> Money:
        return cls(sum([amount.nanousd for amount in amounts]))

    @property
    def usd(self) -> Decimal:
        """Exact dollars."""
        return _EXACT.divide(Decimal(self.nanousd), _NANOUSD_PER_DOLLAR)

    def split(self, weights: Sequence[int]) -> list[Money]:
        """Parts proportional to `weights` that sum to this amount exactly (largest remainder)."""
        return [Money(part) for part in apportion(self.nanousd, weights)]

    def __add__(self, other: Money) -> Money:
        return Money(self.nanousd + other.nanousd)

    def __sub__(self, other: Money) -> Money:
        return Money(self.nanousd - other.nanousd)

    def __neg__(self) -> Money:
        return Money(-self.nanousd)

    def __str__(self) -> str:
        """Plain decimal dollars, as our JSON shows them: `0.000012345`, never an exponent."""
        return _plain(self.usd)

    def human(self) -> str:
        """In the unit a person can read: `$1.20` from a dollar up, `3.4 cents` from a cent, else `210 millicents`.

        Below a dollar three significant digits, half-even; dollars to the cent. For reading, never for adding up.
        """
        sign, magnitude = ("-" if self.nanousd < 0 else ""), Decimal(abs(self.nanousd))
        if magnitude == 0:
            return "$0.00"
        millicents = _three_digits(_EXACT.divide(magnitude, _NANOUSD_PER_MILLICENT))
        if millicents < 1000:
            return f"{sign}{_plain(millicents)} {'millicent' if millicents == 1 else 'millicents'}"
        cents = _three_digits(_EXACT.divide(magnitude, _NANOUSD_PER_CENT))
        if cents < 100:
            return f"{sign}{_plain(cents)} {'cent' if cents == 1 else 'cents'}"
        usd = _EXACT.divide(magnitude, _NANOUSD_PER_DOLLAR).quantize(Decimal("0.01"), ROUND_HALF_EVEN, _EXACT)
        return f"{sign}${usd:,f}"


def _three_digits(value: Decimal) -> Decimal:
    """Three significant digits; whole numbers stay whole."""
    return value.quantize(Decimal(1).scaleb(min(value.adjusted() - 2, 0)), ROUND_HALF_EVEN, _EXACT)


def _plain(value: Decimal) -> str:
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


ZERO = Money(0)


def exact_usd(amount: Money | None) -> str | None:
    """As our JSON shows it: decimal dollars; null where nobody knows, which is never zero."""
    return None if amount is None else str(amount)


def apportion(total: int, weights: Sequence[int]) -> list[int]:
    """Split the integer `total` in proportion to `weights`, by largest remainder; ties go to the earlier part.

    The parts sum to `total` exactly and each is within one unit of its exact proportion. All-zero weights
    count as equal. Raises ValueError when there is nothing to split among or a weight is negative.
    """
    if not weights or min(weights) < 0:
        raise ValueError(f"apportion needs at least one weight, none negative; got {list(weights)}")
    whole = sum(weights)
    if whole == 0:
        weights, whole = [1] * len(weights), len(weights)
    sign, magnitude = (-1, -total) if total < 0 else (1, total)
    parts = [magnitude * weight // whole for weight in weights]
    remainders = [magnitude * weight % whole for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: -remainders[i])
    for i in by_remainder[: magnitude - sum(parts)]:
        parts[i] += 1
    return [sign * part for part in parts]
