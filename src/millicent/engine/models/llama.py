"""Llama, and what is built like it: SmolLM2, Mistral without a sliding window."""

from __future__ import annotations

from millicent.engine.layers import Attention, GatedMlp
from millicent.engine.models.decoder import Layer, Loader


def build_layer(load: Loader, prefix: str) -> Layer:
    return Layer(
        attention_norm=load.norm(f"{prefix}.input_layernorm"),
        attention=Attention(load.spec, *load.attention_linears(f"{prefix}.self_attn")),
        mlp_norm=load.norm(f"{prefix}.post_attention_layernorm"),
        mlp=GatedMlp(*load.mlp_linears(f"{prefix}.mlp")),
    )
