"""Attention over the paged cache: one row of each of many sequences (decode), or tiles of new rows (prefill).

A cache is [blocks, kv_heads, block_tokens, head_dim], so what a program reads of a block is one piece of memory. Block
tables lie one after another in one array; a row or tile knows where its own begins. The query heads that share a
key-value head are computed together: the cache is read once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_TILE_LANES = 128  # query rows of a prefill tile, times the heads of a group
_TILE_LANES_FP32 = 32  # which nothing but registers multiplies exactly
_LEAST_DOT = 16  # rows and columns that a matrix unit takes at least
_TURN_TOKENS = 64  # context tokens per turn of the loop
_TURN_TOKENS_FP32 = 16
_LOG2_E = 1.4426950408889634


@triton.jit
def _decode(
    qkv, keys, values, tables, starts, lengths, out, partial, stats, scale, row_stride,
    heads: tl.constexpr, kv_heads: tl.constexpr, head_dim: tl.constexpr, block_tokens: tl.constexpr,
    WHOLE: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(2)
    length = tl.load(lengths + row)
    share = tl.cdiv(tl.cdiv(length, splits), TOKENS) * TOKENS
    first, last = split * share, tl.minimum(length, (split + 1) * share)
    group: tl.constexpr = heads // kv_heads
    member, dim, step = tl.arange(0, GROUP), tl.arange(0, DIM), tl.arange(0, TOKENS)
    here = (member < group)[:, None] & (dim < head_dim)[None, :]
    head = kv_head * group + member
    query = tl.load(qkv + row.to(tl.int64) * row_stride + head[:, None] * head_dim + dim[None, :], mask=here, other=0.0)
    table = tables + tl.load(starts + row)
    peak = tl.full((GROUP,), -1e30, tl.float32)
    mass = tl.zeros((GROUP,), tl.float32)
    found = tl.zeros((GROUP, DIM), tl.float32)
    for begin in range(first, last, TOKENS):
        token = begin + step
        there = token < last
        block = tl.load(table + token // block_tokens, mask=there, other=0).to(tl.int64)
        line = ((block * kv_heads + kv_head) * block_tokens + token % block_tokens) * head_dim
        wanted = there[:, None] & (dim < head_dim)[None, :]
        key = tl.load(keys + line[:, None] + dim[None, :], mask=wanted, other=0.0)
        value = tl.load(values + line[:, None] + dim[None, :], mask=wanted, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        score = tl.where(there[None, :], score, -1e30)
        higher = tl.maximum(peak, tl.max(score, axis=1))
        weight = tl.exp2(score - higher[:, None])
        fade = tl.exp2(peak - higher)
        mass = mass * fade + tl.sum(weight, axis=1)
        found = found * fade[:, None] + tl.dot(weight.to(value.dtype), value, input_precision=PRECISION)
        peak = higher
    if WHOLE:
        found = found / tl.maximum(mass, 1e-30)[:, None]
        target = (row.to(tl.int64) * heads + head) * head_dim
        tl.store(out + target[:, None] + dim[None, :], found.to(out.dtype.element_ty), mask=here)
    else:
        part = (row.to(tl.int64) * heads + head) * splits + split
        tl.store(partial + part[:, None] * head_dim + dim[None, :], found, mask=here)
        tl.store(stats + part * 2, peak, mask=member < group)
        tl.store(stats + part * 2 + 1, mass, mask=member < group)


@triton.jit
def _combine(partial, stats, out, heads: tl.constexpr, head_dim: tl.constexpr, SPLITS: tl.constexpr, DIM: tl.constexpr):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim, split = tl.arange(0, DIM), tl.arange(0, SPLITS)
    inside = dim < head_dim
    part = (row * heads + head) * SPLITS + split
    peak = tl.load(stats + part * 2)
    weight = tl.exp2(peak - tl.max(peak, axis=0))
    mass = tl.sum(weight * tl.load(stats + part * 2 + 1), axis=0)
    found = tl.load(partial + part[:, None] * head_dim + dim[None, :], mask=inside[None, :], other=0.0)
    merged = tl.sum(found * weight[:, None], axis=0) / tl.maximum(mass, 1e-30)
    tl.store(out + (row * heads + head) * head_dim + dim, merged.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The first rows of a pass: row i attends to `lengths[i]` tokens, 0 for padding, through the table that begins at
    `starts[i]` of `tables`. All int32. `splits`, a power of two, is how many programs share a context."""

    starts: torch.Tensor
    lengths: torch.Tensor
    tables: torch.Tensor
    splits: int


