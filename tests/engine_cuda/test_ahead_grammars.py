"""Grammars decide after each token what may come: the device is told once the token before is read."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from millicent.core.clock import ManualClock
from millicent.core.request import Limits, Sampling
from millicent.engine.config import EngineConfig
from millicent.engine.cuda.ahead import AheadRunner
from millicent.engine.protocol import Output, Submit
from millicent.engine.runner import OpenModel, Runner
from millicent.text.grammars import vocabulary
from support.launched_model import LaunchedModel
from support.scripted_model import EOS, ScriptedModel

if TYPE_CHECKING:
    import llguidance

PLATE = 'start: /[A-Z]{3}-[0-9]{4}/ ("!" | "?")'
CONFIG = EngineConfig(step_tokens=16, block_tokens=4)


def character(token: int) -> str:
    return chr(token + 30) if token > EOS else ""


def characters(size: int, ends: Iterable[int]) -> llguidance.LLTokenizer:
    words = [character(token).encode() for token in range(size)]
    return vocabulary(words, [b"<pad>", b"<end>"] + [b""] * (size - 2), ends)


class Characters:
    stop = ""

    def push(self, token: int, *, heed_stops: bool = True) -> str:
        return character(token)

    def finish(self) -> str:
        return ""


def opened(model: ScriptedModel) -> OpenModel:
    return OpenModel(model, frozenset({EOS}), lambda stop: Characters(), characters)


def run(runner: Runner, frames: list[Submit], clock: ManualClock, woken: threading.Event) -> dict[int, str]:
    outputs: list[Output] = []
    for frame in frames:
        assert runner.submit(frame) is None
    deadline = time.monotonic() + 60
    while sum(bool(output.finish) for output in outputs) < len(frames):
        outputs += runner.take_compiled()
        if runner.busy:
            outputs += runner.step("cuda:0", 0, clock, ahead=True).outputs
        else:
            woken.wait(1)
        assert time.monotonic() < deadline
    assert not any(output.error for output in outputs)
    return {
        frame.sequence: "".join(output.text for output in outputs if output.sequence == frame.sequence)
        for frame in frames
    }


def test_answers_under_grammars_are_those_of_the_runner_that_waits() -> None:
    frames = [
        Submit(
            number,
            "scripted",
            tuple((number * 31 + index * 7) % 90 + 2 for index in range(9)),
            Sampling(seed=number, temperature=temperature, repetition_penalty=penalty),
            Limits(max_tokens=20, ignore_eos=not grammar),
            grammar=grammar,
        )
        for number, (grammar, temperature, penalty) in enumerate(
            [(PLATE, 0, 1.0), (PLATE, 2, 1.0), ("", 1, 1.0), (PLATE, 1, 1.5), ("", 0, 1.0)], 1
        )
    ]
    woken, model = threading.Event(), LaunchedModel(context_tokens=64)
    waits = Runner(opened(ScriptedModel(context_tokens=64)), CONFIG, blocks=200, wake=woken.set)
    ahead = AheadRunner(model, opened(model), CONFIG, blocks=200, wake=woken.set)
    expected = run(waits, frames, ManualClock(), woken)
    found = run(ahead, frames, model.clock, woken)
    assert found == expected
    assert all(re.fullmatch(r"[A-Z]{3}-[0-9]{4}[!?]", found[number]) for number in (1, 2, 4))
    # The next pass runs before the token is known, and its draw waits for that.
    at = {event: place for place, event in enumerate(model.log)}
    redrawn = [n for n in range(1, len(model.batches)) if f"redraw {n}" in at]
    assert any(at[f"launch {n}"] < at[f"land {n - 1}"] < at[f"redraw {n}"] for n in redrawn)
