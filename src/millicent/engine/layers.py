"""What decoders are made of: a linear, a norm, rotation, attention over the paged cache, a gated MLP. Each stands here
once, for every family. `Linear` and `attend` are the two places where time goes."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional

from millicent.engine.kv_cache import Plan
from millicent.engine.weights import ModelSpec

# Private in name, and the only door to oneDNN's packed weights; the check for packing guards against their leaving.
_onednn: Any = torch.ops.mkldnn
_processor: Any = torch.cpu


class Linear:
    """`rows @ weight.T + bias`, with the weight kept in the layout that oneDNN reads fastest, where there is oneDNN."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._bias = bias
        self._packed = weight.dtype is torch.bfloat16 and weight.device.type == "cpu" and has_fast_bf16()
        self.packed_bytes = weight.nbytes if self._packed else 0
        self._weight = _onednn._reorder_linear_weight(weight, None) if self._packed else weight  # noqa: SLF001

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, in] to [rows, out]."""
        if self._packed:
            found: torch.Tensor = _onednn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")  # noqa: SLF001
            return found
        return functional.linear(rows, self._weight, self._bias)


def has_fast_bf16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware, and oneDNN is here to use it."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if platform.machine() in {"arm64", "aarch64"}:
        return bool(_onednn._is_mkldnn_bf16_supported())  # noqa: SLF001
    return bool(_processor._is_avx512_bf16_supported() or _processor._is_amx_tile_supported())  # noqa: SLF001


class RmsNorm:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight = weight
        self._eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, self._weight.shape, self._weight, self._eps)


class LayerNorm:
    """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` over the last dimension."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> None:
        self._weight = weight
        self._bias = bias
        self._eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, self._weight.shape, self._weight, self._bias, self._eps)


class Rotary:
    """Rotary position embedding, Hugging Face's convention: element i of a head turns with element i + half."""

    def __init__(self, spec: ModelSpec) -> None:
        self._frequencies = rotary_frequencies(spec)

    def angles(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, each [rows, 1, head_dim / 2]."""
        angles = torch.outer(positions.float(), self._frequencies)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotary_frequencies(spec: ModelSpec) -> torch.Tensor:
    """Radians per position, float32 [head_dim / 2]: theta^(-2i/d), scaled as `RopeScaling` says."""
    exponents = torch.arange(0, spec.head_dim, 2).float() / spec.head_dim
    frequencies = 1.0 / spec.rope_theta**exponents
    scaling = spec.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.divisors:
        return frequencies / torch.tensor(scaling.divisors)
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    turns = scaling.original_context_tokens * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies


def rotate(x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """[rows, heads, head_dim], each row turned by its position's angles."""
    cosine, sine = angles
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Causal grouped-query attention of `query` [rows, heads, head_dim] over one layer's cache
    [blocks, block_tokens, kv_heads, head_dim], in which this pass's keys and values already are."""
    rows, heads, head_dim = query.shape
    kv_heads = keys.shape[2]
    found = torch.empty_like(query)
    if plan.decode is not None:
        count, blocks = plan.decode.count, plan.decode.blocks
        context = (count, -1, kv_heads, head_dim)
        # A group's query heads stand where positions would: they share a key-value head, and there is no causality.
        found[:count] = functional.scaled_dot_product_attention(
            query[:count].view(count, kv_heads, heads // kv_heads, head_dim),
            _gather(keys, blocks).view(context).transpose(1, 2),
            _gather(values, blocks).view(context).transpose(1, 2),
            attn_mask=plan.decode.mask,
        ).view(count, heads, head_dim)
    for piece in plan.prefill:
        found[piece.start : piece.stop] = functional.scaled_dot_product_attention(
            query[None, piece.start : piece.stop].transpose(1, 2),
            _gather(keys, piece.blocks).view(1, -1, kv_heads, head_dim)[:, : piece.context_tokens].transpose(1, 2),
            _gather(values, piece.blocks).view(1, -1, kv_heads, head_dim)[:, : piece.context_tokens].transpose(1, 2),
            attn_mask=piece.mask,
            is_causal=piece.mask is None,
            enable_gqa=heads != kv_heads,
        )[0].transpose(0, 1)
    return found.view(rows, heads * head_dim)


def attend_both_ways(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, edges: Sequence[int]) -> torch.Tensor:
    """Every row of a text attends to all of it. [rows, heads, head_dim]; text i starts at row edges[i]."""
    found = torch.empty_like(query)
    for start, stop in pairwise(edges):
        q, k, v = (rows[None, start:stop].transpose(1, 2) for rows in (query, key, value))
        found[start:stop] = functional.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)
    return found.flatten(1)


def _gather(cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """The blocks of a table, or of several, one after the other. Whole blocks are copied, not elements."""
    return cache.index_select(0, blocks.flatten())


class Attention:
    """Self-attention. `query_norm` and `key_norm` are over each head, for families that have them."""

    def __init__(
        self,
        spec: ModelSpec,
        qkv: Linear,
        output: Linear,
        query_norm: RmsNorm | None = None,
        key_norm: RmsNorm | None = None,
    ) -> None:
        self._head_dim = spec.head_dim
        self._heads = [spec.heads, spec.kv_heads, spec.kv_heads]
        self._qkv = qkv
        self._output = output
        self._query_norm = query_norm
        self._key_norm = key_norm

    def __call__(
        self,
        x: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        keys: torch.Tensor,
        values: torch.Tensor,
        plan: Plan,
    ) -> torch.Tensor:
        heads = self._qkv(x).view(x.shape[0], -1, self._head_dim)
        query, key, value = torch.split(heads, self._heads, dim=1)
        if self._query_norm is not None:
            query = self._query_norm(query)
        if self._key_norm is not None:
            key = self._key_norm(key)
        keys.view(-1, *keys.shape[2:]).index_copy_(0, plan.slots, rotate(key, angles)[plan.written])
        values.view(-1, *values.shape[2:]).index_copy_(0, plan.slots, value[plan.written])
        return self._output(attend(rotate(query, angles), keys, values, plan))


class GatedMlp:
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self._gate_up = gate_up
        self._down = down

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self._gate_up(x).chunk(2, dim=-1)
        return self._down(functional.silu(gate).mul_(up))
