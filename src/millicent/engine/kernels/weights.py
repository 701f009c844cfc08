"""Weights in the kernels' formats: quantized in groups of 32 inputs, packed, multiplied, unpacked."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntEnum

import torch

from millicent.engine.kernels.library import WeightStruct, library

GROUP = 32


class Format(IntEnum):
    """How a matrix is kept. Q8 is GGUF's Q8_0, Q4 its Q4_0, Q4_MIN its Q4_1: their blocks go in unchanged."""

    F32 = 0
    BF16 = 1
    Q8 = 2
    Q4 = 3
    Q4_MIN = 4

    @property
    def bits(self) -> int:
        """Of a value, without its share of a scale."""
        return {Format.F32: 32, Format.BF16: 16, Format.Q8: 8}.get(self, 4)


class Epilogue(IntEnum):
    """STORE writes the result, ADD adds it to what is there; SILU_MUL makes silu(gate) * up of interleaved rows."""

    STORE = 0
    ADD = 1
    SILU_MUL = 2


_PLAIN = {torch.float32: Format.F32, torch.bfloat16: Format.BF16}
_OFFSETS = {Format.Q8: 128, Format.Q4: 8, Format.Q4_MIN: 0}


@dataclass(frozen=True, slots=True)
class Quantized:
    """`values` uint8 [outputs, inputs]; `scales` and `mins` float16 [outputs, inputs / 32].

    A weight is `scale * (value - 128)` in Q8, `scale * (value - 8)` in Q4, `scale * value + min` in Q4_MIN.
    """

    format: Format
    values: torch.Tensor
    scales: torch.Tensor
    mins: torch.Tensor | None = None

    def rows(self, index: torch.Tensor) -> Quantized:
        """Some rows, in any order: each carries its own groups, so nothing is rounded again."""
        mins = None if self.mins is None else self.mins[index]
        return Quantized(self.format, self.values[index], self.scales[index], mins)

    def dequantized(self) -> torch.Tensor:
        """float32 [outputs, inputs]."""
        grouped = (self.values.float() - _OFFSETS[self.format]).view(*self.scales.shape, GROUP)
        found = grouped * self.scales.float()[..., None]
        if self.mins is not None:
            found = found + self.mins.float()[..., None]
        return found.view(self.values.shape)


Matrix = torch.Tensor | Quantized


def quantize(weight: torch.Tensor, format_: Format) -> Quantized:
    """The values, and for 4 bits the scales and minima, that bring the squared error down.

    Q8: the group's greatest magnitude becomes 127. Q4: it becomes -8, as in GGUF, or something near. Q4_MIN: the
    group's range becomes 0 to 15, or some of it. From the best of those, scales and minima become those of least
    squares for the values they gave, and the values the nearest again.
    """
    if format_ is Format.Q8:
        groups = weight.float().reshape(weight.shape[0], -1, GROUP)
        scales = (groups.abs().amax(-1) / 127).half()
        values = _nearest(groups, scales, -127, 127) + 128
        return Quantized(format_, values.to(torch.uint8).view(weight.shape), scales)
    rows_at_once = max(1, _ELEMENTS_AT_ONCE // weight.shape[1])
    parts = [
        fit_groups(rows.float().reshape(len(rows), -1, GROUP), format_, torch.ones(GROUP))
        for rows in torch.split(weight, rows_at_once)
    ]
    values, scales, mins = (torch.cat(column) for column in zip(*parts, strict=True))
    return Quantized(format_, values.view(weight.shape), scales, mins if format_ is Format.Q4_MIN else None)


_ELEMENTS_AT_ONCE = 1 << 18  # what the search holds stays in the processor's caches
_REFITS = 3
_LIMITS = {Format.Q4: (-8, 7), Format.Q4_MIN: (0, 15)}


def fit_groups(
    groups: torch.Tensor, format_: Format, importance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """4-bit values, scales and minima of `groups` [rows, groups, 32]; `importance` [32] is of the squared errors."""
    best = _Best(groups, format_, importance / importance.sum())
    weights = best.importance
    if format_ is Format.Q4:
        signed = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
        zeros = torch.zeros_like(signed)
        for divisor in (-8.0, -7.6, -7.2, -6.8, -8.4, 7.5):
            best.offer(signed / divisor, zeros)
        for _ in range(_REFITS):
            values = best.values
            best.offer((values * groups) @ weights / ((values * values) @ weights).clamp_(min=1e-6), zeros)
    else:
        low, high = groups.amin(-1), groups.amax(-1)
        for cut in (0.0, 0.03, 0.06, 0.1):  # of the range, at each end
            best.offer((high - low) * (1 - 2 * cut) / 15, low + (high - low) * cut)
        group_mean = groups @ weights
        for _ in range(_REFITS):
            values = best.values
            value_mean = values @ weights
            spread = (values * values) @ weights - value_mean * value_mean
            scales = ((values * groups) @ weights - value_mean * group_mean) / spread.clamp_(min=1e-6)
            best.offer(scales, group_mean - scales * value_mean)
    return (best.values - _LIMITS[format_][0]).to(torch.uint8), best.scales, best.mins


def round_values(
    column: torch.Tensor, scale: torch.Tensor, least: torch.Tensor, format_: Format
) -> tuple[torch.Tensor, torch.Tensor]:
    """What becomes of some values in groups of these scales and minima, and how that is stored."""
    low, high = _LIMITS[format_]
    values = ((column - least) * _inverse(scale)).round_().clamp_(low, high)
    return values * scale + least, (values - low).to(torch.uint8)


class _Best:
    """Of the scales and minima offered for each group, those that round it with the least error."""

    def __init__(self, groups: torch.Tensor, format_: Format, importance: torch.Tensor) -> None:
        self._groups = groups
        self._limits = _LIMITS[format_]
        self._errors = torch.full(groups.shape[:2], torch.inf)
        self.importance = importance
        self.scales = torch.zeros(groups.shape[:2], dtype=torch.float16)
        self.mins = torch.zeros(groups.shape[:2], dtype=torch.float16)
        self.values = torch.zeros_like(groups)

    def offer(self, scales: torch.Tensor, mins: torch.Tensor) -> None:
        scales, mins = scales.half(), mins.half()
        values = _nearest(self._groups - mins.float()[..., None], scales, *self._limits)
        found = values * scales.float()[..., None] + mins.float()[..., None]
        errors = (found - self._groups).square_() @ self.importance
        better = errors < self._errors
        self._errors = torch.where(better, errors, self._errors)
        self.scales = torch.where(better, scales, self.scales)
        self.mins = torch.where(better, mins, self.mins)
        self.values = torch.where(better[..., None], values, self.values)


def _nearest(groups: torch.Tensor, scales: torch.Tensor, low: int, high: int) -> torch.Tensor:
    return (groups * _inverse(scales.float())[..., None]).round_().clamp_(low, high)


def _inverse(scales: torch.Tensor) -> torch.Tensor:
    return torch.where(scales == 0, 0.0, 1.0 / scales)


def format_of(name: str, quantization: str) -> Format:
    """What a matrix of Hugging Face's name is rounded to. The head decides between near ties and is read once a pass:
    four bits there, and in the embedding that may be the same matrix, cost more than they save."""
    if quantization == "int4" and not name.startswith(("lm_head", "model.embed_tokens")):
        return Format.Q4_MIN
    return Format.Q8


def concatenate(parts: list[Matrix]) -> Matrix | None:
    """Matrices that read the same inputs as one; None where their formats differ."""
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, torch.Tensor) for part in parts):
        return torch.cat([part for part in parts if isinstance(part, torch.Tensor)])
    quantized = [part for part in parts if isinstance(part, Quantized)]
    if len(quantized) != len(parts) or len({part.format for part in quantized}) != 1:
        return None
    mins = [part.mins for part in quantized if part.mins is not None]
    return Quantized(
        quantized[0].format,
        torch.cat([part.values for part in quantized]),
        torch.cat([part.scales for part in quantized]),
        torch.cat(mins) if mins else None,
    )


