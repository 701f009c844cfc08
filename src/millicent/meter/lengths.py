"""How long an answer will be: learned from the answers to inputs of about the same length.

The forecast takes the nearest past requests of the same model and feature, topped up from the model, then from all
models, while there are few. Its interval is the shortest that holds as large a part of them as has lately been needed
to be right often enough: that part is moved after every answer (adaptive conformal inference: Gibbs, Candes 2021), so
that the promised coverage holds over time even where traffic changes.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict, deque

import msgspec

from millicent.core.quotes import Interval
from millicent.core.usage import Provenance

_PPM = 1_000_000
# Aim a little above the 90% that is promised.
_MISS_PPM = 80_000
_MOST_MISS_PPM = 500_000
# How far one answer moves the part: 0.5% of its surprise.
_LEARNING_DIVISOR = 200
_NEIGHBOURS = 120
_CLOSEST = 20
_LEAST_NEIGHBOURS = 12  # fewer can't bound nine in ten
_SCANNED = 4 * _NEIGHBOURS
_WINDOW = 4096
_MOST_KEYS = 512

# Before anything was seen: an answer of a few paragraphs, up to what the request allows.
_ASSUMED_TOKENS = 256
_ASSUMED_MOST_TOKENS = 4096

_Key = tuple[str, ...]
_Answer = tuple[int, int, bool]  # tokens of the input, of the output, and whether its limit ended it


class Length(msgspec.Struct, frozen=True):
    """The forecast in tokens, and whether it was learned (estimated) or not (assumed)."""

    tokens: Interval
    provenance: Provenance


class OutputLengths:
    """Bounded memory: at most 512 keys, those used last, with at most 4096 answers each."""

    def __init__(self) -> None:
        self._seen: OrderedDict[_Key, _Answers] = OrderedDict()

    def forecast(self, model: str, feature: str | None, input_tokens: int, limit: int | None) -> Length:
        """`limit` is the most the request can produce; None where nobody knows."""
        most = _ASSUMED_MOST_TOKENS if limit is None else limit
        found, first = self._nearest(model, feature, input_tokens, limit)
        # What is likeliest is a question to the very nearest; what is possible, to more of them.
        closest = found[:_CLOSEST] if first < _CLOSEST else _window(found[:first], input_tokens, _CLOSEST)
        likely = sorted([length for _, length, _ in closest]) or [_ASSUMED_TOKENS]
        expected = min(likely[(len(likely) - 1) // 2], most)
        lengths = sorted([length for _, length, _ in found])
        if limit is not None and lengths and lengths[-1] > limit:
            lengths = [min(limit, length) for length in lengths]
        if len(lengths) < _LEAST_NEIGHBOURS:
            return Length(Interval(min(1, expected), expected, most), Provenance.ASSUMED)
        low, high = _shortest(lengths, self._miss_ppm(model, feature))
        if high is None:
            low, high = min(1, expected), max(most, expected)
        return Length(Interval(min(low, expected), expected, max(high, expected)), Provenance.ESTIMATED)

    def learn(
        self, model: str, feature: str | None, input_tokens: int, output_tokens: int, limit: int | None, *, cut: bool,
        promised: Interval | None = None,
    ) -> None:  # fmt: skip
        """An answer has ended. `cut`: its limit ended it, so that its own length is not known. `promised`: the interval
        that was forecast for it and learned, where somebody knows."""
        if promised is None:
            said = self.forecast(model, feature, input_tokens, output_tokens if cut else limit)
            promised = said.tokens if said.provenance is Provenance.ESTIMATED else None
        if promised is not None:
            self._answers(_keys(model, feature)[0]).calibrate(inside=promised.low <= output_tokens <= promised.high)
        for key in _keys(model, feature):
            self._answers(key).add(input_tokens, output_tokens, cut=cut)

    def _nearest(
        self, model: str, feature: str | None, input_tokens: int, limit: int | None
    ) -> tuple[list[_Answer], int]:
        """The nearest answers, and how many of them come first in the order of their inputs; the others do in that of
        their distance. A coarser key holds the finer one's answers too: it only tops up."""
        found: list[_Answer] = []
        first = 0
        for key in _keys(model, feature):
            answers = self._seen.get(key)
            if answers is not None and len(found) < _NEIGHBOURS:
                found += answers.nearest(input_tokens, limit, skip=len(found))
                first = first or len(found)
        return found, first

    def _miss_ppm(self, model: str, feature: str | None) -> int:
        for key in _keys(model, feature):
            answers = self._seen.get(key)
            if answers is not None:
                return answers.miss_ppm
        return _MISS_PPM

    def _answers(self, key: _Key) -> _Answers:
        if key in self._seen:
            self._seen.move_to_end(key)
        else:
            self._seen[key] = _Answers()
            if len(self._seen) > _MOST_KEYS:
                self._seen.popitem(last=False)
        return self._seen[key]


