"""How long a request will take, and how much of the device it will be given.

Both come from the step-time model where it has been fitted, else from what a token took lately. How far such figures
have been off is remembered per model, as ratios of what happened to what was predicted, and widens the next interval.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict, deque

import msgspec

from millicent.core.clock import NS_PER_MS
from millicent.core.quotes import Interval
from millicent.core.usage import Provenance
from millicent.step_time import Coefficients, Work

_PERMILLE = 1000
_WINDOW = 512
_MOST_MODELS = 256
_LEAST_RATIOS = 24
# With fewer ratios than that, a prediction may be off by this factor either way; before any, by the second.
_FACTOR_AT_FIRST = 4
_FACTOR_UNSEEN = 10
# Before anything was seen of a model: a small model on a few processor cores.
_ASSUMED_INPUT_TOKEN_NS = NS_PER_MS
_ASSUMED_OUTPUT_TOKEN_NS = 30 * NS_PER_MS
# What one step computes of a prompt, at most; the engine's default.
_STEP_TOKENS = 512


class Durations(msgspec.Struct, frozen=True):
    """Nanoseconds: device time charged, until the first token, until the end."""

    serving: Interval
    ttft: Interval
    total: Interval
    provenance: Provenance


class Times(msgspec.Struct, frozen=True):
    """What one answer took, or is predicted to take. None where it isn't known."""

    serving_ns: int | None
    ttft_ns: int | None
    total_ns: int | None


