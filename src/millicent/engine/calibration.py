"""A few short forward passes that nobody asked for, from which the step-time model is learned before anyone is charged.

They run right after a model is loaded, in a KV cache that is still empty, and are overhead of the model. All of them
use the same few blocks of it: memory that was never written would be slow at first, and to write more takes time. So
what reading the cache costs comes out low, until traffic shows more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from millicent.core.clock import NS_PER_MS, Clock
from millicent.core.steps import Overhead, OverheadKind, SequenceWork, StepRecord
from millicent.engine.batch import Model, Piece
from millicent.engine.config import EngineConfig
from millicent.engine.sampler import Draw, sample

# Enough for a small model to go through the plan more than once; a large one stops where the time does.
BUDGET_NS = 1000 * NS_PER_MS
_GREEDY = Draw(0.0, 1.0, 0, 0, 0)
# Rows of a new prompt, beside so many decoding sequences: cheap ones first, so that there is a fit even where time runs
# out. The first passes find caches cold and memory not yet given out: nothing is learned from them.
_WARM_UP = ((160, 0), (0, 1))
_CHEAP = ((0, 1), (0, 4), (16, 0), (0, 8), (0, 2), (48, 0), (16, 4), (0, 16))
_STEPS = (*_CHEAP, (128, 0), *_CHEAP, (256, 0), (64, 8), (0, 32), (96, 4), *_CHEAP, (192, 0), (128, 8), (0, 32))

_CONTEXT_TOKENS = 256


RunPass = Callable[[Sequence[Piece]], object]


def calibrate(
    model: Model, config: EngineConfig, clock: Clock, *, blocks: int, run_pass: RunPass | None = None
) -> Overhead:
    """`run_pass` is what is measured, by default a forward pass and its tokens. `blocks` is what the model was
    allocated. Steps come out in the order they ran; none when time was too short."""
    run_pass = run_pass or partial(_run_pass, model)
    start_ns = clock.monotonic_ns()
    records: list[StepRecord] = []
    row_ns = 0.0
    for pieces in _plan(model, config, blocks):
        rows = sum(len(piece.tokens) for piece in pieces)
        before_ns = clock.monotonic_ns()
        if before_ns - start_ns + row_ns * rows > BUDGET_NS:
            continue
        run_pass(pieces)
        wall_ns = clock.monotonic_ns() - before_ns
        # What a row of a prompt costs, as an upper bound: a step that small reads the weights for few rows.
        row_ns = wall_ns / rows if not row_ns or rows > 8 else row_ns
        works = tuple(_work(piece) for piece in pieces)
        records.append(StepRecord(config.device, model.name, len(records), before_ns, wall_ns, works))
    warm = tuple(records[len(_WARM_UP) :])
    wall_ns = clock.monotonic_ns() - start_ns
    return Overhead(config.device, model.name, OverheadKind.CALIBRATE, start_ns, wall_ns, warm)


def _run_pass(model: Model, pieces: Sequence[Piece]) -> None:
    logits = model.forward(pieces)
    if draws := [_GREEDY for piece in pieces if piece.sample]:
        sample(logits, draws)


def _plan(model: Model, config: EngineConfig, blocks: int) -> Iterator[list[Piece]]:
    """Passes that fit the model's context, its KV cache and the engine's limits."""
    longest = min(_CONTEXT_TOKENS, config.step_tokens, model.context_tokens, blocks * config.block_tokens)
    table = range(-(-longest // config.block_tokens))
    contexts = (max(1, longest // 8), max(1, longest // 2))
    for rows, decodes in (*_WARM_UP, *_STEPS):
        pieces = [
            Piece(-2 - index, _tokens(model, 1), contexts[index % 2] - 1, table, sample=True)
            for index in range(decodes)
        ]
        if rows:
            pieces.append(Piece(-1, _tokens(model, min(rows, longest)), 0, table, sample=True))
        yield pieces[-1:] if config.deterministic else pieces[-config.max_sequences :]


def _tokens(model: Model, count: int) -> list[int]:
    return [(7 + 31 * index) % model.vocabulary_size for index in range(count)]


def _work(piece: Piece) -> SequenceWork:
    rows = len(piece.tokens)
    prefills = rows > 1
    return SequenceWork(
        sequence=piece.sequence,
        prefill_rows=rows if prefills else 0,
        decode_rows=0 if prefills else rows,
        sampled_rows=int(piece.sample),
        kv_read_tokens=piece.start + rows,
    )
