"""Matrix products with weights in memory of the device: as they are, or rounded to FP8."""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional

from millicent.engine.cuda.kernels.matmul import multiply_few
from millicent.engine.cuda.kernels.rows import FP8, FP8_LARGEST, Norm, quantize_rows

_FP8_MULTIPLE = 16  # of both sizes: what the matrix units take


class Linear(Protocol):
    nbytes: int

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, in] to [rows, out]."""
        ...

    def few(
        self, rows: torch.Tensor, *, norm: Norm | None = None, gated: bool = False, onto: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Of few rows, as in `multiply_few`."""
        ...


class PlainLinear:
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight = weight
        self._bias = bias
        self.nbytes = weight.nbytes + (bias.nbytes if bias is not None else 0)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return functional.linear(rows, self._weight, self._bias)

    def few(
        self, rows: torch.Tensor, *, norm: Norm | None = None, gated: bool = False, onto: torch.Tensor | None = None
    ) -> torch.Tensor:
        return multiply_few(rows, self._weight, bias=self._bias, norm=norm, gated=gated, onto=onto)


class OutputLayer:
    """What logits come of, after the last norm."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def into(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        torch.mm(rows, self._weight.t(), out=out)

    def few_into(self, rows: torch.Tensor, norm: Norm, picked: torch.Tensor, out: torch.Tensor) -> None:
        """Of some rows, which are normed first."""
        multiply_few(rows, self._weight, norm=norm, picked=picked, out=out)


class Fp8Linear:
    """Each output's weights are FP8 (e4m3) times a float32 scale. Few rows are multiplied as they are; many are rounded
    to FP8 too, with a scale for each row, so that the matrix units compute twice as fast."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        peak = weight.abs().amax(dim=1).float().clamp(min=1e-12)
        self._scales = peak / FP8_LARGEST
        self._values = (weight.float() / self._scales[:, None]).to(FP8)
        self._bias = bias
        self._dtype = weight.dtype
        self.nbytes = self._values.nbytes + self._scales.nbytes + (bias.nbytes if bias is not None else 0)

    @staticmethod
    def fits(outputs: int, inputs: int) -> bool:
        return outputs % _FP8_MULTIPLE == 0 and inputs % _FP8_MULTIPLE == 0

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        values, scales = quantize_rows(rows)
        found = torch._scaled_mm(  # noqa: SLF001 - private in name, and the only door to it
            values,
            self._values.t(),
            scale_a=scales,
            scale_b=self._scales[None, :],
            out_dtype=self._dtype,
            use_fast_accum=True,  # sums lose less than FP8 has lost already, and need half the time
        )
        return found if self._bias is None else found + self._bias

    def few(
        self, rows: torch.Tensor, *, norm: Norm | None = None, gated: bool = False, onto: torch.Tensor | None = None
    ) -> torch.Tensor:
        return multiply_few(rows, self._values, self._scales, self._bias, norm=norm, gated=gated, onto=onto)
