from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from millicent.core.clock import SystemClock
from millicent.core.errors import ModelError
from millicent.core.request import Limits, Sampling
from millicent.core.steps import OverheadKind
from millicent.engine.config import EngineConfig
from millicent.engine.connection import Connection, Disconnected
from millicent.engine.loop import Engine
from millicent.engine.protocol import (
    MAX_FRAME_BYTES,
    Cancel,
    Coefficients,
    Costs,
    FromEngine,
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
    encode_frame,
    from_engine_decoder,
)
from millicent.engine.runner import OpenModel, Runner
from support.scripted_model import ScriptedModel, opened


class Gateway:
    """The other end of the socket, for a test."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._file = sock.makefile("rb")

    def send(self, *frames: ToEngine) -> None:
        self.socket.sendall(b"".join(map(encode_frame, frames)))

    def receive(self) -> FromEngine:
        size = int.from_bytes(self._file.read(4), "big")
        frame: FromEngine = from_engine_decoder.decode(self._file.read(size))
        return frame

    def outputs_until(self, done: Callable[[dict[int, Output]], bool]) -> tuple[list[Step], dict[int, Output]]:
        steps: list[Step] = []
        ends: dict[int, Output] = {}
        while not done(ends):
            frame = self.receive()
            assert isinstance(frame, Step)
            steps.append(frame)
            ends |= {output.sequence: output for output in frame.outputs if output.finish}
        return steps, ends

    def close(self) -> None:
        self._file.close()
        self.socket.close()


class Running:
    """An engine on a thread. `problem` is what ended it, when it wasn't Shutdown."""

    def __init__(self, config: EngineConfig, open_model: Callable[[Load], OpenModel], memory_bytes: int) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(60)
        self.gateway = Gateway(ours)
        self.engine = Engine(
            Connection(theirs), config, SystemClock(), memory_bytes=memory_bytes, open_model=open_model
        )
        self.problem: BaseException | None = None
        self._socket = theirs
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.engine.run()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.problem = error
        finally:
            self._socket.close()

    def join(self) -> None:
        self.thread.join(60)
        assert not self.thread.is_alive(), "the engine still runs"


@contextlib.contextmanager
def engine(
    open_model: Callable[[Load], OpenModel] = lambda frame: opened(ScriptedModel()),
    *,
    memory_bytes: int = 1 << 30,
    config: EngineConfig | None = None,
) -> Iterator[Running]:
    running = Running(config or EngineConfig(step_tokens=16, block_tokens=4), open_model, memory_bytes)
    try:
        hello = running.gateway.receive()
        assert isinstance(hello, Hello)
        assert hello.memory_budget_bytes == memory_bytes
        yield running
    finally:
        running.gateway.close()
        running.join()


def load(running: Running, name: str = "scripted", path: str = "none") -> Loaded | LoadFailed:
    running.gateway.send(Load(name, path, "auto"))
    answer = running.gateway.receive()
    assert isinstance(answer, (Loaded, LoadFailed))
    return answer


def submit(sequence: int, prompt: int = 5, max_tokens: int = 10, model: str = "scripted") -> Submit:
    limits = Limits(max_tokens=max_tokens, ignore_eos=True)
    return Submit(sequence, model, tuple(2 + index % 90 for index in range(prompt)), Sampling(temperature=0), limits)


def test_a_model_is_loaded_runs_and_is_unloaded_with_its_time_told() -> None:
    with engine() as running:
        loaded = load(running)
        assert isinstance(loaded, Loaded)
        assert (loaded.context_tokens, loaded.weight_bytes, loaded.kv_bytes) == (256, 1000, 32 * 256 * 10)
        assert (loaded.overhead.kind, loaded.overhead.model) == (OverheadKind.LOAD, "scripted")
        running.gateway.send(submit(1))
        steps, ends = running.gateway.outputs_until(bool)
        assert (ends[1].finish, ends[1].total_output_tokens) == ("length", 10)
        assert [step.record.index for step in steps if step.record] == list(range(10))
        running.gateway.send(submit(2, max_tokens=200), Unload("scripted"))
        _, ends = running.gateway.outputs_until(bool)
        assert ends[2].finish == "error"
        unloaded = running.gateway.receive()
        assert isinstance(unloaded, Unloaded)
        running.gateway.send(submit(3))
        _, ends = running.gateway.outputs_until(bool)
        assert "not loaded" in ends[3].error
        running.gateway.send(Shutdown())
        running.join()
        assert running.problem is None


