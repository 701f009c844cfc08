"""From a quarter-hour's requests to the figures that detectors watch.

A few requests say nothing: a figure waits until it is of enough of them. A cost is one per hour, and nothing is a cost
too: it waits no longer than enough requests usually take, and six hours at most. A detector is shown a figure on the
scale on which its noise is even (a root of a sum, a logarithm of a ratio), and the least difference there that would
matter to anyone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal

import msgspec

from millicent.core.clock import NS_PER_MS, NS_PER_S
from millicent.core.money import Money
from millicent.ledger.queries import GroupBy, Sample, Totals
from millicent.watch.config import FIGURES, Figure
from millicent.watch.detector import Detector, State

QUARTER_S = 900
QUARTER_NS = QUARTER_S * NS_PER_S
DIMENSIONS = ("all", "feature", "key", "model")
ALL = "all"
# Of each dimension those with the most requests are watched.
MOST_MEMBERS = 30
# Single receipts of a quarter-hour that are looked at.
MOST_SAMPLES = 20_000
# A ratio is a figure once it is of so many requests; what took longer than a day to come together says nothing of now.
_ENOUGH = 30
_PATIENCE_S = 24 * 3600
_LONGEST_QUARTERS = 24
_DAY_QUARTERS = 96
_SLOWEST = 0.95
_MOST_TIMES = 500


class Batch(msgspec.Struct, kw_only=True):
    """Requests of one member. Costs and `requests` are of all of them, the rest of those that were looked at."""

    quarters: int = 1
    requests: int = 0
    cost_nanousd: int = 0
    share_of: int = 0
    looked_at: int = 0
    failed: int = 0
    tokens: int = 0
    counted: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    times_ns: list[int] = []

    def add(self, other: Batch) -> None:
        for name in self.__struct_fields__[:-1]:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.times_ns = (self.times_ns + other.times_ns)[-_MOST_TIMES:]

    def take(self, sample: Sample) -> None:
        self.looked_at += 1
        self.failed += sample.failed
        if sample.input_tokens is not None and sample.output_tokens is not None:
            self.counted += 1
            self.tokens += sample.input_tokens + sample.output_tokens
        if sample.input_tokens is not None and sample.cached_tokens is not None:
            self.input_tokens += sample.input_tokens
            self.cached_tokens += sample.cached_tokens
        if sample.total_ns is not None and not sample.failed:
            self.times_ns.append(sample.total_ns)


class SeriesState(msgspec.Struct):
    """`waiting` are requests of which there aren't enough yet, since `waiting_since_s`. In a quarter-hour there are
    usually `per_quarter`, by the last day's."""

    detector: State | None = None
    waiting: Batch | None = None
    waiting_since_s: int = 0
    per_quarter: float | None = None


class Reading(msgspec.Struct, frozen=True):
    """What a series showed: its figure and what it is usually, on its own scale. `calm`: it is as usual now, though an
    event may still be open."""

    value: float
    expected: float
    calm: bool


def batches(samples: Sequence[Sample], totals: Mapping[GroupBy, Iterable[Totals]]) -> dict[tuple[str, str], Batch]:
    """By dimension and member. `totals` are of the quarter-hour, by dimension other than `all`."""
    found: dict[tuple[str, str], Batch] = {(ALL, ""): Batch()}
    everything = found[ALL, ""]
    for dimension, groups in totals.items():
        ranked = sorted(groups, key=lambda group: -group.requests)[:MOST_MEMBERS]
        for group in ranked:
            found[dimension, group.group or ""] = Batch(requests=group.requests, cost_nanousd=group.cost.nanousd)
    for group in totals["model"]:
        everything.requests += group.requests
        everything.cost_nanousd += group.cost.nanousd
    for batch in found.values():
        batch.share_of = everything.requests
    for sample in samples:
        everything.take(sample)
        for dimension, member in (("feature", sample.feature), ("key", sample.key), ("model", sample.model)):
            one = found.get((dimension, member or ""))
            if one is not None:
                one.take(sample)
    return found


def figures_of(dimension: str) -> tuple[Figure, ...]:
    """Those that are watched: which model answers is a figure of models alone."""
    return FIGURES if dimension == "model" else tuple(figure for figure in FIGURES if figure != "mix")


