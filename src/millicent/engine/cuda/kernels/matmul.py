"""Products of few rows: reading the weights is what they cost, and launches are the rest. So what comes before (a norm)
and after (a gate, adding to what the layers hand on) is done in the same launch, and FP8 is widened on the way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from millicent.engine.cuda.kernels.rows import Norm, overlap

SMALL_ROWS = 16  # what a matrix unit computes anyway


@dataclass(frozen=True, slots=True)
class Cut:
    """How a product is cut into programs: how many of its weights one has on the way at once, at most, and how many
    programs there are at least where outputs are few: about one for each multiprocessor."""

    weights: int
    inputs: int
    warps: int
    programs: int = 128


ONE_ROW = Cut(weights=8192, inputs=4096, warps=4)
SEVERAL_ROWS = Cut(weights=8192, inputs=256, warps=4)


@triton.jit
def _turn(
    x, source, real, norm, weight, output, inside, at, first, second, squares, outputs: tl.constexpr,
    inputs: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
    WAIT: tl.constexpr,
):  # fmt: skip
    there = at < inputs
    wanted = inside[:, None] & there[None, :]
    place = weight + output[:, None].to(tl.int64) * inputs + at[None, :]
    right = tl.load(place, mask=wanted, other=0.0)
    if GATED:
        upper = tl.load(place + outputs * inputs, mask=wanted, other=0.0)
    if WAIT:  # weights are there anyway; what follows is of the kernel before
        tl.extra.cuda.gdc_wait()
    left = tl.load(x + source[:, None] * inputs + at[None, :], mask=real[:, None] & there[None, :], other=0.0)
    if NORM:
        wide = left.to(tl.float32)
        squares += wide * wide
        left = (wide * tl.load(norm + at, mask=there, other=0.0).to(tl.float32)[None, :]).to(left.dtype)
    if ROWS == 1:  # multiplied where the weights arrive, and summed up at the end
        first += right.to(tl.float32) * left.to(tl.float32)
        if GATED:
            second += upper.to(tl.float32) * left.to(tl.float32)
    else:
        first = tl.dot(left, tl.trans(right.to(left.dtype)), first, input_precision=PRECISION)
        if GATED:
            second = tl.dot(left, tl.trans(upper.to(left.dtype)), second, input_precision=PRECISION)
    return first, second, squares


@triton.jit
def _finished(
    products, factor, scales, bias, output, inside, ROWS: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    if ROWS == 1:
        products = tl.sum(products, axis=1)[None, :]
    products = products * factor
    if SCALED:
        products = products * tl.load(scales + output, mask=inside, other=0.0)[None, :]
    if BIAS:
        products = products + tl.load(bias + output, mask=inside, other=0.0).to(tl.float32)[None, :]
    return products


@triton.jit(do_not_specialize=["rows"])
def _multiply_few(
    x, picked, norm, weight, scales, bias, out, rows, eps, outputs: tl.constexpr, inputs: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, PICK: tl.constexpr, NORM: tl.constexpr,
    SCALED: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        if ROWS > 1:
            tl.extra.cuda.gdc_wait()
    row, output = tl.arange(0, ROWS), tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    real, inside = row < rows, output < outputs
    source = row
    if PICK:
        source = tl.load(picked + row, mask=real, other=0)
    first = tl.zeros((OUTPUTS if ROWS == 1 else ROWS, INPUTS if ROWS == 1 else OUTPUTS), tl.float32)
    second = first
    squares = tl.zeros((ROWS, INPUTS), tl.float32)
    column = tl.arange(0, INPUTS)
    if ROWS == 1:
        for turn in tl.static_range((inputs + INPUTS - 1) // INPUTS):  # so that all loads are issued at once
            first, second, squares = _turn(
                x, source, real, norm, weight, output, inside, turn * INPUTS + column, first, second, squares,
                outputs, inputs, ROWS, NORM, GATED, PRECISION, OVERLAP and turn == 0,
            )  # fmt: skip
    else:
        for begin in range(0, inputs, INPUTS):
            first, second, squares = _turn(
                x, source, real, norm, weight, output, inside, begin + column, first, second, squares,
                outputs, inputs, ROWS, NORM, GATED, PRECISION, False,
            )  # fmt: skip
    factor = 1.0
    if NORM:  # of a row, so it can wait for the sums
        factor = (1.0 / tl.sqrt(tl.sum(squares, axis=1) / inputs + eps))[:, None]
    found = _finished(first, factor, scales, bias, output, inside, ROWS, SCALED, BIAS)
    if GATED:
        upper = _finished(second, factor, scales + outputs, bias + outputs, output, inside, ROWS, SCALED, BIAS)
        found = found / (1.0 + tl.exp(-found)) * upper
    target = out + row[:, None].to(tl.int64) * outputs + output[None, :]
    here = real[:, None] & inside[None, :]
    if ADD:
        found += tl.load(target, mask=here, other=0.0).to(tl.float32)
    tl.store(target, found.to(out.dtype.element_ty), mask=here)


def multiply_few(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    norm: Norm | None = None,
    gated: bool = False,
    onto: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    picked: torch.Tensor | None = None,
    cut: Cut | None = None,
) -> torch.Tensor:
    """`x @ (weight * scales[:, None]).T + bias` of at most SMALL_ROWS rows of `x` (all, or those `picked`), normed
    before. `gated`: the weights are gate's, then up's, and `silu(gate) * up` comes out. `onto` is added to, in place;
    `out` is filled; else the result is new."""
    rows = len(x if picked is None else picked)
    outputs, inputs = weight.shape[0] // (2 if gated else 1), weight.shape[1]
    target = onto if onto is not None else out
    if target is None:
        target = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    lanes = 1 if rows == 1 else SMALL_ROWS
    cut = cut or (ONE_ROW if rows == 1 else SEVERAL_ROWS)
    columns = _columns(inputs, cut.inputs)
    block = max(1 if rows == 1 else 16, cut.weights // (2 * columns if gated else columns))
    while block > (1 if rows == 1 else 16) and triton.cdiv(outputs, block) < cut.programs:
        block //= 2
    _multiply_few[(triton.cdiv(outputs, block),)](
        x,
        x if picked is None else picked,
        x if norm is None else norm.weight,
        weight,
        x if scales is None else scales,
        x if bias is None else bias,
        target,
        rows,
        0.0 if norm is None else norm.eps,
        outputs,
        inputs,
        ROWS=lanes,
        OUTPUTS=block,
        INPUTS=columns,
        PICK=picked is not None,
        NORM=norm is not None,
        SCALED=scales is not None,
        BIAS=bias is not None,
        GATED=gated,
        ADD=onto is not None,
        PRECISION="ieee" if x.dtype is torch.float32 else "tf32",
        num_warps=cut.warps,
        num_stages=4,
        **overlap(),
    )
    return target


def _columns(inputs: int, most: int) -> int:
    """How many are multiplied in a turn: all, or else a power of two that leaves the last turn full, where that isn't
    too small."""
    if inputs <= most:
        return max(16, triton.next_power_of_2(inputs))
    columns = most
    while inputs % columns and columns > most // 4:
        columns //= 2
    return columns