class DurationModel:
    """Per model, in bounded memory. `batch` counts the sequences that run beside each other, this one included."""

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[str, bool], _Seen] = OrderedDict()

    def predict(
        self, model: str, fit: Coefficients | None, input_tokens: int, output: Interval, batch: int
    ) -> Durations:
        seen = self._seen.get((model, fit is not None))
        rates = self._rates(model)
        low, expected, high = [
            _times(fit, rates, input_tokens, tokens, batch) for tokens in (output.low, output.expected, output.high)
        ]
        known = seen is not None or rates is not None
        spreads = seen.spreads() if seen is not None else _unseen(known=known)
        serving, ttft, total = [
            Interval(low[i] * least // _PERMILLE, expected[i] * middle // _PERMILLE, high[i] * most // _PERMILLE)
            for i, (least, middle, most) in enumerate(spreads)
        ]
        provenance = Provenance.ESTIMATED if known or fit is not None else Provenance.ASSUMED
        return Durations(serving, ttft, total, provenance)

    def learn(
        self, model: str, fit: Coefficients | None, input_tokens: int, output_tokens: int, batch: int, took: Times
    ) -> None:
        """An answer has ended that nothing cut off."""
        rates = self._rates(model)
        for way in (fit, None) if fit is not None else (None,):
            seen = self._of(model, fitted=way is not None)
            if way is not None or rates is not None:
                seen.compare(_times(way, rates, input_tokens, output_tokens, batch), took)
        self._of(model, fitted=False).rates.add(input_tokens, output_tokens, took)

    def _rates(self, model: str) -> _Rates | None:
        seen = self._seen.get((model, False))
        return None if seen is None else seen.rates

    def _of(self, model: str, *, fitted: bool) -> _Seen:
        key = (model, fitted)
        if key in self._seen:
            self._seen.move_to_end(key)
        else:
            self._seen[key] = _Seen()
            if len(self._seen) > _MOST_MODELS:
                self._seen.popitem(last=False)
        return self._seen[key]


def _times(
    fit: Coefficients | None, rates: _Rates | None, input_tokens: int, output_tokens: int, batch: int
) -> tuple[int, int, int]:
    """Serving, first token, total."""
    if fit is not None:
        return fitted_times(fit, input_tokens, output_tokens, batch)
    serving_ns = input_tokens * _ASSUMED_INPUT_TOKEN_NS + output_tokens * _ASSUMED_OUTPUT_TOKEN_NS
    if rates is None:
        ttft_ns = input_tokens * _ASSUMED_INPUT_TOKEN_NS + _ASSUMED_OUTPUT_TOKEN_NS
        return serving_ns, ttft_ns, serving_ns
    return rates.times(input_tokens, output_tokens)


def fitted_times(fit: Coefficients, input_tokens: int, output_tokens: int, batch: int) -> tuple[int, int, int]:
    """Serving, first token, total: the prompt in steps of at most _STEP_TOKENS rows beside the others' decoding, then
    one step for each token."""
    context = input_tokens + output_tokens // 2
    decoding = Work(1, 1, context, 0)
    others = [decoding] * (batch - 1)
    serving_ns = ttft_ns = 0
    done = 0
    while done < max(1, input_tokens):
        rows = max(1, min(_STEP_TOKENS, input_tokens - done))
        last = done + rows >= input_tokens
        own = Work(rows, int(last), 0, rows * done + rows * (rows + 1) // 2)
        works = [own, *others]
        serving_ns += int(fit.shares(works)[0])
        ttft_ns += int(fit.step_ns(Work.total(works)))
        done += rows
    works = [decoding, *others]
    tokens = max(0, output_tokens - 1)
    serving_ns += tokens * int(fit.shares(works)[0])
    return serving_ns, ttft_ns, ttft_ns + tokens * int(fit.step_ns(Work.total(works)))


class _Rates:
    """What tokens took lately: sums that fade, so that each of the last hundred answers or so counts."""

    _FADING = 128
    _SCALE = 1 << 20  # so that fading rounds nothing away

    def __init__(self) -> None:
        self._input_tokens = 0
        self._output_tokens = 0
        self._serving_ns = 0
        self._ttft_ns = 0
        self._after_ns = 0

    def add(self, input_tokens: int, output_tokens: int, took: Times) -> None:
        if took.ttft_ns is None or took.total_ns is None:
            return
        self._input_tokens = self._faded(self._input_tokens, input_tokens)
        self._output_tokens = self._faded(self._output_tokens, output_tokens)
        self._serving_ns = self._faded(self._serving_ns, took.serving_ns or 0)
        self._ttft_ns = self._faded(self._ttft_ns, took.ttft_ns)
        self._after_ns = self._faded(self._after_ns, max(0, took.total_ns - took.ttft_ns))

    def _faded(self, before: int, value: int) -> int:
        return before - before // self._FADING + value * self._SCALE

    def times(self, input_tokens: int, output_tokens: int) -> tuple[int, int, int]:
        """Device time is split like the time on the clock, between the prompt and the answer."""
        wall_ns = self._ttft_ns + self._after_ns
        ttft_ns = self._ttft_ns * max(1, input_tokens) // max(1, self._input_tokens)
        after_ns = self._after_ns * max(0, output_tokens - 1) // max(1, self._output_tokens)
        serving_ns = (ttft_ns + after_ns) * self._serving_ns // max(1, wall_ns)
        return serving_ns, ttft_ns, ttft_ns + after_ns


class _Seen:
    """One model's answers, as one way of predicting saw them."""

    def __init__(self) -> None:
        self.rates = _Rates()
        self._ratios = (_Ratios(), _Ratios(), _Ratios())

    def compare(self, predicted: tuple[int, int, int], took: Times) -> None:
        actual = (took.serving_ns, took.ttft_ns, took.total_ns)
        for ratios, said_ns, was_ns in zip(self._ratios, predicted, actual, strict=True):
            if was_ns is not None and said_ns > 0:
                ratios.add((was_ns * _PERMILLE + said_ns // 2) // said_ns)

    def spreads(self) -> tuple[tuple[int, int, int], ...]:
        return tuple(ratios.spread() for ratios in self._ratios)


def _unseen(*, known: bool) -> tuple[tuple[int, int, int], ...]:
    factor = _FACTOR_AT_FIRST if known else _FACTOR_UNSEEN
    return ((_PERMILLE // factor, _PERMILLE, _PERMILLE * factor),) * 3


class _Ratios:
    """What happened over what was predicted, in permille."""

    __slots__ = ("_order", "_sorted")

    def __init__(self) -> None:
        self._order: deque[int] = deque()
        self._sorted: list[int] = []

    def add(self, permille: int) -> None:
        if len(self._order) == _WINDOW:
            del self._sorted[bisect.bisect_left(self._sorted, self._order.popleft())]
        self._order.append(permille)
        bisect.insort(self._sorted, permille)

    def spread(self) -> tuple[int, int, int]:
        """From the 4th to the 96th of a hundred, and the middle one."""
        count = len(self._sorted)
        if count == 0:
            return _unseen(known=True)[0]
        middle = self._sorted[count // 2]
        if count < _LEAST_RATIOS:
            return middle // _FACTOR_AT_FIRST, middle, middle * _FACTOR_AT_FIRST
        cut = count * 4 // 100
        return self._sorted[cut] - 1, middle, self._sorted[count - 1 - cut] + 1  # ratios are known to a permille
