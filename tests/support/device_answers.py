"""What a decoder on the device says through its runner, and what the plain one says in float64 through its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from millicent.core.clock import SystemClock
from millicent.core.request import Limits, Sampling
from millicent.engine.batch import Model
from millicent.engine.config import EngineConfig
from millicent.engine.cuda.ahead import AheadRunner
from millicent.engine.cuda.decoder import DeviceDecoder
from millicent.engine.protocol import Submit
from millicent.engine.runner import OpenModel, Runner
from millicent.engine.weights import Checkpoint
from support.device_decoders import BLOCKS, CONFIG, in_float64
from support.scripted_model import Letters


def submits(
    prompts: Mapping[int, Sequence[int]], tokens: int, sampling: Mapping[int, Sampling] | None = None
) -> list[Submit]:
    """Greedy, but for those with a sampling of their own."""
    limits = Limits(max_tokens=tokens, ignore_eos=True)
    return [
        Submit(number, "", tuple(prompt), (sampling or {}).get(number, Sampling(temperature=0)), limits)
        for number, prompt in prompts.items()
    ]


def said_by_device(
    model: DeviceDecoder, frames: Sequence[Submit], config: EngineConfig = CONFIG, blocks: int = BLOCKS
) -> dict[int, str]:
    """The model's cache is made by the runner."""
    runner = AheadRunner(model, _opened(model), config, blocks=blocks, wake=lambda: None)
    return _said(runner, frames)


def said_by_reference(
    checkpoint: Checkpoint, frames: Sequence[Submit], config: EngineConfig = CONFIG, blocks: int = BLOCKS
) -> dict[int, str]:
    return _said(Runner(_opened(in_float64(checkpoint)), config, blocks=blocks), frames)


def _opened(model: Model) -> OpenModel:
    return OpenModel(model, frozenset(), Letters)


def _said(runner: Runner, frames: Sequence[Submit]) -> dict[int, str]:
    """A letter for each token."""
    texts = {frame.sequence: "" for frame in frames}
    for frame in frames:
        assert runner.submit(frame) is None
    clock, steps = SystemClock(), 0
    while runner.busy:
        for output in runner.step("cuda:0", steps, clock, ahead=True).outputs:
            assert not output.error, output.error
            texts[output.sequence] += output.text
        steps += 1
    return texts
