"""Whose steps were, of an engine that doesn't show them: from when its answers' tokens come.

A stretch of time in which some streams are there has about as many steps as its fastest writer got tokens. All that was
read of prompts is taken to be of one of them, which the others shared; in the rest they only wrote.

The coefficients are learned from streams that were alone (their time to the first token is a step of the whole prompt,
their time per token a step of one row), from those that were the only ones to be read, and from stretches in which all
only wrote. Until then they are those of an 8-billion-parameter model of 16 bits on an accelerator with 2 TB/s and 312
TFLOPS, of which only the proportions matter.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from millicent.step_time.fit import Fitter
from millicent.step_time.model import Coefficients, Work

_STANDING = Coefficients(fixed_ns=1e6, weights_ns=8e6, row_ns=51_000, sampled_row_ns=1_000, kv_token_ns=65, pair_ns=1.7)
# So many observations set the scale of those; from then on they are learned.
_SCALED_BY = 16
_REFIT_EVERY = 64
# A new fit is used when its predictions of the latest observations differ by so much on average.
_WORTH_IT_PERCENT = 2
_LATEST = 32
# Fewer steps than this are too few to say how long each took.
_LEAST_STEPS = 4
_WEIGHTS_PER_NS = 1000


class Stream:
    """One answer on its way. It counts as being read until its first tokens come: `answering`.

    Of its prompt, `read` tokens are taken to be done and `unread` not; each of its `choices` has `made` tokens from
    before this stretch, and all of them `tokens` in it. Several `prompts` are taken to be alike, and are counted
    together.
    """

    def __init__(self, prompt_tokens: int, choices: int, prompts: int = 1) -> None:
        self.choices = choices
        self.prompts = prompts
        self.unread = prompt_tokens
        self.read = 0
        self.answering = False
        self.made = 0
        self.tokens = 0

    @property
    def context(self) -> int:
        """Of each answer."""
        return (self.read + self.unread) // self.prompts + self.made

    def go_on(self, rows: int) -> None:
        """Its stretch is over, in which so many rows of its prompt were read."""
        self.read += rows
        self.unread = 0 if self.answering else max(1, self.unread - rows)
        self.made += self.tokens // self.choices
        self.tokens = 0

    def writing(self) -> Work:
        """One step in which it writes."""
        context = self.context + self.tokens // self.choices // 2
        return Work(self.choices, self.choices, context * self.choices, 0)

    def reading(self, rows: int) -> Work:
        pairs = (rows * self.read + rows * (rows + 1) // 2) // self.prompts
        return Work(rows, int(self.answering), 0, pairs)


class Split(NamedTuple):
    """Of each stream, the rows of its prompt that were read, and its weight in the stretch; that of all others that are
    said to be there; and about how many steps there were."""

    rows: list[int]
    weights: list[int]
    others_weight: int
    steps: int


class UnseenSteps:
    """One engine's. `known`: what was learned of it before. `fitter` is there once something is."""

    def __init__(self, known: Coefficients | None = None) -> None:
        self._costs = known or _STANDING
        self._first: list[tuple[Work, int]] = []
        self._latest: deque[Work] = deque(maxlen=_LATEST)
        self.fitter = None if known is None else Fitter(known=known)

    @property
    def learned(self) -> Coefficients | None:
        """What steps take, in use since it was learned; None before."""
        return None if self.fitter is None else self._costs

    def split(self, there: Sequence[Stream], wall_ns: int, others: int = 0) -> Split:
        """A stretch of so long with these streams, and `others` of which nothing else is known."""
        writing = [stream for stream in there if stream.tokens]
        steps = max([1, *(-(-stream.tokens // stream.choices) for stream in writing)])
        rows = self._rows(there, wall_ns, steps)
        active = [stream for stream in there if stream.tokens or stream in rows]
        works = [stream.reading(rows[stream]) if stream in rows else stream.writing() for stream in active]
        if not rows and len(active) == len(there) and not others:
            self._learn_writing(writing, Work.total(works), wall_ns, steps)
        shares = dict.fromkeys(there, 0.0)
        if works:
            shares |= zip(active, self._costs.shares(works), strict=True)
        later = [stream for stream in writing if stream.tokens > stream.choices]
        if later:
            each_step = self._costs.shares([stream.writing() for stream in later])
            for stream, share_ns in zip(later, each_step, strict=True):
                shares[stream] += share_ns * (stream.tokens / stream.choices - 1)
        weights = [1 + int(shares[stream] * _WEIGHTS_PER_NS) for stream in there]
        others_weight = others * self._weight_of_another(there, steps, others) if others else 0
        return Split([rows.get(stream, 0) for stream in there], weights, others_weight, steps)

    def learn_reading(self, stream: Stream, others: Sequence[Stream], wall_ns: int) -> None:
        """Since it came, so long ago, it was the only one whose prompt was read, and now its first token has come. A
        stretch began when it came."""
        if others and self.fitter is None:
            return
        works = [other.writing() for other in others if other.tokens]
        took_ns = wall_ns * 1.0
        if works:
            # It came in the middle of a step, and was read in the last one.
            steps = max(other.tokens / other.choices for other in others)
            took_ns -= max(0.0, steps - 1.5) * self._costs.step_ns(Work.total(works))
        prompt = Work(stream.unread, 1, 0, stream.unread * (stream.unread + 1) // 2 // stream.prompts)
        self._observe(Work.total([*works, prompt]), int(took_ns))

    def _learn_writing(self, writing: Sequence[Stream], total: Work, wall_ns: int, steps: int) -> None:
        """All wrote, and nothing else was done."""
        if steps >= _LEAST_STEPS and all(stream.tokens >= 0.9 * steps * stream.choices for stream in writing):
            self._observe(total, wall_ns // steps)

    def _rows(self, there: Sequence[Stream], wall_ns: int, steps: int) -> dict[Stream, int]:
        """How much of which prompts was read. Of those that don't answer yet, in the order in which they came, as much
        as there was time for."""
        row_ns = self._costs.row_ns
        rows = {stream: stream.unread for stream in there if stream.answering and stream.unread}
        written = [stream.writing() for stream in there if stream.tokens and stream not in rows]
        left_ns = wall_ns - sum(row_ns * read for read in rows.values())
        if written:
            left_ns -= self._costs.step_ns(Work.total(written)) * steps
        for stream in there:
            if stream.answering:
                continue
            possible = int(left_ns / row_ns) if self.fitter is not None and row_ns else stream.unread
            if (read := min(stream.unread, possible)) > 0:
                rows[stream] = read
                left_ns -= row_ns * read
        return rows

    def _weight_of_another(self, there: Sequence[Stream], steps: int, others: int) -> int:
        """Somebody else is taken to write, with a context like these, in each step."""
        context = sum(stream.context for stream in there) // len(there)
        works = [Work(1, 1, context, 0)] * (len(there) + others)
        return 1 + int(self._costs.shares(works)[0] * steps * _WEIGHTS_PER_NS)

    def _observe(self, work: Work, wall_ns: int) -> None:
        if wall_ns <= 0:
            return
        if self.fitter is not None:
            self.fitter.observe(work, wall_ns)
            self._latest.append(work)
            if self.fitter.steps % _REFIT_EVERY == 0:
                found = self.fitter.coefficients()
                if found is not None and found.differs(self._costs, self._latest, _WORTH_IT_PERCENT):
                    self._costs = found
            return
        self._first.append((work, wall_ns))
        if len(self._first) < _SCALED_BY:
            return
        scale = statistics.median(wall_ns / _STANDING.step_ns(work) for work, wall_ns in self._first)
        known = Coefficients(*(scale * getattr(_STANDING, field) for field in _STANDING.__struct_fields__))
        self.fitter = Fitter(known=known)
        for seen, seen_ns in self._first:
            self.fitter.observe(seen, seen_ns)
        self._first.clear()
        self._costs = self.fitter.coefficients() or known
