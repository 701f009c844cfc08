"""Models that plan ahead, in an engine with others."""

from __future__ import annotations

import contextlib
import functools
import itertools
import socket
import threading
from collections.abc import Iterator

from millicent.core.clock import ManualClock
from millicent.core.request import Limits, Sampling
from millicent.engine.config import EngineConfig
from millicent.engine.connection import Connection
from millicent.engine.cuda.ahead import AheadRunner
from millicent.engine.loop import Engine
from millicent.engine.protocol import (
    FromEngine,
    Load,
    Loaded,
    LoadFailed,
    Shutdown,
    Step,
    Submit,
    ToEngine,
    Unload,
    Unloaded,
    encode_frame,
    from_engine_decoder,
)
from millicent.engine.runner import OpenModel
from support.launched_model import LaunchedModel
from support.scripted_model import opened

CLOCK = ManualClock()


def open_model(frame: Load) -> OpenModel:
    model = LaunchedModel(CLOCK)
    model.name = frame.model
    working_bytes = 500_000 if frame.path == "wide" else 0
    words = opened(model).words
    return OpenModel(
        model, frozenset(), words, make_runner=functools.partial(AheadRunner, model), working_bytes=working_bytes
    )


@contextlib.contextmanager
def engine() -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    config = EngineConfig(device="cuda:0", block_tokens=4, step_tokens=16, calibrate=False)
    subject = Engine(Connection(theirs), config, CLOCK, memory_bytes=600_000, open_model=open_model)
    thread = threading.Thread(target=subject.run)
    thread.start()
    try:
        yield ours
    finally:
        ours.sendall(encode_frame(Shutdown()))
        thread.join(60)
        theirs.close()
        ours.close()


def frames_of(sock: socket.socket) -> Iterator[FromEngine]:
    file = sock.makefile("rb")
    while size := file.read(4):
        yield from_engine_decoder.decode(file.read(int.from_bytes(size, "big")))


def send(sock: socket.socket, *frames: ToEngine) -> None:
    sock.sendall(b"".join(map(encode_frame, frames)))


def submit(sequence: int, model: str, tokens: int = 30) -> Submit:
    return Submit(sequence, model, (5, 6, 7), Sampling(temperature=0), Limits(max_tokens=tokens, ignore_eos=True))


def test_steps_loads_and_unloads_never_overlap() -> None:
    with engine() as sock:
        frames = frames_of(sock)
        next(frames)
        send(
            sock, Load("one", "", "auto"), submit(1, "one"), Load("two", "", "auto"), submit(2, "two"), submit(3, "one")
        )
        spans, ended, steps = [], 0, set()
        while ended < 3:
            frame = next(frames)
            if isinstance(frame, Loaded):
                spans.append((frame.overhead.start_ns, frame.overhead.wall_ns))
            assert isinstance(frame, Loaded | Step)
            if isinstance(frame, Step) and frame.record:
                spans.append((frame.record.start_ns, frame.record.wall_ns))
                steps.add((frame.record.index, frame.record.device, frame.record.model))
                ended += sum(bool(output.finish) for output in frame.outputs)
        send(sock, submit(4, "one", 200), Unload("one"))
        while not isinstance(frame := next(frames), Unloaded):
            assert isinstance(frame, Step)
            if frame.record:
                spans.append((frame.record.start_ns, frame.record.wall_ns))
        spans.append((frame.overhead.start_ns, frame.overhead.wall_ns))
    assert all(after >= start + wall for (start, wall), (after, _) in itertools.pairwise(spans))
    assert {model for _, _, model in steps} == {"one", "two"}
    assert {device for _, device, _ in steps} == {"cuda:0"}


def test_what_passes_need_is_kept_free() -> None:
    with engine() as sock:
        frames = frames_of(sock)
        next(frames)
        send(sock, Load("wide", "wide", "auto"), Unload("wide"), Load("narrow", "", "auto"))
        found = [frame for frame in itertools.islice(frames, 3) if isinstance(frame, Loaded | LoadFailed)]
    kv = [frame.kv_bytes for frame in found if isinstance(frame, Loaded)]
    assert len(kv) == 2
    assert kv[0] < kv[1]