class Series:
    """One figure of one member, told of every quarter-hour in order."""

    def __init__(self, figure: Figure, state: SeriesState, sensitivity: Decimal) -> None:
        self.figure = figure
        self.state = state
        self._detector = Detector(QUARTER_S, state.detector, float(sensitivity))
        state.detector = self._detector.state

    def observe(self, at_s: int, batch: Batch) -> Reading | None:
        """None while there is no figure."""
        of = self._waited(at_s, batch)
        value = None if of is None else _value(self.figure, of)
        if of is None or value is None:
            return None
        verdict = self._detector.observe(at_s, value, _least(self.figure, value, of.looked_at))
        return Reading(value, verdict.expected, self._detector.state.calm_s != at_s)

    @property
    def since_s(self) -> int | None:
        detector = self.state.detector
        return None if detector is None else detector.since_s

    def _waited(self, at_s: int, batch: Batch) -> Batch | None:
        state = self.state
        waiting = state.waiting
        if waiting is None or at_s - state.waiting_since_s > _PATIENCE_S:
            waiting, state.waiting_since_s = Batch(quarters=0), at_s
        waiting.add(batch)
        usual = batch.requests if state.per_quarter is None else state.per_quarter
        state.per_quarter = usual + (batch.requests - usual) / _DAY_QUARTERS
        if self.figure == "cost":
            expected = max(waiting.requests, waiting.quarters * state.per_quarter)
            enough = expected >= _ENOUGH or waiting.quarters >= _LONGEST_QUARTERS
        else:
            enough = (waiting.share_of if self.figure == "mix" else waiting.looked_at) >= _ENOUGH
        state.waiting = None if enough else waiting
        return waiting if enough else None


def _value(figure: Figure, batch: Batch) -> float | None:
    """On the scale on which it is watched."""
    if figure == "cost":
        return math.sqrt(max(0, batch.cost_nanousd) * 4 / batch.quarters)
    if figure == "mix":
        return batch.requests / batch.share_of
    if figure == "errors":
        return batch.failed / batch.looked_at
    if figure == "tokens":
        return math.log(batch.tokens / batch.counted) if batch.counted and batch.tokens else None
    if figure == "cache":
        return batch.cached_tokens / batch.input_tokens if batch.input_tokens else None
    times = sorted(batch.times_ns)
    return math.log(max(1, times[int(len(times) * _SLOWEST)])) if len(times) >= _ENOUGH // 2 else None


def _least(figure: Figure, value: float, requests: int) -> float:
    """A fifth of a cost, a quarter of a latency or of a request's tokens, ten points of a share; five of errors, and
    what some of few requests may do by chance."""
    if figure == "cost":
        return 0.1 * value
    if figure == "errors":
        return max(0.05, 3 * math.sqrt(0.02 / requests) + 1 / requests)
    return {"latency": 0.22, "tokens": 0.22, "cache": 0.1, "mix": 0.1}[figure]


def sentence(figure: Figure, whose: str, reading: Reading) -> tuple[str, dict[str, str]]:
    """What changed, and its figures."""
    value, usual = _told(figure, reading.value), _told(figure, reading.expected)
    names = {
        "cost": "The cost",
        "latency": "The latency (95th percentile)",
        "errors": "The share of failed requests",
        "tokens": "The number of tokens per request",
        "cache": "The share of input tokens from the cache",
        "mix": "The share of requests",
    }
    went = "rose" if reading.value > reading.expected else "fell"
    title = f"{names[figure]} of {whose} {went} to {value}; at this time it is usually {usual}."
    return title, {"value": value, "usual": usual}


def _told(figure: Figure, value: float) -> str:
    """As a person reads it."""
    if figure == "cost":
        return f"{Money(round(max(0.0, value) ** 2)).human()} an hour"
    if figure == "latency":
        return f"{math.exp(value) / NS_PER_MS:,.0f} ms"
    if figure == "tokens":
        return f"{math.exp(value):,.0f}"
    return f"{100 * min(1.0, max(0.0, value)):.1f}%"
