"""A random Llama so small that a test can afford it, with a real tokenizer and a chat template; the same for a seed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class TinyLlama:
    hidden: int = 32
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    intermediate: int = 48
    context_tokens: int = 512
    tied: bool = True
    seed: int = 0


def write_tiny_model(directory: Path, shape: TinyLlama | None = None) -> Path:
    """Write the checkpoint into `directory` (made if missing) and return it."""
    shape = shape or TinyLlama()
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tiny_tokenizer(directory)
    _write_json(directory / "config.json", config(shape, vocabulary))
    _write_json(directory / "generation_config.json", {"eos_token_id": [2, 0]})
    _write_weights(directory / "model.safetensors", shape, vocabulary)
    return directory


def config(shape: TinyLlama, vocabulary: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate,
        "vocab_size": vocabulary,
        "max_position_embeddings": shape.context_tokens,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": shape.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "eos_token_id": 2,
    }


def write_tiny_tokenizer(directory: Path) -> int:
    """A byte-level BPE of 3 special tokens, 256 bytes and a few merges. Returns the size of the vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    merges = [("t", "h"), ("th", "e"), ("\u0120", "the"), ("i", "n"), ("e", "r"), ("\u0120", "a"), ("o", "n")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {"bos_token": SPECIAL_TOKENS[1], "eos_token": SPECIAL_TOKENS[2], "chat_template": CHAT_TEMPLATE},
    )
    return len(vocabulary)


def _write_weights(file: Path, shape: TinyLlama, vocabulary: int) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(shape.seed)

    def random(*size: int) -> torch.Tensor:
        # Wide enough that greedy choices aren't near-ties.
        return torch.randn(*size, generator=generator) * 0.3

    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors = {"model.embed_tokens.weight": random(vocabulary, shape.hidden)}
    for index in range(shape.layers):
        prefix = f"model.layers.{index}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": torch.ones(shape.hidden),
            f"{prefix}.self_attn.q_proj.weight": random(query, shape.hidden),
            f"{prefix}.self_attn.k_proj.weight": random(key, shape.hidden),
            f"{prefix}.self_attn.v_proj.weight": random(key, shape.hidden),
            f"{prefix}.self_attn.o_proj.weight": random(shape.hidden, query),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(shape.hidden),
            f"{prefix}.mlp.gate_proj.weight": random(shape.intermediate, shape.hidden),
            f"{prefix}.mlp.up_proj.weight": random(shape.intermediate, shape.hidden),
            f"{prefix}.mlp.down_proj.weight": random(shape.hidden, shape.intermediate),
        }
    tensors["model.norm.weight"] = torch.ones(shape.hidden)
    if not shape.tied:
        tensors["lm_head.weight"] = random(vocabulary, shape.hidden)
    save_file(tensors, str(file), metadata={"format": "pt"})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1))
