"""The local backend over a real engine process with a tiny random model."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import millicent
from millicent.backends.local import EngineState, LocalBackend, LocalModel, ModelState
from millicent.core.chunks import End, FinishReason, Text
from millicent.core.clock import SystemClock
from millicent.core.errors import EngineCrashed, ModelError, Unavailable
from millicent.core.protocols import Backend, Run
from millicent.core.request import Limits, Message, Request, Sampling
from millicent.core.steps import DeviceState, OverheadKind
from millicent.core.usage import Leaf, Provenance
from millicent.engine.config import EngineConfig
from support.observers import Notes
from support.tiny_models import TinyLlama, write_tiny_model
from support.waiting import until_it

CONFIG = EngineConfig(dtype="fp32", threads=1, memory_gb=1.0, step_tokens=64)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", TinyLlama(context_tokens=2048))


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engine processes import the package from where we did."""
    monkeypatch.setenv("PYTHONPATH", str(Path(millicent.__file__).parents[1]))


@asynccontextmanager
async def backend(
    models: dict[str, LocalModel], home: Path, config: EngineConfig = CONFIG
) -> AsyncIterator[tuple[LocalBackend, Notes]]:
    notes = Notes()
    subject = LocalBackend(config, models, notes, SystemClock(), home)
    await subject.start()
    try:
        yield subject, notes
    finally:
        await subject.close()


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 120))


def request(
    prompt: str | tuple[int, ...] = "the sun", *, model: str = "tiny", max_tokens: int | None = 12, **limits: Any
) -> Request:
    limits.setdefault("ignore_eos", True)
    return Request(
        id="r",
        dialect="test",
        model=model,
        prompt=prompt,
        sampling=Sampling(temperature=0),
        limits=Limits(max_tokens=max_tokens, **limits),
    )


async def read(run: Run) -> tuple[str, End]:
    text = ""
    end: End | None = None
    async for chunk in run:
        assert end is None, "something came after the end"
        if isinstance(chunk, Text):
            text += chunk.text
        else:
            assert isinstance(chunk, End)
            end = chunk
    assert end is not None
    return text, end


async def ask(subject: Backend, wanted: Request) -> tuple[str, End]:
    return await read((await subject.prepare(wanted)).start())


def test_answers_are_streamed_metered_and_shown_in_steps(tiny: Path, tmp_path: Path) -> None:
    async def test() -> None:
        models = {"tiny": LocalModel(tiny, "home", preload=True)}
        async with backend(models, tmp_path) as (subject, notes):
            status = subject.status()
            assert (status.state, status.models) == (EngineState.READY, {"tiny": ModelState.LOADED})
            assert [overhead.kind for overhead in notes.overheads] == [OverheadKind.LOAD]
            call = await subject.prepare(request())
            assert call.input_tokens is not None
            _, end = await read(call.start())
            assert (end.reason, end.error) == (FinishReason.LENGTH, None)
            assert end.usage.tokens(Leaf.INPUT_FRESH) == call.input_tokens
            assert end.usage.tokens(Leaf.INPUT_CACHE_READ) == 0
            assert end.usage.tokens(Leaf.OUTPUT_TEXT) == 12
            assert {count.provenance for count in end.usage.leaves.values()} == {Provenance.MEASURED}
            works = [work for record in notes.steps for work in record.sequences if work.sequence in call.sequences]
            assert sum(work.sampled_rows for work in works) == 12
            assert sum(work.prefill_rows for work in works) == call.input_tokens
            chat = Request(
                id="r",
                dialect="test",
                model="tiny",
                messages=(Message("user", "hello"),),
                limits=Limits(max_tokens=4, ignore_eos=True),
            )
            _, end = await ask(subject, chat)
            assert end.usage.output_tokens == 4
        assert [state for state, _ in notes.states] == [DeviceState.DOWN, DeviceState.UP, DeviceState.DOWN]
        assert subject.status().state is EngineState.STOPPED

    run(test())