def _keys(model: str, feature: str | None) -> tuple[_Key, ...]:
    """From the finest to the coarsest."""
    return ((model, feature or ""), (model,), ())


class _Answers:
    """The last answers under one key, sorted by the length of their input."""

    __slots__ = ("_by_input", "_order", "miss_ppm")

    def __init__(self) -> None:
        self.miss_ppm = _MISS_PPM
        self._by_input: list[_Answer] = []
        self._order: deque[_Answer] = deque()

    def add(self, input_tokens: int, output_tokens: int, *, cut: bool) -> None:
        if len(self._order) == _WINDOW:
            oldest = self._order.popleft()
            del self._by_input[bisect.bisect_left(self._by_input, oldest)]
        answer = (input_tokens, output_tokens, cut)
        self._order.append(answer)
        bisect.insort(self._by_input, answer)

    def calibrate(self, *, inside: bool) -> None:
        """A miss makes the next intervals wider, a hit a little narrower; in balance a share of _MISS_PPM misses."""
        surprise_ppm = _MISS_PPM if inside else _MISS_PPM - _PPM
        self.miss_ppm = min(_MOST_MISS_PPM, max(0, self.miss_ppm + surprise_ppm // _LEARNING_DIVISOR))

    def nearest(self, input_tokens: int, limit: int | None, *, skip: int) -> list[_Answer]:
        """Those to the nearest inputs, in the order of inputs; but the very nearest `skip`, in that of distance.

        An answer that was cut short of the limit says only that it would have been longer: it is left out, and others
        are looked for somewhat further away.
        """
        width = count = _NEIGHBOURS
        while True:
            window = _window(self._by_input, input_tokens, width)
            found = [answer for answer in window if not answer[2] or (limit is not None and answer[1] >= limit)]
            if len(found) >= count or width >= min(_SCANNED, len(self._by_input)):
                break
            width *= 2
        if skip:
            return sorted(found, key=lambda answer: abs(answer[0] - input_tokens))[skip:count]
        return found if len(found) <= count else _window(found, input_tokens, count)


def _window(answers: list[_Answer], input_tokens: int, width: int) -> list[_Answer]:
    """The `width` answers to the nearest inputs: they lie next to each other."""
    low, high = 0, max(0, len(answers) - width)
    while low < high:
        middle = (low + high) // 2
        # What would leave the window at its start is further away than what would come in at its end.
        if input_tokens - answers[middle][0] > answers[middle + width][0] - input_tokens:
            low = middle + 1
        else:
            high = middle
    return answers[low : low + width]


def _shortest(lengths: list[int], miss_ppm: int) -> tuple[int, int | None]:
    """The shortest interval with all but `miss_ppm` of the sorted lengths and one more; no upper end when they are
    too few for that."""
    count = len(lengths)
    wanted = max(1, -(-(_PPM - miss_ppm) * (count + 1) // _PPM))
    if wanted > count:
        return 1, None
    widths = [last - first for first, last in zip(lengths, lengths[wanted - 1 :], strict=False)]
    start = widths.index(min(widths))
    return lengths[start], lengths[start + wanted - 1]
