"""GGML's quantizations: how blocks are laid out, and back to floating point.

The common ones (F32, F16, BF16, Q8_0, Q4_0, Q4_1) are done here with torch, straight into the wanted type, several
times as fast as by way of float32 arrays; all others go through the `gguf` library.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import numpy as np

    from millicent.engine.kernels.weights import Quantized

_BLOCK = 32


# GGML's numbers, with elements and bytes per block.
_F32, _F16, _Q4_0, _Q4_1, _Q8_0, _BF16 = 0, 1, 2, 3, 8, 30
_LAYOUTS = {_F32: (1, 4), _F16: (1, 2), _Q4_0: (32, 18), _Q4_1: (32, 20), _Q8_0: (32, 34), _BF16: (1, 2)}
_PLAIN = {_F32: torch.float32, _F16: torch.float16, _BF16: torch.bfloat16}


def block_layout(quantization: int) -> tuple[int, int] | None:
    """Elements and bytes per block; None for an unknown number."""
    if quantization in _LAYOUTS:
        return _LAYOUTS[quantization]
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        elements, size_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(quantization)]
    except (ValueError, KeyError):
        return None
    return elements, size_bytes


def dequantize(
    raw: np.ndarray[Any, Any], quantization: int, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """`raw` bytes as a tensor of `shape` and `dtype`, in memory of its own."""
    if quantization in _PLAIN:
        return torch.from_numpy(raw).view(_PLAIN[quantization]).reshape(shape).to(dtype, copy=True)
    if quantization in _FAST:
        return _FAST[quantization](torch.from_numpy(raw), dtype).reshape(shape)
    from gguf import GGMLQuantizationType
    from gguf import dequantize as dequantize_any

    return torch.from_numpy(dequantize_any(raw, GGMLQuantizationType(quantization))).reshape(shape).to(dtype)


def is_plain(quantization: int) -> bool:
    """Whether these are just floating-point numbers."""
    return quantization in _PLAIN


def quantized(raw: np.ndarray[Any, Any], quantization: int, shape: tuple[int, ...]) -> Quantized | None:
    """A matrix of Q8_0, Q4_0 or Q4_1 blocks as the kernels take it, value for value; None for anything else."""
    if quantization not in _FAST or len(shape) != 2:
        return None
    from millicent.engine.kernels.weights import Format, Quantized

    layout_bytes = _LAYOUTS[quantization][1]
    blocks = torch.from_numpy(raw).view(-1, layout_bytes)
    head_bytes = 4 if quantization == _Q4_1 else 2
    heads = blocks[:, :head_bytes].contiguous().view(torch.float16).view(shape[0], -1, head_bytes // 2)
    body = blocks[:, head_bytes:]
    values = (body ^ 0x80) if quantization == _Q8_0 else _nibbles(body).view(torch.uint8)
    format_ = {_Q8_0: Format.Q8, _Q4_0: Format.Q4, _Q4_1: Format.Q4_MIN}[quantization]
    mins = heads[..., 1].contiguous() if quantization == _Q4_1 else None
    return Quantized(format_, values.reshape(shape), heads[..., 0].contiguous(), mins)


def to_blocks(matrix: Quantized) -> np.ndarray[Any, Any]:
    """The inverse of `quantized`: uint8 [outputs, bytes of a row]."""
    values = matrix.values.view(-1, _BLOCK)
    heads = [matrix.scales] if matrix.mins is None else [matrix.scales, matrix.mins]
    head = torch.stack(heads, dim=-1).view(torch.uint8).view(len(values), -1)
    wide = matrix.format.bits == 8
    body = values ^ 0x80 if wide else values[:, : _BLOCK // 2] | values[:, _BLOCK // 2 :] << 4
    return torch.cat((head, body), dim=1).view(len(matrix.values), -1).numpy()


def stored_bytes(quantization: int, shape: tuple[int, ...]) -> int:
    """`block_layout` knows the number."""
    layout = block_layout(quantization)
    assert layout is not None
    elements, size_bytes = layout
    return prod(shape) // elements * size_bytes


def _q8_0(raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Blocks of a float16 scale and 32 signed bytes: `scale * q`."""
    blocks = raw.view(-1, 2 + _BLOCK)
    scale = blocks[:, :2].contiguous().view(torch.float16).float()
    return (blocks[:, 2:].view(torch.int8) * scale).to(dtype)


def _q4_0(raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Blocks of a float16 scale and 16 bytes, whose low nibbles come first, then the high ones: `scale * (q - 8)`."""
    blocks = raw.view(-1, 2 + _BLOCK // 2)
    scale = blocks[:, :2].contiguous().view(torch.float16).float()
    return ((_nibbles(blocks[:, 2:]) - 8) * scale).to(dtype)


def _q4_1(raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As Q4_0, with a float16 minimum after the scale: `scale * q + minimum`."""
    blocks = raw.view(-1, 4 + _BLOCK // 2)
    pair = blocks[:, :4].contiguous().view(torch.float16).float()
    return torch.addcmul(pair[:, 1:], _nibbles(blocks[:, 4:]).float(), pair[:, :1]).to(dtype)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """int8 [blocks, 32] from uint8 [blocks, 16]."""
    return torch.cat((packed & 0x0F, packed >> 4), dim=1).view(torch.int8)


_FAST: dict[int, Callable[[torch.Tensor, torch.dtype], torch.Tensor]] = {_Q8_0: _q8_0, _Q4_0: _q4_0, _Q4_1: _q4_1}
