"""Tables, and the CSV of tables and charts: what is read and what is exported come from the same cells."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple, TypeVar

import msgspec

from millicent.core.money import Money
from millicent.core.spreadsheets import inert
from millicent.core.usage import Provenance
from millicent.dashboard import figures
from millicent.dashboard.figures import Figure

T = TypeVar("T")
Value = str | int | float | Decimal | Money | None

_EMPTY = "Nothing here in this period."
_MOST = 50


class Column(NamedTuple):
    """`name` is the column's in CSV, with its unit last (`cost_usd`). Columns of numbers are aligned right; those that
    are `wide` are left out on narrow screens."""

    title: str
    name: str
    number: bool = True
    wide: bool = False


class Cell(NamedTuple):
    """What is read, what is exported and sorted by, how it is known, and where it leads."""

    figure: Figure
    value: Value
    provenance: Provenance | None = None
    href: str | None = None

    @property
    def sort_by(self) -> str:
        """Numbers as they are, for the browser to compare; an unknown one is empty, and sorts last."""
        if isinstance(self.value, Money):
            return str(self.value.nanousd)
        return exact(self.value)


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """The first cell of a row is its heading. `total` is a last row that isn't sorted; `empty` is said where there are
    no rows. Of more than `most` rows a page shows the first; the export has all. `count`: so many there would be, where
    not all were made (`site.exporting` says whether they are needed)."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    total: tuple[Cell, ...] | None = None
    empty: str = _EMPTY
    note: str = ""
    most: int = _MOST
    count: int | None = None

    def table(self) -> Table:
        return self

    def classes(self) -> list[str]:
        """Of each column's cells."""
        told = []
        for i, column in enumerate(self.columns):
            names = ["num" if column.number else "text", "wide" if column.wide else ""]
            if column.name.endswith("_usd"):
                shown = [*self.rows[: self.most], *([self.total] if self.total else [])]
                amounts = (row[i].value for row in shown)
                names += ["money", figures.slot(each for each in amounts if isinstance(each, Money))]
            elif column.name.endswith("_at") or column.name == "since":
                names.append("time")
            told.append(" ".join(filter(None, names)))
        return told


def table_of(
    items: Iterable[T],
    *columns: tuple[Column, Callable[[T], Cell]],
    name: str,
    title: str,
    empty: str = _EMPTY,
    note: str = "",
    most: int = _MOST,
) -> Table:
    """A row for each, with what each column says of it."""
    rows = tuple(tuple(tells(each) for _, tells in columns) for each in items)
    heads = tuple(column for column, _ in columns)
    return Table(name=name, title=title, columns=heads, rows=rows, empty=empty, note=note, most=most)


def money(amount: Money | None, provenance: Provenance | None = None, href: str | None = None) -> Cell:
    return Cell(figures.amount(amount), amount, None if amount is None else provenance, href)


def known(amount: Money | None) -> Cell:
    """What is earned, or what of it is left: unknown where nobody said."""
    if amount is None:
        return Cell(Figure("unknown", "", "nobody said what is earned here; it is not zero"), None)
    return money(amount)


def if_any(amount: Money | None, provenance: Provenance | None = None) -> Cell:
    """What only some have: of nothing there is no mean, say."""
    return text(None) if amount is None else money(amount, provenance)


def count(number: int | None) -> Cell:
    return Cell(figures.count(number), number)


def duration(ns: int | None, provenance: Provenance | None = None) -> Cell:
    return Cell(figures.duration(ns), ns, provenance)


def share(part: int | None, whole: int) -> Cell:
    return Cell(figures.share(part, whole), None if part is None or whole == 0 else round(part / whole, 6))


def part(of_one: Decimal | Fraction | float | None) -> Cell:
    """The same where it is worked out already: 1 is all."""
    if of_one is None:
        return Cell(figures.percent(None), None)
    rounded = round(of_one, 6) if isinstance(of_one, Decimal) else round(float(of_one), 6)
    return Cell(figures.percent(float(of_one)), rounded)


def text(words: str | None, href: str | None = None) -> Cell:
    return Cell(Figure("—", "", "") if words is None else Figure(words, "", ""), words, None, href)


def tell(value: Value, unit: str) -> Figure:
    """A value in its unit: `usd` for Money, `ns`, `share` (1 is all); any other unit is written after the number."""
    if isinstance(value, str):
        return Figure(value, "", "")
    if isinstance(value, Money) or unit == "usd":
        return figures.amount(value if isinstance(value, Money) else None)
    if value is None:
        return Figure("unknown", "", "nobody measured or reported this; it is not zero")
    if unit == "ns":
        return figures.duration(round(value))
    if unit == "share":
        return figures.percent(float(value))
    return figures.number(value, unit)


def exact(value: Value) -> str:
    if value is None:
        return ""
    return f"{value:f}" if isinstance(value, Decimal) else str(value)


def as_csv(table: Table) -> Iterator[str]:
    """RFC 4180, exact values; what is unknown is empty. The total's row is left out: it isn't data."""
    yield _line([column.name for column in table.columns])
    for row in table.rows:
        yield _line([inert(cell.value) if isinstance(cell.value, str) else exact(cell.value) for cell in row])


def _line(cells: list[str]) -> str:
    written = io.StringIO()
    csv.writer(written).writerow(cells)
    return written.getvalue()
