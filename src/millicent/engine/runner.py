"""One loaded model at work: schedule, forward, sample, put into words."""

from __future__ import annotations

import logging
import secrets
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable
from collections.abc import Sequence as Many
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from millicent.core.chunks import FinishReason
from millicent.core.clock import Clock
from millicent.core.errors import InvalidRequest
from millicent.core.request import Limits, Sampling
from millicent.core.steps import Overhead, SequenceWork, StepRecord
from millicent.engine.batch import Model, Piece
from millicent.engine.calibration import calibrate
from millicent.engine.config import EngineConfig
from millicent.engine.draft_model import Ahead, DraftModel
from millicent.engine.grammars import Grammar, GrammarCompiler, Vocabulary
from millicent.engine.logprobs import score, score_drawn
from millicent.engine.lookup import Lookup
from millicent.engine.processors import Adjustments, adjustments
from millicent.engine.protocol import Output, ScoredToken, Step, Submit
from millicent.engine.sampler import Draw, sample
from millicent.engine.scheduling.scheduler import Scheduler
from millicent.engine.scheduling.sequences import Sequence
from millicent.step_time import Coefficients, Work

if TYPE_CHECKING:
    import llguidance
    import numpy as np
    import torch

_log = logging.getLogger(__name__)
_MOST_GUESSES = 10
_LEARNS = 0.1  # how much the latest guess counts
_FORGETS = 0.01
_UNKNOWN = 0.5


def _nothing() -> None:
    """Nobody waits."""


class Words(Protocol):
    """Turns one answer's tokens into text: `millicent.text.TextStream`."""

    stop: str  # the stop string that ended it, or nothing

    def push(self, token: int, *, heed_stops: bool = True) -> str: ...

    def finish(self) -> str: ...


@dataclass(frozen=True, slots=True)
class OpenModel:
    """What a model's files give: `words` opens the text of an answer that ends at one of the stop strings. Without a
    `vocabulary` its answers can have no grammar. `draft` is a smaller model with the same tokenizer. A model on a
    device of its own brings the runner that drives it, and needs `working_bytes` beside its weights and cache."""

    model: Model
    eos_tokens: frozenset[int]
    words: Callable[[Many[str]], Words]
    vocabulary: Vocabulary | None = None
    draft: Model | None = None
    make_runner: Callable[..., Runner] | None = None
    working_bytes: int = 0

    @property
    def weight_bytes(self) -> int:
        return self.model.weight_bytes + (self.draft.weight_bytes if self.draft else 0)

    @property
    def kv_bytes_per_token(self) -> int:
        return self.model.kv_bytes_per_token + (self.draft.kv_bytes_per_token if self.draft else 0)


@dataclass(slots=True)
class _Answer:
    """A sequence's side that the scheduler needn't see."""

    sequence: Sequence
    sampling: Sampling
    limits: Limits
    seed: int
    words: Words
    adjust: Adjustments | None
    grammar: Grammar | None = None
    lookup: Lookup | None = None
    scored_prompt: list[ScoredToken] = field(default_factory=list)  # until it is told

    def draw(self) -> Draw:
        sampling = self.sampling
        return Draw(
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            self.seed,
            self.sequence.output_tokens,
            sampling.min_p,
            sampling.typical_p,
            self._change if self.adjust is not None or self.grammar is not None else None,
        )

    def look_up(self, context_tokens: int, ends: Collection[int]) -> list[int]:
        """Guesses of what comes next that could all be output."""
        if self.lookup is None:
            return []
        guesses = self._possible(self.lookup.guess(self.sequence.tokens, self.most_guesses(context_tokens)), ends)
        if guesses:
            self.forget()
        return guesses

    def ahead(self, wanted: int, ends: Collection[int]) -> Ahead:
        adjust, grammar = self.adjust, self.grammar
        return Ahead(
            self.sequence,
            self.draw(),
            None if adjust is None else adjust.copy(),
            None if grammar is None else grammar.copy(),
            ends=ends,
            wanted=wanted,
        )

    def most_guesses(self, context_tokens: int) -> int:
        """A token is drawn after the last guess too: there must be room for it."""
        room = context_tokens - len(self.sequence.tokens)
        if self.limits.max_tokens is not None:
            room = min(room, self.limits.max_tokens - self.sequence.output_tokens)
        return min(_MOST_GUESSES, room - 1)

    def _possible(self, guesses: list[int], ends: Collection[int]) -> list[int]:
        """Up to what ends the answer, or its grammar forbids."""
        ending = next((at for at, token in enumerate(guesses, 1) if token in ends), len(guesses))
        guesses = guesses[:ending]
        return guesses[: self.grammar.valid(guesses)] if self.grammar is not None and guesses else guesses

    def forget(self) -> None:
        """What went badly is given another chance some day."""
        self.sequence.acceptance += _FORGETS * (_UNKNOWN - self.sequence.acceptance)

    def learn(self, guesses: int, right: int) -> None:
        """So many guesses were checked. What follows a wrong one says nothing."""
        acceptance = self.sequence.acceptance
        for hit in (*[1.0] * right, *[0.0] * (right < guesses)):
            acceptance += _LEARNS * (hit - acceptance)
        self.sequence.acceptance = acceptance

    def _change(self, scores: np.ndarray) -> None:
        if self.adjust is not None:
            self.adjust(scores)
        if self.grammar is not None:
            self.grammar.mask(scores)

    def news(self, tokens: int, text: str, scored: tuple[ScoredToken, ...] = ()) -> Output:
        told, self.scored_prompt = tuple(self.scored_prompt), []
        sequence = self.sequence
        return Output(
            sequence.id, tokens, text, cached_tokens=sequence.cached_tokens, scored=scored, scored_prompt=told
        )

    def end(
        self, finish: FinishReason, *, news: Output | None = None, error: str = "", refused: bool = False
    ) -> Output:
        return msgspec.structs.replace(
            news or self.news(0, ""),
            finish=finish.value,
            error=error,
            refused=refused,
            total_output_tokens=self.sequence.output_tokens,
        )


