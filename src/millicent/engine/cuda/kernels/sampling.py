"""A token per row of logits, drawn on the device: what `engine.sampler` does.

All of the chip looks for each row's best, which is all that a greedy row needs. Of other rows one program each does the
rest. Every filter keeps what is at least some bound, so it is enough to find the bound: by quartering the interval of
the logits' numbers, in order, in which it lies. Sums are of float32 weights, as on the processor, but in another order:
a draw can differ from the processor's where the random number falls within rounding of the edge between two tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

_CHUNK = 4096
_BLOCK = 2048
_PARTS = 4  # blocks that are on their way at once
_LOWEST = tl.constexpr(-2139095041)  # minus infinity, as `_ordered` has it
_GREEDY_BELOW = tl.constexpr(1e-5)
_LEAST_TOP_P = tl.constexpr(1e-6)


@triton.jit
def _best(logits, peaks, places, stride, count, BLOCK: tl.constexpr):
    """Of a part of a row: its largest number and where that is first; infinity where one is none."""
    index, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = part * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(logits + index * stride + at, mask=at < count, other=float("-inf")).to(tl.float32)
    peak = tl.max(score, axis=0)
    place = tl.min(tl.where(score == peak, at, count), axis=0)
    sound = tl.min((score == score).to(tl.int32), axis=0)
    target = index * tl.num_programs(1) + part
    tl.store(peaks + target, tl.where(sound == 1, peak, float("inf")))
    tl.store(places + target, place)


@triton.jit
def _ordered(x, SHIFT: tl.constexpr):
    """Integers in the order of the float32 numbers; of those that are bfloat16's, half of the bits are enough."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT).to(tl.int64)


