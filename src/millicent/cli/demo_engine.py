"""The demo's stand-in for an engine: what is asked at once shares its steps, which take as long as a step-time model
says, and some more or less."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from random import Random

from millicent.backends.fake import FakeAnswer
from millicent.core.chunks import Chunk, End, FinishReason, Text
from millicent.core.clock import NS_PER_S, Clock
from millicent.core.protocols import Observer
from millicent.core.request import Request
from millicent.core.steps import SequenceWork, StepRecord
from millicent.core.usage import Usage
from millicent.engine.config import EngineConfig
from millicent.step_time import Coefficients, Work

# Each step guesses so many tokens ahead, of which most are right.
_DRAFTED, _RIGHT = 5, 0.8
_NOISE = 0.03


class DemoEngine:
    """One device. A step has a row of every sequence that writes, with its guesses, and of the prompts, in the order in
    which they came, what is left of the rows that a step may have."""

    def __init__(
        self, device: str, costs: Coefficients, config: EngineConfig, observer: Observer, clock: Clock
    ) -> None:
        self._device = device
        self._costs = costs
        self._config = config
        self._observer = observer
        self._clock = clock
        self._random = Random(device)  # noqa: S311 - made-up steps, made again
        self._waiting: deque[DemoRun] = deque()
        self._running: list[DemoRun] = []
        self._index = 0
        self._working: asyncio.Task[None] | None = None

    def enter(self, run: DemoRun) -> None:
        self._waiting.append(run)
        if self._working is None:
            self._working = asyncio.create_task(self._work())

    async def _work(self) -> None:
        while self._waiting or self._running:
            while self._waiting and len(self._running) < self._config.max_sequences:
                self._running.append(self._waiting.popleft())
            self._running = [run for run in self._running if not run.over]
            if self._running:
                await self._step()
        self._working = None

    async def _step(self) -> None:
        work = dict(self._planned())
        start_ns = self._clock.monotonic_ns()
        takes_ns = self._costs.step_ns(Work.total(Work.of(each) for each in work.values()))
        await asyncio.sleep(takes_ns * self._random.uniform(1 - _NOISE, 1 + _NOISE) / NS_PER_S)
        wall_ns = self._clock.monotonic_ns() - start_ns
        self._index += 1
        for run, each in work.items():
            run.advance(each)
        self._observer.step(
            StepRecord(self._device, self._running[0].model, self._index, start_ns, wall_ns, tuple(work.values()))
        )
        for run in work:
            run.news.set()

    def _planned(self) -> Iterator[tuple[DemoRun, SequenceWork]]:
        room = self._config.step_tokens
        for run in self._running:
            if not run.unread:
                room -= 1 + _DRAFTED
                yield run, self._decoding(run)
        for run in self._running:
            rows = min(run.unread, max(0, room))
            if rows:
                room -= rows
                last = rows == run.unread
                yield run, SequenceWork(run.sequence, rows, 0, int(last), run.context - run.unread + rows)

    def _decoding(self, run: DemoRun) -> SequenceWork:
        drafted = min(_DRAFTED, run.left - 1)
        right = next((i for i in range(drafted) if self._random.random() > _RIGHT), drafted)
        rows = 1 + drafted
        return SequenceWork(run.sequence, 0, rows, rows, run.context + drafted, 0, drafted, right)


class DemoRun:
    """One answer in its engine. `context` are the tokens that it has by now, `unread` those of its prompt that are
    still to be read, `left` those still to be written."""

    def __init__(self, engine: DemoEngine, answer: FakeAnswer, model: str, sequence: int, most: int) -> None:
        self.model = model
        self.sequence = sequence
        self.context = answer.input_tokens
        self.unread = answer.input_tokens
        self.news = asyncio.Event()
        self._engine = engine
        self._answer = answer
        self._wanted = sum(chunk.tokens for chunk in answer.chunks)
        self._whole = min(most, self._wanted)
        self._made = 0
        self._cancelled = False

    @property
    def left(self) -> int:
        return self._whole - self._made

    @property
    def over(self) -> bool:
        return self._cancelled or not self.left

    def cancel(self) -> None:
        self._cancelled = True
        self.news.set()

    def advance(self, work: SequenceWork) -> None:
        self.unread -= work.prefill_rows
        if work.sampled_rows:
            written = 1 + work.accepted_tokens
            self._made += written
            self.context += written

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        if self._answer.error is not None:
            yield End(FinishReason.ERROR, Usage(), self._answer.error)
            return
        self._engine.enter(self)
        told = 0
        for chunk in self._answer.chunks:
            tokens = min(chunk.tokens, self._whole - told)
            while self._made < told + tokens and not self._cancelled:
                await self.news.wait()
                self.news.clear()
            if self._cancelled or not tokens:
                break
            told += tokens
            yield Text(chunk.text, tokens)
        yield End(self._reason(), self._usage(), None)

    def _reason(self) -> FinishReason:
        if self._cancelled:
            return FinishReason.CANCELLED
        return self._answer.finish if self._whole == self._wanted else FinishReason.LENGTH

    def _usage(self) -> Usage:
        return Usage.of(
            self._answer.provenance,
            input_fresh=self._answer.input_tokens - self.unread,
            input_cache_read=0,
            output_text=self._made,
        )


class DemoCall:
    def __init__(self, backend: DemoBackend, answer: FakeAnswer, model: str, sequence: int, most: int) -> None:
        self.served_model = model
        self.placement = backend.name
        self.sequences: tuple[int, ...] = (sequence,)
        self.input_tokens: int | None = answer.input_tokens
        self.max_output_tokens: int | None = most
        self._run = DemoRun(backend.engine, answer, model, sequence, most)

    def start(self) -> DemoRun:
        return self._run


class DemoBackend:
    """Of one engine's model. What is answered is what `answer` makes of a request."""

    def __init__(
        self, name: str, model: str, engine: DemoEngine, answer: Callable[[Request], FakeAnswer], numbers: Iterator[int]
    ) -> None:
        self.name = name
        self.engine = engine
        self._model = model
        self._answer = answer
        self._numbers = numbers

    def models(self) -> tuple[str, ...]:
        return (self._model,)

    async def prepare(self, request: Request) -> DemoCall:
        answer = self._answer(request)
        most = request.limits.max_tokens or answer.context_tokens
        return DemoCall(self, answer, self._model, next(self._numbers), most)
