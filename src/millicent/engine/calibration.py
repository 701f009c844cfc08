"""A few short forward passes that nobody asked for, from which the step-time model is learned before anyone is charged.

They run right after a model is loaded, in a KV cache that is still empty, and are overhead of the model.
"""

from __future__ import annotations

from collections.abc import Iterator

from millicent.core.clock import NS_PER_MS, Clock
from millicent.core.steps import Overhead, OverheadKind, SequenceWork, StepRecord
from millicent.engine.batch import Model, Piece
from millicent.engine.config import EngineConfig
from millicent.engine.sampler import Draw, sample

# Enough for a small model to go through the plan more than once; a large one stops where the time does.
BUDGET_NS = 1000 * NS_PER_MS
_ROUNDS = 3
_GREEDY = Draw(0.0, 1.0, 0, 0, 0)
# Rows of new prompts, each beside so many decoding sequences, and how many decode at once: cheap steps first.
_STEPS = ((0, 1), (0, 4), (16, 0), (0, 8), (0, 2), (64, 0), (0, 16), (32, 4), (128, 0), (64, 8), (256, 0), (0, 32))


def calibrate(model: Model, config: EngineConfig, clock: Clock, *, blocks: int) -> Overhead:
    """`blocks` is what the model was allocated. Steps come out in the order they ran; none when time was too short."""
    start_ns = clock.monotonic_ns()
    records: list[StepRecord] = []
    row_ns = 0.0
    for pieces in _plan(model, config, blocks):
        rows = sum(len(piece.tokens) for piece in pieces)
        before_ns = clock.monotonic_ns()
        if before_ns - start_ns + row_ns * rows > BUDGET_NS:
            break
        logits = model.forward(pieces)
        if draws := [_GREEDY for piece in pieces if piece.sample]:
            sample(logits, draws)
        wall_ns = clock.monotonic_ns() - before_ns
        # What a row of a prompt costs, as an upper bound: a step that small reads the weights for few rows.
        row_ns = wall_ns / rows if not row_ns or rows > 8 else row_ns
        works = tuple(_work(piece) for piece in pieces)
        records.append(StepRecord(config.device, model.name, len(records), before_ns, wall_ns, works))
    warm = tuple(records[len(_WARM_UP) :])
    wall_ns = clock.monotonic_ns() - start_ns
    return Overhead(config.device, model.name, OverheadKind.CALIBRATE, start_ns, wall_ns, warm)


# The first passes find caches cold and memory not yet given out: they aren't like those that follow.
_WARM_UP = ((64, 0), (0, 1))


def _plan(model: Model, config: EngineConfig, blocks: int) -> Iterator[list[Piece]]:
    """Passes that fit the model's context, its KV cache and the engine's limits."""
    lanes = _lanes(model, config, blocks)
    longest = min(config.step_tokens, model.context_tokens, len(lanes[0]) * config.block_tokens)
    for rows, decodes in (*_WARM_UP, *_STEPS * _ROUNDS):
        taken = lanes[1:] if rows else lanes
        pieces = [_decode(model, lane, index, config) for index, lane in enumerate(taken[:decodes])]
        if rows:
            pieces.append(Piece(-1, _tokens(model, min(rows, longest)), 0, lanes[0], sample=True))
        if pieces:
            yield pieces[-1:] if config.deterministic else pieces[-config.max_sequences :]


def _lanes(model: Model, config: EngineConfig, blocks: int) -> list[list[int]]:
    """Block tables for as many sequences as may run, each for a context of up to 512 tokens."""
    per_context = max(1, min(512, model.context_tokens) // config.block_tokens)
    count = max(1, min(config.max_sequences + 1, blocks // per_context))
    per_lane = min(per_context, blocks)
    return [list(range(lane * per_lane, (lane + 1) * per_lane)) for lane in range(count)]


def _decode(model: Model, lane: list[int], index: int, config: EngineConfig) -> Piece:
    """One row at the end of a context; every other one is long, so that reading the KV cache shows."""
    longest = min(len(lane) * config.block_tokens, model.context_tokens)
    start = (longest if index % 2 else min(longest, 32)) - 1
    return Piece(-2 - index, _tokens(model, 1), start, lane, sample=True)


def _tokens(model: Model, count: int) -> list[int]:
    return [(7 + 31 * index) % model.vocabulary_size for index in range(count)]


def _work(piece: Piece) -> SequenceWork:
    rows = len(piece.tokens)
    prefills = piece.start == 0
    return SequenceWork(
        sequence=piece.sequence,
        prefill_rows=rows if prefills else 0,
        decode_rows=0 if prefills else rows,
        sampled_rows=int(piece.sample),
        kv_read_tokens=piece.start + rows,
    )
