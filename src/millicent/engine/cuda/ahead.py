"""A runner that plans the next step while the device works on this one.

A step is planned before the one before it is read, so the tokens that one draws aren't known: each stands in the plan
as a number, `-1 - i` for row i, and the device fills it in. What depends on such a token on the host, penalties and
grammars, is sent after it is read: the layers run meanwhile, and the token is drawn anew from their logits.

An answer that ends in a step may be in the next one already. That row is thrown away and stays the answer's: its end is
told with the record that holds the row, so that nobody else pays for it.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np

from millicent.core.clock import NS_PER_MS, Clock
from millicent.core.steps import Overhead, SequenceWork, StepRecord
from millicent.engine.batch import Model, Piece
from millicent.engine.calibration import calibrate
from millicent.engine.config import EngineConfig
from millicent.engine.logprobs import score_drawn
from millicent.engine.protocol import Output, Step
from millicent.engine.runner import OpenModel, Runner
from millicent.engine.sampler import Draw

if TYPE_CHECKING:
    from millicent.engine.runner import _Answer as Answer

_log = logging.getLogger(__name__)
_NO_LOGITS = np.empty(0, dtype=np.float32)
# How far the record's clock, which adds up the device's, may lag behind the host's before it is set right.
_LAG_NS = NS_PER_MS


@dataclass(frozen=True, slots=True)
class Changes:
    """What is done to some rows of logits before tokens are drawn: at (row, token), each named once, multiply what is
    negative by the factor and divide the rest, then take away, then add. `allowed` has a bit for each token that may
    come, lowest first."""

    rows: np.ndarray
    tokens: np.ndarray
    factors: np.ndarray
    minus: np.ndarray
    plus: np.ndarray
    allowed: dict[int, bytes]


@dataclass(frozen=True, slots=True)
class Landed:
    """What a pass gave: a token for each row drawn (None from what is no distribution), the logits that were asked
    for, float32, and how long the device worked."""

    tokens: list[int | None]
    logits: dict[int, np.ndarray]
    device_ns: int


class Flight(Protocol):
    """A pass on its way through the device."""

    def redraw(self, rows: Many[int], draws: Many[Draw], changes: Changes) -> None:
        """Draw some rows again, from changed logits. Only before `bring`, and before the next launch."""
        ...

    def bring(self, scored: Many[int]) -> None:
        """Nothing more is asked of the device but to bring the tokens, and the logits of these rows."""
        ...

    def reached(self) -> bool:
        """Whether `land` wouldn't wait."""
        ...

    def land(self, before: Flight | None) -> Landed:
        """Wait for what was brought. Time counts from the end of `before`, or from the launch."""
        ...


class LaunchedModel(Model, Protocol):
    """A model on a device that works by itself. `working_bytes` is what passes need beside weights and cache."""

    working_bytes: int

    @property
    def step_tokens(self) -> int:
        """How many rows a pass takes at most."""
        ...

    def launch(self, pieces: Many[Piece], draws: Many[Draw]) -> Flight:
        """Begin a pass; `draws` are of the pieces that sample. A token `-1 - i` is the one drawn in row i before."""
        ...

    def is_lost(self, error: Exception) -> bool:
        """Whether nothing works any more after this."""
        ...


@dataclass(slots=True)
class _Pass:
    """`sampled` are the sequences whose tokens are drawn, in the order of the rows; of those, `late` lists the rows
    that are drawn anew once the host knows more. `begun_ns` is when it was planned, `launched_ns` when the device had
    it."""

    flight: Flight
    before: Flight | None
    works: tuple[SequenceWork, ...]
    sampled: list[int]
    late: list[int]
    begun_ns: int
    launched_ns: int
    brought: bool = False

    def __contains__(self, sequence: int) -> bool:
        return any(work.sequence == sequence for work in self.works)


