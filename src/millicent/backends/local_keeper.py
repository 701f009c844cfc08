"""Which models are in the engine's memory: loaded when they are asked for, unloaded when they are not, by turns where
there is no room for all."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Protocol

from millicent.backends.engine_process import EngineProcess
from millicent.backends.local_models import HeldModel, LocalModel, ModelState, load_frame, load_tokenizer
from millicent.core.clock import NS_PER_S, Clock
from millicent.core.errors import EngineCrashed, MillicentError, ModelError, Unavailable
from millicent.engine.protocol import EngineConfig, Load, Loaded, LoadFailed, Unload, Unloaded

_RETRY_LOAD_NS = 10 * NS_PER_S  # after a failed load, requests are refused for this long before it is tried again
_START_GRACE_S = 5.0  # a model stays this long for a call that was prepared to be started
_ROOM_WAIT_S = 120.0  # a model waits this long for others to make room
_LOOK_AGAIN_S = 0.05


class Host(Protocol):
    """What the keeper needs of the backend."""

    def require_up(self) -> EngineProcess:
        """Raises Unavailable while there is no engine."""
        ...

    def is_up(self, engine: EngineProcess | None = None) -> bool:
        """Whether this engine is, or any."""
        ...

    def calibrates(self, model: str) -> bool:
        """Whether loading it should measure what its steps cost."""
        ...

    def has_loaded(self, model: str) -> None: ...

    def spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]: ...


class ModelKeeper:
    """Models that don't fit beside each other take turns. A model that finds no room waits until one of the others is
    idle; who asks for those then waits until it has been loaded. A model keeps its place for as long as loading it
    took, so that at most half the time goes into loading.
    """

    def __init__(self, models: Mapping[str, LocalModel], config: EngineConfig, clock: Clock, host: Host) -> None:
        self.models = {name: HeldModel(name, spec) for name, spec in models.items()}
        self.asked_ns: int | None = None  # since when the engine loads or unloads
        self._config = config
        self._clock = clock
        self._host = host
        # One change of what is loaded at a time, so that making room is decided once.
        self._changing = asyncio.Lock()
        self._answer: asyncio.Future[Loaded | LoadFailed | Unloaded] | None = None

    def give_answer(self, frame: Loaded | LoadFailed | Unloaded) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(frame)

    def engine_went_down(self, error: MillicentError) -> None:
        for model in self.models.values():
            model.keep()
            if model.state is not ModelState.FAILED:
                model.state = ModelState.UNLOADED
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)

    async def use(self, model: HeldModel) -> None:
        """Until it is loaded. Raises Unavailable: what keeps a model from being loaded (a download that failed, a
        damaged file) is nothing that the request could mend, and is tried again after a while."""
        try:
            await self.ensure_loaded(model)
        except ModelError as error:
            wait_ns = model.failed_ns + _RETRY_LOAD_NS - self._clock.monotonic_ns()
            raise Unavailable(
                error.message, code=error.code, retry_after_s=max(1, math.ceil(wait_ns / NS_PER_S))
            ) from None
        model.used_ns = self._clock.monotonic_ns()
        self.unload_later(model, _START_GRACE_S)

    async def use_for_call(self, model: HeldModel) -> None:
        """The same, for a call that will begin shortly."""
        await self.use(model)
        model.expect(model.used_ns, model.used_ns + int(_START_GRACE_S * NS_PER_S))

    async def ensure_loaded(self, model: HeldModel) -> None:
        """Raises Unavailable while there is no engine or no room, ModelError when the model cannot be loaded."""
        self._host.require_up()
        while model.state is ModelState.LOADED and model.gives_way_to is not None and not model.gives_way_to.done():
            await asyncio.wait({model.gives_way_to})
        if model.state is ModelState.LOADED:
            return
        if model.state is ModelState.FAILED and self._clock.monotonic_ns() < model.failed_ns + _RETRY_LOAD_NS:
            raise ModelError(model.message)
        if model.loading is None:
            model.loading = self._host.spawn(self._load(model))
        loading = model.loading
        model.awaited += 1
        try:
            await asyncio.wait({loading})  # which, unlike awaiting it, leaves it alone when the caller is cancelled
        finally:
            model.awaited -= 1
        if loading.cancelled():
            raise Unavailable("the server is shutting down; retry", retry_after_s=5)
        loading.result()

    async def unload(self, model: HeldModel) -> None:
        """Now, or once nothing runs on it any more."""
        model.leaving = True
        if model.in_use(self._clock.monotonic_ns()):
            self.unload_later(model, _START_GRACE_S)
        else:
            await self._unload_if_idle(model)

    def unload_later(self, model: HeldModel, at_least_s: float = 0.0) -> None:
        if model.keep_alive_s is None or model.running or model.state is not ModelState.LOADED:
            return
        model.keep()
        delay_s = max(model.keep_alive_s, at_least_s)
        loop = asyncio.get_running_loop()
        model.unload_timer = loop.call_later(delay_s, lambda: self._host.spawn(self._unload_if_idle(model)))

    async def _load(self, model: HeldModel) -> None:
        try:
            model.state = ModelState.LOADING
            model.leaving = False
            model.message = ""
            if model.path is None:
                path = model.spec.path
                model.path = path if isinstance(path, Path) else await asyncio.to_thread(path)
            if model.tokenizer is None:
                model.tokenizer = await asyncio.to_thread(load_tokenizer, model.path, self._clock)
            async with self._changing:
                loaded = await self._load_making_room(model, model.path)
                model.context_tokens = loaded.context_tokens
                model.dimensions = loaded.dimensions
                model.state = ModelState.LOADED
                model.wanted = True
                model.settled_ns = self._clock.monotonic_ns() + loaded.overhead.wall_ns
                self.unload_later(model, _START_GRACE_S)
        except Unavailable:
            model.state = ModelState.UNLOADED
            raise
        except MillicentError as error:
            model.state = ModelState.FAILED
            model.failed_ns = self._clock.monotonic_ns()
            model.message = error.message
            raise
        finally:
            model.loading = None

    async def _load_making_room(self, model: HeldModel, path: Path) -> Loaded:
        """Unloads idle models, the least recently used first, until the model fits."""
        draft = model.spec.draft
        while True:
            answer = await self._ask(load_frame(model, path, self._config.dtype, self._host.calibrates))
            if isinstance(answer, Loaded):
                for name in (model.name, *([draft.name] if draft else [])):
                    self._host.has_loaded(name)
                return answer
            assert isinstance(answer, LoadFailed)
            if answer.code != "out_of_memory":
                raise ModelError(answer.message)
            await self._unload(await self._idle_model(model, answer.message))

    async def _idle_model(self, model: HeldModel, why: str) -> HeldModel:
        """The least recently used of those that nobody uses, waiting for one if need be. Raises Unavailable when that
        takes too long or nobody waits for `model` any more, ModelError where no other is loaded."""
        engine = self._host.require_up()
        give_up_ns = self._clock.monotonic_ns() + int(_ROOM_WAIT_S * NS_PER_S)
        while True:
            now_ns = self._clock.monotonic_ns()
            loaded = [other for other in self.models.values() if other.state is ModelState.LOADED]
            if idle := [other for other in loaded if not other.in_use(now_ns)]:
                return min(idle, key=lambda other: other.used_ns)
            if not self._host.is_up(engine):
                raise EngineCrashed("the engine process ended while this waited for room; retry", retry_after_s=1)
            if not loaded:
                raise ModelError(why)
            if not model.awaited or now_ns >= give_up_ns:
                raise Unavailable(f"{why}; the others have been in use for long: retry", retry_after_s=5)
            for other in loaded:
                if now_ns >= other.settled_ns:
                    other.gives_way_to = model.loading
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def _unload(self, model: HeldModel) -> None:
        model.state = ModelState.UNLOADED  # from here on nothing is submitted to it
        model.wanted = model.spec.preload
        model.keep()
        await self._ask(Unload(model.name))

    async def _unload_if_idle(self, model: HeldModel) -> None:
        async with self._changing:
            if model.state is ModelState.LOADED and not model.running and self._host.is_up():
                await self._unload(model)

    async def _ask(self, frame: Load | Unload) -> Loaded | LoadFailed | Unloaded:
        """Called with the lock held, so that the next answer is this one's."""
        engine = self._host.require_up()
        self.asked_ns = self._clock.monotonic_ns()
        self._answer = asyncio.get_running_loop().create_future()
        engine.send(frame)
        try:
            answer = await self._answer
        finally:
            self._answer = self.asked_ns = None
        if not self._host.is_up(engine):
            raise EngineCrashed("the engine process ended as this began; retry", retry_after_s=1)
        return answer
