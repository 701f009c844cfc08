"""Whole decoder layers in one call: their weights, the paged cache in the kernels' order, which rows go where."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from millicent.engine.batch import Piece
from millicent.engine.kernels.library import BatchStruct, LayerStruct, ShapeStruct, library
from millicent.engine.kernels.weights import Format, PackedWeight, address
from millicent.engine.kv_cache import lazy_zeros

CACHE_TILE_TOKENS = 16
MAX_HEAD_DIM = 256
MAX_HEADS_PER_KV_HEAD = 48
_CACHE_FORMATS = {torch.float32: Format.F32, torch.bfloat16: Format.BF16, torch.int8: Format.Q8}


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """What the layers share. `frequencies` are radians per position, float32 [rotated / 2]; with `interleaved`,
    elements 2i and 2i + 1 of a head turn together, otherwise i and i + rotated / 2. A cache of int8 has a float32 scale
    for each token's key and value of a head."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    norm_epsilon: float
    frequencies: torch.Tensor
    interleaved: bool = False
    cache_dtype: torch.dtype = torch.bfloat16

    def angles(self, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of the first so many positions, float32 [positions, rotated / 2]."""
        angles = torch.outer(torch.arange(positions).float(), self.frequencies)
        return angles.cos(), angles.sin()

    @property
    def cache_bytes_per_token(self) -> int:
        """Keys and values of one layer."""
        scale_bytes = 4 if self.cache_dtype is torch.int8 else 0
        return 2 * self.kv_heads * (self.head_dim * self.cache_dtype.itemsize + scale_bytes)

    def unsupported(self) -> str | None:
        """Why the kernels can't run this shape; None where they can."""
        if self.head_dim % 16 or self.head_dim > MAX_HEAD_DIM:
            return f"heads of {self.head_dim} (the kernels take multiples of 16 up to {MAX_HEAD_DIM})"
        if self.heads // self.kv_heads > MAX_HEADS_PER_KV_HEAD:
            return f"{self.heads // self.kv_heads} query heads on one key-value head (at most {MAX_HEADS_PER_KV_HEAD})"
        if self.hidden % 32 or self.intermediate % 32 or self.heads * self.head_dim % 32:
            return "widths that are not multiples of 32"
        return None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. Norms are float32; `query_norm` and `key_norm` [head_dim] are for families that have them.

    `qkv` has the query, key and value rows below each other, `gate_up` its rows in the order of `interleaved_rows`.
    """

    attention_norm: torch.Tensor
    feed_forward_norm: torch.Tensor
    qkv: PackedWeight
    output: PackedWeight
    gate_up: PackedWeight
    down: PackedWeight
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None


class Batch:
    """Pieces of sequences, row after row in their order, as the kernels read them."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        row_offsets, table_offsets = array("i", [0]), array("i")
        tables = array("i")
        for piece in pieces:
            row_offsets.append(row_offsets[-1] + len(piece.tokens))
            table_offsets.append(len(tables))
            tables.extend(piece.blocks)
        self.rows = row_offsets[-1]
        self._held = (row_offsets, array("i", [piece.start for piece in pieces]), table_offsets, tables)
        self.struct = BatchStruct(self.rows, len(pieces), *(held.buffer_info()[0] for held in self._held))


class DecoderLayers:
    """A decoder's layers with their cache. `allocate` comes before everything else; one call runs at a time."""

    def __init__(self, shape: DecoderShape, layers: Sequence[LayerWeights]) -> None:
        self._shape = shape
        self._layers = tuple(layers)
        self._structs = (LayerStruct * len(layers))()
        self._cache: list[torch.Tensor] = []
        self._angles: tuple[torch.Tensor, torch.Tensor] | None = None
        self._shape_struct = ShapeStruct()

    def allocate(self, blocks: int, block_tokens: int, context_tokens: int) -> None:
        """A cache of zeros, for contexts of up to `context_tokens`.

        What a block holds stays in it until it is written over; nothing reads beyond a context.
        """
        shape = self._shape
        cosines, sines = self._angles = shape.angles(min(context_tokens, blocks * block_tokens))
        self._shape_struct = ShapeStruct(
            shape.hidden,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            len(shape.frequencies) * 2,
            shape.interleaved,
            shape.intermediate,
            block_tokens,
            _CACHE_FORMATS[shape.cache_dtype],
            shape.norm_epsilon,
            shape.head_dim**-0.5,
            0,
            address(cosines),
            address(sines),
        )
        block_bytes = library().mk_cache_block_bytes(ctypes.byref(self._shape_struct))
        self._cache = [lazy_zeros((2, blocks, block_bytes), torch.uint8) for _ in self._layers]
        for cache in self._cache:
            library().mk_use_large_pages(address(cache), cache.nbytes)
        for struct, layer, cache in zip(self._structs, self._layers, self._cache, strict=True):
            struct.attention_norm = address(layer.attention_norm)
            struct.feed_forward_norm = address(layer.feed_forward_norm)
            struct.query_norm = address(layer.query_norm)
            struct.key_norm = address(layer.key_norm)
            struct.qkv, struct.output = layer.qkv.struct, layer.output.struct
            struct.gate_up, struct.down = layer.gate_up.struct, layer.down.struct
            struct.keys, struct.values = address(cache[0]), address(cache[1])

    @property
    def cache_bytes(self) -> int:
        return sum(cache.nbytes for cache in self._cache)

    def forward(self, hidden: torch.Tensor, batch: Batch) -> None:
        """`hidden`, float32 [rows, hidden], goes through all layers in place."""
        assert hidden.dtype is torch.float32
        assert hidden.is_contiguous()
        library().mk_decode_layers(
            ctypes.byref(self._shape_struct),
            self._structs,
            len(self._layers),
            ctypes.byref(batch.struct),
            address(hidden),
        )

    def attend(self, layer: int, qkv: torch.Tensor, batch: Batch) -> torch.Tensor:
        """One layer's attention alone: rotates queries and keys in `qkv` in place, writes keys and values, attends.

        qkv float32 [rows, (heads + 2 kv_heads) head_dim] to [rows, heads head_dim].
        """
        assert qkv.dtype is torch.float32
        assert qkv.is_contiguous()
        out = torch.empty(batch.rows, self._shape.heads * self._shape.head_dim)
        arguments = (
            ctypes.byref(self._shape_struct),
            ctypes.byref(self._structs[layer]),
            ctypes.byref(batch.struct),
            address(qkv),
        )
        library().mk_rotate_and_write(*arguments)
        library().mk_attend(*arguments, address(out))
        return out
