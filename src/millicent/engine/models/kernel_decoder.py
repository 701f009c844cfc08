"""A decoder run by the compiled kernels: all layers in one call, weights quantized or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from millicent.engine.batch import Piece
from millicent.engine.config import Quantization
from millicent.engine.kernels.layers import Batch, DecoderLayers, DecoderShape, LayerWeights
from millicent.engine.kernels.weights import (
    Format,
    Matrix,
    PackedWeight,
    concatenate,
    format_of,
    interleaved_rows,
    quantize,
)
from millicent.engine.layers import rotary_frequencies
from millicent.engine.weights import Checkpoint, ModelSpec

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8"}
FORMAT_NAMES = {
    Format.F32: "fp32",
    Format.BF16: "bf16",
    Format.Q8: "int8",
    Format.Q4: "int4",
    Format.Q4_MIN: "int4 with minima",
}


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
        cache_dtype: torch.dtype,
        eos_tokens: frozenset[int],
    ) -> None:
        spec = checkpoint.spec
        self.name = name
        self.context_tokens = spec.context_tokens
        self.vocabulary_size = spec.vocabulary
        self.eos_tokens = eos_tokens
        load = _Loader(checkpoint, dtype, quantization)
        self._norm_epsilon = spec.norm_eps
        shape = _shape(spec, cache_dtype)
        self._layers = DecoderLayers(shape, [load.layer(index) for index in range(spec.layers)])
        self._norm = load.vector("model.norm.weight", spec.hidden)
        self._embedding = load.packed([("model.embed_tokens", spec.vocabulary)], spec.hidden)
        self._output = (
            self._embedding if spec.tied_embeddings else load.packed([("lm_head", spec.vocabulary)], spec.hidden)
        )
        self.weight_bytes = load.bytes
        self.kv_bytes_per_token = spec.layers * shape.cache_bytes_per_token
        self.precision = f"weights {_formats(load.bytes_of)}, cache {DTYPE_NAMES[cache_dtype]}"

    def allocate(self, blocks: int, block_tokens: int) -> None:
        self._layers.allocate(blocks, block_tokens, self.context_tokens)

    def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        with torch.inference_mode():
            hidden = self.states(pieces)
            sampled: list[int] = []
            end = 0
            for piece in pieces:
                end += len(piece.tokens)
                sampled += range(end - piece.logit_rows, end)
            if not sampled:
                return torch.empty(0, self.vocabulary_size)
            return self.logits(hidden if len(sampled) == len(hidden) else hidden[sampled])

    def states(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """What the layers make of every row, float32 [rows, hidden]."""
        hidden = self._embedding.unpack_rows(torch.tensor([token for piece in pieces for token in piece.tokens]))
        self._layers.forward(hidden, Batch(pieces))
        return hidden

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """float32 [rows, vocabulary] of some rows of `states`."""
        return self._output(states, norm=self._norm, norm_epsilon=self._norm_epsilon)


def _formats(bytes_of: Counter[Format]) -> str:
    """The formats of a model's matrices, that of the most bytes first."""
    return " and ".join(FORMAT_NAMES[format_] for format_, _ in bytes_of.most_common())


def _shape(spec: ModelSpec, cache_dtype: torch.dtype) -> DecoderShape:
    return DecoderShape(
        hidden=spec.hidden,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        intermediate=spec.intermediate,
        norm_epsilon=spec.norm_eps,
        frequencies=rotary_frequencies(spec),
        cache_dtype=cache_dtype,
    )


class _Loader:
    """Reads a checkpoint's tensors as the kernels want them, checking each one's presence and shape."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, quantization: Quantization) -> None:
        self._checkpoint = checkpoint
        self._spec = checkpoint.spec
        self._dtype = dtype
        self._quantization = quantization
        self.bytes = 0
        self.bytes_of: Counter[Format] = Counter()

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
        self.bytes_of[packed.format] += packed.nbytes
        return packed

    def _matrix(self, name: str, shape: tuple[int, int]) -> Matrix:
        checkpoint = self._checkpoint
        checkpoint.require(name, shape)
        if self._quantization == "none":
            return checkpoint.read(name, self._dtype)
        stored = checkpoint.read_quantized(name)
        if self._quantization == "native":
            if stored is not None:
                return stored
            if not checkpoint.is_quantized(name):
                return checkpoint.read(name, self._dtype)
        wanted = format_of(name, self._quantization)
        if stored is not None and stored.format.bits <= wanted.bits:
            return stored  # rounding it once more would only lose
        return quantize(self._float(name), wanted)

    def _float(self, name: str) -> torch.Tensor:
        return self._checkpoint.read(name, torch.float32)

    def _head_norm(self, name: str) -> torch.Tensor | None:
        return self.vector(name, self._spec.head_dim) if self._spec.head_norms else None
