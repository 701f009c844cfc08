"""The engine: takes frames, keeps models in memory, and gives each that has work its turn, one step at a time."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from millicent.core.chunks import FinishReason
from millicent.core.clock import Clock
from millicent.core.errors import ConfigError, ModelError
from millicent.core.steps import Overhead, OverheadKind
from millicent.engine.batch import Encoder
from millicent.engine.config import EngineConfig
from millicent.engine.connection import Connection
from millicent.engine.encoder_runner import EncoderRunner
from millicent.engine.machine import kv_blocks
from millicent.engine.protocol import (
    Cancel,
    Costs,
    Embed,
    Hello,
    Load,
    Loaded,
    LoadFailed,
    Output,
    Shutdown,
    Step,
    Submit,
    ToEngine,
    Unload,
    Unloaded,
)
from millicent.engine.runner import OpenModel, Runner

_log = logging.getLogger(__name__)
# What part of the file weights may shrink to on their way from it: fp32 to bf16 is half.
_SHRINKS_BY: dict[str, int] = {"int8": 4, "int4": 8}


_TORCH_HAS_NO_MEMORY = ("can't allocate memory", "out of memory")


class OutOfMemory(Exception):
    """A model doesn't fit into what is left of the budget."""


class Engine:
    """`open_model` brings a model's weights into memory and raises ModelError when its files are unusable.

    Steps, loads and unloads happen one after another on one thread, so their times never overlap.
    """

    def __init__(
        self,
        connection: Connection,
        config: EngineConfig,
        clock: Clock,
        *,
        memory_bytes: int,
        open_model: Callable[[Load], OpenModel | Encoder],
    ) -> None:
        self._connection = connection
        self._config = config
        self._clock = clock
        self._memory_bytes = memory_bytes
        self._open_model = open_model
        self._runners: dict[str, Runner | EncoderRunner] = {}
        self._steps = 0

    def run(self) -> None:
        """Until the gateway says Shutdown; raises Disconnected when it goes without a word."""
        try:
            self._serve()
        finally:
            self._connection.close()

    def _serve(self) -> None:
        self._connection.send(Hello(self._config.device, os.getpid(), self._memory_bytes))
        turn = 0
        while True:
            if not self._busy():
                self._check_rest()
            for frame in self._connection.receive(wait=not self._busy()):
                if isinstance(frame, Shutdown):
                    return
                self._handle(frame)
            for runner in self._runners.values():
                if isinstance(runner, Runner):
                    self._report(runner.take_compiled())
            if busy := self._busy():
                turn += 1
                # What the device works on already comes first, so that steps of two models never overlap.
                runner = next((runner for runner in busy if runner.flying), busy[turn % len(busy)])
                self._step(runner, ahead=len(busy) == 1)

    def _step(self, runner: Runner | EncoderRunner, *, ahead: bool) -> None:
        self._connection.send(runner.step(self._config.device, self._steps, self._clock, ahead=ahead))
        self._steps += 1

    def _land(self) -> None:
        """Let the device finish: what follows takes time of its own."""
        for runner in self._runners.values():
            while runner.flying:
                self._step(runner, ahead=False)

    def _check_rest(self) -> None:
        """With no sequence left, no KV block has a holder."""
        for name, runner in self._runners.items():
            if isinstance(runner, Runner) and (held := runner.scheduler.pool.used):
                _log.error("%d KV blocks of %s are held by nobody; report this", held, name)

    def _busy(self) -> list[Runner | EncoderRunner]:
        return [runner for runner in self._runners.values() if runner.busy]

    def _handle(self, frame: ToEngine) -> None:
        match frame:
            case Submit() | Embed():
                self._submit(frame)
            case Cancel():
                self._report(runner.cancel(frame.sequence) for runner in self._runners.values())
            case Costs():
                for runner in self._runners.values():
                    if isinstance(runner, Runner):
                        runner.learn(frame.model, frame.coefficients)
            case Load():
                self._land()
                self._connection.send(self._load(frame))
            case Unload():
                self._land()
                self._unload(frame)

    def _submit(self, frame: Submit | Embed) -> None:
        match self._runners.get(frame.model), frame:
            case (Runner() as runner, Submit()):
                self._report([runner.submit(frame)])
            case (EncoderRunner() as runner, Embed()):
                self._report([runner.submit(frame)])
            case (None, _):
                self._refuse(frame, f"the model {frame.model} is not loaded in the engine; retry")
            case _:
                self._refuse(frame, f"the model {frame.model} doesn't do this; ask one that does")

    def _refuse(self, frame: Submit | Embed, error: str) -> None:
        self._report([Output(frame.sequence, 0, "", FinishReason.ERROR.value, error)])

    def _report(self, outputs: Iterable[Output | None]) -> None:
        """Ends that no forward pass belongs to."""
        found = tuple(output for output in outputs if output is not None)
        if found:
            self._connection.send(Step(None, found))

    def _load(self, frame: Load) -> Loaded | LoadFailed:
        start_ns = self._clock.monotonic_ns()
        opened_ns = start_ns
        calibrations: tuple[Overhead, ...] = ()
        if frame.model not in self._runners:
            try:
                runner = self._open(frame)
                opened_ns = self._clock.monotonic_ns()
                if isinstance(runner, Runner):
                    drafts = frame.draft is not None and frame.draft.calibrate
                    calibrations = runner.calibrate(self._config, self._clock, own=frame.calibrate, draft=drafts)
                self._runners[frame.model] = runner
            except (ModelError, ConfigError) as error:
                return LoadFailed(frame.model, error.message, "model_unusable")
            except OutOfMemory as error:
                return LoadFailed(frame.model, str(error), "out_of_memory")
            except Exception as error:  # noqa: BLE001 - a file that trips up its reader costs this model only
                _log.exception("loading %s failed", frame.model)
                if isinstance(error, MemoryError) or any(each in str(error) for each in _TORCH_HAS_NO_MEMORY):
                    message = f"the system has no memory left to load {frame.model}; lower [engine] memory_gb"
                    return LoadFailed(frame.model, message, "out_of_memory")
                detail = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                return LoadFailed(frame.model, f"{frame.path}: cannot be loaded ({detail})", "model_unusable")
        runner = self._runners[frame.model]
        return Loaded(
            model=frame.model,
            context_tokens=runner.context_tokens,
            weight_bytes=runner.weight_bytes,
            kv_bytes=runner.kv_bytes,
            overhead=Overhead(self._config.device, frame.model, OverheadKind.LOAD, start_ns, opened_ns - start_ns),
            calibrations=calibrations,
            dimensions=runner.dimensions,
        )

    def _open(self, frame: Load) -> Runner | EncoderRunner:
        held = sum(runner.weight_bytes + runner.kv_bytes for runner in self._runners.values())
        left = self._memory_bytes - held
        files = [(frame.path, frame.quantize), *([(frame.draft.path, frame.draft.quantize)] if frame.draft else [])]
        least = sum(
            _file_bytes(Path(path)) // _SHRINKS_BY.get(quantize or self._config.quantize, 2) for path, quantize in files
        )
        if least > left:
            raise OutOfMemory(_does_not_fit(frame.model, least, left))
        opened = self._open_model(frame)
        if not isinstance(opened, OpenModel):
            if opened.weight_bytes > left:
                raise OutOfMemory(_does_not_fit(frame.model, opened.weight_bytes, left))
            return EncoderRunner(opened, self._config)
        left -= opened.weight_bytes + opened.working_bytes
        blocks, least = kv_blocks(self._config, opened.model.context_tokens, opened.kv_bytes_per_token, left)
        if blocks < least:
            kv_bytes = least * self._config.block_tokens * opened.kv_bytes_per_token
            weight_bytes = opened.weight_bytes
            raise OutOfMemory(_does_not_fit(frame.model, weight_bytes + kv_bytes, weight_bytes + left))
        make = opened.make_runner or Runner
        return make(opened, self._config, blocks=blocks, wake=self._connection.wake)

    def _unload(self, frame: Unload) -> None:
        start_ns = self._clock.monotonic_ns()
        runner = self._runners.pop(frame.model, None)
        if runner is not None:
            self._report(runner.abandon(f"the model {frame.model} was unloaded while this ran; retry"))
        del runner
        gc.collect()
        wall_ns = self._clock.monotonic_ns() - start_ns
        overhead = Overhead(self._config.device, frame.model, OverheadKind.UNLOAD, start_ns, wall_ns)
        self._connection.send(Unloaded(frame.model, overhead))


def _file_bytes(path: Path) -> int:
    """What the weights take on disk."""
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.gguf")]
    return sum(file.stat().st_size for file in files)


def _does_not_fit(model: str, needed_bytes: int, left_bytes: int) -> str:
    return (
        f"{model} needs {needed_bytes / 1e9:.2f} GB and {max(0, left_bytes) / 1e9:.2f} GB are free for models;"
        " unload another one, raise [engine] memory_gb, or use a smaller model"
    )
