"""Qwen3: Llama with a norm over each query and key head."""

from __future__ import annotations

from millicent.engine.layers import Attention, GatedMlp
from millicent.engine.models.decoder import Layer, Loader


def build_layer(load: Loader, prefix: str) -> Layer:
    attention, head_dim = f"{prefix}.self_attn", load.spec.head_dim
    query_norm, key_norm = load.norm(f"{attention}.q_norm", head_dim), load.norm(f"{attention}.k_norm", head_dim)
    return Layer(
        attention_norm=load.norm(f"{prefix}.input_layernorm"),
        attention=Attention(load.spec, *load.attention_linears(attention), query_norm, key_norm),
        mlp_norm=load.norm(f"{prefix}.post_attention_layernorm"),
        mlp=GatedMlp(*load.mlp_linears(f"{prefix}.mlp")),
    )
