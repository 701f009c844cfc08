"""Charts, drawn on the server as SVG. One struct is the picture, the table under it and its CSV.

A drawing lies in a square of 1000 by 1000 that the page stretches: lines keep their width, and text stands beside it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from datetime import date
from decimal import Decimal
from itertools import pairwise
from typing import Literal, NamedTuple

import msgspec

from millicent.core.money import NANOUSD_PER_USD, Money
from millicent.core.usage import Provenance
from millicent.dashboard.figures import Figure
from millicent.dashboard.tables import Cell, Column, Table, Value, tell

Kind = Literal["line", "step", "bar", "stacked", "histogram"]
X = str | int | float | Decimal
_Y = Callable[[float], float]

SIDE = 1000
_Y_INTERVALS = 5
_X_LABELS = 6
_X_LONG_LABELS = 4
_LONG = 8
_WIDEST_BAR = 60


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """One value per place on the x axis; None where it isn't known, which is drawn as a gap. Lines may have a range
    around them, `low` to `high`."""

    name: str
    values: tuple[Value, ...]
    low: tuple[Value, ...] = ()
    high: tuple[Value, ...] = ()


class Chart(msgspec.Struct, frozen=True, kw_only=True):
    """`x` are labels, evenly spaced, unless `scale` says that they are numbers on a linear or logarithmic axis (lines
    and steps only). `unit` is `usd` (values are Money), `ns`, `share` (1 is all), or any other word for what is
    counted. `links` lead from a place on the x axis to the receipts under it. `name` is the chart's in addresses."""

    name: str
    title: str
    kind: Kind
    x_title: str
    x: tuple[X, ...]
    series: tuple[Series, ...]
    unit: str
    provenance: Provenance | None = None
    scale: Literal["even", "linear", "log"] = "even"
    links: tuple[str | None, ...] = ()
    note: str = ""

    def table(self) -> Table:
        """The same values, to read and to export."""
        columns = [Column(self.x_title, _slug(self.x_title), number=self.scale != "even")]
        values: list[tuple[Value, ...]] = []
        for series in self.series:
            for told, part in (("", series.values), ("low", series.low), ("high", series.high)):
                if part:
                    title = f"{series.name}, {told}" if told else series.name
                    columns.append(Column(title, "_".join(filter(None, (_slug(title), _slug(self.unit))))))
                    values.append(part)
        rows = []
        for i, x in enumerate(self.x):
            href = self.links[i] if self.links else None
            head = Cell(_x_label(x), x, None, href)
            here = (each[i] for each in values)
            cells = (Cell(tell(each, self.unit), each, None if each is None else self.provenance) for each in here)
            rows.append((head, *cells))
        return Table(
            name=self.name, title=self.title, columns=tuple(columns), rows=tuple(rows), note=self.note, most=10_000
        )


class Mark(NamedTuple):
    """A bar, in the drawing's coordinates. `tells` is its value in words."""

    x: str
    y: str
    width: str
    height: str
    series: int
    tells: str


class Path(NamedTuple):
    d: str
    series: int
    kind: Literal["line", "band", "dot"]


class Tick(NamedTuple):
    """`at`: its place, in percent from the left or the top. Minor ones are left out on narrow screens."""

    at: str
    label: str
    minor: bool = False


class Drawing(NamedTuple):
    y: tuple[Tick, ...]
    x: tuple[Tick, ...]
    zero: str
    marks: tuple[Mark, ...]
    paths: tuple[Path, ...]
    legend: tuple[str, ...]


