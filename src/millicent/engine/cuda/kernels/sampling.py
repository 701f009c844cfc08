"""A token per row of logits, drawn on the device: what `engine.sampler` does, one program for each row.

Every filter keeps what is at least some bound, so it is enough to find the bound: by halving the interval of float32
numbers, in order, in which it lies. Sums are float64 over float32 weights, as on the processor, but in another order: a
draw can differ from the processor's where the random number falls within rounding of the edge between two tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

_BLOCK = 4096
_LOWEST = tl.constexpr(-2139095041)  # minus infinity, as `_ordered` has it
_GREEDY_BELOW = tl.constexpr(1e-5)
_LEAST_TOP_P = tl.constexpr(1e-6)


@triton.jit
def _ordered(x):
    """Integers in the order of the float32 numbers."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _bound(row, count, floor, largest, warmth, target, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The highest bound at or above `floor` at which what is kept measures `target`: tokens, or their weight."""
    at = tl.arange(0, BLOCK)
    low = floor
    high = _ordered(largest) + 1
    while high - low > 1:
        stride = tl.maximum((high - low) // 4, 1)
        first = tl.full((), 0.0, tl.float64)
        second = tl.full((), 0.0, tl.float64)
        third = tl.full((), 0.0, tl.float64)
        for start in range(0, count, BLOCK):
            score = tl.load(row + start + at, mask=start + at < count, other=float("-inf")).to(tl.float32)
            key = tl.where(start + at < count, _ordered(score), low - 1)
            measure = tl.full((BLOCK,), 1.0, tl.float32)
            if MASS:
                measure = tl.exp((score - largest) * warmth)
            first += tl.sum(tl.where(key >= low + stride, measure, 0.0), axis=0).to(tl.float64)
            second += tl.sum(tl.where(key >= low + 2 * stride, measure, 0.0), axis=0).to(tl.float64)
            third += tl.sum(tl.where(key >= low + 3 * stride, measure, 0.0), axis=0).to(tl.float64)
        before = low
        if third >= target:
            low = before + 3 * stride
        elif second >= target:
            low = before + 2 * stride
            high = before + 3 * stride
        elif first >= target:
            low = before + stride
            high = before + 2 * stride
        else:
            high = before + stride
    return low


@triton.jit
def _kept_mass(row, start, count, floor, largest, warmth, least, BLOCK: tl.constexpr):
    """The weights of a block's tokens, 0 where a filter dropped them."""
    at = start + tl.arange(0, BLOCK)
    score = tl.load(row + at, mask=at < count, other=float("-inf")).to(tl.float32)
    weight = tl.exp((score - largest) * warmth)
    return tl.where((at < count) & (_ordered(score) >= floor) & (weight >= least), weight, 0.0)


@triton.jit
def _draw(logits, temperatures, top_ks, top_ps, min_ps, numbers, out, stride, count, BLOCK: tl.constexpr):
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * stride
    at = tl.arange(0, BLOCK)
    # Each lane keeps its own: they meet once, after the last block.
    peaks = tl.full((BLOCK,), float("-inf"), tl.float32)
    places = tl.zeros((BLOCK,), tl.int32)
    sounds = tl.full((BLOCK,), 1, tl.int32)
    for start in range(0, count, BLOCK):
        score = tl.load(row + start + at, mask=start + at < count, other=float("-inf")).to(tl.float32)
        sounds = sounds & (score == score).to(tl.int32)
        higher = score > peaks
        places = tl.where(higher, start + at, places)
        peaks = tl.where(higher, score, peaks)
    largest = tl.max(peaks, axis=0)
    token = tl.min(tl.where(peaks == largest, places, count), axis=0)
    sound = tl.min(sounds, axis=0)
    usable = (sound == 1) & (largest > float("-inf")) & (largest < float("inf"))
    temperature = tl.load(temperatures + index)
    if usable & (temperature >= _GREEDY_BELOW):
        warmth = 1.0 / temperature
        floor = tl.full((), _LOWEST, tl.int64)
        top_k = tl.load(top_ks + index)
        if (top_k > 0) & (top_k < count):
            floor = _bound(row, count, floor, largest, warmth, top_k.to(tl.float64), False, BLOCK)
        top_p = tl.load(top_ps + index)
        if top_p < 1.0:
            whole = tl.full((), 0.0, tl.float64)
            for start in range(0, count, BLOCK):
                kept = _kept_mass(row, start, count, floor, largest, warmth, 0.0, BLOCK)
                whole += tl.sum(kept, axis=0).to(tl.float64)
            wanted = whole * tl.maximum(top_p, _LEAST_TOP_P).to(tl.float64)
            floor = _bound(row, count, floor, largest, warmth, wanted, True, BLOCK)
        least = tl.load(min_ps + index)
        whole = tl.full((), 0.0, tl.float64)
        for start in range(0, count, BLOCK):
            whole += tl.sum(_kept_mass(row, start, count, floor, largest, warmth, least, BLOCK), axis=0).to(tl.float64)
        target = whole * tl.load(numbers + index).to(tl.float64)
        passed = tl.full((), 0.0, tl.float64)
        found = tl.full((), 0, tl.int32)
        for start in range(0, count, BLOCK):
            weight = _kept_mass(row, start, count, floor, largest, warmth, least, BLOCK)
            mass = tl.sum(weight, axis=0).to(tl.float64)
            if (found == 0) & (mass > 0.0):
                ahead = passed + tl.cumsum(weight.to(tl.float64), axis=0)
                last = tl.max(tl.where(weight > 0.0, start + at, 0), axis=0)
                hit = tl.min(tl.where((ahead > target) & (weight > 0.0), start + at, count), axis=0)
                # Where rounding leaves the number past the end, the last token that was kept is meant.
                token = tl.minimum(hit, last)
                found = (hit < count).to(tl.int32)
            passed += mass
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
    _draw[(len(logits),)](
        logits,
        *draws,
        out,
        logits.stride(0),
        logits.shape[1],
        BLOCK=min(_BLOCK, triton.next_power_of_2(logits.shape[1])),
        num_warps=16,
    )
