"""What the gateway makes of an engine process that misbehaves."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import millicent
from millicent.backends.local import EngineState, LocalBackend, LocalModel, ModelState
from millicent.core.chunks import End, FinishReason, Text
from millicent.core.clock import SystemClock
from millicent.core.errors import EngineCrashed, InvalidRequest, ModelNotFound, Unavailable
from millicent.core.protocols import Run
from millicent.core.request import Limits, Request, Sampling
from millicent.core.steps import DeviceState, OverheadKind
from millicent.core.usage import Leaf
from millicent.engine.config import EngineConfig
from millicent.engine.protocol import MAX_FRAME_BYTES
from support import frames_by_script
from support.observers import Notes
from support.tiny_models import write_tiny_model
from support.waiting import until_it

ANSWER = (["load"], ["submit"], ["text", "one "], ["text", "two"])


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(millicent.__file__).parents[1]))


def scripted(script: Any, model: Path, home: Path, notes: Notes, *, names: tuple[str, ...] = ("m",)) -> LocalBackend:
    command = (sys.executable, str(frames_by_script.__file__), "--script", json.dumps(script))
    models = {name: LocalModel(model, "home", preload=name == "m") for name in names}
    return LocalBackend(EngineConfig(), models, notes, SystemClock(), home, command=command)


@asynccontextmanager
async def playing(
    script: Any, model: Path, home: Path, *, names: tuple[str, ...] = ("m",)
) -> AsyncIterator[tuple[LocalBackend, Notes]]:
    notes = Notes()
    subject = scripted(script, model, home, notes, names=names)
    await subject.start()
    try:
        yield subject, notes
    finally:
        await subject.close()


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def kill(subject: LocalBackend) -> None:
    assert subject._engine is not None
    subject._engine._process.kill()


def request(
    model: str = "m", prompt: str | tuple[int, ...] = "hello", max_tokens: int | None = 20, seed: int | None = None
) -> Request:
    return Request(
        id="r",
        dialect="test",
        model=model,
        prompt=prompt,
        sampling=Sampling(seed=seed),
        limits=Limits(max_tokens=max_tokens),
    )


async def read(run: Run) -> tuple[list[Text], End]:
    texts: list[Text] = []
    async for chunk in run:
        if isinstance(chunk, End):
            return texts, chunk
        assert isinstance(chunk, Text)
        texts.append(chunk)
    raise AssertionError("it ended without an End")


def test_text_that_waits_for_a_slow_reader_is_merged(tiny: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with playing([*ANSWER, ["end"]], tiny, tmp_path) as (subject, notes):
            running = (await subject.prepare(request())).start()
            await until_it(lambda: len(notes.steps) == 3)
            texts, end = await read(running)
            assert texts == [Text("one two", 3)]
            assert end.usage.tokens(Leaf.OUTPUT_TEXT) == 3

    run(test())


def test_a_deep_folder_for_temporary_files_keeps_no_engine_from_starting(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))

    async def test() -> None:
        async with playing([*ANSWER, ["end"]], tiny, tmp_path) as (subject, _):
            _, end = await read((await subject.prepare(request())).start())
            assert end.error is None

    run(test())


def test_nobody_reads_an_end_before_its_step_was_observed(tiny: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with playing([*ANSWER, ["end"]], tiny, tmp_path) as (subject, notes):
            produced = 0
            async for chunk in (await subject.prepare(request())).start():
                produced = produced + chunk.tokens if isinstance(chunk, Text) else 3
                assert len(notes.steps) >= produced
            assert produced == 3

    run(test())


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (["bytes", b"\0\0\0\5hello".hex()], "doesn't decode"),
        (["bytes", (MAX_FRAME_BYTES + 1).to_bytes(4, "big").hex()], "over the limit"),
        (["bytes", b"\0\0\0\2\x92\xa5".hex()], "doesn't decode"),
        (["exit", 3], "exited with status 3"),
    ],
    ids=["garbage", "oversized", "truncated", "exit"],
)
def test_an_engine_that_leaves_or_talks_nonsense_is_replaced(
    act: list[Any], says: str, tiny: Path, tmp_path: Path
) -> None:
    async def test() -> None:
        async with playing([*ANSWER, act], tiny, tmp_path) as (subject, notes):
            call = await subject.prepare(request())
            texts, end = await read(call.start())
            assert "".join(text.text for text in texts) == "one two"
            assert end.reason is FinishReason.ERROR
            assert isinstance(end.error, EngineCrashed)
            assert says in end.error.message
            assert end.usage.tokens(Leaf.INPUT_FRESH) == call.input_tokens
            assert end.usage.tokens(Leaf.OUTPUT_TEXT) == 2
            last = notes.steps[-1]
            ((start_ns, wall_ns),) = notes.losses
            assert start_ns == last.start_ns + last.wall_ns
            assert notes.states[-1] == (DeviceState.DOWN, start_ns + wall_ns)
            await until_it(lambda: subject.status().state is EngineState.READY)
            _, end = await read((await subject.prepare(request())).start())
            assert isinstance(end.error, EngineCrashed), "the script plays again"

    run(test())


def test_an_idle_crash_loses_no_time(tiny: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with playing([["load"]], tiny, tmp_path) as (subject, notes):
            kill(subject)
            await until_it(lambda: len(notes.states) == 4)
            assert notes.losses == []
            at = [at_ns for _, at_ns in notes.states]
            assert at == sorted(at)
            assert [state for state, _ in notes.states] == [DeviceState.DOWN, DeviceState.UP] * 2

    run(test())


def test_an_engine_that_never_comes_up_fails_the_start_and_names_its_log(tiny: Path, tmp_path: Path) -> None:
    async def test() -> None:
        for command in ((sys.executable, "-c", "raise SystemExit('no torch here')"), ("/nonexistent/engine",)):
            notes = Notes()
            models = {"m": LocalModel(tiny, "home")}
            subject = LocalBackend(EngineConfig(), models, notes, SystemClock(), tmp_path, command=command)
            with pytest.raises(Unavailable, match=r"engine"):
                await subject.start()
            assert subject.status().state is EngineState.FAILED
            assert [state for state, _ in notes.states] == [DeviceState.DOWN]
        assert "no torch here" in (tmp_path / "logs" / "engine-cpu.log").read_text()

    run(test())


def test_a_crash_while_loading_is_lost_time_and_a_retryable_error(tiny: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with playing([["load"], ["unload"], ["exit", 1]], tiny, tmp_path, names=("m", "n")) as (subject, notes):
            # The script reads up to an Unload that never comes, so the load of n is never answered.
            waiting = asyncio.create_task(subject.prepare(request("n")))
            await until_it(lambda: subject.status().models["n"] is ModelState.LOADING)
            kill(subject)
            with pytest.raises(EngineCrashed, match="retry"):
                await waiting
            assert len(notes.losses) == 1
            assert subject.status().models["n"] is ModelState.UNLOADED

    run(test())


def test_an_engine_that_hangs_in_a_step_is_ended_and_replaced(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script reads what it is given and never says anything more."""
    monkeypatch.setattr("millicent.backends.local.LOOK_S", 0.01)
    monkeypatch.setattr("millicent.backends.engine_silence.LOOK_S", 1000.0)

    async def test() -> None:
        async with playing([["load"], ["submit"]], tiny, tmp_path) as (subject, notes):
            before = subject.status().pid
            _, end = await read((await subject.prepare(request())).start())
            assert isinstance(end.error, EngineCrashed)
            assert "the engine process said nothing for 1000 s in a step, as if it hung, and was ended" in str(
                end.error
            )
            assert len(notes.losses) == 1
            await until_it(lambda: subject.status().state is EngineState.READY)
            assert subject.status().pid not in (None, before)
            assert subject.status().models == {"m": ModelState.LOADED}

    run(test())