def test_cancelling_in_prefill_ends_with_what_was_computed(tiny: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with backend({"tiny": LocalModel(tiny, "home", preload=True)}, tmp_path) as (subject, notes):
            running = (await subject.prepare(request((5,) * 2000))).start()
            await until_it(lambda: notes.steps)
            running.cancel()
            running.cancel()
            _, end = await read(running)
            running.cancel()
            assert (end.reason, end.usage.output_tokens) == (FinishReason.CANCELLED, 0)
            prefilled = sum(work.prefill_rows for record in notes.steps for work in record.sequences)
            assert end.usage.input_tokens == prefilled < 2000

    run(test())


def test_a_killed_engine_ends_answers_retryably_loses_time_and_comes_back(tiny: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with backend({"tiny": LocalModel(tiny, "home", preload=True)}, tmp_path) as (subject, notes):
            expected, _ = await ask(subject, request())
            runs = [(await subject.prepare(request(max_tokens=None))).start() for _ in range(3)]
            await until_it(lambda: notes.steps and len(notes.steps[-1].sequences) == 3)
            pid = subject.status().pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            for running in runs:
                _, end = await read(running)
                assert end.reason is FinishReason.ERROR
                assert isinstance(end.error, EngineCrashed)
                assert "SIGKILL" in end.error.message
                assert "retry" in end.error.message
                assert end.usage.input_tokens
                assert end.usage.output_tokens
            assert subject.status().state is EngineState.RESTARTING
            with pytest.raises(Unavailable) as refused:
                await subject.prepare(request())
            assert refused.value.retry_after_s
            ((start_ns, wall_ns),) = notes.losses
            last = notes.steps[-1]
            assert start_ns == last.start_ns + last.wall_ns
            assert notes.states[-1] == (DeviceState.DOWN, start_ns + wall_ns)
            await until_it(lambda: subject.status().state is EngineState.READY)
            status = subject.status()
            assert (status.pid != pid, status.models, status.message) == (True, {"tiny": ModelState.LOADED}, "")
            again, _ = await ask(subject, request())
            assert again == expected
            assert [state for state, _ in notes.states] == [DeviceState.DOWN, DeviceState.UP] * 2

    run(test())


def test_an_idle_model_makes_room_and_comes_back_when_asked_for(tiny: Path, tmp_path: Path) -> None:
    """Each takes half of what is left but at least a context, so the budget holds one of them, not three."""

    async def test() -> None:
        models = {name: LocalModel(tiny, "home") for name in ("a", "b", "c")}
        config = EngineConfig(dtype="fp32", threads=1, memory_gb=0.0018, step_tokens=64)
        async with backend(models, tmp_path, config) as (subject, notes):
            for name in ("a", "b", "c", "a"):
                _, end = await ask(subject, request(model=name))
                assert end.reason is FinishReason.LENGTH
            kinds = [overhead.kind for overhead in notes.overheads]
            assert kinds.count(OverheadKind.UNLOAD) >= 2
            assert subject.status().models["a"] is ModelState.LOADED

    run(test())


def test_models_that_are_asked_at_once_are_all_answered_where_not_all_fit(tiny: Path, tmp_path: Path) -> None:
    async def test() -> None:
        models = {name: LocalModel(tiny, "home") for name in ("a", "b", "c", "d")}
        config = EngineConfig(dtype="fp32", threads=1, memory_gb=0.0018, step_tokens=64)
        async with backend(models, tmp_path, config) as (subject, _):
            asked = [ask(subject, request(model=name, max_tokens=100)) for name in models]
            ends = [end for _, end in await asyncio.gather(*asked)]
            assert [end.reason for end in ends] == [FinishReason.LENGTH] * 4

    run(test())


def test_a_model_is_unloaded_after_its_time_without_use(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millicent.backends.local_keeper._START_GRACE_S", 0.3)

    async def test() -> None:
        async with backend({"tiny": LocalModel(tiny, "home", keep_alive_s=0)}, tmp_path) as (subject, notes):
            assert subject.status().models == {"tiny": ModelState.UNLOADED}
            late = await subject.prepare(request())
            await until_it(lambda: subject.status().models == {"tiny": ModelState.UNLOADED})
            _, end = await read(late.start())  # loads it again
            assert end.reason is FinishReason.LENGTH
            await until_it(lambda: len(notes.overheads) == 4)
            load, unload = OverheadKind.LOAD, OverheadKind.UNLOAD
            assert [overhead.kind for overhead in notes.overheads] == [load, unload, load, unload]

    run(test())


def test_a_model_that_is_to_go_answers_what_it_has_begun_and_is_then_unloaded(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millicent.backends.local_keeper._START_GRACE_S", 0.3)

    async def test() -> None:
        models = {name: LocalModel(tiny, "home", keep_alive_s=None) for name in ("tiny", "other")}
        async with backend(models, tmp_path) as (subject, notes):
            await subject.unload("tiny")  # it isn't there
            await subject.load("other")
            begun = (await subject.prepare(request(max_tokens=200))).start()
            await subject.unload("tiny")
            assert subject.status().models["tiny"] is ModelState.LOADED
            _, end = await read(begun)
            assert (end.reason, end.usage.output_tokens) == (FinishReason.LENGTH, 200)
            await until_it(lambda: subject.status().models["tiny"] is ModelState.UNLOADED)
            await until_it(lambda: notes.overheads[-1].kind is OverheadKind.UNLOAD)
            await ask(subject, request())  # it is to stay again
            held = subject._models["tiny"]
            assert (held.unload_timer, held.leaving) == (None, False)
            assert set(subject.status().models.values()) == {ModelState.LOADED}

    run(test())


def test_who_asks_for_a_model_that_is_to_go_has_the_last_word(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millicent.backends.local_keeper._START_GRACE_S", 600.0)

    async def test() -> None:
        async with backend({"tiny": LocalModel(tiny, "home", keep_alive_s=None)}, tmp_path) as (subject, _):
            await subject.load("tiny")
            call = await subject.prepare(request())
            await subject.unload("tiny")  # in a while: a call may begin
            held = subject._models["tiny"]
            timers = [held.unload_timer]
            await subject.load("tiny")
            timers.append(held.unload_timer)
            assert [timer is None for timer in timers] == [False, True]
            await read(call.start())
            assert (held.unload_timer, held.state) == (None, ModelState.LOADED)
            await subject.unload("tiny")
            assert subject.status().models == {"tiny": ModelState.UNLOADED}

    run(test())


def test_a_model_that_cannot_be_loaded_is_refused_for_a_while(tmp_path: Path) -> None:
    async def test() -> None:
        async with backend({"gone": LocalModel(tmp_path / "gone", "home")}, tmp_path) as (subject, _):
            with pytest.raises(Unavailable) as caught:
                await subject.load("gone")
            assert caught.value.retry_after_s
            await subject.unload("gone")

    run(test())


def test_a_model_that_cannot_be_loaded_fails_its_start_and_costs_later_requests_only_an_error(
    tiny: Path, tmp_path: Path
) -> None:
    async def test() -> None:
        missing = tmp_path / "missing.gguf"
        subject = LocalBackend(
            CONFIG, {"bad": LocalModel(missing, "home", preload=True)}, Notes(), SystemClock(), tmp_path
        )
        with pytest.raises(ModelError, match=r"missing\.gguf"):
            await subject.start()
        assert subject.status().state is EngineState.FAILED
        models = {
            "bad": LocalModel(missing, "home"),
            "narrow": LocalModel(tiny, "home", quantize="int4"),  # its heads of 8 are none for the kernels
            "tiny": LocalModel(tiny, "home"),
        }
        async with backend(models, tmp_path) as (subject, _):
            with pytest.raises(Unavailable, match="quantize = 'int4' needs the compiled kernels"):
                await subject.prepare(request(model="narrow"))
            for _ in range(2):
                with pytest.raises(Unavailable, match=r"missing\.gguf") as refused:
                    await subject.prepare(request(model="bad"))
                assert refused.value.code == "model_unusable"
                assert refused.value.retry_after_s
            assert subject.status().models["bad"] is ModelState.FAILED
            assert "missing.gguf" in subject.status().message
            _, end = await ask(subject, request())
            assert end.reason is FinishReason.LENGTH

    run(test())


def test_deterministic_answers_in_a_crowd_are_those_given_alone(tiny: Path, tmp_path: Path) -> None:
    async def test() -> None:
        config = EngineConfig(dtype="fp32", threads=1, memory_gb=1.0, step_tokens=16, deterministic=True)
        async with backend({"tiny": LocalModel(tiny, "home", preload=True)}, tmp_path, config) as (subject, _):
            prompts = ["the " * size + "inner" for size in (1, 3, 9, 20, 40, 5, 17, 33)]
            alone = [(await ask(subject, request(prompt)))[0] for prompt in prompts]
            together = await asyncio.gather(*(ask(subject, request(prompt)) for prompt in prompts))
            assert [text for text, _ in together] == alone

    run(test())
