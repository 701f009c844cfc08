"""Calibration runs a few passes of every kind, within its time, and leaves a cache that nobody's answer depends on."""

from collections.abc import Sequence
from pathlib import Path

import torch

from millicent.core.clock import ManualClock, SystemClock
from millicent.core.steps import OverheadKind
from millicent.engine.batch import Piece
from millicent.engine.calibration import BUDGET_NS, calibrate
from millicent.engine.config import EngineConfig
from millicent.engine.models import load_model
from support.tiny_models import write_tiny_model


class TimedModel:
    """Takes as long as it is told to, on a clock that only it moves."""

    name = "timed"
    context_tokens = 4096
    vocabulary_size = 50
    eos_tokens: frozenset[int] = frozenset()
    weight_bytes = 0
    kv_bytes_per_token = 1

    def __init__(self, clock: ManualClock, row_ns: int) -> None:
        self.clock = clock
        self.row_ns = row_ns
        self.passes: list[list[Piece]] = []

    def allocate(self, blocks: int, block_tokens: int) -> None:
        """Keeps nothing."""

    def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        self.passes.append(list(pieces))
        self.clock.advance(10_000_000 + self.row_ns * sum(len(piece.tokens) for piece in pieces))
        return torch.zeros(len(pieces), self.vocabulary_size)


def test_every_kind_of_step_is_run_and_timed() -> None:
    clock = ManualClock()
    overhead = calibrate(TimedModel(clock, 10_000), EngineConfig(), clock, blocks=100)
    assert overhead.kind is OverheadKind.CALIBRATE
    assert overhead.wall_ns == clock.monotonic_ns() <= BUDGET_NS
    kinds = {
        (any(w.prefill_rows for w in s.sequences), any(w.decode_rows for w in s.sequences)) for s in overhead.steps
    }
    assert kinds == {(True, False), (False, True), (True, True)}
    assert all(step.wall_ns == 10_000_000 + 10_000 * sum(w.rows for w in step.sequences) for step in overhead.steps)


def test_a_slow_model_is_left_alone_after_its_time() -> None:
    clock = ManualClock()
    overhead = calibrate(TimedModel(clock, 5_000_000), EngineConfig(), clock, blocks=100)
    assert overhead.wall_ns < 2 * BUDGET_NS


def test_small_engines_are_calibrated_within_their_limits() -> None:
    clock = ManualClock()
    model = TimedModel(clock, 1000)
    config = EngineConfig(max_sequences=2, step_tokens=16, block_tokens=4)
    calibrate(model, config, clock, blocks=5)
    for pieces in model.passes:
        assert len(pieces) <= 2
        for piece in pieces:
            assert len(piece.tokens) <= 16
            assert piece.start + len(piece.tokens) <= len(piece.blocks) * 4
            assert set(piece.blocks) <= set(range(5))


def test_an_answer_after_calibration_is_the_one_without(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    prompt = Piece(1, list(range(5, 25)), 0, range(4), sample=True)
    logits = []
    for calibrated in (False, True):
        model = load_model(folder, dtype="fp32", name="tiny", threads=1)
        model.allocate(40, 16)
        if calibrated:
            assert calibrate(model, EngineConfig(), SystemClock(), blocks=40).steps
        logits.append(model.forward([prompt]))
    assert torch.equal(*logits)
