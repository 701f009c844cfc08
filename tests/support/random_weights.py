"""Checkpoints that were never written: any shape, random numbers, the same for a seed; and known models' shapes."""

from __future__ import annotations

from functools import cached_property
from hashlib import blake2b

import torch

from millicent.engine.weights import Checkpoint, EncoderSpec, ModelSpec


def spec(**changes: object) -> ModelSpec:
    """Small enough for an interpreter, with sizes that are no powers of two where they needn't be."""
    small: dict[str, object] = {
        "family": "llama",
        "layers": 2,
        "hidden": 48,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "intermediate": 80,
        "vocabulary": 199,
        "context_tokens": 256,
        "norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "tied_embeddings": True,
        "qkv_bias": False,
        "attention_output_bias": False,
        "mlp_bias": False,
    }
    return ModelSpec(**(small | changes))  # type: ignore[arg-type]


QWEN3_0_6B = spec(
    family="qwen3",
    layers=28,
    hidden=1024,
    heads=16,
    kv_heads=8,
    head_dim=128,
    intermediate=3072,
    vocabulary=151_936,
    context_tokens=40_960,
    norm_eps=1e-6,
    rope_theta=1_000_000.0,
)
LLAMA_3_1_8B = spec(
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    intermediate=14_336,
    vocabulary=128_256,
    context_tokens=131_072,
    rope_theta=500_000.0,
    tied_embeddings=False,
)


class RandomCheckpoint(Checkpoint):
    """Weights are normal numbers such that rows keep about their length from layer to layer; norms are near one."""

    def __init__(self, shape: ModelSpec, *, seed: int = 0, device: str = "cpu") -> None:
        self.label = "random"
        self.family = shape.family
        self._spec = shape
        self._seed = seed
        self._device = device
        self.shapes = dict(_shapes(shape))

    @cached_property
    def spec(self) -> ModelSpec:
        return self._spec

    @cached_property
    def encoder_spec(self) -> EncoderSpec:
        raise AssertionError("these are decoders")

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        shape = self.shapes[name]
        key = blake2b(f"{self._seed} {name}".encode(), digest_size=7).digest()
        generator = torch.Generator(self._device).manual_seed(int.from_bytes(key, "little"))
        drawn = torch.randn(shape, generator=generator, device=self._device, dtype=torch.float32)
        if len(shape) == 1:
            return ((1 + drawn * 0.1) if "norm" in name else drawn * 0.1).to(dtype)
        scale = 1.0 if "embed_tokens" in name and not self._spec.tied_embeddings else shape[1] ** -0.5
        return (drawn * scale * (3 if "embed_tokens" in name else 1)).to(dtype)


class KeptCheckpoint(RandomCheckpoint):
    """Draws each tensor once: for several precisions, and the reference, of one model."""

    def __init__(self, shape: ModelSpec) -> None:
        super().__init__(shape)
        self._drawn: dict[str, torch.Tensor] = {}

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        if name not in self._drawn:
            self._drawn[name] = super().read(name, torch.float32)
        return self._drawn[name].to(dtype, copy=True)


def _shapes(shape: ModelSpec) -> list[tuple[str, tuple[int, ...]]]:
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    found: list[tuple[str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", (shape.vocabulary, shape.hidden)),
        ("model.norm.weight", (shape.hidden,)),
    ]
    if not shape.tied_embeddings:
        found.append(("lm_head.weight", (shape.vocabulary, shape.hidden)))
    for index in range(shape.layers):
        prefix = f"model.layers.{index}"
        linears = {
            "self_attn.q_proj": (query, shape.hidden, shape.qkv_bias),
            "self_attn.k_proj": (kv, shape.hidden, shape.qkv_bias),
            "self_attn.v_proj": (kv, shape.hidden, shape.qkv_bias),
            "self_attn.o_proj": (shape.hidden, query, shape.attention_output_bias),
            "mlp.gate_proj": (shape.intermediate, shape.hidden, shape.mlp_bias),
            "mlp.up_proj": (shape.intermediate, shape.hidden, shape.mlp_bias),
            "mlp.down_proj": (shape.hidden, shape.intermediate, shape.mlp_bias),
        }
        for name, (outputs, inputs, biased) in linears.items():
            found.append((f"{prefix}.{name}.weight", (outputs, inputs)))
            if biased:
                found.append((f"{prefix}.{name}.bias", (outputs,)))
        norms = {"input_layernorm": shape.hidden, "post_attention_layernorm": shape.hidden}
        if shape.head_norms:
            norms |= {"self_attn.q_norm": shape.head_dim, "self_attn.k_norm": shape.head_dim}
        found += [(f"{prefix}.{name}.weight", (size,)) for name, size in norms.items()]
    return found
