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

from millicent.engine.cuda.kernels.rows import Turning, overlap

_TILE_LANES = 128  # query rows of a prefill tile, times the heads of a group
_TILE_LANES_FP32 = 32  # which nothing but registers multiplies exactly
_LEAST_DOT = 16  # rows and columns that a matrix unit takes at least
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Turns:
    """How a context is read: tokens per turn of the loop, warps, and how far loads run ahead (blocks' numbers two
    turns, keys and values one; float32's, which are twice the bytes, not at all). In decoding, also how many tokens are
    worth a program of their own."""

    tokens: int
    warps: int
    stages: int
    least: int = 128


DECODE = Turns(tokens=64, warps=4, stages=3)
DECODE_FP32 = Turns(tokens=16, warps=4, stages=1)
PREFILL = Turns(tokens=64, warps=8, stages=3)
PREFILL_FP32 = Turns(tokens=16, warps=8, stages=1)


@triton.jit
def _turned(
    source, norm, cosines, sines, position, eps, dim, wanted, head_dim: tl.constexpr, NORM: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Heads as attention takes them, normed (where the family has it) and turned. Each element needs the one half a
    head away too, which is read for itself: registers can't be shifted."""
    half: tl.constexpr = head_dim // 2
    other = tl.where(dim < half, dim + half, dim - half)
    mine = tl.load(source + dim, mask=wanted, other=0.0).to(tl.float32)
    far = tl.load(source + other, mask=wanted, other=0.0).to(tl.float32)
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(mine * mine, axis=-1, keep_dims=True) / head_dim + eps)
        mine = mine * scale * tl.load(norm + dim, mask=dim < head_dim, other=0.0).to(tl.float32)
        far = far * scale * tl.load(norm + other, mask=dim < head_dim, other=0.0).to(tl.float32)
    angle = position * half + dim % half
    cosine = tl.load(cosines + angle, mask=dim < head_dim, other=0.0)
    sine = tl.load(sines + angle, mask=dim < head_dim, other=0.0)
    return (mine * cosine + tl.where(dim < half, -far, far) * sine).to(DTYPE)


@triton.jit
def _folded(peak, mass, found, score, value, PRECISION: tl.constexpr):
    """What is found so far, and some more scores and values; weights are relative to the highest score so far."""
    higher = tl.maximum(peak, tl.max(score, axis=1))
    weight = tl.exp2(score - higher[:, None])
    fade = tl.exp2(peak - higher)
    found = found * fade[:, None] + tl.dot(weight.to(value.dtype), value, input_precision=PRECISION)
    return higher, mass * fade + tl.sum(weight, axis=1), found


