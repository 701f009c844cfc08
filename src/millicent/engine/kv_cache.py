"""The paged KV cache, and where each row of a forward pass reads and writes in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from millicent.engine.batch import Piece


class KVCache:
    """`keys[layer]` and `values[layer]`: [blocks, block_tokens, kv_heads, head_dim], zero at first.

    What a block held before it was given to a sequence stays in it: readers mask what lies beyond a context.
    """

    def __init__(
        self, layers: int, blocks: int, block_tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        shape = (blocks, block_tokens, kv_heads, head_dim)
        self.block_tokens = block_tokens
        self.keys = [lazy_zeros(shape, dtype) for _ in range(layers)]
        self.values = [lazy_zeros(shape, dtype) for _ in range(layers)]


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take no memory until they are written: NumPy leaves the clearing to the system, torch does it."""
    nothing_yet = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(nothing_yet).view(dtype).view(shape)


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The first `count` rows of a pass: one for each of so many sequences, which attend to whole contexts.

    `blocks` is int64 [count, widest]; short tables are padded with a block of their own, so that sequences never read
    each other's. `mask` is bool [count, 1, 1, widest x block_tokens], true where there is context.
    """

    count: int
    blocks: torch.Tensor
    mask: torch.Tensor
    context_tokens: torch.Tensor


@dataclass(frozen=True, slots=True)
class PrefillRows:
    """Rows `start .. stop - 1` of a pass: consecutive ones of one sequence, which attend to `context_tokens` tokens.

    `mask` is bool [rows, context_tokens], None where it is causal from the first token on.
    """

    start: int
    stop: int
    blocks: torch.Tensor
    context_tokens: int
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Plan:
    """One forward pass. Rows of single tokens come first, then prefill pieces.

    `slots` is where the keys and values of the rows in `written` go, counted in tokens from the cache's start.
    `sampled` are the rows whose logits are asked for, in the order of the pieces.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    written: slice
    slots: torch.Tensor
    decode: DecodeRows | None
    prefill: tuple[PrefillRows, ...]
    sampled: torch.Tensor


def plan_batch(pieces: Sequence[Piece], block_tokens: int) -> Plan:
    """All pieces in one pass."""
    single = [piece for piece in pieces if len(piece.tokens) == 1]
    several = [piece for piece in pieces if len(piece.tokens) != 1]
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    last_row: dict[int, int] = {}
    prefill = []
    for piece in (*single, *several):
        first = len(tokens)
        tokens += piece.tokens
        span = range(piece.start, piece.start + len(piece.tokens))
        positions += span
        slots += [piece.blocks[at // block_tokens] * block_tokens + at % block_tokens for at in span]
        last_row[id(piece)] = len(tokens) - 1
        if len(piece.tokens) != 1:
            prefill.append(_prefill_rows(piece, first, block_tokens))
    return Plan(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        written=slice(None),
        slots=torch.tensor(slots),
        decode=_decode_rows(single, block_tokens) if single else None,
        prefill=tuple(prefill),
        sampled=torch.tensor(
            [last_row[id(piece)] - back for piece in pieces for back in range(piece.logit_rows - 1, -1, -1)],
            dtype=torch.int64,
        ),
    )


def plan_tile(piece: Piece, first: int, stop: int, tile: int, block_tokens: int) -> Plan:
    """Positions `first .. stop - 1` of one piece, in a pass of `tile` rows in which position p is row `p % tile`.

    The rest of the rows are padding. Every shape depends on the position alone, and so does each result, however the
    sequence was cut and whatever else runs: that is what makes `deterministic` so.
    """
    tile_start = first - first % tile
    span = range(first, stop)
    tokens = [0] * tile
    tokens[first - tile_start : stop - tile_start] = piece.tokens[first - piece.start : stop - piece.start]
    context_tokens = tile_start + tile
    blocks = list(piece.blocks[: -(-context_tokens // block_tokens)])
    blocks += [blocks[-1]] * (-(-context_tokens // block_tokens) - len(blocks))
    positions = torch.arange(tile_start, context_tokens)
    sampled = range(max(first, piece.start + len(piece.tokens) - piece.logit_rows), stop)
    return Plan(
        tokens=torch.tensor(tokens),
        positions=positions,
        written=slice(first - tile_start, stop - tile_start),
        slots=torch.tensor([piece.blocks[at // block_tokens] * block_tokens + at % block_tokens for at in span]),
        decode=None,
        prefill=(
            PrefillRows(
                0, tile, torch.tensor(blocks), context_tokens, torch.arange(context_tokens) <= positions[:, None]
            ),
        ),
        sampled=torch.tensor([at - tile_start for at in sampled], dtype=torch.int64),
    )


def _decode_rows(pieces: Sequence[Piece], block_tokens: int) -> DecodeRows:
    context_tokens = [piece.start + 1 for piece in pieces]
    counts = [-(-tokens // block_tokens) for tokens in context_tokens]
    widest = max(counts)
    tables = [
        [*piece.blocks[:count], *[piece.blocks[count - 1]] * (widest - count)]
        for piece, count in zip(pieces, counts, strict=True)
    ]
    lengths = torch.tensor(context_tokens)
    mask = torch.arange(widest * block_tokens) < lengths[:, None]
    return DecodeRows(len(pieces), torch.tensor(tables), mask[:, None, None, :], lengths)


def _prefill_rows(piece: Piece, first: int, block_tokens: int) -> PrefillRows:
    context_tokens = piece.start + len(piece.tokens)
    blocks = torch.tensor(list(piece.blocks[: -(-context_tokens // block_tokens)]))
    mask = None
    if piece.start:
        mask = torch.arange(context_tokens) <= torch.arange(piece.start, context_tokens)[:, None]
    return PrefillRows(first, first + len(piece.tokens), blocks, context_tokens, mask)
