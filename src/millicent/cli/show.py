"""How figures look in a terminal: aligned columns, amounts a person can read, times in UTC; and exact JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, TypeVar

from millicent.core.clock import NS_PER_S

if TYPE_CHECKING:
    from millicent.core.money import Money

T = TypeVar("T")
# The control characters, but tab and line feed.
_MOVING = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "?")


def as_json(body: object) -> None:
    import msgspec

    # Decimals become numbers with all their digits; money is a string before it comes here.
    encoded = msgspec.json.Encoder(decimal_format="number").encode(body)
    print(msgspec.json.format(encoded, indent=2).decode())


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: frozenset[str] = frozenset()) -> str:
    """Columns as wide as their widest cell; those named in `right` are aligned there."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = zip(header, row, widths, strict=True)
        padded = (cell.rjust(width) if name in right else cell.ljust(width) for name, cell, width in cells)
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def table_of(items: Iterable[T], *columns: tuple[str, Callable[[T], str]], right: frozenset[str] | None = None) -> str:
    """A row for each, with what each column says of it; all but the first are aligned right, or those in `right`."""
    header = [name for name, _ in columns]
    rows = [[tells(each) for _, tells in columns] for each in items]
    return table(header, rows, right=frozenset(header[1:]) if right is None else right)


def printable(text: str) -> str:
    """Names come from callers: what could move the terminal's cursor is shown as a question mark."""
    return "".join(character if character.isprintable() else "?" for character in text)


def still(text: str) -> str:
    """Text of several lines, in which nothing else moves a terminal's cursor."""
    return text.translate(_MOVING)


def amount(money: Money | None, missing: str = "unpriced") -> str:
    """What nobody could price is said so: it is not zero."""
    return missing if money is None else money.human()


def percent(part: Decimal | Fraction | None) -> str:
    """A share: 1 is all."""
    if part is None:
        return "-"
    return f"{(float(part) if isinstance(part, Fraction) else part) * 100:.1f}%"


def count(tokens: int | None) -> str:
    return "unknown" if tokens is None else f"{tokens:,}"


def duration(ns: int | None) -> str:
    if ns is None:
        return "-"
    if ns < NS_PER_S:
        return f"{Decimal(ns) / 1_000_000:.1f} ms"
    return f"{Decimal(ns) / NS_PER_S:.2f} s"


def size(count_bytes: int) -> str:
    """Decimal units, as disks are sold and downloads counted."""
    value, unit = Decimal(count_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def moment(utc_ns: int) -> str:
    return datetime.fromtimestamp(utc_ns // NS_PER_S, UTC).strftime("%Y-%m-%d %H:%M:%S")


def note(text: str) -> None:
    """A remark beside the output: on stderr, so that the output can be piped."""
    print(text, file=sys.stderr)
