"""How figures are shown: a number and its unit to read, and the exact value for whoever needs it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from decimal import Context, Decimal
from typing import NamedTuple

from millicent.core.accounts import Account
from millicent.core.clock import NS_PER_MS, NS_PER_S
from millicent.core.money import Money, apportion
from millicent.core.receipts import Receipt, Timing
from millicent.core.usage import Provenance, weakest

_THREE_DIGITS = Context(prec=3)
_SIX_DIGITS = Context(prec=6)

BAR_UNITS = 1000  # a bar's width in its own coordinates

# What a receipt's snapshot of prices tells in dollars per million tokens.
TOKEN_PRICES = frozenset(
    {
        "input",
        "input_cached",
        "cache_write_5m",
        "cache_write_1h",
        "output",
        "reasoning",
        "input_image",
        "output_image",
        "input_audio",
        "output_audio",
    }
)

MEANINGS = {
    Provenance.MEASURED: "our own engine saw it",
    Provenance.REPORTED: "a provider said so",
    Provenance.COUNTED: "our tokenizer counted it",
    Provenance.ESTIMATED: "computed from a model",
    Provenance.ASSUMED: "rests on a stated assumption",
    Provenance.UNKNOWN: "nobody knows; the figure is left out, never zero",
}


class Figure(NamedTuple):
    """`text` and `unit` as read; `exact` stands in the title."""

    text: str
    unit: str
    exact: str


class Part(NamedTuple):
    """One piece of a stacked bar: its name, its size in nanoseconds, and where it lies in the bar."""

    name: str
    ns: int
    start: int
    width: int


def amount(money: Money | None) -> Figure:
    if money is None:
        return Figure("unpriced", "", "no price is known for this; it is not zero")
    text, _, unit = money.human().partition(" ")
    return Figure(text, unit, f"{money} USD")


def slot(amounts: Iterable[Money | None]) -> str:
    """The class of a column of amounts, by its widest unit: numbers stand under each other, and their heading above."""
    units = {amount(money).unit.rstrip("s") for money in amounts}
    return next((f"in-{unit}s" for unit in ("millicent", "cent") if unit in units), "")


def count(number: int | None, unit: str = "") -> Figure:
    if number is None:
        return Figure("unknown", "", "nobody reported or counted this; it is not zero")
    return Figure(f"{number:,}", unit, "")


def duration(ns: int | None) -> Figure:
    if ns is None:
        return Figure("—", "", "did not happen, or was not seen")
    if ns == 0:
        return Figure("0", "s", "")
    exact = f"{ns:,} ns"
    seconds = ns // NS_PER_S
    if seconds >= 3600:
        return Figure(f"{seconds // 3600:,} h {seconds % 3600 // 60:02d}", "min", exact)
    if seconds >= 60:
        return Figure(f"{seconds // 60} min {seconds % 60:02d}", "s", exact)
    # The limits lie where three digits would round up into the next unit.
    if ns >= 999_500_000:
        return Figure(_three_digits(ns, NS_PER_S), "s", exact)
    if ns >= 999_500:
        return Figure(_three_digits(ns, NS_PER_MS), "ms", exact)
    return Figure(_three_digits(ns, 1000), "µs", exact)


def percent(fraction: float | None) -> Figure:
    if fraction is None:
        return Figure("—", "", "there is nothing to take a share of")
    size = abs(fraction)
    places = 0 if size >= 0.9995 or size == 0 else 1 if size >= 0.01 else 2
    return Figure(f"{fraction * 100:.{places}f}", "%", f"{fraction * 100:.6g} %")


def share(part: int | None, whole: int) -> Figure:
    """`part` of `whole`, in percent."""
    return percent(None if part is None or whole == 0 else part / whole)


def number(value: float | Decimal, unit: str = "") -> Figure:
    """To three significant digits; whole numbers whole."""
    if value == int(value):
        return Figure(f"{int(value):,}", unit, "")
    rounded = _THREE_DIGITS.create_decimal(Decimal(value))
    return Figure(f"{rounded:,f}" if -1000 < value < 1000 else f"{value:,.0f}", unit, f"{value:.12g} {unit}".strip())


def _three_digits(ns: int, per_unit: int) -> str:
    value = _THREE_DIGITS.divide(Decimal(ns), Decimal(per_unit))
    return f"{value:.{max(0, 2 - value.adjusted())}f}"


def seconds(ns: int) -> str:
    """Seconds with three decimals, for columns that are added up by eye."""
    return f"{Decimal(ns) / NS_PER_S:,.3f}"


def rate(usd_per_hour: Decimal | None) -> Figure:
    if usd_per_hour is None:
        return Figure("unpriced", "", "no rate is known for this machine; it is not zero")
    places = max(2, -int(usd_per_hour.normalize().as_tuple().exponent))
    return Figure(f"${usd_per_hour:.{min(places, 4)}f}", "/hour", f"{usd_per_hour:f} USD per hour")


def price(unit_price_usd: Decimal) -> str:
    """A unit price to six significant digits: a rate per second has no end in decimals."""
    return f"{_SIX_DIGITS.create_decimal(unit_price_usd):f}"


def plural(number: int, one: str, many: str) -> str:
    """`1 receipt is`, `2 receipts are`: the words follow the number."""
    return f"{number:,} {one if number == 1 else many}"


def usd_column(amounts: Sequence[Money | None]) -> list[str]:
    """Exact dollars with equally many decimals, so that a column's points align and it adds up by eye."""
    exact = [None if money is None else str(money) for money in amounts]
    places = max([2, *(len(text.partition(".")[2]) for text in exact if text)])
    return ["unpriced" if money is None else f"{money.usd:,.{places}f}" for money in amounts]


