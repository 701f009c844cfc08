"""Tells what is unusual in one series of figures, as they come.

Four forecasts stand beside each other: what the last hours were, the last days, this time of day, and this hour of the
week. The one that has been off by least lately is believed, so that a series gets seasons only where it has them. What
a figure is off by, over a step, an hour, six hours and a day, is unusual where it is several times what it usually is
and exceeds, by half, all that the past weeks had: each series sets its own threshold, so that one which jumps every
night is not reported for jumping. Everything learns with clipped steps: an outlier hardly moves it.

The state is some 400 numbers however long the series is. Figures are plain floats of whatever is watched: statistics,
never sums of money that anyone is billed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

HOUR_S = 3600
DAY_S = 24 * HOUR_S
WEEK_S = 7 * DAY_S

# Nothing is reported before the series has been seen for this long.
LEARNING_S = 2 * DAY_S
# Over how long what a series is off by is averaged: a jolt, an hour, a quarter of a day, a day.
_SPANS_S = (0, HOUR_S, 6 * HOUR_S, 24 * HOUR_S)
_LOCAL_S = 2 * HOUR_S
_LEVELS_S = (0, 2 * DAY_S, DAY_S, 2 * DAY_S)
_SCALE_S = 2 * DAY_S
_RECORD_S = WEEK_S
_CLIP = 3.0
# So many times what a series is usually off by; and so many times the most that it was off by in the past weeks.
_LEAST = 5.0
_MARGIN = 1.5
# An event is over when the series has kept well below what opened it for this long.
_CALM_S = 2 * HOUR_S
_CALM = 0.5
_RECORD_CAP = 6.0
_SEASON_GAIN = 0.2
# What comes after a shift soon agrees with the last hours, which would hide it.
_DISTRUST = (1.25, 1.0, 1.0, 1.0)


class Verdict(msgspec.Struct, frozen=True):
    """`unusual` while an event is open. `expected` is the forecast; a `score` above 1 is more than was ever usual."""

    unusual: bool
    opened: bool
    expected: float
    score: float


class _Judged(NamedTuple):
    """`size` is what the forecast is off by over a span, `score` that over the `bound` beyond which it is unusual."""

    score: float
    size: float
    bound: float


class _Span(msgspec.Struct):
    mean: float = 0.0
    scale: float = 0.0
    record: float = 0.0
    lately: float = 0.0
    latest: float = 0.0
    turned_s: int = 0


class State(msgspec.Struct):
    """Everything a detector knows; as JSON some kilobytes."""

    seen: int = 0
    first_s: int = 0
    last_s: int = 0
    local: float = 0.0
    levels: list[float] = msgspec.field(default_factory=lambda: [0.0] * 4)
    day: list[float | None] = []
    week: list[float | None] = []
    errors: list[float] = msgspec.field(default_factory=lambda: [0.0] * 4)
    spans: list[list[_Span]] = []
    # For how long each forecast has been tried.
    tried_s: list[int] = msgspec.field(default_factory=lambda: [0] * 4)
    since_s: int | None = None
    calm_s: int = 0
    opened_by: int = 0
    opened_at: float = 0.0


class Detector:
    """Of a series with one figure every `step_s` seconds; gaps are nothing. Times are UTC seconds."""

    def __init__(self, step_s: int, state: State | None = None, sensitivity: float = 1.0) -> None:
        self._step_s = self._elapsed_s = step_s
        self._slot_s = max(step_s, 900)
        self._sensitivity = sensitivity
        self.state = state or State(
            day=[None] * (DAY_S // self._slot_s),
            week=[None] * 168,
            spans=[[_Span() for _ in _SPANS_S] for _ in range(4)],
        )

    def observe(self, at_s: int, value: float, least: float = 0.0) -> Verdict:
        state = self.state
        if not state.seen:
            state.first_s, state.local, state.levels[1] = at_s, value, value
        else:
            self._elapsed_s = max(self._step_s, min(at_s - state.last_s, DAY_S))
        forecasts = self._forecasts(at_s)
        ready = [n for n in range(4) if forecasts[n] is not None and (n < 2 or self._known(n))]
        best = min(ready, key=lambda n: state.errors[n] * _DISTRUST[n])
        expected = forecasts[best]
        assert expected is not None
        judged: list[_Judged] = []
        for number, forecast in enumerate(forecasts):
            if forecast is not None:
                spans = self._judge(number, at_s, self._off(at_s, value, forecast, number), least)
                judged = spans if number == best else judged
        opened = self._event(at_s, judged)
        self._learn(at_s, value, forecasts, best)
        state.seen += 1
        state.last_s = at_s
        return Verdict(state.since_s is not None, opened, expected, max(each.score for each in judged))

    def _known(self, number: int) -> bool:
        """Whether a forecast has been tried for long enough to go by what it was off by."""
        return self.state.tried_s[number] >= DAY_S

    def _forecasts(self, at_s: int) -> list[float | None]:
        state = self.state
        day = state.day[at_s % DAY_S // self._slot_s]
        week = self._in_week(at_s)
        return [
            state.local,
            state.levels[1],
            None if day is None else day + state.levels[2],
            None if week is None else week + state.levels[3],
        ]

    def _in_week(self, at_s: int) -> float | None:
        """Between the middles of the hours."""
        hour, into_s = divmod((at_s - HOUR_S // 2) % WEEK_S, HOUR_S)
        one, other = self.state.week[hour], self.state.week[(hour + 1) % 168]
        if one is None or other is None:
            return None
        return one + (other - one) * into_s / HOUR_S

    def _off(self, at_s: int, value: float, expected: float, number: int) -> float:
        """What the figure is off by; a season that comes a little early or late is not off."""
        if number < 2:
            return value - expected
        early, late = (self._forecasts(at_s + step_s)[number] for step_s in (-self._slot_s, self._slot_s))
        beside = [each for each in (early, late) if each is not None]
        return value - min(max(value, min(expected, *beside)), max(expected, *beside)) if beside else value - expected

    def _judge(self, number: int, at_s: int, off: float, least: float) -> list[_Judged]:
        """Over each span, how this forecast is off now."""
        state = self.state
        judged = []
        state.tried_s[number] += self._elapsed_s
        weight_scale = max(self._weight(_SCALE_S), self._elapsed_s / state.tried_s[number])
        for span, span_s in zip(state.spans[number], _SPANS_S, strict=True):
            span.mean += (1.0 if not span_s else self._weight(span_s)) * (off - span.mean)
            size = abs(span.mean)
            usual = span.scale or size
            # What has been tried for a short time only knows little of what is usual, the more so over long spans.
            young = 1 + (6 * span_s + DAY_S / 2) / state.tried_s[number]
            bound = young * max(_LEAST * usual, _MARGIN * span.record) / self._sensitivity
            judged.append(_Judged(size / bound if bound > 0 and size >= least else 0.0, size, max(bound, least)))
            span.scale += weight_scale * (min(size, _CLIP * usual) - span.scale)
            if number < 2 or self._known(number):
                self._remember(span, at_s, span_s, min(size, _RECORD_CAP * max(_LEAST * usual, span.record)))
        return judged

    def _remember(self, span: _Span, at_s: int, span_s: int, size: float) -> None:
        """What is on its way up must not raise its own threshold: a span's figures count once they are as old."""
        span.latest = max(span.latest, size)
        span.record *= 0.5 ** (self._elapsed_s / _RECORD_S)
        if at_s - span.turned_s >= span_s:
            span.record = max(span.record, span.lately)
            span.lately, span.latest, span.turned_s = span.latest, 0.0, at_s

    def _event(self, at_s: int, judged: Sequence[_Judged]) -> bool:
        state = self.state
        if state.since_s is not None:
            if judged[state.opened_by].size > _CALM * state.opened_at:
                state.calm_s = at_s
            elif at_s - state.calm_s >= _CALM_S:
                state.since_s = None
                # What was told once must not be told again by a longer span that still remembers it.
                for span in (span for spans in state.spans for span in spans):
                    span.mean = 0.0
            return False
        which = max(range(len(judged)), key=lambda n: judged[n].score)
        if judged[which].score > 1 and at_s - state.first_s >= LEARNING_S:
            state.since_s = state.calm_s = at_s
            state.opened_by, state.opened_at = which, judged[which].bound
            return True
        return False

    def _learn(self, at_s: int, value: float, forecasts: Sequence[float | None], best: int) -> None:
        state = self.state
        scale = state.spans[best][0].scale
        weight = max(self._weight(_SCALE_S), 1 / (state.seen + 1))
        for number, forecast in enumerate(forecasts):
            if forecast is not None:
                error, usual = abs(value - forecast), state.errors[number]
                state.errors[number] += weight * (min(error, _CLIP * usual) - usual) if usual else error
        state.local += self._weight(_LOCAL_S) * (value - state.local)
        limit = _CLIP * scale if scale else math.inf
        off = value - state.levels[1]
        weight = max(self._weight(_LEVELS_S[1]), 1 / (state.seen + 1))
        state.levels[1] += weight * max(-limit, min(limit, off))
        # A figure that was long in coming is of all the time since the one before.
        since_s = at_s - max(0, self._elapsed_s - self._step_s) if state.seen else at_s
        for slot in {covered_s % DAY_S // self._slot_s for covered_s in range(since_s, at_s + 1, self._step_s)}:
            self._learn_season(state.day, slot, self._slot_s, value, 2, limit)
        for hour in {covered_s % WEEK_S // HOUR_S for covered_s in range(since_s, at_s + 1, self._step_s)}:
            self._learn_season(state.week, hour, HOUR_S, value, 3, limit)

    def _learn_season(
        self, season: list[float | None], slot: int, slot_s: int, value: float, number: int, limit: float
    ) -> None:
        usual = season[slot]
        level = self.state.levels[number]
        if usual is None:
            season[slot] = value - level
            return
        off = max(-limit, min(limit, value - usual - level))
        covered_s = min(self._elapsed_s, slot_s)
        self.state.levels[number] += covered_s / _LEVELS_S[number] * off
        season[slot] = usual + _SEASON_GAIN * covered_s / slot_s * off

    def _weight(self, over_s: int) -> float:
        return min(1.0, self._elapsed_s / over_s)