def draw(chart: Chart) -> Drawing | None:
    """None where there is nothing to draw: no value is known."""
    tops = _stacks(chart) if chart.kind == "stacked" else _extent(chart)
    if not tops or not chart.x:
        return None
    values = _values(chart)
    whole = not any(isinstance(value, float | Decimal) for value in values)
    ticks = _nice(min(0.0, *tops), max(0.0, *tops), least=1.0 if whole else 0.0)
    low, high = ticks[0], ticks[-1]

    def y(value: float) -> float:
        return SIDE * (high - value) / (high - low)

    places = _places(chart)
    lines = chart.kind in ("line", "step")
    money = any(isinstance(value, Money) for value in values)
    most = max(-low, high) if any(tops) else 0.0
    return Drawing(
        y=tuple(Tick(_percent(y(tick)), _y_label(tick, chart.unit, money, most)) for tick in ticks),
        x=_x_ticks(chart, places),
        zero=_number(y(0.0)),
        marks=() if lines else tuple(_bars(chart, places, y)),
        paths=tuple(_lines(chart, places, y)) if lines else (),
        legend=tuple(series.name for series in chart.series) if len(chart.series) > 1 else (),
    )


def _scalar(value: Value) -> float | None:
    """Its size: money in nano-dollars."""
    if value is None or isinstance(value, str):
        return None
    return float(value.nanousd if isinstance(value, Money) else value)


def _extent(chart: Chart) -> list[float]:
    return [size for value in _values(chart) if (size := _scalar(value)) is not None]


def _values(chart: Chart) -> list[Value]:
    return [value for series in chart.series for part in (series.values, series.low, series.high) for value in part]


def _stacks(chart: Chart) -> list[float]:
    """Both ends of each pile: what is below zero is piled downwards."""
    ends: list[float] = []
    for i in range(len(chart.x)):
        sizes = [size for series in chart.series if (size := _scalar(series.values[i])) is not None]
        if sizes:
            ends += [sum(size for size in sizes if size > 0), sum(size for size in sizes if size < 0)]
    return ends


def _nice(low: float, high: float, *, least: float = 0.0) -> list[float]:
    """Round values that hold the whole extent, some four steps of 1, 2 or 5 times a power of ten, and no smaller ones
    than `least`: there are no half requests."""
    span = (high - low) or 1.0
    raw = span / _Y_INTERVALS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999999)
    step = max(step, least)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


def _y_label(value: float, unit: str, money: bool, most: float) -> str:
    """One axis has one unit: where it reaches a dollar, all of it is told in dollars."""
    if value == 0:
        return "0"
    if not most:  # all there is to tell is nothing
        return ""
    if money and most >= NANOUSD_PER_USD:
        places = 0 if most >= 10 * NANOUSD_PER_USD else 2
        return f"{'-' if value < 0 else ''}${abs(value) / NANOUSD_PER_USD:,.{places}f}"
    figure = tell(Money(round(value)) if money else (int(value) if value == int(value) else value), unit)
    text = re.sub(r"\.0+$", "", figure.text)
    return f"{text} {figure.unit}".strip() if unit in ("usd", "ns", "share") else text


def _x_label(x: X) -> Figure:
    return tell(x, "")


def _places(chart: Chart) -> list[float]:
    """Where each x lies: the middles of equal slots, or where its number is on the axis."""
    if chart.scale == "even":
        return [SIDE * (i + 0.5) / len(chart.x) for i in range(len(chart.x))]
    numbers = [float(x) for x in chart.x]
    if chart.scale == "log":
        numbers = [math.log10(max(number, 1e-12)) for number in numbers]
    low, high = min(numbers), max(numbers)
    return [SIDE * (number - low) / ((high - low) or 1.0) for number in numbers]


def _x_ticks(chart: Chart, places: Sequence[float]) -> tuple[Tick, ...]:
    """At most six labels, fewer where they are long, of which every other is left out on narrow screens; round numbers
    on a linear axis."""
    if chart.scale == "linear":
        numbers = [float(x) for x in chart.x]
        low, high = min(numbers), max(numbers)
        round_ones = [tick for tick in _nice(low, high) if low <= tick <= high]
        at = [SIDE * (tick - low) / ((high - low) or 1.0) for tick in round_ones]
        labels = [_x_label(int(tick) if tick == int(tick) else tick).text for tick in round_ones]
        return tuple(
            Tick(_percent(place), label, minor=bool(n % 2))
            for n, (place, label) in enumerate(zip(at, labels, strict=True))
        )
    labels = [_short(_x_label(x).text) for x in chart.x]
    most = _X_LONG_LABELS if max(map(len, labels)) > _LONG else _X_LABELS
    every = max(1, math.ceil(len(places) / most))
    if chart.scale == "even":
        chosen = list(range(0, len(places), every))
    else:
        chosen, last = [], -math.inf
        for i, place in enumerate(places):
            if place - last >= SIDE / most:
                chosen.append(i)
                last = place
    return tuple(Tick(_percent(places[i]), labels[i], minor=bool(n % 2)) for n, i in enumerate(chosen))