def attend_decode(
    qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: DecodeRows, out: torch.Tensor
) -> None:
    """Flash-decoding: parts of a context are computed apart and merged. Fills `out[: len(rows.lengths)]`."""
    _, kv_heads, block_tokens, head_dim = keys.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    count, splits, dim = len(rows.lengths), rows.splits, max(_LEAST_DOT, triton.next_power_of_2(head_dim))
    partial = stats = out
    if splits > 1:
        partial = torch.empty(count, heads, splits, head_dim, dtype=torch.float32, device=qkv.device)
        stats = torch.empty(count, heads, splits, 2, dtype=torch.float32, device=qkv.device)
    _decode[(count, kv_heads, splits)](
        qkv,
        keys,
        values,
        rows.tables,
        rows.starts,
        rows.lengths,
        out,
        partial,
        stats,
        head_dim**-0.5 * _LOG2_E,
        qkv.stride(0),
        heads,
        kv_heads,
        head_dim,
        block_tokens,
        WHOLE=splits == 1,
        GROUP=max(_LEAST_DOT, triton.next_power_of_2(heads // kv_heads)),
        DIM=dim,
        TOKENS=_turn_tokens(qkv),
        PRECISION=_precision(qkv),
        num_warps=4,
        num_stages=_stages(qkv),
    )
    if splits > 1:
        _combine[(count, heads)](partial, stats, out, heads, head_dim, SPLITS=splits, DIM=dim)


@triton.jit
def _prefill(
    qkv, keys, values, tables, tile_rows, tile_counts, tile_positions, tile_starts, out, scale, row_stride,
    heads: tl.constexpr, kv_heads: tl.constexpr, head_dim: tl.constexpr, block_tokens: tl.constexpr,
    ROWS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    count = tl.load(tile_counts + tile)
    if count == 0:  # padding
        return
    first_row = tl.load(tile_rows + tile).to(tl.int64)
    first_position = tl.load(tile_positions + tile)
    table = tables + tl.load(tile_starts + tile)
    group: tl.constexpr = heads // kv_heads
    lane, dim, step = tl.arange(0, ROWS * GROUP), tl.arange(0, DIM), tl.arange(0, TOKENS)
    row, member = lane // GROUP, lane % GROUP
    real = (row < count) & (member < group)
    here = real[:, None] & (dim < head_dim)[None, :]
    head = kv_head * group + member
    source = (first_row + row) * row_stride + head * head_dim
    query = tl.load(qkv + source[:, None] + dim[None, :], mask=here, other=0.0)
    position = first_position + row
    peak = tl.full((ROWS * GROUP,), -1e30, tl.float32)
    mass = tl.zeros((ROWS * GROUP,), tl.float32)
    found = tl.zeros((ROWS * GROUP, DIM), tl.float32)
    end = first_position + count
    for begin in range(0, end, TOKENS):
        token = begin + step
        there = token < end
        block = tl.load(table + token // block_tokens, mask=there, other=0).to(tl.int64)
        line = ((block * kv_heads + kv_head) * block_tokens + token % block_tokens) * head_dim
        wanted = there[:, None] & (dim < head_dim)[None, :]
        key = tl.load(keys + line[:, None] + dim[None, :], mask=wanted, other=0.0)
        value = tl.load(values + line[:, None] + dim[None, :], mask=wanted, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        score = tl.where(token[None, :] <= position[:, None], score, -1e30)
        higher = tl.maximum(peak, tl.max(score, axis=1))
        weight = tl.exp2(score - higher[:, None])
        fade = tl.exp2(peak - higher)
        mass = mass * fade + tl.sum(weight, axis=1)
        found = found * fade[:, None] + tl.dot(weight.to(value.dtype), value, input_precision=PRECISION)
        peak = higher
    found = found / mass[:, None]
    target = ((first_row + row) * heads + head) * head_dim
    tl.store(out + target[:, None] + dim[None, :], found.to(out.dtype.element_ty), mask=here)


@dataclass(frozen=True, slots=True)
class PrefillTiles:
    """Tile i is `counts[i]` rows (0 for padding, at most `tile_rows`) from row `rows[i]` on: consecutive ones of one
    sequence, the first at `positions[i]` of its context, whose table begins at `starts[i]` of `tables`. All int32."""

    tables: torch.Tensor
    rows: torch.Tensor
    counts: torch.Tensor
    positions: torch.Tensor
    starts: torch.Tensor


def tile_rows(heads: int, kv_heads: int, dtype: torch.dtype) -> int:
    """How many rows a prefill tile holds."""
    lanes = _TILE_LANES_FP32 if dtype is torch.float32 else _TILE_LANES
    return max(_LEAST_DOT, lanes // triton.next_power_of_2(heads // kv_heads))


def attend_prefill(
    qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tiles: PrefillTiles, out: torch.Tensor
) -> None:
    """Causal attention of new rows to all that their sequences have. Fills the tiles' rows of `out`."""
    _, kv_heads, block_tokens, head_dim = keys.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    _prefill[(len(tiles.rows), kv_heads)](
        qkv,
        keys,
        values,
        tiles.tables,
        tiles.rows,
        tiles.counts,
        tiles.positions,
        tiles.starts,
        out,
        head_dim**-0.5 * _LOG2_E,
        qkv.stride(0),
        heads,
        kv_heads,
        head_dim,
        block_tokens,
        ROWS=tile_rows(heads, kv_heads, qkv.dtype),
        GROUP=triton.next_power_of_2(heads // kv_heads),
        DIM=max(_LEAST_DOT, triton.next_power_of_2(head_dim)),
        TOKENS=_turn_tokens(qkv),
        PRECISION=_precision(qkv),
        num_warps=8,
        num_stages=_stages(qkv),
    )


def _turn_tokens(tensor: torch.Tensor) -> int:
    return _TURN_TOKENS_FP32 if tensor.dtype is torch.float32 else _TURN_TOKENS


def _stages(tensor: torch.Tensor) -> int:
    """How far loads run ahead of products: blocks' numbers two turns, keys and values one; float32's, which are twice
    the bytes, not at all."""
    return 1 if tensor.dtype is torch.float32 else 3


def _precision(tensor: torch.Tensor) -> str:
    """Float32 is multiplied as such: greedy answers in it are those of the processor."""
    return "ieee" if tensor.dtype is torch.float32 else "tf32"
