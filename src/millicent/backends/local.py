"""Our own engine as a backend: one engine process for one device, supervised.

A crash of the engine ends the answers that were running with a retryable error, is told to the observer, and the
engine is started again with its models. Nothing an engine does can take the gateway down.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import secrets
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from millicent.backends.engine_process import EngineProcess
from millicent.backends.engine_silence import LOOK_S, Silence, longest_silence_s
from millicent.backends.grammar_checks import GrammarChecker
from millicent.backends.local_embeddings import EmbeddingCall, EmbeddingRun, encode_inputs
from millicent.backends.local_keeper import ModelKeeper
from millicent.backends.local_models import (
    EngineState,
    EngineStatus,
    HeldModel,
    LocalModel,
    ModelState,
    check_does,
    check_fits,
    check_known,
    check_taken_here,
    check_tokens,
    encode,
    truncate,
)
from millicent.backends.local_runs import LocalCall, LocalRun, Reading
from millicent.core.chunks import FinishReason
from millicent.core.clock import NS_PER_MS, NS_PER_S, Clock
from millicent.core.errors import EngineCrashed, MillicentError, ModelNotFound, Unavailable
from millicent.core.protocols import Observer
from millicent.core.request import Embedding, Request
from millicent.core.steps import DeviceState, Overhead
from millicent.engine.protocol import (
    Cancel,
    Coefficients,
    Costs,
    Embed,
    EngineConfig,
    FromEngine,
    Loaded,
    LoadFailed,
    Step,
    Submit,
    Unloaded,
)
from millicent.text.reasoning import opens_reasoning
from millicent.text.tools import answer_grammar

if TYPE_CHECKING:
    from millicent.text import Tokenizer

__all__ = ["EngineState", "EngineStatus", "LocalBackend", "LocalModel", "ModelState"]

R = TypeVar("R", LocalRun, EmbeddingRun)

_log = logging.getLogger(__name__)

_FIRST_BACKOFF_S = 0.25
_LAST_BACKOFF_S = 30.0
_STABLE_NS = 60 * NS_PER_S  # an engine that lived this long starts over with the shortest pause
_ENGINE_COMMAND = (sys.executable, "-P", "-m", "millicent.engine")


class LocalBackend:
    """`core.protocols.Backend` over one engine process. Use from one event loop: `start`, then `prepare`, then `close`.

    `command` starts the engine (to put `numactl` or the like before it); `--socket` and `--config` are added.
    `costs` tells what steps of a model on a device take, as far as the observer knows; the engine is told. If it
    doesn't, loading the model calibrates. Without `costs` nothing is calibrated, and nothing guessed.
    """

    def __init__(
        self,
        config: EngineConfig,
        models: Mapping[str, LocalModel],
        observer: Observer,
        clock: Clock,
        home: Path,
        *,
        name: str = "local",
        command: Sequence[str] = _ENGINE_COMMAND,
        costs: Callable[[str, str], Coefficients | None] | None = None,
    ) -> None:
        self.name = name
        self._config = config
        self._observer = observer
        self._costs = costs
        self._told: dict[str, Coefficients] = {}  # what the engine knows of what steps take
        self._clock = clock
        self._command = tuple(command)
        self._log_file = home / "logs" / f"engine-{config.device}.log"
        self._grammars = GrammarChecker()
        self._keeper = ModelKeeper(models, config, clock, self)
        self._models = self._keeper.models
        self._state = EngineState.STOPPED
        self._message = ""
        self._engine: EngineProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._runs: dict[int, LocalRun | EmbeddingRun] = {}
        self._sequences = itertools.count(1)
        self._tenant_secret = secrets.token_bytes(16)
        self._heard = 0  # frames, of all engines
        self._accounted_ns = 0  # the end of the last step or load that the engine told of
        self._retry_at_ns = 0

    # What the server asks.

    def models(self) -> tuple[str, ...]:
        return tuple(self._models)

    def offer(self, model: str, spec: LocalModel) -> None:
        """One more, from now on."""
        self._models[model] = HeldModel(model, spec)

    def makes_vectors(self, model: str) -> bool:
        """As declared, or as seen when it was loaded."""
        held = self._models[model]
        return held.spec.makes_vectors or held.dimensions > 0

    def status(self) -> EngineStatus:
        return EngineStatus(
            device=self._config.device,
            pid=self._engine.pid if self._engine else None,
            state=self._state,
            models={name: model.state for name, model in self._models.items()},
            message=self._message or "; ".join(model.message for model in self._models.values() if model.message),
        )

    async def start(self) -> None:
        """Start the engine and load the models to preload. Raises Unavailable or ModelError, and is then closed."""
        self._state = EngineState.STARTING
        self._observer.device_state(self._config.device, DeviceState.DOWN, self._clock.monotonic_ns())
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(ready))
        try:
            await ready
        except BaseException as error:
            await self.close()
            self._state = EngineState.FAILED
            self._message = str(error)
            raise

    async def close(self) -> None:
        """End what runs with an error and stop the engine."""
        self._state = EngineState.STOPPED
        engine = self._engine
        if engine is not None:
            self._went_down(Unavailable("the server is shutting down; retry", retry_after_s=5))
        tasks = [*self._tasks, *([self._supervisor] if self._supervisor else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._grammars.close()
        if engine is not None:
            await engine.stop()

    async def prepare(self, request: Request) -> LocalCall | EmbeddingCall:
        model = self._models.get(request.model)
        if model is None:
            known = ", ".join(self._models) or "none"
            raise ModelNotFound(f"model: {request.model} is not served here; available: {known}", param="model")
        check_taken_here(request)
        await self._keeper.use_for_call(model)
        assert model.tokenizer is not None
        check_does(request, model)
        if request.embedding is not None:
            return await self._prepare_embedding(request.embedding, model)
        form = model.tokenizer.tool_format
        if grammar := answer_grammar(request, form):
            await self._grammars.check(grammar, "tools" if request.tools else "response_format")
        encoded = await encode(request, model.tokenizer)
        prompts = [truncate(request, tokens, model.context_tokens) for tokens in encoded]
        check_tokens(request, model.tokenizer.vocabulary_size)
        sequences = tuple(next(self._sequences) for _ in range(request.answers))
        submits = [
            Submit(
                sequences[0],
                model.name,
                tokens,
                request.sampling,
                msgspec.structs.replace(
                    request.limits, max_tokens=check_fits(request, len(tokens), model.context_tokens)
                ),
                tenant=self._tenant(request.attribution.key),
                priority=request.priority,
                deadline_ns=self._deadline_ns(request.latency_target_ms),
                grammar=grammar,
            )
            for tokens in prompts
        ]
        echoes = [model.tokenizer.decode(tokens) if request.echo else "" for tokens in prompts]
        label = model.tokenizer.label
        names = tuple(tool.name for tool in request.tools if request.tool_choice != "none")
        reasons = model.tokenizer.reasons and request.messages is not None
        # What a grammar holds is the answer, also where the model was to think first.
        thinks = reasons and not grammar and opens_reasoning(model.tokenizer.decode(prompts[0][-8:]))
        reading = Reading(reasons, thinks, form, names)
        return LocalCall(
            submits,
            sequences,
            placement=model.spec.placement,
            begin=lambda submits: self._begin(LocalRun(submits, label, echoes, self._cancel, reading=reading)),
        )

    async def encode(self, request: Request, *, surrounded: bool) -> tuple[tuple[int, ...], tuple[bytes, ...], int]:
        """The prompt's tokens, each one's own text, and the model's context. Raises InvalidRequest."""
        request.refuse_foreign()
        request.refuse_images()
        tokenizer, context_tokens = await self._tokenizer(request.model)
        (tokens,) = await encode(request, tokenizer, surrounded=surrounded)
        return tokens, tuple(map(tokenizer.label, tokens)), context_tokens

    async def decode(self, model: str, tokens: Sequence[int]) -> str:
        """Raises InvalidRequest for a token that the model hasn't got."""
        tokenizer, _ = await self._tokenizer(model)
        check_known(tokens, tokenizer.vocabulary_size, "tokens")
        return tokenizer.decode(tokens)

    async def load(self, name: str) -> None:
        """Until it is loaded. Raises Unavailable."""
        model = self._models[name]
        model.leaving = False
        model.keep()
        await self._keeper.use(model)

    async def unload(self, name: str) -> None:
        """Now, or once nothing runs on it any more."""
        await self._keeper.unload(self._models[name])

    async def _tokenizer(self, name: str) -> tuple[Tokenizer, int]:
        """The model's, which is loaded for it."""
        model = self._models[name]
        await self._keeper.use(model)
        assert model.tokenizer is not None
        return model.tokenizer, model.context_tokens

    async def _prepare_embedding(self, wanted: Embedding, model: HeldModel) -> EmbeddingCall:
        assert model.tokenizer is not None
        texts = await encode_inputs(wanted, model.tokenizer, model.context_tokens)
        frames = [Embed(next(self._sequences), model.name, tokens, wanted.dimensions or 0) for tokens in texts]
        return EmbeddingCall(
            frames, model.spec.placement, lambda frames: self._begin(EmbeddingRun(frames, self._cancel))
        )

    def _tenant(self, key: str | None) -> int:
        """A number that says nothing of the key it stands for. Callers without a key are one tenant, 0."""
        if key is None:
            return 0
        digest = blake2b(key.encode(), key=self._tenant_secret, digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def _deadline_ns(self, latency_target_ms: int | None) -> int | None:
        return None if latency_target_ms is None else self._clock.monotonic_ns() + latency_target_ms * NS_PER_MS

    # Runs.

    def _begin(self, run: R) -> R:
        model = self._models[run.model]
        model.begin()
        self._runs.update(dict.fromkeys(run.sequences, run))
        if model.state is ModelState.LOADED and self._engine is not None:
            self._submit(run, self._engine)
        else:  # it was unloaded, or the engine crashed, since the call was prepared
            self.spawn(self._begin_later(run, model))
        return run

    async def _begin_later(self, run: LocalRun | EmbeddingRun, model: HeldModel) -> None:
        try:
            await self._keeper.use(model)
        except MillicentError as error:
            self._end(run, FinishReason.ERROR, error)
            return
        if not run.ended and self._engine is not None:
            self._submit(run, self._engine)

    def _submit(self, run: LocalRun | EmbeddingRun, engine: EngineProcess) -> None:
        if run.submitted_ns is None:
            run.submitted_ns = self._clock.monotonic_ns()
        for frame in run.next_frames():
            engine.send(frame)

    def _cancel(self, run: LocalRun | EmbeddingRun) -> None:
        if run.submitted_ns is None:
            self._end(run, FinishReason.CANCELLED)
        elif self._engine is not None:
            for sequence in run.unfinished:
                self._engine.send(Cancel(sequence))

    def _end(self, run: LocalRun | EmbeddingRun, reason: FinishReason, error: MillicentError | None = None) -> None:
        run.end(reason, error)
        self._forget(run)

    def _forget(self, run: LocalRun | EmbeddingRun) -> None:
        """The run has ended."""
        if run.sequences[0] not in self._runs:
            return
        for sequence in run.sequences:
            del self._runs[sequence]
        model = self._models[run.model]
        model.running -= 1
        model.used_ns = self._clock.monotonic_ns()
        self._keeper.unload_later(model)

    # What the engine says.

    def _take(self, frame: FromEngine) -> None:
        self._heard += 1
        match frame:
            case Step():
                self._take_step(frame)
            case Loaded() | Unloaded():
                self._take_overhead(frame.overhead)
                for calibration in frame.calibrations if isinstance(frame, Loaded) else ():
                    self._take_overhead(calibration)
                self._keeper.give_answer(frame)
            case LoadFailed():
                self._accounted_ns = self._clock.monotonic_ns()
                self._keeper.give_answer(frame)

    def _take_step(self, step: Step) -> None:
        """The record first: nobody may see an answer before the time it took."""
        record = step.record
        if record is not None:
            self._accounted_ns = record.start_ns + record.wall_ns
            self._observer.step(record)
            for work in record.sequences:
                run = self._runs.get(work.sequence)
                if work.prefill_rows and run is not None and run.model == record.model:  # not by its draft model
                    run.prefilled(work.sequence, work.prefill_rows - work.recomputed_rows)
            self._tell_costs(record.model)
        for output in step.outputs:
            run = self._runs.get(output.sequence)
            if run is not None:
                run.take(output)
                if run.ended:
                    self._forget(run)
                elif output.finish == FinishReason.ERROR.value:  # no choice is worth more than the whole answer
                    self._cancel(run)
                elif self._engine is not None:
                    self._submit(run, self._engine)

    def _tell_costs(self, model: str) -> None:
        """The engine decides by them how many guesses are worth checking."""
        found = None if self._costs is None else self._costs(self._config.device, model)
        if found is not None and found is not self._told.get(model) and self._engine is not None:
            self._told[model] = found
            self._engine.send(Costs(model, found))

    def _take_overhead(self, overhead: Overhead) -> None:
        self._accounted_ns = overhead.start_ns + overhead.wall_ns
        if overhead.wall_ns:
            self._observer.overhead(overhead)

    # Models.

    def require_up(self) -> EngineProcess:
        """Raises Unavailable while there is no engine."""
        if self._engine is None:
            wait_ns = self._retry_at_ns - self._clock.monotonic_ns()
            raise Unavailable(
                f"the engine on {self._config.device} is {self._state.value}; retry in a moment",
                retry_after_s=max(1, math.ceil(wait_ns / NS_PER_S)),
            )
        return self._engine

    def is_up(self, engine: EngineProcess | None = None) -> bool:
        """Whether this engine is, or any."""
        return self._engine is not None and (engine is None or self._engine is engine)

    def calibrates(self, model: str) -> bool:
        """Whether loading it should measure what its steps cost."""
        known = self._costs is None or self._costs(self._config.device, model) is not None
        return self._config.calibrate and not known

    def has_loaded(self, model: str) -> None:
        self._told.pop(model, None)
        self._tell_costs(model)

    # The engine process.

    async def _supervise(self, ready: asyncio.Future[None]) -> None:
        """Keep an engine running. `ready` hears how the first start went; if badly, there is no second."""
        pause_s = _FIRST_BACKOFF_S
        while True:
            started_ns = self._clock.monotonic_ns()
            try:
                engine = await EngineProcess.start(self._command, self._config, self._log_file, self._take)
            except (Unavailable, OSError) as error:
                self._state = EngineState.FAILED
                self._message = str(error)
            else:
                self._came_up(engine)
                self.spawn(self._bring_back_models(ready))
                self.spawn(self._watch(engine))
                reason = await engine.gone()
                self._state = EngineState.RESTARTING
                self._message = f"the engine process {engine.pid} {reason}; {self._log_file} may say why"
                self._went_down(EngineCrashed(f"the engine process {reason} while this ran; retry", retry_after_s=1))
            _log.error("%s", self._message)
            if not ready.done():
                ready.set_exception(Unavailable(self._message))
                return
            if self._clock.monotonic_ns() - started_ns > _STABLE_NS:
                pause_s = _FIRST_BACKOFF_S
            self._retry_at_ns = self._clock.monotonic_ns() + int(pause_s * NS_PER_S)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_BACKOFF_S)

    def _came_up(self, engine: EngineProcess) -> None:
        self._engine = engine
        self._observer.device_state(self._config.device, DeviceState.UP, self._clock.monotonic_ns())
        _log.info(
            "engine on %s is up: process %d, %.1f GB for models",
            self._config.device,
            engine.pid,
            engine.hello.memory_budget_bytes / 1e9,
        )

    async def _watch(self, engine: EngineProcess) -> None:
        """End it if it hangs in a step. Loading takes as long as it takes."""
        silence = Silence()
        while self._engine is engine:
            works = self._keeper.asked_ns is None and any(run.submitted_ns is not None for run in self._runs.values())
            silent_s = silence.look(self._heard, works=works)
            if silent_s and silent_s > longest_silence_s(self._config, self._step_costs()):
                engine.give_up(f"said nothing for {silent_s:.0f} s in a step, as if it hung, and was ended")
                return
            await asyncio.sleep(LOOK_S)

    def _step_costs(self) -> Iterator[tuple[Coefficients | None, int]]:
        for name, model in self._models.items():
            if model.state is ModelState.LOADED:
                yield None if self._costs is None else self._costs(self._config.device, name), model.context_tokens

    async def _bring_back_models(self, ready: asyncio.Future[None]) -> None:
        """Load what is to be preloaded, or was loaded when the engine went down."""
        for model in [model for model in self._models.values() if model.wanted]:
            try:
                await self._keeper.ensure_loaded(model)
            except MillicentError as error:
                if self._engine is None:
                    return  # the supervisor is at it
                _log.error("%s", error.message)
                if not ready.done():
                    ready.set_exception(error)
                    return
        self._state = EngineState.READY
        self._message = ""
        if not ready.done():
            ready.set_result(None)

    def _went_down(self, error: MillicentError) -> None:
        """Account for the time, then end what ran: time that was cut off is nobody's."""
        now_ns = self._clock.monotonic_ns()
        work_ns = [run.submitted_ns for run in self._runs.values() if run.submitted_ns is not None]
        if self._keeper.asked_ns is not None:
            work_ns.append(self._keeper.asked_ns)
        if work_ns:
            start_ns = max(self._accounted_ns, min(work_ns))
            if now_ns > start_ns:
                self._observer.lost(self._config.device, start_ns, now_ns - start_ns)
        self._observer.device_state(self._config.device, DeviceState.DOWN, now_ns)
        self._engine = None
        self._keeper.engine_went_down(error)
        for run in set(self._runs.values()):
            self._end(run, FinishReason.ERROR, error)

    def spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) and not isinstance(error, MillicentError):
            _log.error("a task of the backend %s failed", self.name, exc_info=error)