@triton.jit
def _own(
    heads_of_row, norm, cosines, sines, keys, values, table, newest, eps, kv_head, dim, heads: tl.constexpr,
    kv_heads: tl.constexpr, head_dim: tl.constexpr, block_tokens: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """A row's own key and value, which aren't in the cache yet: who attends to them puts them there."""
    inside = dim < head_dim
    key = _turned(
        heads_of_row + (heads + kv_head) * head_dim, norm, cosines, sines, newest.to(tl.int64), eps, dim, inside,
        head_dim, NORM, heads_of_row.dtype.element_ty,
    )  # fmt: skip
    value = tl.load(heads_of_row + (heads + kv_heads + kv_head) * head_dim + dim, mask=inside, other=0.0)
    block = tl.load(table + newest // block_tokens).to(tl.int64)
    line = ((block * kv_heads + kv_head) * block_tokens + newest % block_tokens) * head_dim
    tl.store(keys + line + dim, key, mask=inside)
    tl.store(values + line + dim, value, mask=inside)
    return key, value


@triton.jit
def _decode(
    qkv, query_norm, key_norm, cosines, sines, keys, values, tables, starts, lengths, out, partial, stats, arrivals,
    scale, eps, heads: tl.constexpr, kv_heads: tl.constexpr, head_dim: tl.constexpr, block_tokens: tl.constexpr,
    NORM: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    TOKENS: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # Programs that start together read contexts of one length: rows come longest first.
    kv_head, row, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    length = tl.load(lengths + row)
    share = tl.maximum(tl.cdiv(tl.cdiv(length, SPLITS), TOKENS) * TOKENS, LEAST)
    if (split > 0) & (split * share >= length):
        return
    group: tl.constexpr = heads // kv_heads
    member, dim, step = tl.arange(0, GROUP), tl.arange(0, DIM), tl.arange(0, TOKENS)
    here = (member < group)[:, None] & (dim < head_dim)[None, :]
    head = kv_head * group + member
    heads_of_row = qkv + row * (heads + 2 * kv_heads) * head_dim
    newest = length - 1
    position = tl.maximum(newest, 0).to(tl.int64)  # padding has no newest
    query = _turned(
        heads_of_row + head[:, None] * head_dim, query_norm, cosines, sines, position, eps, dim[None, :], here,
        head_dim, NORM, qkv.dtype.element_ty,
    )  # fmt: skip
    table = tables + tl.load(starts + row)
    peak = tl.full((GROUP,), -1e30, tl.float32)
    mass = tl.zeros((GROUP,), tl.float32)
    found = tl.zeros((GROUP, DIM), tl.float32)
    first, last = split * share, tl.minimum(newest, (split + 1) * share)
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
        peak, mass, found = _folded(peak, mass, found, score, value, PRECISION)
    if (newest >= first) & (newest < first + share):
        key, value = _own(
            heads_of_row, key_norm, cosines, sines, keys, values, table, newest, eps, kv_head, dim,
            heads, kv_heads, head_dim, block_tokens, NORM,
        )  # fmt: skip
        score = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], axis=1) * scale
        higher = tl.maximum(peak, score)
        weight, fade = tl.exp2(score - higher), tl.exp2(peak - higher)
        mass = mass * fade + weight
        found = found * fade[:, None] + weight[:, None] * value.to(tl.float32)[None, :]
        peak = higher
    parts = tl.cdiv(length, share)
    if parts <= 1:
        found = found / tl.maximum(mass, 1e-30)[:, None]
        target = out + (row * heads + head)[:, None] * head_dim + dim[None, :]
        tl.store(target, found.to(out.dtype.element_ty), mask=here)
    if SPLITS > 1:  # noqa: SIM102 - decided when it is compiled
        if parts > 1:
            part = (row * heads + head) * SPLITS + split
            tl.store(partial + part[:, None] * head_dim + dim[None, :], found, mask=here)
            tl.store(stats + part * 2, peak, mask=member < group)
            tl.store(stats + part * 2 + 1, mass, mask=member < group)
            tl.debug_barrier()  # every thread's part is written before one of them says so
            arrival = arrivals + row * kv_heads + kv_head
            if tl.atomic_add(arrival, 1, sem="acq_rel") == parts - 1:
                tl.store(arrival, 0)  # for the next layer
                for index in tl.static_range(group):
                    _merge(partial, stats, out, row * heads + kv_head * group + index, parts, head_dim, SPLITS, DIM)


@triton.jit
def _merge(
    partial, stats, out, head, parts, head_dim: tl.constexpr, SPLITS: tl.constexpr, DIM: tl.constexpr
):  # fmt: skip
    """One head of one row, from what all parts of its context came to. What others wrote isn't in the nearest cache."""
    dim, split = tl.arange(0, DIM), tl.arange(0, SPLITS)
    there = split < parts
    part = head * SPLITS + split
    peak = tl.load(stats + part * 2, mask=there, other=-1e30, cache_modifier=".cg")
    weight = tl.exp2(peak - tl.max(peak, axis=0))
    mass = tl.sum(weight * tl.load(stats + part * 2 + 1, mask=there, other=0.0, cache_modifier=".cg"), axis=0)
    wanted = there[:, None] & (dim < head_dim)[None, :]
    found = tl.load(partial + part[:, None] * head_dim + dim[None, :], mask=wanted, other=0.0, cache_modifier=".cg")
    merged = tl.sum(found * weight[:, None], axis=0) / mass
    tl.store(out + head * head_dim + dim, merged.to(out.dtype.element_ty), mask=dim < head_dim)


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The first rows of a pass: row i attends to `lengths[i]` tokens, itself the last; 0 is padding. Its block table
    begins at `starts[i]` of `tables`. All int32. `splits`, a power of two, is how many programs share a context at
    most; `arrivals`, a zero for each row and key-value head, is how they tell each other who is last, and zero after.
    """

    starts: torch.Tensor
    lengths: torch.Tensor
    tables: torch.Tensor
    arrivals: torch.Tensor
    splits: int


def attend_decode(
    qkv: torch.Tensor,
    turning: Turning,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: DecodeRows,
    out: torch.Tensor,
    turns: Turns | None = None,
) -> None:
    """Flash-decoding from products to attention in one launch: queries and the new key are normed and turned, the new
    key and value put into the cache, parts of long contexts computed apart and merged by whoever is last. Fills
    `out[: len(rows.lengths)]`, padding with zeros."""
    _, kv_heads, block_tokens, head_dim = keys.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    count, splits = len(rows.lengths), rows.splits
    turns = turns or (DECODE_FP32 if qkv.dtype is torch.float32 else DECODE)
    partial = stats = out
    if splits > 1:
        partial = torch.empty(count, heads, splits, head_dim, dtype=torch.float32, device=qkv.device)
        stats = torch.empty(count, heads, splits, 2, dtype=torch.float32, device=qkv.device)
    _decode[(kv_heads, count, splits)](
        qkv,
        *(turning.norms or (qkv, qkv)),
        *turning.angles,
        keys,
        values,
        rows.tables,
        rows.starts,
        rows.lengths,
        out,
        partial,
        stats,
        rows.arrivals,
        head_dim**-0.5 * _LOG2_E,
        turning.eps,
        heads,
        kv_heads,
        head_dim,
        block_tokens,
        NORM=turning.norms is not None,
        SPLITS=splits,
        LEAST=turns.least,
        GROUP=max(_LEAST_DOT, triton.next_power_of_2(heads // kv_heads)),
        DIM=max(_LEAST_DOT, triton.next_power_of_2(head_dim)),
        TOKENS=turns.tokens,
        PRECISION=_precision(qkv),
        num_warps=turns.warps,
        num_stages=turns.stages,
        **overlap(),
    )


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
        peak, mass, found = _folded(peak, mass, found, score, value, PRECISION)
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
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tiles: PrefillTiles,
    out: torch.Tensor,
    turns: Turns | None = None,
) -> None:
    """Causal attention of new rows to all that their sequences have. Fills the tiles' rows of `out`."""
    _, kv_heads, block_tokens, head_dim = keys.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    turns = turns or (PREFILL_FP32 if qkv.dtype is torch.float32 else PREFILL)
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
        TOKENS=turns.tokens,
        PRECISION=_precision(qkv),
        num_warps=turns.warps,
        num_stages=turns.stages,
    )


def _precision(tensor: torch.Tensor) -> str:
    """Float32 is multiplied as such: greedy answers in it are those of the processor."""
    return "ieee" if tensor.dtype is torch.float32 else "tf32"
