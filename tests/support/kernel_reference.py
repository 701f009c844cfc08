"""What the kernels compute, said in plain torch: for tests to compare with. In float32 throughout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from millicent.engine.batch import Piece
from millicent.engine.kernels.layers import DecoderShape


def linear(x: torch.Tensor, weight: torch.Tensor, norm: torch.Tensor | None = None, eps: float = 0.0) -> torch.Tensor:
    if norm is not None:
        x = functional.rms_norm(x, norm.shape, norm, eps)
    return x @ weight.T


def gate_up(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return functional.silu(x @ gate.T) * (x @ up.T)


class ReferenceAttention:
    """One layer's attention over contexts that it keeps whole, by sequence number."""

    def __init__(
        self, shape: DecoderShape, query_norm: torch.Tensor | None = None, key_norm: torch.Tensor | None = None
    ) -> None:
        self._shape = shape
        self._query_norm = query_norm
        self._key_norm = key_norm
        self._contexts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, qkv: torch.Tensor, pieces: Sequence[Piece]) -> torch.Tensor:
        """float32 [rows, (heads + 2 kv_heads) head_dim] to [rows, heads head_dim]."""
        counts = [len(piece.tokens) for piece in pieces]
        outputs = [self._piece(rows, piece) for rows, piece in zip(torch.split(qkv, counts), pieces, strict=True)]
        return torch.cat(outputs)

    def _piece(self, rows: torch.Tensor, piece: Piece) -> torch.Tensor:
        shape = self._shape
        heads = rows.view(len(rows), -1, shape.head_dim)
        query, key, value = torch.split(heads, [shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
        positions = torch.arange(piece.start, piece.start + len(rows))
        query = self._rotated(self._normed(query, self._query_norm), positions)
        key = self._rotated(self._normed(key, self._key_norm), positions)
        if piece.start:
            past_keys, past_values = self._contexts[piece.sequence]
            key = torch.cat((past_keys[: piece.start], key))
            value = torch.cat((past_values[: piece.start], value))
        self._contexts[piece.sequence] = (key, value)
        group = shape.heads // shape.kv_heads
        scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(group, dim=1)) * shape.head_dim**-0.5
        scores = scores.masked_fill(torch.arange(len(key)) > positions[:, None], -torch.inf)
        found = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value.repeat_interleave(group, dim=1))
        return found.reshape(len(rows), -1)

    def _normed(self, heads: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        return heads if norm is None else functional.rms_norm(heads, norm.shape, norm, self._shape.norm_epsilon)

    def _rotated(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cosine, sine = (found[positions][:, None] for found in self._shape.angles(int(positions[-1]) + 1))
        rotated = cosine.shape[-1] * 2
        turning, rest = heads[..., :rotated], heads[..., rotated:]
        if self._shape.interleaved:
            first, second = turning[..., 0::2], turning[..., 1::2]
            pairs = torch.stack((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
            return torch.cat((pairs.flatten(-2), rest), dim=-1)
        first, second = turning.chunk(2, dim=-1)
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine, rest), dim=-1)