def total_provenance(receipt: Receipt) -> Provenance:
    """How a receipt's total is known: by its weakest line."""
    return weakest([line.provenance for line in receipt.lines if line.book == "actual"] or [Provenance.UNKNOWN])


def usage_provenance(receipt: Receipt) -> Provenance:
    return weakest([leaf.provenance for leaf in receipt.usage.leaves.values()] or [Provenance.UNKNOWN])


def bar(sizes: Sequence[tuple[str, int]]) -> list[Part]:
    """Named sizes laid end to end over the bar's whole width; what is zero is left out."""
    shown = [(name, ns) for name, ns in sizes if ns > 0]
    if not shown:
        return []
    widths = apportion(BAR_UNITS, [ns for _, ns in shown])
    return [
        Part(name, ns, sum(widths[:i]), width) for i, ((name, ns), width) in enumerate(zip(shown, widths, strict=True))
    ]


def timing_parts(timing: Timing) -> list[tuple[str, int]]:
    """A request's time, cut where it changed hands: queue, then the first token, then the rest. Both `ttft_ns` and
    `total_ns` run from the request's arrival, so the parts sum to the total."""
    if timing.total_ns is None:
        return []
    queue_ns = min(timing.queue_ns or 0, timing.total_ns)
    first_ns = min(max(timing.total_ns if timing.ttft_ns is None else timing.ttft_ns, queue_ns), timing.total_ns)
    return [
        ("queue", queue_ns),
        ("first token", first_ns - queue_ns),
        ("further tokens", timing.total_ns - first_ns),
    ]


def account_parts(account: Account) -> list[tuple[str, int]]:
    return [
        ("serving", account.serving_ns),
        ("overhead", account.overhead_ns),
        ("lost", account.lost_ns),
        ("idle", account.idle_ns),
        ("down", account.down_ns),
    ]


def balances(account: Account) -> bool:
    """Whether serving + overhead + lost + idle + down is wall x accelerators, to the nanosecond."""
    return sum(ns for _, ns in account_parts(account)) == account.wall_ns * account.accelerators


def wall_sum(accounts: Sequence[Account]) -> int:
    return sum(account.wall_ns * account.accelerators for account in accounts)
