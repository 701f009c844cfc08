"""Products of few rows with FP8 weights: the weights are what is read, so they are widened on the way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SMALL_ROWS = 16  # what a matrix unit computes anyway; above, rounding rows to FP8 too pays
_INPUTS = 256  # columns per turn of the loop


@triton.jit(do_not_specialize=["rows"])
def _multiply_small(
    x, weight, scales, out, rows, outputs: tl.constexpr, inputs: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    row, output = tl.arange(0, ROWS), tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    column = tl.arange(0, INPUTS)
    found = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for begin in range(0, inputs, INPUTS):
        inside = begin + column < inputs
        left = tl.load(
            x + row[:, None] * inputs + begin + column[None, :], mask=(row < rows)[:, None] & inside[None, :], other=0.0
        )
        right = tl.load(
            weight + output[:, None].to(tl.int64) * inputs + begin + column[None, :],
            mask=(output < outputs)[:, None] & inside[None, :],
            other=0.0,
        )
        found = tl.dot(left, tl.trans(right.to(left.dtype)), found)
    found = found * tl.load(scales + output, mask=output < outputs, other=0.0)[None, :]
    here = (row < rows)[:, None] & (output < outputs)[None, :]
    tl.store(out + row[:, None] * outputs + output[None, :], found.to(out.dtype.element_ty), mask=here)


def multiply_small(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`x @ (weight * scales[:, None]).T` of at most SMALL_ROWS rows: FP8 [outputs, inputs], float32 [outputs]."""
    outputs, inputs = weight.shape
    out = torch.empty(len(x), outputs, dtype=x.dtype, device=x.device)
    block = 16 if outputs < 8192 else 32  # enough programs to fill the chip
    _multiply_small[(triton.cdiv(outputs, block),)](
        x, weight, scales, out, len(x), outputs, inputs, ROWS=SMALL_ROWS, OUTPUTS=block, INPUTS=_INPUTS, num_stages=4
    )
    return out