class AheadRunner(Runner):
    """At most one pass is under way while the next is planned. A sequence that needs more of the host than that
    (typical-p, scores of its prompt) makes steps wait for each other while it is there."""

    def __init__(
        self, model: LaunchedModel, opened: OpenModel, config: EngineConfig, *, blocks: int, wake: Callable[[], None]
    ) -> None:
        """`model` is the opened one."""
        # Guesses are checked on the host, which would have to wait for each step.
        fitting = msgspec.structs.replace(config, step_tokens=model.step_tokens, speculation="off")
        super().__init__(opened, fitting, blocks=blocks, wake=wake)
        self._launcher = model
        self._flights: deque[_Pass] = deque()
        self._ends: dict[int, Output] = {}
        self._ended_ns = 0

    @property
    def flying(self) -> bool:
        return bool(self._flights)

    @property
    def busy(self) -> bool:
        return super().busy or self.flying

    def calibrate(
        self, config: EngineConfig, clock: Clock, *, own: bool = True, draft: bool = True
    ) -> tuple[Overhead, ...]:
        """With passes as they are run here; there is no draft model."""
        del draft
        if not own:
            return ()
        fitting = msgspec.structs.replace(config, step_tokens=self._launcher.step_tokens)
        return (calibrate(self._model, fitting, clock, blocks=self._blocks, run_pass=self._run_pass),)

    def _run_pass(self, pieces: Many[Piece]) -> None:
        flight = self._launcher.launch(pieces, [_GREEDY for piece in pieces if piece.sample])
        flight.bring(())
        flight.land(None)

    def cancel(self, sequence: int) -> Output | None:
        end = super().cancel(sequence)
        if end is None or not self._is_flying(sequence):
            return end
        self._ends[sequence] = end
        return None

    def step(self, device: str, index: int, clock: Clock, *, ahead: bool = False) -> Step:
        """Give the device what it can do next, and read the oldest pass. Call only while busy."""
        on_host = any(map(_needs_host, self._answers.values()))
        if on_host and not self._flights:
            return super().step(device, index, clock)
        failed: list[Output] = []
        if not self._flights:
            failed += self._launch(clock)
        if ahead and not on_host and not self._deterministic and len(self._flights) == 1:
            failed += self._launch(clock)
        if not self._flights:
            return Step(None, tuple(failed))
        return self._land(device, index, clock, failed)

    def _launch(self, clock: Clock) -> list[Output]:
        """Plan a pass and give it to the device, if there is anything to plan. Outputs are of those it failed."""
        if not len(self.scheduler):
            return []
        begun_ns = clock.monotonic_ns()
        with self._tokens_to_come() as waiting:
            planned = self._next_pass() if not self._flights else self.scheduler.schedule()
            pieces = [piece for piece in planned if piece.sequence not in waiting]
            if not pieces:
                return []
            works = tuple(map(self.scheduler.advance, pieces))
            sampled = [piece.sequence for piece in pieces if piece.sample]
            answers = [self._answers[sequence] for sequence in sampled]
            draws = [answer.draw() for answer in answers]
        before = self._flights[-1].flight if self._flights else None
        try:
            launched_ns = clock.monotonic_ns()
            flight = self._launcher.launch(pieces, draws)
        except Exception as error:
            if self._launcher.is_lost(error):
                raise
            _log.exception("a forward pass of %s failed", self._model.name)
            detail = " ".join(str(error).split())[:200]
            reason = f"the model failed while computing this answer ({type(error).__name__}: {detail}); retry"
            return self._hold_back(self._fail((piece.sequence for piece in pieces), reason))
        late = [row for row, answer in enumerate(answers) if answer.adjust is not None or answer.grammar is not None]
        self._flights.append(_Pass(flight, before, works, sampled, late, begun_ns, launched_ns))
        if not late or before is None:
            self._bring(self._flights[-1])
        return []

    @contextlib.contextmanager
    def _tokens_to_come(self) -> Iterator[Collection[int]]:
        """While the next pass is planned, sequences have the tokens that the one under way will draw.

        What it gives are those that have not, because that token may be their last: they must not be in the plan.
        """
        grown: list[Answer] = []
        waiting: set[int] = set()
        for row, sequence in enumerate(self._flights[-1].sampled if self._flights else ()):
            answer = self._answers.get(sequence)
            if answer is None:
                continue
            if self._may_go_on(answer):
                answer.sequence.tokens.append(-1 - row)
                grown.append(answer)
            else:
                waiting.add(sequence)
        try:
            yield waiting
        finally:
            for answer in grown:
                answer.sequence.tokens.pop()

    def _may_go_on(self, answer: Answer) -> bool:
        """Whether there may be a token after the one that comes."""
        sequence, most = answer.sequence, answer.limits.max_tokens
        full = most is not None and sequence.output_tokens + 1 >= most
        return not full and len(sequence.tokens) + 1 < self.scheduler.context_tokens

    def _bring(self, each: _Pass) -> None:
        """All passes before it are read, or none of its draws waits for that."""
        rows = [row for row in each.late if each.sampled[row] in self._answers]
        if rows:
            answers = [self._answers[each.sampled[row]] for row in rows]
            each.flight.redraw(rows, [answer.draw() for answer in answers], _changes(answers))
        scored = [row for row, sequence in enumerate(each.sampled) if self._wants_scores(sequence)]
        each.flight.bring(scored)
        each.brought = True

    def _wants_scores(self, sequence: int) -> bool:
        answer = self._answers.get(sequence)
        return answer is not None and answer.sampling.logprobs is not None

    def _land(self, device: str, index: int, clock: Clock, failed: list[Output]) -> Step:
        current = self._flights[0]
        waited = not current.flight.reached()
        landed = current.flight.land(current.before)
        self._flights.popleft()
        start_ns, wall_ns = self._time(current, landed.device_ns, clock.monotonic_ns(), waited=waited)
        outputs = failed
        answers = [self._answers.get(sequence) for sequence in current.sampled]
        tops = [None if answer is None else answer.sampling.logprobs for answer in answers]
        scored = score_drawn(landed.tokens, tops, landed.logits.__getitem__)
        for answer, token, scores in zip(answers, landed.tokens, scored, strict=True):
            if answer is not None:  # else it ended, or was cancelled, while this was under way
                outputs.append(self._accept(answer, token, scores))
        outputs = self._hold_back(outputs)
        if self._flights and not self._flights[0].brought:
            self._bring(self._flights[0])
        record = StepRecord(device, self._model.name, index, start_ns, wall_ns, current.works)
        return Step(record, tuple(outputs))

    def _time(self, current: _Pass, device_ns: int, now_ns: int, *, waited: bool) -> tuple[int, int]:
        """When the pass began and how long it took, on the host's clock: passes follow each other without a gap while
        one is under way at all, so what the device idles because the host is slow is the passes' own.

        The device's times are added up, since the host may look late. Where it was waiting when the pass ended it knows
        better, and corrects what has added up: two clocks drift apart.
        """
        if current.before is None:
            start_ns = max(current.begun_ns, self._ended_ns)
            end_ns = max(current.launched_ns, start_ns) + device_ns
        else:
            start_ns = self._ended_ns
            end_ns = start_ns + device_ns
        end_ns = max(start_ns, min(end_ns, now_ns))
        if waited and now_ns - end_ns > _LAG_NS:
            end_ns = now_ns
        self._ended_ns = end_ns
        return start_ns, end_ns - start_ns

    def _hold_back(self, outputs: Iterable[Output]) -> list[Output]:
        """Ends of sequences that are still in a pass wait for its record; those whose passes are read come now."""
        told: list[Output] = []
        for output in outputs:
            if not output.finish or not self._is_flying(output.sequence):
                told.append(output)
                continue
            end = output
            if output.tokens:
                end = msgspec.structs.replace(output, tokens=0, text="", scored=(), scored_prompt=())
                told.append(
                    msgspec.structs.replace(output, finish="", error="", total_output_tokens=0, stop="", refused=False)
                )
            self._ends[output.sequence] = end
        over = [sequence for sequence in self._ends if not self._is_flying(sequence)]
        return told + [self._ends.pop(sequence) for sequence in over]

    def _is_flying(self, sequence: int) -> bool:
        return any(sequence in each for each in self._flights)

    def _drop(self, sequence: int, *, sound: bool = True) -> Answer | None:
        """What was computed for a token that nobody knows isn't kept for others."""
        answer = self._answers.get(sequence)
        if answer is not None:
            answer.sequence.computed = min(answer.sequence.computed, len(answer.sequence.tokens))
        return super()._drop(sequence, sound=sound)


_GREEDY = Draw(0.0, 1.0, 0, 0, 0)


def _needs_host(answer: Answer) -> bool:
    sampling = answer.sampling
    return sampling.typical_p < 1 or (sampling.prompt_logprobs and not answer.sequence.output_tokens)


def _changes(answers: Many[Answer]) -> Changes:
    found = [(row, answer.adjust.changes()) for row, answer in enumerate(answers) if answer.adjust is not None]
    allowed = {row: answer.grammar.allowed() for row, answer in enumerate(answers) if answer.grammar is not None}
    columns = list(zip(*(change for _, change in found), strict=True))
    tokens, factors, minus, plus = (np.concatenate(column) for column in columns) if found else (_NO_LOGITS,) * 4
    rows = np.repeat([row for row, _ in found], [len(change[0]) for _, change in found]) if found else _NO_LOGITS
    return Changes(rows, tokens, factors, minus, plus, {row: bits for row, bits in allowed.items() if bits})
