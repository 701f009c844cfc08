"""Logits equal those of `transformers` on the same weights, in float32, within 1e-4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from millicent.engine.batch import Model, Piece
from millicent.engine.models import FAMILIES, load_model
from millicent.engine.weights import open_checkpoint
from support.tiny_models import TinyLlama, write_tiny_model, write_tiny_tokenizer

transformers = pytest.importorskip("transformers")

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SHAPES: dict[str, dict[str, Any]] = {
    "every head its own keys": {"num_key_value_heads": 4},
    "grouped queries": {"num_key_value_heads": 2},
    "one key-value head": {"num_key_value_heads": 1},
    "an output layer of its own": {"tie_word_embeddings": False},
    "biases everywhere": {"attention_bias": True, "mlp_bias": True},
    "heads wider than their share": {"head_dim": 24},
    "linear scaling": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "llama 3 scaling": {"rope_parameters": {**LLAMA3_SCALING, "rope_theta": 500000.0}},
    "another rotary base": {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
}


def write_with_transformers(directory: Path, *, shard: str = "1GB", kind: str = "Llama", **changes: Any) -> Any:
    vocabulary = write_tiny_tokenizer(directory)
    shape: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": 0,
        **changes,
    }
    torch.manual_seed(7)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory, max_shard_size=shard)
    return model


def reference_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def logits_of_every_row(model: Model, tokens: list[int]) -> torch.Tensor:
    """Row by row: a prompt of one token, then decoding."""
    rows = [model.forward([Piece(0, [token], at, range(8), True)])[0] for at, token in enumerate(tokens)]
    return torch.stack(rows)


def assert_equal_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_and_decode_give_the_logits_of_transformers(shape: str, tmp_path: Path) -> None:
    reference = write_with_transformers(tmp_path, **SHAPES[shape])
    tokens = [1, 5, 90, 17, 200, 3, 44, 45, 46, 250, 9, 9, 9, 30, 31, 32, 33, 34, 35, 36, 37]
    expected = reference_logits(reference, tokens)
    model = load_model(tmp_path, dtype="fp32", name="tiny")
    model.allocate(8, 4)
    assert_equal_logits(model.forward([Piece(0, tokens, 0, range(8), True)])[0], expected[-1])
    assert_equal_logits(logits_of_every_row(model, tokens), expected)


def test_mistral_without_a_window_gives_the_logits_of_transformers(tmp_path: Path) -> None:
    reference = write_with_transformers(tmp_path, kind="Mistral", sliding_window=None)
    tokens = [1, 5, 90, 17]
    model = load_model(tmp_path, dtype="fp32", name="tiny")
    model.allocate(1, 16)
    expected = reference_logits(reference, tokens)[-1]
    assert_equal_logits(model.forward([Piece(0, tokens, 0, [0], True)])[0], expected)


def test_a_sharded_checkpoint_is_read_through_its_index(tmp_path: Path) -> None:
    reference = write_with_transformers(tmp_path, shard="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokens = [1, 5, 90, 17]
    model = load_model(tmp_path, dtype="fp32", name="tiny")
    model.allocate(1, 16)
    expected = reference_logits(reference, tokens)[-1]
    assert_equal_logits(model.forward([Piece(0, tokens, 0, [0], True)])[0], expected)


def test_an_older_configuration_with_rope_scaling_means_the_same(tmp_path: Path) -> None:
    reference = write_with_transformers(tmp_path, rope_parameters={**LLAMA3_SCALING, "rope_theta": 500000.0})
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"rope_scaling": LLAMA3_SCALING, "rope_theta": 500000.0}
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = list(range(3, 30))
    model = load_model(tmp_path, dtype="fp32", name="tiny")
    model.allocate(2, 16)
    expected = reference_logits(reference, tokens)[-1]
    assert_equal_logits(model.forward([Piece(0, tokens, 0, [1, 0], True)])[0], expected)


def test_the_tiny_model_of_the_tests_is_a_llama_to_transformers_too(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, TinyLlama(tied=False, seed=3))
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = [1, 5, 90, 17]
    model = load_model(tmp_path, dtype="fp32", name="tiny")
    model.allocate(1, 16)
    expected = reference_logits(reference, tokens)[-1]
    assert_equal_logits(model.forward([Piece(0, tokens, 0, [0], True)])[0], expected)


@pytest.mark.model
def test_smollm2_gives_the_logits_of_transformers_on_its_dequantized_weights(smollm2_path: Path) -> None:
    checkpoint = open_checkpoint(smollm2_path, FAMILIES)
    spec = checkpoint.spec
    config = transformers.LlamaConfig(
        vocab_size=spec.vocabulary,
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        max_position_embeddings=spec.context_tokens,
        rms_norm_eps=spec.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.device("meta"):
        reference = transformers.LlamaForCausalLM(config)
    weights = {name: checkpoint.read(name, torch.float32) for name in checkpoint.shapes}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    reference.load_state_dict(weights, assign=True)
    reference.model.rotary_emb = type(reference.model.rotary_emb)(config)
    tokens = [1, 4093, 198, 1780, 314, 216, 34, 1232, 216, 34, 47, 2, 198, 1, 520, 9531, 198]
    model = load_model(smollm2_path, dtype="fp32", name="smollm2")
    model.allocate(4, 16)
    expected = reference_logits(reference.eval(), tokens)
    assert_equal_logits(model.forward([Piece(0, tokens, 0, [2, 1], True)])[0], expected[-1])