def test_loading_twice_answers_at_once_and_loads_once() -> None:
    times: list[Load] = []

    def count(frame: Load) -> OpenModel:
        times.append(frame)
        return opened(ScriptedModel())

    with engine(count) as running:
        first, second = load(running), load(running)
        assert isinstance(first, Loaded)
        assert isinstance(second, Loaded)
        assert first.kv_bytes == second.kv_bytes
        assert len(times) == 1


def test_a_model_that_does_not_fit_is_refused_with_what_it_needs_and_what_is_free() -> None:
    def big(frame: Load) -> OpenModel:
        return opened(ScriptedModel(weight_bytes=3_000_000_000))

    with engine(big, memory_bytes=2_000_000_000) as running:
        answer = load(running)
        assert isinstance(answer, LoadFailed)
        assert answer.code == "out_of_memory"
        assert "needs 3.00 GB and 2.00 GB are free" in answer.message


def test_a_file_far_over_the_budget_is_refused_without_reading_it(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    with file.open("wb") as sparse:
        sparse.truncate(5_000_000_000)

    def never(frame: Load) -> OpenModel:
        raise AssertionError("it was read")

    with engine(never, memory_bytes=2_000_000_000) as running:
        answer = load(running, path=str(file))
        assert isinstance(answer, LoadFailed)
        assert answer.code == "out_of_memory"


def test_models_share_one_budget_and_each_leaves_room_for_another() -> None:
    def hungry(frame: Load) -> OpenModel:
        return opened(ScriptedModel(context_tokens=64, weight_bytes=100_000, kv_bytes_per_token=1000))

    config = EngineConfig(step_tokens=16, block_tokens=4, max_sequences=1000)
    with engine(hungry, memory_bytes=2_000_000, config=config) as running:
        answers = [load(running, f"model{number}") for number in range(12)]
    loaded = [answer for answer in answers if isinstance(answer, Loaded)]
    assert sum(answer.weight_bytes + answer.kv_bytes for answer in loaded) <= 2_000_000
    assert len(loaded) >= 3
    assert isinstance(answers[-1], LoadFailed)
    assert all(answer.context_tokens == 64 for answer in loaded)


@pytest.mark.parametrize(
    ("problem", "code", "message"),
    [
        (ModelError("x.gguf: truncated; fetch it again"), "model_unusable", "x.gguf: truncated; fetch it again"),
        (ValueError("odd\nfile"), "model_unusable", "none: cannot be loaded (ValueError: odd file)"),
        (MemoryError(), "out_of_memory", "no memory left"),
    ],
)
def test_a_model_that_cannot_be_loaded_costs_only_itself(problem: Exception, code: str, message: str) -> None:
    def fail(frame: Load) -> OpenModel:
        if frame.model == "bad":
            raise problem
        return opened(ScriptedModel())

    with engine(fail) as running:
        answer = load(running, "bad")
        assert isinstance(answer, LoadFailed)
        assert (answer.code, message in answer.message) == (code, True)
        assert isinstance(load(running), Loaded)


def test_two_models_take_turns() -> None:
    def named(frame: Load) -> OpenModel:
        model = ScriptedModel()
        model.name = frame.model
        return opened(model)

    with engine(named) as running:
        load(running, "a")
        load(running, "b")
        running.gateway.send(submit(1, model="a", max_tokens=50), submit(2, model="b", max_tokens=50))
        steps, _ = running.gateway.outputs_until(lambda ends: len(ends) == 2)
    models = [step.record.model for step in steps if step.record]
    assert models.count("a") == models.count("b") == 50
    assert "aa" not in "".join(models[10:-10])


def test_a_cancel_is_answered_before_the_next_step_of_a_long_prefill() -> None:
    started, go_on = threading.Event(), threading.Event()
    seen: list[int] = []

    def hold(pieces: object) -> None:
        seen.append(1)
        if len(seen) == 3:
            started.set()
            assert go_on.wait(20)

    with engine(lambda frame: opened(ScriptedModel(before=hold))) as running:
        load(running)
        running.gateway.send(submit(1, prompt=200))
        assert started.wait(20)
        running.gateway.send(Cancel(1))
        go_on.set()
        steps, ends = running.gateway.outputs_until(bool)
        assert ends[1].finish == "cancelled"
        assert len(seen) == 3
        assert sum(work.prefill_rows for step in steps if step.record for work in step.record.sequences) == 96


def test_two_hundred_arrivals_and_cancellations_leave_all_blocks_free() -> None:
    choose = random.Random(0)
    with engine() as running:
        load(running)
        live: set[int] = set()
        for number in range(1, 201):
            running.gateway.send(submit(number, choose.randint(1, 80), choose.randint(1, 60)))
            live.add(number)
            if choose.random() < 0.7:
                running.gateway.send(Cancel(choose.choice(sorted(live))))
        for number in choose.sample(sorted(live), 100):
            running.gateway.send(Cancel(number))
        _, ends = running.gateway.outputs_until(lambda ends: len(ends) == 200)
        assert {end.finish for end in ends.values()} == {"cancelled", "length"}
        running.gateway.send(Shutdown())
        running.join()
        runner = running.engine._runners["scripted"]
        assert isinstance(runner, Runner)
        scheduler = runner.scheduler
        assert (len(scheduler), scheduler.pool.used) == (0, 0)


def test_the_engine_leaves_when_the_gateway_is_gone() -> None:
    with engine() as running:
        load(running)
        running.gateway.send(submit(1, max_tokens=200))
        running.gateway.receive()
        running.gateway.close()
        running.join()
        assert isinstance(running.problem, Disconnected)


@pytest.mark.parametrize(
    "data", [b"\0\0\0\5hello", (MAX_FRAME_BYTES + 1).to_bytes(4, "big")], ids=["garbage", "oversized"]
)
def test_the_engine_leaves_when_what_it_reads_are_no_frames(data: bytes) -> None:
    with engine() as running:
        running.gateway.socket.sendall(data)
        running.join()
        assert isinstance(running.problem, Disconnected)


def test_a_gateway_that_does_not_read_pauses_the_engine_and_is_still_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millicent.engine.connection._CONGESTED_BYTES", 20_000)
    model = ScriptedModel(context_tokens=8000, kv_bytes_per_token=1)
    with engine(lambda frame: opened(model), config=EngineConfig(max_sequences=64)) as running:
        load(running)
        for number in range(1, 65):
            running.gateway.send(submit(number, 2, 7000))
        quiet = threading.Event()
        before = -1
        while len(model.batches) != before:  # until it no longer steps
            before = len(model.batches)
            quiet.wait(0.3)
        assert before < 7000
        assert len(running.engine._connection._outgoing) < 200_000
        for number in range(1, 65):
            running.gateway.send(Cancel(number))
        _, ends = running.gateway.outputs_until(lambda ends: len(ends) == 64)
        assert {end.finish for end in ends.values()} == {"cancelled"}


def test_an_engine_at_rest_tells_of_blocks_that_nobody_holds(caplog: pytest.LogCaptureFixture) -> None:
    with engine() as running:
        load(running)
        running.gateway.send(submit(1, prompt=60), submit(2, prompt=60), Cancel(1), submit(3))
        running.gateway.outputs_until(lambda ends: len(ends) == 3)
        running.gateway.send(Shutdown())
        running.join()
        assert "held by nobody" not in caplog.text
    with engine() as running:
        load(running)
        running.gateway.send(submit(1))
        running.gateway.outputs_until(bool)
        runner = running.engine._runners["scripted"]
        assert isinstance(runner, Runner)
        runner.scheduler.pool.take(2)
        running.gateway.send(submit(2))
        running.gateway.outputs_until(bool)  # after which it comes to rest, and then reads on
        running.gateway.send(Shutdown())
        running.join()
    assert "2 KV blocks of scripted are held by nobody" in caplog.text


def test_what_steps_take_is_told_to_the_scheduler_of_that_model() -> None:
    costs = Coefficients(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    with engine() as running:
        load(running)
        running.gateway.send(Costs("another", costs), submit(1))
        running.gateway.outputs_until(bool)
        runner = running.engine._runners["scripted"]
        assert isinstance(runner, Runner)
        assert runner.scheduler.costs is None
        running.gateway.send(Costs("scripted", costs), submit(2))
        running.gateway.outputs_until(bool)
        assert runner.scheduler.costs == costs
