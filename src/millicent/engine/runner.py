"""One loaded model at work: schedule, forward, sample, put into words."""

from __future__ import annotations

import logging
import secrets
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Protocol

from millicent.core.chunks import FinishReason
from millicent.core.clock import Clock
from millicent.core.errors import InvalidRequest
from millicent.core.request import Limits, Sampling
from millicent.core.steps import Overhead, StepRecord
from millicent.engine.batch import Model, Piece
from millicent.engine.calibration import calibrate
from millicent.engine.config import EngineConfig
from millicent.engine.protocol import Output, Step, Submit
from millicent.engine.sampler import Draw, sample
from millicent.engine.scheduling.scheduler import Scheduler
from millicent.engine.scheduling.sequences import Sequence

_log = logging.getLogger(__name__)


class Words(Protocol):
    """Turns one answer's tokens into text: `millicent.text.TextStream`."""

    stopped: bool

    def push(self, token: int) -> str: ...

    def finish(self) -> str: ...


@dataclass(frozen=True, slots=True)
class OpenModel:
    """What a model's files give: `words` opens the text of an answer that ends at one of the stop strings."""

    model: Model
    eos_tokens: frozenset[int]
    words: Callable[[Many[str]], Words]


@dataclass(slots=True)
class _Answer:
    """A sequence's side that the scheduler needn't see."""

    sequence: Sequence
    sampling: Sampling
    limits: Limits
    seed: int
    words: Words

    def draw(self) -> Draw:
        sampling = self.sampling
        return Draw(sampling.temperature, sampling.top_p, sampling.top_k, self.seed, self.sequence.output_tokens)

    def end(self, finish: FinishReason, *, tokens: int = 0, text: str = "", error: str = "") -> Output:
        sequence = self.sequence
        return Output(sequence.id, tokens, text, finish.value, error, total_output_tokens=sequence.output_tokens)


def check_tokens(tokens: Many[int], vocabulary_size: int) -> None:
    """A token that the model doesn't know would fail the whole forward pass."""
    for token in (min(tokens, default=0), max(tokens, default=0)):
        if not 0 <= token < vocabulary_size:
            last = vocabulary_size - 1
            raise InvalidRequest(f"the prompt holds token {token}; this model's are 0 to {last}", param="prompt")