def test_a_model_without_room_takes_an_idle_ones_and_says_when_none_gets_idle(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millicent.backends.local_keeper._ROOM_WAIT_S", 0.0)
    script = [["load"], ["load", "out_of_memory"], ["unload"], ["load"], ["submit"], ["text", "x"]]

    async def test() -> None:
        async with playing(script, tiny, tmp_path, names=("m", "n")) as (subject, notes):
            running = (await subject.prepare(request("n"))).start()
            assert subject.status().models == {"m": ModelState.UNLOADED, "n": ModelState.LOADED}
            kinds = [overhead.kind for overhead in notes.overheads]
            assert kinds == [OverheadKind.LOAD, OverheadKind.UNLOAD, OverheadKind.LOAD]
            await until_it(lambda: notes.steps)
            running.cancel()

    run(test())

    async def busy() -> None:
        script = [["load"], ["submit"], ["text", "x"], ["load", "out_of_memory"]]
        async with playing(script, tiny, tmp_path, names=("m", "n")) as (subject, notes):
            (await subject.prepare(request("m"))).start()
            await until_it(lambda: notes.steps)
            with pytest.raises(Unavailable, match="in use") as refused:
                await subject.prepare(request("n"))
            assert refused.value.retry_after_s

    run(busy())


def test_a_model_that_was_loaded_for_a_call_stays_until_that_call_has_begun(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else two models that fit one at a time take each other's place, and neither answers."""
    monkeypatch.setattr("millicent.backends.local_keeper._ROOM_WAIT_S", 0.0)
    script = [["load"], ["load", "out_of_memory"], ["submit"], ["text", "x"], ["end"]]
    script += [["load", "out_of_memory"], ["unload"], ["load"]]

    async def test() -> None:
        async with playing(script, tiny, tmp_path, names=("m", "n")) as (subject, _):
            prepared = await subject.prepare(request("m"))
            with pytest.raises(Unavailable, match="in use"):
                await subject.prepare(request("n"))
            assert isinstance([chunk async for chunk in prepared.start()][-1], End)
            await subject.prepare(request("n"))
            assert subject.status().models == {"m": ModelState.UNLOADED, "n": ModelState.LOADED}

    run(test())


def test_two_busy_models_with_room_for_one_take_turns(tiny: Path, tmp_path: Path) -> None:
    script = [["load"], ["submit"], ["text", "x"], ["load", "out_of_memory"], ["cancel"], ["unload"], ["load"]]
    script += [["load", "out_of_memory"], ["submit"], ["text", "y"], ["end"], ["unload"], ["load"]]

    async def test() -> None:
        async with playing(script, tiny, tmp_path, names=("m", "n")) as (subject, notes):
            models = subject._models
            first = (await subject.prepare(request("m"))).start()
            await until_it(lambda: notes.steps)
            waits = asyncio.create_task(subject.prepare(request("n")))
            await until_it(lambda: models["m"].gives_way_to)
            behind = asyncio.create_task(subject.prepare(request("m")))  # else n would never have its turn
            await asyncio.sleep(0)
            assert not waits.done()
            first.cancel()
            its_turn = await waits
            assert not behind.done()
            await until_it(lambda: models["n"].gives_way_to)
            texts, end = await read(its_turn.start())
            assert (texts[0].text, end.error) == ("y", None)
            assert (await behind).served_model == "m"
            assert subject.status().models == {"m": ModelState.LOADED, "n": ModelState.UNLOADED}

    run(test())


def test_nobody_gives_way_to_a_model_that_nobody_waits_for_any_more(tiny: Path, tmp_path: Path) -> None:
    script = [["load"], ["submit"], ["text", "x"], ["load", "out_of_memory"], ["submit"], ["text", "y"], ["end"]]

    async def test() -> None:
        async with playing(script, tiny, tmp_path, names=("m", "n")) as (subject, notes):
            (await subject.prepare(request("m"))).start()
            await until_it(lambda: notes.steps)
            gone = asyncio.create_task(subject.prepare(request("n")))
            await until_it(lambda: subject._models["m"].gives_way_to)
            behind = asyncio.create_task(subject.prepare(request("m")))
            gone.cancel()
            texts, _ = await read((await behind).start())
            assert texts[0].text == "y"
            assert subject.status().models == {"m": ModelState.LOADED, "n": ModelState.UNLOADED}

    run(test())


def test_a_crash_while_a_model_waits_for_room_ends_the_waiting(tiny: Path, tmp_path: Path) -> None:
    script = [["load"], ["submit"], ["text", "x"], ["load", "out_of_memory"]]

    async def test() -> None:
        async with playing(script, tiny, tmp_path, names=("m", "n")) as (subject, notes):
            (await subject.prepare(request("m"))).start()
            await until_it(lambda: notes.steps)
            waits = asyncio.create_task(subject.prepare(request("n")))
            await until_it(lambda: subject._models["m"].gives_way_to)
            kill(subject)
            with pytest.raises(EngineCrashed, match="waited for room; retry"):
                await waits

    run(test())


def test_a_failed_load_is_not_tried_again_at_once(tiny: Path, tmp_path: Path) -> None:
    async def test() -> None:
        script = [["load"], ["load", "model_unusable"]]
        async with playing(script, tiny, tmp_path, names=("m", "n")) as (subject, _):
            for _ in range(3):  # a second Load would never be answered
                with pytest.raises(Unavailable, match="cannot be used"):
                    await subject.prepare(request("n"))

    run(test())


def test_a_caller_who_gives_up_does_not_undo_the_load_that_others_wait_for(tiny: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with playing([["load"], ["load"]], tiny, tmp_path, names=("m", "n")) as (subject, _):
            first = asyncio.create_task(subject.prepare(request("n")))
            second = asyncio.create_task(subject.prepare(request("n")))
            await asyncio.sleep(0)
            first.cancel()
            assert (await second).served_model == "n"

    run(test())


def test_a_run_cancelled_before_the_engine_has_it_ends_at_once(tiny: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with playing([["load"]], tiny, tmp_path) as (subject, _):
            call = await subject.prepare(request())
            kill(subject)
            await until_it(lambda: subject.status().pid is None)
            running = call.start()
            running.cancel()
            _, end = await read(running)
            assert end.reason is FinishReason.CANCELLED
            assert (end.usage.input_tokens, end.usage.output_tokens) == (0, 0)

    run(test())


def test_a_run_begun_while_the_engine_is_down_says_retry(tiny: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with playing([["load"]], tiny, tmp_path) as (subject, _):
            call = await subject.prepare(request())
            kill(subject)
            await until_it(lambda: subject.status().pid is None)
            _, end = await read(call.start())
            assert isinstance(end.error, Unavailable)
            assert end.error.retry_after_s

    run(test())


def test_an_engine_busy_in_a_long_step_is_made_to_leave(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millicent.backends.engine_process._EXIT_TIMEOUT_S", 0.2)

    async def test() -> None:
        async with playing([["load"]], tiny, tmp_path) as (subject, _):
            engine = subject._engine
            assert engine is not None
            engine._process.send_signal(19)  # SIGSTOP: it hears nothing
        assert engine._process.returncode == -9

    run(test())


def test_closing_ends_what_runs(tiny: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with playing(ANSWER, tiny, tmp_path) as (subject, notes):
            running = (await subject.prepare(request())).start()
            await until_it(lambda: notes.steps)
        _, end = await read(running)
        assert isinstance(end.error, Unavailable)
        assert subject.status().state is EngineState.STOPPED

    run(test())


def test_what_cannot_run_is_refused_before_anything_is_spent(tiny: Path, tmp_path: Path) -> None:
    """The script's model has a context of 64 tokens."""

    async def test() -> None:
        async with playing([["load"]], tiny, tmp_path) as (subject, notes):
            with pytest.raises(ModelNotFound, match="available: m"):
                await subject.prepare(request("other"))
            with pytest.raises(InvalidRequest, match=r"64 tokens leave no room.*context of 64") as refused:
                await subject.prepare(request(prompt=(5,) * 64))
            assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")
            with pytest.raises(InvalidRequest, match="token 100000 is not one"):
                await subject.prepare(request(prompt=(5, 100_000)))
            with pytest.raises(InvalidRequest, match="no tokens"):
                await subject.prepare(request(prompt=""))
            with pytest.raises(InvalidRequest, match="seed"):
                await subject.prepare(request(seed=2**64))
            with pytest.raises(InvalidRequest, match="context of 64"):
                await subject.prepare(request(prompt="a b " * 6_000))  # encoded on another thread
            for max_tokens in (500, 14, None):
                call = await subject.prepare(request(prompt=(5,) * 50, max_tokens=max_tokens))
                assert (call.input_tokens, call.max_output_tokens) == (50, 14)
            assert notes.steps == []

    run(test())


def test_a_log_that_has_grown_large_becomes_the_one_before(tiny: Path, tmp_path: Path) -> None:
    async def test() -> None:
        log = tmp_path / "logs" / "engine-cpu.log"
        log.parent.mkdir()
        log.write_bytes(b"x" * ((4 << 20) + 1))
        async with playing([["load"]], tiny, tmp_path):
            assert log.stat().st_size < 1 << 20
            assert log.with_suffix(".log.1").stat().st_size == (4 << 20) + 1

    run(test())