def _short(label: str) -> str:
    """A day or an hour as it stands on an axis: `Jan 31`, `Jan 31 18:00`."""
    if not (found := re.fullmatch(r"(\d{4}-\d\d-\d\d)( \d\d:\d\d)?", label)):
        return label
    day = date.fromisoformat(found[1])
    return f"{day:%b} {day.day}{found[2] or ''}"


def _bars(chart: Chart, places: Sequence[float], y: _Y) -> list[Mark]:
    slot = SIDE / len(places)
    full = slot if chart.kind == "histogram" else min(slot * 0.78, _WIDEST_BAR * len(chart.series))
    marks = []
    for i, place in enumerate(places):
        above = below = 0.0
        for n, series in enumerate(chart.series):
            size = _scalar(series.values[i])
            if not size:
                continue
            if chart.kind == "stacked":
                left, width, start = place - full / 2, full, above if size > 0 else below
                above, below = (above + size, below) if size > 0 else (above, below + size)
            else:
                width, start = full / len(chart.series), 0.0
                left = place - full / 2 + n * width
            top, bottom = sorted((y(start), y(start + size)))
            tells = _tells(chart, i, series.name, series.values[i])
            marks.append(Mark(_number(left), _number(top), _number(width), _number(bottom - top), n, tells))
    return marks


def _tells(chart: Chart, i: int, name: str, value: Value) -> str:
    figure = tell(value, chart.unit)
    beside = f", {name}" if len(chart.series) > 1 else ""
    return f"{_x_label(chart.x[i]).text}{beside}: {figure.text} {figure.unit}".rstrip()


def _lines(chart: Chart, places: Sequence[float], y: _Y) -> list[Path]:
    paths = []
    for n, series in enumerate(chart.series):
        if series.low and series.high:
            for run in _runs(places, series.low, series.high):
                edge = [f"{_number(x)} {_number(y(high))}" for x, _, high in run]
                edge += [f"{_number(x)} {_number(y(low))}" for x, low, _ in reversed(run)]
                paths.append(Path(f"M{' L'.join(edge)} Z", n, "band"))
        for run in _runs(places, series.values, series.values):
            points = [(_number(x), _number(y(value))) for x, value, _ in run]
            if len(points) == 1:
                paths.append(Path(f"M{points[0][0]} {points[0][1]} h0", n, "dot"))
                continue
            d = f"M{points[0][0]} {points[0][1]}"
            for _, (x, at) in pairwise(points):
                d += f" H{x} V{at}" if chart.kind == "step" else f" L{x} {at}"
            paths.append(Path(d, n, "line"))
    return paths


def _runs(
    places: Sequence[float], lows: Sequence[Value], highs: Sequence[Value]
) -> list[list[tuple[float, float, float]]]:
    """What is known without a gap, in turn."""
    runs: list[list[tuple[float, float, float]]] = [[]]
    for place, low_value, high_value in zip(places, lows, highs, strict=True):
        low, high = _scalar(low_value), _scalar(high_value)
        if low is None or high is None:
            runs.append([])
        else:
            runs[-1].append((place, low, high))
    return [run for run in runs if run]


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _percent(place: float) -> str:
    return f"{_number(place * 100 / SIDE)}%"


def _slug(words: str) -> str:
    return "_".join("".join(letter if letter.isalnum() else " " for letter in words.lower()).split())