class Runner:
    def __init__(self, opened: OpenModel, config: EngineConfig, *, blocks: int) -> None:
        """Allocates the model's KV cache of `blocks` blocks."""
        self._model = opened.model
        self._eos_tokens = opened.eos_tokens | opened.model.eos_tokens
        self._words = opened.words
        self._deterministic = config.deterministic
        self.dimensions = 0
        self.weight_bytes = opened.model.weight_bytes
        self.kv_bytes = blocks * config.block_tokens * opened.model.kv_bytes_per_token
        self._answers: dict[int, _Answer] = {}
        self._passes: deque[list[Piece]] = deque()
        self.scheduler = Scheduler(
            blocks=blocks,
            block_tokens=config.block_tokens,
            context_tokens=opened.model.context_tokens,
            max_sequences=config.max_sequences,
            step_tokens=config.step_tokens,
            deterministic=config.deterministic,
        )
        self._blocks = blocks
        self._model.allocate(blocks, config.block_tokens)

    def calibrate(self, config: EngineConfig, clock: Clock) -> Overhead:
        """Measure what steps of every kind cost. Call before the first sequence."""
        return calibrate(self._model, config, clock, blocks=self._blocks)

    @property
    def context_tokens(self) -> int:
        return self.scheduler.context_tokens

    @property
    def busy(self) -> bool:
        return bool(self._answers)

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._answers

    def submit(self, frame: Submit) -> Output | None:
        """Queue a sequence. An Output says why it cannot run; nobody else is concerned."""
        sequence = Sequence(frame.sequence, list(frame.tokens))
        try:
            words = self._words(frame.limits.stop)
            check_tokens(sequence.tokens, self._model.vocabulary_size)
            self.scheduler.add(sequence)
        except InvalidRequest as error:
            return Output(sequence.id, 0, "", FinishReason.ERROR.value, error.message)
        seed = frame.sampling.seed if frame.sampling.seed is not None else secrets.randbits(64)
        self._answers[sequence.id] = _Answer(sequence, frame.sampling, frame.limits, seed, words)
        return None

    def cancel(self, sequence: int) -> Output | None:
        answer = self._drop(sequence)
        return None if answer is None else answer.end(FinishReason.CANCELLED)

    def abandon(self, error: str) -> tuple[Output, ...]:
        """End everything that runs."""
        return tuple(self._fail(list(self._answers), error))

    def step(self, device: str, index: int, clock: Clock) -> Step:
        """One forward pass, from planning it to the text that came of it. Call only while busy."""
        start_ns = clock.monotonic_ns()
        pieces = self._next_pass()
        works = tuple(map(self.scheduler.advance, pieces))
        try:
            outputs = self._forward(pieces)
        except Exception as error:  # noqa: BLE001 - a failed pass ends its own sequences, never the process
            _log.exception("a forward pass of %s failed", self._model.name)
            detail = " ".join(str(error).split())[:200]
            reason = f"the model failed while computing this answer ({type(error).__name__}: {detail}); retry"
            outputs = self._fail((piece.sequence for piece in pieces), reason)
        wall_ns = clock.monotonic_ns() - start_ns
        return Step(StepRecord(device, self._model.name, index, start_ns, wall_ns, works), tuple(outputs))

    def _next_pass(self) -> list[Piece]:
        """Under `deterministic`, a planned step becomes one forward pass per piece, each a step of its own: so a
        record's time is that of its own rows, and a cancellation still waits for one pass only."""
        while True:
            if not self._passes:
                plan = self.scheduler.schedule()
                self._passes.extend([piece] for piece in plan) if self._deterministic else self._passes.append(plan)
            pieces = [piece for piece in self._passes.popleft() if piece.sequence in self.scheduler]
            if pieces:
                return pieces

    def _forward(self, pieces: list[Piece]) -> list[Output]:
        answers = [self._answers[piece.sequence] for piece in pieces if piece.sample]
        logits = self._model.forward(pieces)
        if not answers:
            return []
        tokens = sample(logits, [answer.draw() for answer in answers])
        return [self._accept(answer, token) for answer, token in zip(answers, tokens, strict=True)]

    def _accept(self, answer: _Answer, token: int | None) -> Output:
        """Add a sampled token to its answer; what there is to show, and whether it ends."""
        sequence, limits = answer.sequence, answer.limits
        if token is None:
            error = "the model gave no usable probabilities (NaN or infinity); check its files, or try dtype fp32"
            return self._finish(answer, FinishReason.ERROR, error=error)
        sequence.tokens.append(token)
        if token in self._eos_tokens and not limits.ignore_eos:
            return self._finish(answer, FinishReason.STOP, tokens=1, text=answer.words.finish())
        text = answer.words.push(token)
        if answer.words.stopped:
            return self._finish(answer, FinishReason.STOP, tokens=1, text=text)
        full = limits.max_tokens is not None and sequence.output_tokens >= limits.max_tokens
        if full or len(sequence.tokens) >= self.scheduler.context_tokens:
            return self._finish(answer, FinishReason.LENGTH, tokens=1, text=text + answer.words.finish())
        return Output(sequence.id, 1, text)

    def _finish(
        self, answer: _Answer, finish: FinishReason, *, tokens: int = 0, text: str = "", error: str = ""
    ) -> Output:
        self._drop(answer.sequence.id)
        return answer.end(finish, tokens=tokens, text=text, error=error)

    def _fail(self, sequences: Iterable[int], error: str) -> list[Output]:
        dropped = [self._drop(sequence) for sequence in sequences]
        return [answer.end(FinishReason.ERROR, error=error) for answer in dropped if answer is not None]

    def _drop(self, sequence: int) -> _Answer | None:
        self.scheduler.remove(sequence)
        return self._answers.pop(sequence, None)
