"""Section `host` of gpu.py: what a step costs the host, beside a device that does nothing. Needs no GPU, no Triton."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from millicent.core.clock import SystemClock
from millicent.core.request import Limits, Sampling
from millicent.engine.batch import Piece
from millicent.engine.config import EngineConfig
from millicent.engine.cuda.ahead import AheadRunner, Landed
from millicent.engine.cuda.passes import Layout, PassWriter, Shapes, prepared_shapes
from millicent.engine.protocol import Submit, encode_frame
from millicent.engine.runner import OpenModel
from millicent.engine.sampler import Draw

_SEQUENCES, _STEP_TOKENS, _TILE_ROWS, _TABLE = 256, 2048, 64, 2560


class _Flight:
    def __init__(self, count: int) -> None:
        self._count = count

    def redraw(self, rows: Sequence[int], draws: Sequence[Draw], changes: Any) -> None:
        """There are no logits."""

    def bring(self, scored: Sequence[int]) -> None:
        """It is there."""

    def reached(self) -> bool:
        return True

    def land(self, before: Any) -> Landed:
        del before
        return Landed([5] * self._count, {}, 1000)


class _NoDevice:
    """Passes are written as for a device, and that is all."""

    name = "none"
    context_tokens = 40_960
    vocabulary_size = 151_936
    eos_tokens: frozenset[int] = frozenset()
    weight_bytes = kv_bytes_per_token = working_bytes = 0
    step_tokens = _STEP_TOKENS

    def allocate(self, blocks: int, block_tokens: int) -> None:
        del blocks
        tiles = _STEP_TOKENS // _TILE_ROWS + _SEQUENCES
        layout = Layout(_STEP_TOKENS + _SEQUENCES, _SEQUENCES, tiles, _SEQUENCES + 64, _SEQUENCES * _TABLE)
        shapes = Shapes(prepared_shapes(_SEQUENCES, _STEP_TOKENS, _TILE_ROWS))
        self._writer = PassWriter(layout, shapes, block_tokens=block_tokens, tile_rows=_TILE_ROWS, tiled=False)
        self._into = np.zeros(layout.size, dtype=np.int32)

    def forward(self, pieces: Sequence[Piece]) -> Any:
        raise AssertionError(f"nothing asks for logits of {len(pieces)} pieces")

    def launch(self, pieces: Sequence[Piece], draws: Sequence[Draw]) -> _Flight:
        self._writer.write(pieces, draws, self._into)
        return _Flight(len(draws))

    def is_lost(self, error: Exception) -> bool:
        del error
        return False


class _OneLetter:
    stop = ""

    def __init__(self, stops: object) -> None:
        del stops

    def push(self, token: int, *, heed_stops: bool = True) -> str:
        del token, heed_stops
        return "x"

    def finish(self) -> str:
        return ""


def step_ms(sequences: int, temperature: float) -> float:
    """The median of 300 steps in which all decode, their frames encoded."""
    model = _NoDevice()
    config = EngineConfig(device="cuda:0", max_sequences=_SEQUENCES, step_tokens=_STEP_TOKENS)
    opened = OpenModel(model, frozenset(), _OneLetter)
    runner = AheadRunner(model, opened, config, blocks=60_000, wake=lambda: None)
    for number in range(sequences):
        prompt = tuple((number + i) % 1000 for i in range(500))
        limits = Limits(max_tokens=600, ignore_eos=True)
        runner.submit(Submit(number, "", prompt, Sampling(temperature=temperature, seed=number), limits))
    clock, took = SystemClock(), []
    for index in range(500):
        start = time.perf_counter()
        encode_frame(runner.step("cuda:0", index, clock, ahead=True))
        took.append(time.perf_counter() - start)
    return 1000 * statistics.median(took[200:])
