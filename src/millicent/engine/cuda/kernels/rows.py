"""What happens to rows between matrix products: embedding, norms, rotation and the cache, the gate, rounding to FP8."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.runtime import driver

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
_OVERLAPS_FROM = 90
_GATE_BLOCK = 1024
_QUANTIZE_BLOCK = 1024


@functools.cache
def overlap() -> dict[str, bool]:
    """How a kernel is launched that may begin before the one before it has ended (programmatic dependent launch, from
    Hopper on): what it does until it waits, as reading weights, costs no time then."""
    if os.environ.get("TRITON_INTERPRET") == "1" or not hasattr(tl.extra.cuda, "gdc_wait"):
        return {"OVERLAP": False}
    if driver.active.get_current_target().arch < _OVERLAPS_FROM:
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}


@triton.jit
def _embed(tokens, drawn, table, out, hidden: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    token = tl.load(tokens + row)
    if token < 0:
        token = tl.maximum(tl.load(drawn - token - 1), 0)
    at = tl.arange(0, BLOCK)
    inside = at < hidden
    tl.store(
        out + row.to(tl.int64) * hidden + at, tl.load(table + token.to(tl.int64) * hidden + at, mask=inside), inside
    )


def embed(tokens: torch.Tensor, drawn: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """[rows, hidden]. A token `-1 - i` stands for the one that the pass before drew in its row i: `drawn[i]`."""
    hidden = table.shape[1]
    out = torch.empty(len(tokens), hidden, dtype=table.dtype, device=table.device)
    _embed[(len(tokens),)](tokens, drawn, table, out, hidden, BLOCK=triton.next_power_of_2(hidden))
    return out


@dataclass(frozen=True, slots=True)
class Norm:
    """Of rows, by their root mean square."""

    weight: torch.Tensor
    eps: float


@triton.jit
def _add_rms_norm(
    delta, residual, rows, weight, out, eps, hidden: tl.constexpr, ADD: tl.constexpr, PICK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    target = tl.program_id(0).to(tl.int64)
    row = target
    if PICK:
        row = tl.load(rows + target).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < hidden
    stored = tl.load(residual + row * hidden + at, mask=inside, other=0.0)
    x = stored.to(tl.float32)
    if ADD:
        x += tl.load(delta + row * hidden + at, mask=inside, other=0.0).to(tl.float32)
        if not PICK:
            tl.store(residual + row * hidden + at, x.to(stored.dtype), mask=inside)
        x = x.to(stored.dtype).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / hidden + eps)
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + target * hidden + at, (x * scale * factor).to(stored.dtype), mask=inside)


def add_rms_norm(
    delta: torch.Tensor | None,
    residual: torch.Tensor,
    norm: Norm,
    *,
    picked: torch.Tensor | None = None,
) -> torch.Tensor:
    """`residual += delta`, in place, and its norm. With `picked` only those rows come out, and nothing is kept."""
    rows = residual.shape[0] if picked is None else len(picked)
    out = torch.empty(rows, residual.shape[1], dtype=residual.dtype, device=residual.device)
    _add_rms_norm[(rows,)](
        residual if delta is None else delta,
        residual,
        residual if picked is None else picked,
        norm.weight,
        out,
        norm.eps,
        residual.shape[1],
        ADD=delta is not None,
        PICK=picked is not None,
        BLOCK=triton.next_power_of_2(residual.shape[1]),
    )
    return out


@triton.jit
def _rotate_and_cache(
    qkv, query_norm, key_norm, cosines, sines, positions, slots, keys, values, eps, heads: tl.constexpr,
    kv_heads: tl.constexpr, head_dim: tl.constexpr, block_tokens: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    if slot < 0:  # padding
        return
    half: tl.constexpr = head_dim // 2
    at = tl.arange(0, BLOCK)
    inside = at < half
    source = qkv + (row * (heads + 2 * kv_heads) + head) * head_dim
    stored = tl.load(source + at, mask=inside, other=0.0)
    first = stored.to(tl.float32)
    second = tl.load(source + half + at, mask=inside, other=0.0).to(tl.float32)
    block, offset = slot // block_tokens, slot % block_tokens
    if head >= heads + kv_heads:
        target = values + ((block * kv_heads + head - heads - kv_heads) * block_tokens + offset) * head_dim
        tl.store(target + at, first.to(stored.dtype), mask=inside)
        tl.store(target + half + at, second.to(stored.dtype), mask=inside)
        return
    if NORM:
        scale = 1.0 / tl.sqrt((tl.sum(first * first, axis=0) + tl.sum(second * second, axis=0)) / head_dim + eps)
        weight = query_norm
        if head >= heads:
            weight = key_norm
        first = first * scale * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        second = second * scale * tl.load(weight + half + at, mask=inside, other=0.0).to(tl.float32)
    position = tl.load(positions + row).to(tl.int64)
    cosine = tl.load(cosines + position * half + at, mask=inside, other=0.0)
    sine = tl.load(sines + position * half + at, mask=inside, other=0.0)
    target = source
    if head >= heads:
        target = keys + ((block * kv_heads + head - heads) * block_tokens + offset) * head_dim
    tl.store(target + at, (first * cosine - second * sine).to(stored.dtype), mask=inside)
    tl.store(target + half + at, (second * cosine + first * sine).to(stored.dtype), mask=inside)


@dataclass(frozen=True, slots=True)
class Turning:
    """What makes queries and keys of products: cosines and sines, float32 [positions, head_dim / 2], and the weights of
    the norms of queries' and of keys' heads, where the family has them."""

    angles: tuple[torch.Tensor, torch.Tensor]
    norms: tuple[torch.Tensor, torch.Tensor] | None
    eps: float


def rotate_and_cache(
    qkv: torch.Tensor,
    turning: Turning,
    positions: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Norm and turn the queries of `qkv` [rows, all heads x head_dim] in place; write normed and turned keys, and
    values, into one layer's cache [blocks, kv_heads, block_tokens, head_dim]. Rows with slot -1 are padding."""
    _, kv_heads, block_tokens, head_dim = keys.shape
    all_heads = qkv.shape[1] // head_dim
    _rotate_and_cache[(len(qkv), all_heads)](
        qkv,
        *(turning.norms or (qkv, qkv)),
        *turning.angles,
        positions,
        slots,
        keys,
        values,
        turning.eps,
        all_heads - 2 * kv_heads,
        kv_heads,
        head_dim,
        block_tokens,
        NORM=turning.norms is not None,
        BLOCK=triton.next_power_of_2(head_dim // 2),
        num_warps=1,
    )


@triton.jit
def _silu_mul(gate_up, out, width: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    stored = tl.load(gate_up + row * 2 * width + at, mask=inside, other=0.0)
    gate = stored.to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, (gate / (1.0 + tl.exp(-gate)) * up).to(stored.dtype), mask=inside)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` of [rows, gate then up]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    block = min(_GATE_BLOCK, triton.next_power_of_2(width))
    _silu_mul[(rows, triton.cdiv(width, block))](gate_up, out, width, BLOCK=block)
    return out


@triton.jit
def _quantize_rows(x, out, scales, width: tl.constexpr, largest: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    peak = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        peak = tl.maximum(
            peak, tl.abs(tl.load(x + row * width + start + at, mask=start + at < width, other=0.0).to(tl.float32))
        )
    scale = tl.maximum(tl.max(peak, axis=0), 1e-12) / largest
    tl.store(scales + row, scale)
    for start in range(0, width, BLOCK):
        inside = start + at < width
        value = tl.load(x + row * width + start + at, mask=inside, other=0.0).to(tl.float32) / scale
        tl.store(out + row * width + start + at, value.to(out.dtype.element_ty), mask=inside)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` [rows, width] as FP8 (e4m3) with a float32 scale for each row: `x = values * scales`."""
    values = torch.empty(x.shape, dtype=FP8, device=x.device)
    scales = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    block = min(_QUANTIZE_BLOCK, triton.next_power_of_2(x.shape[1]))
    _quantize_rows[(len(x),)](x, values, scales, x.shape[1], FP8_LARGEST, BLOCK=block)
    return values, scales
