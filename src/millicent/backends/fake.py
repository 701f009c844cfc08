"""A backend without a model, for tests, the demo and the simulator: it says what it is told to, when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

import msgspec

from millicent.core.chunks import Chunk, End, FinishReason, Text
from millicent.core.clock import Clock, SystemClock
from millicent.core.errors import InvalidRequest, MillicentError, ModelNotFound
from millicent.core.money import Money
from millicent.core.protocols import Observer
from millicent.core.request import Request
from millicent.core.steps import SequenceWork, StepRecord
from millicent.core.usage import Provenance, Usage


class FakeAnswer(msgspec.Struct, frozen=True):
    """What a request gets: each chunk after `delay_s`, then the end, or `error` in its place.

    `refusal` is raised by `prepare`. `usage` overrides what follows from the tokens. `context_tokens` limits input and
    output together, as in a model. `reported_cost` and `served_model` are told at the end, as by a provider.
    """

    chunks: tuple[Text, ...] = (Text("Hello", 1), Text(" world", 1))
    finish: FinishReason = FinishReason.STOP
    error: MillicentError | None = None
    refusal: MillicentError | None = None
    delay_s: float = 0.0
    input_tokens: int = 5
    cached_tokens: int = 0
    context_tokens: int = 2048
    provenance: Provenance = Provenance.MEASURED
    usage: Usage | None = None
    reported_cost: Money | None = None
    served_model: str | None = None


class FakeScript:
    """Answers in turn, whoever asks; the last one for ever. For `FakeBackend(answer)`: failures first, then not."""

    def __init__(self, *answers: FakeAnswer) -> None:
        self._answers = answers
        self.asked = 0

    def __call__(self, request: Request) -> FakeAnswer:
        del request
        self.asked += 1
        return self._answers[min(self.asked, len(self._answers)) - 1]


class FakeBackend:
    """Answers every request with `answer`, or with what `answer` makes of it. `requests` keeps what was asked.

    With an observer it shows steps, one per chunk: the first prefills the input, the others decode. Their time is what
    the clock measures around `sleep`; they happen one after another, as on a device. Pass a `sleep` that advances a
    ManualClock for exact times. Several that one observer hears share the `numbers` of their sequences.
    """

    def __init__(
        self,
        answer: FakeAnswer | Callable[[Request], FakeAnswer] | None = None,
        *,
        models: Sequence[str] = ("fake",),
        name: str = "fake",
        placement: str = "fake",
        device: str = "fake",
        observer: Observer | None = None,
        clock: Clock | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        numbers: Iterator[int] | None = None,
    ) -> None:
        self.name = name
        self.requests: list[Request] = []
        self.running = 0
        self.placement = placement
        self.device = device
        self.observer = observer
        self.clock = clock or SystemClock()
        self.sleep = sleep
        self.turn = asyncio.Lock()
        self.step_index = itertools.count()
        self._answer = answer or FakeAnswer()
        self._models = tuple(models)
        self._sequences = itertools.count(1) if numbers is None else numbers

    def models(self) -> tuple[str, ...]:
        return self._models

    async def prepare(self, request: Request) -> FakeCall:
        if request.model not in self._models:
            known = ", ".join(self._models)
            raise ModelNotFound(f"model: {request.model} is not served here; available: {known}", param="model")
        answer = self._answer if isinstance(self._answer, FakeAnswer) else self._answer(request)
        if answer.refusal is not None:
            raise answer.refusal
        room = answer.context_tokens - answer.input_tokens
        if room < 1:
            param = "prompt" if request.messages is None else "messages"
            raise InvalidRequest(
                f"{param}: {answer.input_tokens} tokens leave no room for output in the context of"
                f" {answer.context_tokens} tokens; shorten the input",
                param=param,
                code="context_length_exceeded",
            )
        self.requests.append(request)
        wanted = request.limits.max_tokens
        return FakeCall(self, request, answer, next(self._sequences), room if wanted is None else min(wanted, room))


class FakeCall:
    def __init__(
        self, backend: FakeBackend, request: Request, answer: FakeAnswer, sequence: int, max_output_tokens: int
    ) -> None:
        self.served_model = request.model
        self.placement = backend.placement
        self.sequences: tuple[int, ...] = (sequence,) if backend.observer is not None else ()
        self.input_tokens: int | None = answer.input_tokens
        self.max_output_tokens: int | None = max_output_tokens
        self._backend = backend
        self._answer = answer

    def start(self) -> FakeRun:
        assert self.max_output_tokens is not None
        return FakeRun(self._backend, self._answer, self.served_model, self.sequences, self.max_output_tokens)


class FakeRun:
    """Works at the reader's pace: nothing happens until it is iterated."""

    def __init__(
        self, backend: FakeBackend, answer: FakeAnswer, model: str, sequences: tuple[int, ...], max_output_tokens: int
    ) -> None:
        self._backend = backend
        self._answer = answer
        self._model = model
        self._sequences = sequences
        self._max_output_tokens = max_output_tokens
        self._cancelled = asyncio.Event()
        self._input_tokens = 0
        self._output_tokens = 0

    def cancel(self) -> None:
        self._cancelled.set()

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        self._backend.running += 1
        try:
            for chunk in self._answer.chunks:
                if self._output_tokens + chunk.tokens > self._max_output_tokens:
                    yield self._end(FinishReason.LENGTH)
                    return
                if not await self._step(chunk):
                    break
                yield chunk
            if self._cancelled.is_set():
                yield self._end(FinishReason.CANCELLED)
            elif self._answer.error is not None:
                yield self._end(FinishReason.ERROR, self._answer.error)
            else:
                self._input_tokens = self._answer.input_tokens
                yield self._end(self._answer.finish)
        finally:
            self._backend.running -= 1

    async def _step(self, chunk: Text) -> bool:
        """Spend the time of one chunk; False if cancelled before it was done."""
        backend, answer = self._backend, self._answer
        async with backend.turn if backend.observer is not None else contextlib.nullcontext():
            if self._cancelled.is_set():
                return False
            start_ns = backend.clock.monotonic_ns()
            await self._sleep(answer.delay_s)
            if self._cancelled.is_set():
                return False
            prefill_rows = answer.input_tokens - answer.cached_tokens if self._input_tokens == 0 else 0
            self._input_tokens = answer.input_tokens
            self._output_tokens += chunk.tokens
            if backend.observer is not None and self._sequences:
                work = SequenceWork(
                    sequence=self._sequences[0],
                    prefill_rows=prefill_rows,
                    decode_rows=0 if prefill_rows else chunk.tokens,
                    sampled_rows=chunk.tokens,
                    kv_read_tokens=answer.input_tokens + self._output_tokens - chunk.tokens,
                )
                wall_ns = backend.clock.monotonic_ns() - start_ns
                index = next(backend.step_index)
                backend.observer.step(StepRecord(backend.device, self._model, index, start_ns, wall_ns, (work,)))
        return True

    async def _sleep(self, delay_s: float) -> None:
        """Until the delay is over or the run is cancelled."""
        sleeping = asyncio.ensure_future(self._backend.sleep(delay_s))
        cancelled = asyncio.ensure_future(self._cancelled.wait())
        try:
            await asyncio.wait({sleeping, cancelled}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            sleeping.cancel()
            cancelled.cancel()

    def _end(self, reason: FinishReason, error: MillicentError | None = None) -> End:
        answer = self._answer
        last = max((chunk.choice for chunk in answer.chunks), default=0)
        choices = (reason,) * (last + 1) if last else ()
        told = (answer.served_model, answer.reported_cost)
        if answer.usage is not None:
            return End(reason, answer.usage, error, choices, *told)
        if answer.provenance is Provenance.UNKNOWN:
            return End(reason, Usage(), error, choices, *told)
        usage = Usage.of(
            answer.provenance,
            input_fresh=max(0, self._input_tokens - answer.cached_tokens),
            input_cache_read=min(self._input_tokens, answer.cached_tokens),
            output_text=self._output_tokens,
        )
        return End(reason, usage, error, choices, *told)
