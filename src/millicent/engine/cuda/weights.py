"""A checkpoint's tensors on the device, joined where several read the same rows: one product each for query, key and
value, and for gate and up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from millicent.engine.cuda.kernels.rows import Norm, Turning
from millicent.engine.cuda.linear import Fp8Linear, Linear, OutputLayer, PlainLinear
from millicent.engine.layers import rotary_frequencies
from millicent.engine.weights import Checkpoint, ModelSpec


@dataclass(frozen=True, slots=True)
class LayerWeights:
    attention_norm: Norm
    qkv: Linear
    turning: Turning
    output: Linear
    mlp_norm: Norm
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """The embedding and the output layer stay in `dtype` when the layers are FP8: they decide what is said, and take
    little of the time."""

    spec: ModelSpec
    dtype: torch.dtype
    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: Norm
    output: OutputLayer
    nbytes: int


def load_weights(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, *, fp8: bool) -> DecoderWeights:
    load = _Loader(checkpoint, dtype, device, fp8=fp8)
    spec = checkpoint.spec
    embedding = load.tensor("model.embed_tokens.weight", spec.vocabulary, spec.hidden)
    turns = torch.outer(torch.arange(spec.context_tokens, dtype=torch.float64), rotary_frequencies(spec).double())
    angles = (turns.cos().float().to(device), turns.sin().float().to(device))
    layers = tuple(_layer(load, spec, f"model.layers.{index}", angles) for index in range(spec.layers))
    norm = Norm(load.tensor("model.norm.weight", spec.hidden), spec.norm_eps)
    tied = spec.tied_embeddings
    output = OutputLayer(embedding if tied else load.tensor("lm_head.weight", spec.vocabulary, spec.hidden))
    return DecoderWeights(spec, dtype, embedding, layers, norm, output, load.nbytes + 2 * angles[0].nbytes)


def _layer(load: _Loader, spec: ModelSpec, prefix: str, angles: tuple[torch.Tensor, torch.Tensor]) -> LayerWeights:
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    query, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    norms = None
    if spec.head_norms:
        norms = (
            load.tensor(f"{attention}.q_norm.weight", spec.head_dim),
            load.tensor(f"{attention}.k_norm.weight", spec.head_dim),
        )
    return LayerWeights(
        attention_norm=Norm(load.tensor(f"{prefix}.input_layernorm.weight", spec.hidden), spec.norm_eps),
        qkv=load.linear(
            [(f"{attention}.q_proj", query), (f"{attention}.k_proj", kv), (f"{attention}.v_proj", kv)],
            spec.hidden,
            bias=spec.qkv_bias,
        ),
        turning=Turning(angles, norms, spec.norm_eps),
        output=load.linear([(f"{attention}.o_proj", spec.hidden)], query, bias=spec.attention_output_bias),
        mlp_norm=Norm(load.tensor(f"{prefix}.post_attention_layernorm.weight", spec.hidden), spec.norm_eps),
        gate_up=load.linear(
            [(f"{mlp}.gate_proj", spec.intermediate), (f"{mlp}.up_proj", spec.intermediate)],
            spec.hidden,
            bias=spec.mlp_bias,
        ),
        down=load.linear([(f"{mlp}.down_proj", spec.hidden)], spec.intermediate, bias=spec.mlp_bias),
    )


class _Loader:
    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, *, fp8: bool) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._fp8 = fp8
        self.nbytes = 0

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        found = self._read(name, *shape)
        self.nbytes += found.nbytes
        return found

    def linear(self, parts: Sequence[tuple[str, int]], inputs: int, *, bias: bool) -> Linear:
        """One linear out of several that read the same rows: (name, output size) each."""
        weight = torch.cat([self._read(f"{name}.weight", outputs, inputs) for name, outputs in parts])
        biases = torch.cat([self._read(f"{name}.bias", outputs) for name, outputs in parts]) if bias else None
        rounds = self._fp8 and Fp8Linear.fits(*weight.shape)
        found: Linear = Fp8Linear(weight, biases) if rounds else PlainLinear(weight, biases)
        self.nbytes += found.nbytes
        return found

    def _read(self, name: str, *shape: int) -> torch.Tensor:
        return self._checkpoint.tensor(name, shape, self._dtype).to(self._device).contiguous()
