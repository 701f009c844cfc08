"""A decoder-only transformer over the paged cache: everything that families share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn import functional

from millicent.engine.batch import Piece
from millicent.engine.kv_cache import KVCache, Plan, plan_batch, plan_tile
from millicent.engine.layers import Attention, GatedMlp, Linear, RmsNorm, Rotary
from millicent.engine.weights import Checkpoint

# Rows per pass when results must not depend on the batch: enough to use a matrix unit, few enough to waste little.
TILE_ROWS = 16


@dataclass(frozen=True, slots=True)
class Layer:
    attention_norm: RmsNorm
    attention: Attention
    mlp_norm: RmsNorm
    mlp: GatedMlp


class Loader:
    """Reads a checkpoint's tensors as parts of a model, checking each one's presence and shape."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self.checkpoint = checkpoint
        self.spec = checkpoint.spec
        self.dtype = dtype
        self.bytes = 0

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        found = self.checkpoint.tensor(name, shape, self.dtype)
        self.bytes += found.nbytes
        return found

    def norm(self, name: str, size: int | None = None) -> RmsNorm:
        return RmsNorm(self.tensor(f"{name}.weight", size or self.spec.hidden), self.spec.norm_eps)

    def linear(self, parts: Sequence[tuple[str, int]], in_size: int, *, bias: bool = False) -> Linear:
        """One linear out of several that read the same rows: (name, output size) each."""
        weights = [self.tensor(f"{name}.weight", size, in_size) for name, size in parts]
        biases = [self.tensor(f"{name}.bias", size) for name, size in parts] if bias else []
        return Linear(_joined(weights), _joined(biases) if biases else None)

    def attention_linears(self, prefix: str) -> tuple[Linear, Linear]:
        """The query, key and value projections as one, and the output projection."""
        spec = self.spec
        query_size, kv_size = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        parts = [(f"{prefix}.q_proj", query_size), (f"{prefix}.k_proj", kv_size), (f"{prefix}.v_proj", kv_size)]
        qkv = self.linear(parts, spec.hidden, bias=spec.qkv_bias)
        return qkv, self.linear([(f"{prefix}.o_proj", spec.hidden)], query_size, bias=spec.attention_output_bias)

    def mlp_linears(self, prefix: str) -> tuple[Linear, Linear]:
        """The gate and up projections as one, and the down projection."""
        spec = self.spec
        parts = [(f"{prefix}.gate_proj", spec.intermediate), (f"{prefix}.up_proj", spec.intermediate)]
        gate_up = self.linear(parts, spec.hidden, bias=spec.mlp_bias)
        return gate_up, self.linear([(f"{prefix}.down_proj", spec.hidden)], spec.intermediate, bias=spec.mlp_bias)


BuildLayer = Callable[[Loader, str], Layer]


class Decoder:
    """A loaded model (`engine.batch.Model`).

    `deterministic` computes each row in a tile of its own sequence (`plan_tile`), so that its result is the same bits
    whatever shares the batch and however its prompt was cut.
    """

    def __init__(
        self, name: str, load: Loader, build_layer: BuildLayer, *, eos_tokens: frozenset[int], deterministic: bool
    ) -> None:
        spec = load.spec
        self.name = name
        self.context_tokens = spec.context_tokens
        self.vocabulary_size = spec.vocabulary
        self.eos_tokens = eos_tokens
        self._spec = spec
        self._dtype = load.dtype
        self._deterministic = deterministic
        self._embedding = load.tensor("model.embed_tokens.weight", spec.vocabulary, spec.hidden)
        self._layers = [build_layer(load, f"model.layers.{index}") for index in range(spec.layers)]
        self._norm = load.norm("model.norm")
        if spec.tied_embeddings:
            self._output = Linear(self._embedding)
            load.bytes += self._output.packed_bytes
        else:
            self._output = load.linear([("lm_head", spec.vocabulary)], spec.hidden)
        self._rotary = Rotary(spec)
        self._cache: KVCache | None = None
        self.weight_bytes = load.bytes
        self.kv_bytes_per_token = 2 * spec.layers * spec.kv_heads * spec.head_dim * self._dtype.itemsize

    def allocate(self, blocks: int, block_tokens: int) -> None:
        spec = self._spec
        self._cache = KVCache(spec.layers, blocks, block_tokens, spec.kv_heads, spec.head_dim, self._dtype)

    def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        cache = self._cache
        assert cache is not None, "allocate comes first"
        with torch.inference_mode():
            if not self._deterministic:
                return self._logits(plan_batch(pieces, cache.block_tokens), cache)
            return torch.cat(
                [torch.empty(0, self.vocabulary_size)]
                + [self._logits(plan, cache) for piece in pieces for plan in _tiles(piece, cache.block_tokens)]
            )

    def _logits(self, plan: Plan, cache: KVCache) -> torch.Tensor:
        """float32 [sampled rows, vocabulary]."""
        x = functional.embedding(plan.tokens, self._embedding)
        angles = self._rotary.angles(plan.positions, self._dtype)
        for layer, keys, values in zip(self._layers, cache.keys, cache.values, strict=True):
            x = x + layer.attention(layer.attention_norm(x), angles, keys, values, plan)
            x = x + layer.mlp(layer.mlp_norm(x))
        if not len(plan.sampled):
            return torch.empty(0, self.vocabulary_size)
        return self._output(self._norm(x[plan.sampled])).float()


def _tiles(piece: Piece, block_tokens: int) -> list[Plan]:
    end = piece.start + len(piece.tokens)
    cuts = [piece.start, *range(piece.start - piece.start % TILE_ROWS + TILE_ROWS, end, TILE_ROWS), end]
    return [plan_tile(piece, first, stop, TILE_ROWS, block_tokens) for first, stop in pairwise(cuts)]


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