def interleaved_rows(intermediate: int) -> torch.Tensor:
    """Order of the rows of gate and up, one below the other, that SILU_MUL expects: 16 of one, 16 of the other."""
    rows = torch.arange(2 * intermediate).view(2, intermediate // 16, 16)
    return rows.transpose(0, 1).reshape(-1)


class PackedWeight:
    """A matrix in the kernels' order. Inputs are a multiple of 32; outputs are any number."""

    def __init__(self, matrix: Matrix, bias: torch.Tensor | None = None) -> None:
        quantized = matrix if isinstance(matrix, Quantized) else None
        values = matrix.values if isinstance(matrix, Quantized) else matrix
        self.outputs, self.inputs = values.shape
        self.format = quantized.format if quantized else _PLAIN[values.dtype]
        assert self.inputs % GROUP == 0
        native = library()
        self._values = torch.empty(
            native.mk_packed_value_bytes(self.format, self.outputs, self.inputs), dtype=torch.uint8
        )
        native.mk_use_large_pages(address(self._values), self._values.nbytes)
        scale_count = native.mk_packed_scales(self.outputs, self.inputs)
        self._scales = torch.empty(scale_count, dtype=torch.float16) if quantized else None
        has_mins = quantized is not None and quantized.mins is not None
        self._mins = torch.empty(scale_count, dtype=torch.float16) if has_mins else None
        self._bias = None if bias is None else bias.float().contiguous()
        parts = (values, quantized.scales if quantized else None, quantized.mins if quantized else None)
        sources = [None if part is None else part.contiguous() for part in parts]
        native.mk_pack(
            self.format,
            self.outputs,
            self.inputs,
            *map(address, sources),
            *map(address, (self._values, self._scales, self._mins)),
        )
        self.struct = WeightStruct(
            self.format,
            0,
            self.outputs,
            self.inputs,
            *map(address, (self._values, self._scales, self._mins, self._bias)),
        )

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self._values, self._scales, self._mins, self._bias) if part is not None)

    def __call__(
        self,
        x: torch.Tensor,
        *,
        norm: torch.Tensor | None = None,
        norm_epsilon: float = 0.0,
        epilogue: Epilogue = Epilogue.STORE,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`x`, float32 [rows, inputs], times the transposed weight, float32. With `norm`, x is RMS-normalised first."""
        assert x.dtype is torch.float32
        assert x.is_contiguous()
        columns = self.outputs // 2 if epilogue is Epilogue.SILU_MUL else self.outputs
        if out is None:
            out = torch.empty(len(x), columns)
        assert out.is_contiguous()
        library().mk_linear(
            ctypes.byref(self.struct), address(x), len(x), address(norm), norm_epsilon, epilogue, address(out)
        )
        return out

    def unpack_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Dequantized rows, float32 [len(rows), inputs]: the embedding of a model that shares it with its head."""
        wanted = rows.to(torch.int64).contiguous()
        out = torch.empty(len(wanted), self.inputs)
        library().mk_unpack_rows(ctypes.byref(self.struct), address(wanted), len(wanted), address(out))
        return out


def address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