@triton.jit
def _scores(row, start, count, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """[PARTS, BLOCK] of a row, and which of them are in it."""
    at = start + tl.arange(0, PARTS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = at < count
    return tl.load(row + at, mask=inside, other=float("-inf")).to(tl.float32), inside


@triton.jit
def _bound(
    row, count, floor, largest, warmth, target, MASS: tl.constexpr, SHIFT: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The highest bound at or above `floor` at which what is kept measures `target`: tokens, or their weight."""
    low = floor
    high = _ordered(largest, SHIFT) + 1
    while high - low > 1:
        stride = tl.maximum((high - low) // 4, 1)
        # Each lane keeps its own: they meet once, after the last block.
        first = tl.zeros((BLOCK,), tl.float32)
        second = tl.zeros((BLOCK,), tl.float32)
        third = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, count, PARTS * BLOCK):
            score, inside = _scores(row, start, count, PARTS, BLOCK)
            key = tl.where(inside, _ordered(score, SHIFT), low - 1)
            measure = tl.full((PARTS, BLOCK), 1.0, tl.float32)
            if MASS:
                measure = tl.exp((score - largest) * warmth)
            first += tl.sum(tl.where(key >= low + stride, measure, 0.0), axis=0)
            second += tl.sum(tl.where(key >= low + 2 * stride, measure, 0.0), axis=0)
            third += tl.sum(tl.where(key >= low + 3 * stride, measure, 0.0), axis=0)
        before = low
        if tl.sum(third.to(tl.float64), axis=0) >= target:
            low = before + 3 * stride
        elif tl.sum(second.to(tl.float64), axis=0) >= target:
            low = before + 2 * stride
            high = before + 3 * stride
        elif tl.sum(first.to(tl.float64), axis=0) >= target:
            low = before + stride
            high = before + 2 * stride
        else:
            high = before + stride
    return low


@triton.jit
def _kept(score, inside, floor, largest, warmth, least, SHIFT: tl.constexpr):
    """Tokens' weights, 0 where a filter dropped them."""
    weight = tl.exp((score - largest) * warmth)
    return tl.where(inside & (_ordered(score, SHIFT) >= floor) & (weight >= least), weight, 0.0)


@triton.jit
def _whole(
    row, count, floor, largest, warmth, least, SHIFT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The weight of what is kept."""
    found = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, PARTS * BLOCK):
        score, inside = _scores(row, start, count, PARTS, BLOCK)
        found += tl.sum(_kept(score, inside, floor, largest, warmth, least, SHIFT), axis=0)
    return tl.sum(found.to(tl.float64), axis=0)


@triton.jit
def _pick(
    row, count, floor, largest, warmth, least, target, SHIFT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The token in whose part of the weight of what is kept, in order, the target falls."""
    size: tl.constexpr = PARTS * BLOCK
    passed = tl.full((), 0.0, tl.float64)
    chosen = tl.full((), 0, tl.int32)
    before = passed
    for start in range(0, count, size):
        score, inside = _scores(row, start, count, PARTS, BLOCK)
        mass = tl.sum(tl.sum(_kept(score, inside, floor, largest, warmth, least, SHIFT), axis=0).to(tl.float64), axis=0)
        # The first block that reaches past it; where rounding leaves the target past the end, the last that was kept.
        if (passed <= target) & (mass > 0.0):
            chosen = start
            before = passed
        passed += mass
    at = chosen + tl.arange(0, size)
    score = tl.load(row + at, mask=at < count, other=float("-inf")).to(tl.float32)
    weight = _kept(score, at < count, floor, largest, warmth, least, SHIFT)
    ahead = before + tl.cumsum(weight.to(tl.float64), axis=0)
    last = tl.max(tl.where(weight > 0.0, at, 0), axis=0)
    return tl.minimum(tl.min(tl.where((ahead > target) & (weight > 0.0), at, count), axis=0), last)


@triton.jit
def _draw(
    logits, peaks, places, temperatures, top_ks, top_ps, min_ps, numbers, out, stride, count, chunks,
    CHUNKS: tl.constexpr, SHIFT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * stride
    part = tl.arange(0, CHUNKS)
    peak = tl.load(peaks + index * chunks + part, mask=part < chunks, other=float("-inf"))
    largest = tl.max(peak, axis=0)
    place = tl.load(places + index * chunks + part, mask=part < chunks, other=count)
    token = tl.min(tl.where(peak == largest, place, count), axis=0)
    usable = (largest > float("-inf")) & (largest < float("inf"))
    temperature = tl.load(temperatures + index)
    if usable & (temperature >= _GREEDY_BELOW):
        warmth = 1.0 / temperature
        floor = tl.full((), _LOWEST >> SHIFT, tl.int64)
        top_k = tl.load(top_ks + index)
        if (top_k > 0) & (top_k < count):
            floor = _bound(row, count, floor, largest, warmth, top_k.to(tl.float64), False, SHIFT, PARTS, BLOCK)
        top_p = tl.load(top_ps + index)
        if top_p < 1.0:
            whole = _whole(row, count, floor, largest, warmth, 0.0, SHIFT, PARTS, BLOCK)
            wanted = whole * tl.maximum(top_p, _LEAST_TOP_P).to(tl.float64)
            floor = _bound(row, count, floor, largest, warmth, wanted, True, SHIFT, PARTS, BLOCK)
        least = tl.load(min_ps + index)
        whole = _whole(row, count, floor, largest, warmth, least, SHIFT, PARTS, BLOCK)
        target = whole * tl.load(numbers + index).to(tl.float64)
        token = _pick(row, count, floor, largest, warmth, least, target, SHIFT, PARTS, BLOCK)
    tl.store(out + index, tl.where(usable, token, -1))


class Draws(NamedTuple):
    """How each row is drawn: float32, but for `top_k`, int32. `numbers` are in [0, 1)."""

    temperatures: torch.Tensor
    top_ks: torch.Tensor
    top_ps: torch.Tensor
    min_ps: torch.Tensor
    numbers: torch.Tensor


def draw(logits: torch.Tensor, draws: Draws, out: torch.Tensor) -> None:
    """Fill `out` (int32) with a token for each row of `logits` [rows, vocabulary]; -1 where a row is no distribution.

    Temperature, top-k, top-p and min-p are applied in this order, and the row's number decides. Temperatures below 1e-5
    take the first of equal maxima.
    """
    rows, count = logits.shape
    chunk = min(_CHUNK, triton.next_power_of_2(count))
    chunks = triton.cdiv(count, chunk)
    peaks = torch.empty(rows, chunks, dtype=torch.float32, device=logits.device)
    places = torch.empty(rows, chunks, dtype=torch.int32, device=logits.device)
    _best[(rows, chunks)](logits, peaks, places, logits.stride(0), count, BLOCK=chunk)
    _draw[(rows,)](
        logits,
        peaks,
        places,
        *draws,
        out,
        logits.stride(0),
        count,
        chunks,
        CHUNKS=triton.next_power_of_2(chunks),
        SHIFT=16 if logits.dtype is torch.bfloat16 else 0,
        PARTS=_PARTS,
        BLOCK=min(_BLOCK, triton.next_power_of_2(triton.cdiv(count, _PARTS))),
        num_warps=8,
    )
