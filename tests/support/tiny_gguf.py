"""A tiny checkpoint as a GGUF file, named and laid out as llama.cpp's converter does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from millicent.engine.models import FAMILIES
from millicent.engine.weights import open_checkpoint

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[part]}.{suffix}"
    return f"{GGUF_NAMES[stem]}.{suffix}"


def interleaved(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter does to query and key projections."""
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    path: Path, directory: Path, *, architecture: str = "llama", change: Callable[[gguf.GGUFWriter], None] | None = None
) -> Path:
    """The tiny checkpoint of `directory` as llama.cpp would convert it: only a Llama has rows reordered."""
    checkpoint = open_checkpoint(directory, FAMILIES)
    spec = checkpoint.spec
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(spec.layers)
    writer.add_context_length(spec.context_tokens)
    writer.add_embedding_length(spec.hidden)
    writer.add_feed_forward_length(spec.intermediate)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_rope_freq_base(spec.rope_theta)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if architecture.startswith("qwen") else "gpt-2")
    writer.add_token_list(list(tokenizer["model"]["vocab"]))
    writer.add_token_types([3, 3, 3, *[1] * (spec.vocabulary - 3)])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(2)
    if change is not None:
        change(writer)
    for name in checkpoint.shapes:
        tensor = checkpoint.read(name, torch.float32).numpy()
        if "q_proj" in name and architecture == "llama":
            tensor = interleaved(tensor, spec.heads)
        if "k_proj" in name and architecture == "llama":
            tensor = interleaved(tensor, spec.kv_heads)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
