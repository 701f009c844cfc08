"""A decoder run by the compiled kernels: all layers in one call, weights quantized or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from millicent.engine.batch import Piece
from millicent.engine.kernels.layers import Batch, DecoderLayers, DecoderShape, LayerWeights
from millicent.engine.kernels.weights import Format, Matrix, PackedWeight, concatenate, interleaved_rows, quantize
from millicent.engine.layers import rotary_frequencies
from millicent.engine.weights import Checkpoint, ModelSpec

# `native` keeps matrices as they are stored: GGUF's Q8_0, Q4_0 and Q4_1 unchanged, other quantizations as int8, plain
# ones in the model's dtype. `none` turns all into the model's dtype.
Quantization = Literal["none", "native", "int8", "int4"]


def unsupported(spec: ModelSpec) -> str | None:
    """Why the kernels can't run this model; None where they can."""
    return _shape(spec, torch.bfloat16).unsupported()


class KernelDecoder:
    """A loaded model (`engine.batch.Model`). A row's logits are the same bits whatever shares the batch and however its
    prompt was cut, so `deterministic` needs nothing more here."""

    def __init__(
        self,
        name: str,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        quantization: Quantization,
        *,
        eos_tokens: frozenset[int],
    ) -> None:
        spec = checkpoint.spec
        self.name = name
        self.context_tokens = spec.context_tokens
        self.vocabulary_size = spec.vocabulary
        self.eos_tokens = eos_tokens
        load = _Loader(checkpoint, dtype, quantization)
        self._norm_epsilon = spec.norm_eps
        self._layers = DecoderLayers(_shape(spec, dtype), [load.layer(index) for index in range(spec.layers)])
        self._norm = load.vector("model.norm.weight", spec.hidden)
        self._embedding = load.packed([("model.embed_tokens", spec.vocabulary)], spec.hidden)
        self._output = (
            self._embedding if spec.tied_embeddings else load.packed([("lm_head", spec.vocabulary)], spec.hidden)
        )
        self.weight_bytes = load.bytes
        self.kv_bytes_per_token = 2 * spec.layers * spec.kv_heads * spec.head_dim * dtype.itemsize

    def allocate(self, blocks: int, block_tokens: int) -> None:
        self._layers.allocate(blocks, block_tokens, self.context_tokens)

    def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        with torch.inference_mode():
            hidden = self._embedding.unpack_rows(torch.tensor([token for piece in pieces for token in piece.tokens]))
            self._layers.forward(hidden, Batch(pieces))
            ends = torch.tensor([len(piece.tokens) for piece in pieces]).cumsum(0) - 1
            sampled = ends[torch.tensor([piece.sample for piece in pieces])]
            if not len(sampled):
                return torch.empty(0, self.vocabulary_size)
            rows = hidden if len(sampled) == len(hidden) else hidden[sampled]
            return self._output(rows, norm=self._norm, norm_epsilon=self._norm_epsilon)


def _shape(spec: ModelSpec, dtype: torch.dtype) -> DecoderShape:
    return DecoderShape(
        hidden=spec.hidden,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        intermediate=spec.intermediate,
        norm_epsilon=spec.norm_eps,
        frequencies=rotary_frequencies(spec),
        cache_dtype=dtype,
    )


class _Loader:
    """Reads a checkpoint's tensors as the kernels want them, checking each one's presence and shape."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, quantization: Quantization) -> None:
        self._checkpoint = checkpoint
        self._spec = checkpoint.spec
        self._dtype = dtype
        self._quantization = quantization
        self.bytes = 0

    def layer(self, index: int) -> LayerWeights:
        spec = self._spec
        prefix = f"model.layers.{index}"
        attention = f"{prefix}.self_attn"
        query_size, kv_size = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        qkv = [(f"{attention}.q_proj", query_size), (f"{attention}.k_proj", kv_size), (f"{attention}.v_proj", kv_size)]
        gate_up = [(f"{prefix}.mlp.gate_proj", spec.intermediate), (f"{prefix}.mlp.up_proj", spec.intermediate)]
        return LayerWeights(
            attention_norm=self.vector(f"{prefix}.input_layernorm.weight", spec.hidden),
            feed_forward_norm=self.vector(f"{prefix}.post_attention_layernorm.weight", spec.hidden),
            qkv=self.packed(qkv, spec.hidden, bias=spec.qkv_bias),
            output=self.packed([(f"{attention}.o_proj", spec.hidden)], query_size, bias=spec.attention_output_bias),
            gate_up=self.packed(gate_up, spec.hidden, bias=spec.mlp_bias, rows=interleaved_rows(spec.intermediate)),
            down=self.packed([(f"{prefix}.mlp.down_proj", spec.hidden)], spec.intermediate, bias=spec.mlp_bias),
            query_norm=self._head_norm(f"{attention}.q_norm.weight"),
            key_norm=self._head_norm(f"{attention}.k_norm.weight"),
        )

    def vector(self, name: str, size: int) -> torch.Tensor:
        found = self._checkpoint.tensor(name, (size,), torch.float32).contiguous()
        self.bytes += found.nbytes
        return found

    def packed(
        self, parts: Sequence[tuple[str, int]], inputs: int, *, bias: bool = False, rows: torch.Tensor | None = None
    ) -> PackedWeight:
        """Matrices (name, outputs) that read the same rows, as one; `rows` is the order in which to keep them."""
        matrices = [self._matrix(f"{name}.weight", (outputs, inputs)) for name, outputs in parts]
        matrix = concatenate(matrices)
        if matrix is None:  # stored in different formats: int8 holds each of them
            matrix = quantize(torch.cat([self._float(f"{name}.weight") for name, _ in parts]), Format.Q8)
        biases = torch.cat([self.vector(f"{name}.bias", outputs) for name, outputs in parts]) if bias else None
        if rows is not None:
            matrix = matrix[rows] if isinstance(matrix, torch.Tensor) else matrix.rows(rows)
            biases = biases[rows] if biases is not None else None
        packed = PackedWeight(matrix, biases)
        self.bytes += packed.nbytes
        return packed

    def _matrix(self, name: str, shape: tuple[int, int]) -> Matrix:
        checkpoint = self._checkpoint
        checkpoint.require(name, shape)
        if self._quantization == "none":
            return checkpoint.read(name, self._dtype)
        # The head decides between near ties and is read once a pass: four bits there cost more than they save.
        if self._quantization == "int4" and not name.startswith(("lm_head", "model.embed_tokens")):
            return quantize(self._float(name), Format.Q4)
        if self._quantization in {"int4", "int8"}:
            return quantize(self._float(name), Format.Q8)
        stored = checkpoint.read_quantized(name)
        if stored is not None:
            return stored
        return (
            quantize(self._float(name), Format.Q8)
            if checkpoint.is_quantized(name)
            else checkpoint.read(name, self._dtype)
        )

    def _float(self, name: str) -> torch.Tensor:
        return self._checkpoint.read(name, torch.float32)

    def _head_norm(self, name: str) -> torch.Tensor | None:
        return self.vector(name, self._spec.head_dim) if self._spec.head_norms else None