class _Turn(NamedTuple):
    """A token is drawn for the answer from this row of logits; if it is the first guess, another from the next."""

    answer: _Answer
    row: int
    guesses: Many[int]


def _rows(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Some rows, in ascending order. On the CPU copying them is NumPy's work: torch would wake its threads for it."""
    if len(rows) == len(logits):
        return logits
    if len(rows) == 1:
        return logits[rows[0] : rows[0] + 1]
    if logits.device.type != "cpu":
        return logits[rows]
    import torch

    return torch.from_numpy(logits.numpy()[rows])


def check_tokens(tokens: Collection[int], vocabulary_size: int, what: str = "the prompt holds") -> None:
    """A token that the model doesn't know would fail the whole forward pass."""
    for token in (min(tokens, default=0), max(tokens, default=0)):
        if not 0 <= token < vocabulary_size:
            raise InvalidRequest(f"{what} token {token}; this model's are 0 to {vocabulary_size - 1}")


def _refusal(sequence: int, error: BaseException) -> Output:
    """The request's own fault, unless something else went wrong."""
    refused = isinstance(error, InvalidRequest)
    return Output(sequence, 0, "", FinishReason.ERROR.value, str(error), refused=refused)


class Runner:
    def __init__(
        self, opened: OpenModel, config: EngineConfig, *, blocks: int, wake: Callable[[], None] = _nothing
    ) -> None:
        """Allocates the model's KV cache of `blocks` blocks. `wake` is called, from another thread, when there may be
        something to `take_compiled`."""
        self._model = opened.model
        self._vocabulary_size = opened.model.vocabulary_size
        self._eos_tokens = opened.eos_tokens | opened.model.eos_tokens
        self._words = opened.words
        self._deterministic = config.deterministic
        self.dimensions = 0
        self.weight_bytes = opened.weight_bytes
        self.kv_bytes = blocks * config.block_tokens * opened.kv_bytes_per_token
        self._answers: dict[int, _Answer] = {}
        self._compiling: dict[int, tuple[Submit, Future[llguidance.LLMatcher]]] = {}
        self._compiler = GrammarCompiler(opened.vocabulary, self._vocabulary_size, self._eos_tokens, wake)
        self._passes: deque[list[Piece]] = deque()
        self._draft = None if opened.draft is None else self._open_draft(opened.draft, config, blocks)
        self._drafting = False
        self._aheads: list[Ahead] = []
        self._looks_up = config.speculation == "ngram" and opened.draft is None
        self.scheduler = Scheduler(
            blocks=blocks,
            block_tokens=config.block_tokens,
            context_tokens=opened.model.context_tokens,
            max_sequences=config.max_sequences,
            step_tokens=config.step_tokens,
            deterministic=config.deterministic,
            prefix_cache=config.prefix_cache,
        )
        self._blocks = blocks
        self._model.allocate(blocks, config.block_tokens)

    def _open_draft(self, model: Model, config: EngineConfig, blocks: int) -> DraftModel:
        return DraftModel(
            model,
            vocabulary_size=self._vocabulary_size,
            blocks=blocks,
            block_tokens=config.block_tokens,
            step_tokens=config.step_tokens,
            deterministic=config.deterministic,
        )

    def calibrate(
        self, config: EngineConfig, clock: Clock, *, own: bool = True, draft: bool = True
    ) -> tuple[Overhead, ...]:
        """Measure what steps of every kind take, of the model and its draft model. Call before the first sequence."""
        models = [self._model] if own else []
        if draft and self._draft is not None:
            models.append(self._draft.model)
        return tuple(calibrate(model, config, clock, blocks=self._blocks) for model in models)

    @property
    def context_tokens(self) -> int:
        return self.scheduler.context_tokens

    @property
    def busy(self) -> bool:
        return bool(self._answers)

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._answers

    def submit(self, frame: Submit) -> Output | None:
        """Queue a sequence, once its grammar is there. An Output says why it cannot run; nobody else is concerned."""
        if frame.grammar:
            self._compiling[frame.sequence] = (frame, self._compiler.compile(frame.grammar))
            return None
        return self._queue(frame)

    def take_compiled(self) -> list[Output]:
        """Queue the sequences whose grammars are ready. Outputs are of those that cannot run."""
        refused: list[Output | None] = []
        for sequence, (frame, compiled) in list(self._compiling.items()):
            if not compiled.done():
                continue
            del self._compiling[sequence]
            if error := compiled.exception():
                refused.append(_refusal(sequence, error))
            else:
                refused.append(self._queue(frame, Grammar(compiled.result().deep_copy(), self._vocabulary_size)))
        return [output for output in refused if output is not None]

    def _queue(self, frame: Submit, grammar: Grammar | None = None) -> Output | None:
        sampling, limits = frame.sampling, frame.limits
        sequence = Sequence(
            frame.sequence,
            list(frame.tokens),
            tenant=frame.tenant,
            priority=frame.priority,
            deadline_ns=frame.deadline_ns,
            reuses=not sampling.prompt_logprobs,
            every_row=sampling.prompt_logprobs,
        )
        try:
            words = self._words(limits.stop)
            check_tokens(sequence.tokens, self._vocabulary_size)
            check_tokens(sampling.logit_bias, self._vocabulary_size, "logit_bias names")
            check_tokens(limits.stop_tokens, self._vocabulary_size, "stop_token_ids names")
            self.scheduler.add(sequence)
        except InvalidRequest as error:
            return _refusal(sequence.id, error)
        seed = sampling.seed if sampling.seed is not None else secrets.randbits(64)
        ends = self._eos_tokens.union(limits.stop_tokens)
        adjust = adjustments(sampling, limits, sequence.tokens, [end for end in ends if end < self._vocabulary_size])
        lookup = Lookup() if self._looks_up else None
        self._answers[sequence.id] = _Answer(sequence, sampling, limits, seed, words, adjust, grammar, lookup)
        return None

    def learn(self, model: str, costs: Coefficients) -> None:
        """What steps of a model take; it may be none of ours."""
        if model == self._model.name:
            self.scheduler.costs = costs
        if self._draft is not None and model == self._draft.name:
            self._draft.costs = costs

    def cancel(self, sequence: int) -> Output | None:
        if self._compiling.pop(sequence, None):
            return Output(sequence, 0, "", FinishReason.CANCELLED.value)
        answer = self._drop(sequence)
        return None if answer is None else answer.end(FinishReason.CANCELLED)

    def abandon(self, error: str) -> tuple[Output, ...]:
        """End everything that runs."""
        waiting = [Output(sequence, 0, "", FinishReason.ERROR.value, error) for sequence in self._compiling]
        self._compiling.clear()
        self._compiler.close()
        return (*waiting, *self._fail(list(self._answers), error))

    @property
    def flying(self) -> bool:
        """Whether the device works on a step that isn't told yet."""
        return False

    def step(self, device: str, index: int, clock: Clock, *, ahead: bool = False) -> Step:
        """One forward pass, from planning it to the text that came of it. Call only while busy.

        `ahead` allows to begin another one, where the device works by itself.
        """
        del ahead
        start_ns = clock.monotonic_ns()
        draft = self._draft
        if draft is not None and (drafting := self._next_draft_pass(draft)):
            works = self._run_draft(draft, drafting)
            wall_ns = clock.monotonic_ns() - start_ns
            return Step(StepRecord(device, draft.name, index, start_ns, wall_ns, works), ())
        pieces = self._next_pass()
        works = tuple(map(self.scheduler.advance, pieces))
        accepted: Counter[int] = Counter()
        try:
            outputs = self._forward(pieces, accepted)
        except Exception as error:  # noqa: BLE001 - a failed pass ends its own sequences, never the process
            _log.exception("a forward pass of %s failed", self._model.name)
            detail = " ".join(str(error).split())[:200]
            reason = f"the model failed while computing this answer ({type(error).__name__}: {detail}); retry"
            outputs = self._fail((piece.sequence for piece in pieces), reason)
        if accepted:
            works = tuple(msgspec.structs.replace(work, accepted_tokens=accepted[work.sequence]) for work in works)
        wall_ns = clock.monotonic_ns() - start_ns
        return Step(StepRecord(device, self._model.name, index, start_ns, wall_ns, works), tuple(outputs))

    def _next_pass(self) -> list[Piece]:
        """Under `deterministic`, a planned step becomes one forward pass per piece, each a step of its own: so a
        record's time is that of its own rows, and a cancellation still waits for one pass only."""
        while True:
            if not self._passes:
                self._guess()
                plan = self.scheduler.schedule()
                self._passes.extend([piece] for piece in plan) if self._deterministic else self._passes.append(plan)
            pieces = [piece for piece in self._passes.popleft() if piece.sequence in self.scheduler]
            if pieces:
                return pieces

    def _guess(self) -> None:
        """What those that decode may say next. It is looked for only where it could be worth a row."""
        if not self._looks_up or self.scheduler.costs is None:
            return
        for sequence in self.scheduler.decoding():
            sequence.guesses = self._answers[sequence.id].look_up(self.scheduler.context_tokens, self._eos_tokens)

    def _next_draft_pass(self, draft: DraftModel) -> list[Piece]:
        """Before each step is planned, the draft model has its passes: as many as the guesses that are worth it."""
        if self._passes:
            return []
        if not self._drafting:
            self._drafting = True
            self._aheads = self._begin_draft(draft)
            draft.begin(self._aheads)
        pieces = draft.next_pass()
        if not pieces:
            self._drafting = False
            for ahead in self._aheads:
                ahead.sequence.guesses = ahead.guesses
        return pieces

    def _begin_draft(self, draft: DraftModel) -> list[Ahead]:
        offers: list[tuple[Sequence, int]] = []
        for sequence in self.scheduler.decoding():
            sequence.guesses = []
            answer = self._answers[sequence.id]
            if (most := answer.most_guesses(min(self.scheduler.context_tokens, draft.context_tokens))) > 0:
                answer.forget()
                offers.append((sequence, most))
        if draft.costs is None or not offers:
            return []
        passes = offers[:1] if self._deterministic else offers
        guess_ns = draft.costs.step_ns(Work.total(Work(1, 1, len(sequence.tokens), 0) for sequence, _ in passes))
        aheads: list[Ahead] = []
        for (sequence, _), worth in zip(offers, self.scheduler.worth_making(offers, guess_ns), strict=True):
            if wanted := self.scheduler.reserve(sequence, worth) if worth else 0:
                aheads.append(self._answers[sequence.id].ahead(wanted, self._eos_tokens))
        return aheads

    def _run_draft(self, draft: DraftModel, pieces: list[Piece]) -> tuple[SequenceWork, ...]:
        works = tuple(draft.work(piece, self._answers[piece.sequence].sequence) for piece in pieces)
        try:
            draft.run(pieces)
        except Exception:  # noqa: BLE001 - guesses are worth nothing against an answer
            _log.exception("a forward pass of %s failed; %s goes on without it", draft.name, self._model.name)
            self._draft = None
        return works

    def _forward(self, pieces: list[Piece], accepted: Counter[int]) -> list[Output]:
        """`accepted` counts the guesses of each sequence that were right."""
        logits = self._model.forward(pieces)
        turns: list[_Turn] = []
        stop = 0
        for piece in pieces:
            start, stop = stop, stop + piece.logit_rows
            answer = self._answers[piece.sequence]
            if piece.every_row:
                self._score_prompt(answer, piece, logits[start:stop].numpy(force=True))
            if piece.sample:
                first = stop - 1 - piece.drafts
                turns.append(_Turn(answer, first, piece.tokens[len(piece.tokens) - piece.drafts :]))
        outputs = self._draw(logits, turns, accepted)
        for piece in pieces:
            if piece.drafts and piece.sequence in self._answers:
                self._answers[piece.sequence].learn(piece.drafts, accepted[piece.sequence])
        return outputs

    def _draw(self, logits: torch.Tensor, turns: list[_Turn], accepted: Counter[int]) -> list[Output]:
        """A token for each, as it would be drawn without guesses; and another for as long as they were right.

        So guesses change neither a token nor its distribution: whether one is right depends on nothing but the draw.
        """
        outputs: list[Output] = []
        while turns:
            rows = _rows(logits, [turn.row for turn in turns])
            tokens = sample(rows, [turn.answer.draw() for turn in turns])
            following: list[_Turn] = []
            tops = [turn.answer.sampling.logprobs for turn in turns]
            scored = score_drawn(tokens, tops, lambda row, rows=rows: rows[row].numpy(force=True))  # type: ignore[misc]
            for turn, token, scores in zip(turns, tokens, scored, strict=True):
                output = self._accept(turn.answer, token, scores)
                outputs.append(output)
                if not turn.guesses or token != turn.guesses[0]:
                    continue
                accepted[turn.answer.sequence.id] += 1
                if not output.finish:
                    self.scheduler.accept(turn.answer.sequence)
                    following.append(_Turn(turn.answer, turn.row + 1, turn.guesses[1:]))
            turns = following
        return outputs

    @staticmethod
    def _score_prompt(answer: _Answer, piece: Piece, logits: np.ndarray) -> None:
        """Row i holds the logits for the token after `piece.start + i`."""
        sequence, scored = answer.sequence, answer.scored_prompt
        if sequence.output_tokens:
            return  # it was preempted, and the scores were told long ago
        if piece.start == 0:
            scored[:] = [ScoredToken(sequence.tokens[0], None)]
        following = sequence.tokens[piece.start + 1 : min(piece.start + 1 + len(logits), sequence.prompt_tokens)]
        tops = [answer.sampling.logprobs or 0] * len(following)
        scored += score(list(logits[: len(following)]), following, tops)

    def _accept(self, answer: _Answer, token: int | None, scored: tuple[ScoredToken, ...]) -> Output:
        """Add a sampled token to its answer; what there is to show, and whether it ends. `scored` is the token, where
        its log probability is asked for."""
        sequence, limits, words = answer.sequence, answer.limits, answer.words
        if limits.max_tokens == 0:
            return self._finish(answer, FinishReason.LENGTH, answer.news(0, ""))
        if answer.grammar is not None and answer.grammar.error:
            return self._finish(answer, FinishReason.ERROR, answer.news(0, ""), answer.grammar.error, refused=True)
        if token is None:
            error = "the model gave no usable probabilities (NaN or infinity); check its files, or try dtype fp32"
            return self._finish(answer, FinishReason.ERROR, answer.news(0, ""), error)
        sequence.tokens.append(token)
        if token in limits.stop_tokens or (token in self._eos_tokens and not limits.ignore_eos):
            return self._finish(answer, FinishReason.STOP, answer.news(1, words.finish()))
        if answer.adjust is not None:
            answer.adjust.note(token)
        if answer.grammar is not None:
            answer.grammar.take(token)
            if answer.grammar.error:
                news = answer.news(1, "", scored)
                return self._finish(answer, FinishReason.ERROR, news, answer.grammar.error, refused=True)
        text = words.push(token, heed_stops=sequence.output_tokens >= limits.min_tokens)
        if words.stop:
            news = msgspec.structs.replace(answer.news(1, text, scored), stop=words.stop)
            return self._finish(answer, FinishReason.STOP, news)
        if answer.grammar is not None and answer.grammar.finished:
            return self._finish(answer, FinishReason.STOP, answer.news(1, text + words.finish(), scored))
        full = limits.max_tokens is not None and sequence.output_tokens >= limits.max_tokens
        if full or len(sequence.tokens) >= self.scheduler.context_tokens:
            return self._finish(answer, FinishReason.LENGTH, answer.news(1, text + words.finish(), scored))
        return answer.news(1, text, scored)

    def _finish(
        self, answer: _Answer, finish: FinishReason, news: Output, error: str = "", *, refused: bool = False
    ) -> Output:
        self._drop(answer.sequence.id, sound=not error)
        return answer.end(finish, news=news, error=error, refused=refused)

    def _fail(self, sequences: Iterable[int], error: str) -> list[Output]:
        dropped = [self._drop(sequence, sound=False) for sequence in sequences]
        return [answer.end(FinishReason.ERROR, error=error) for answer in dropped if answer is not None]

    def _drop(self, sequence: int, *, sound: bool = True) -> _Answer | None:
        self.scheduler.remove(sequence, sound=sound)
        if self._draft is not None:
            self._draft.forget(sequence)
        return self._answers.pop(sequence, None)
