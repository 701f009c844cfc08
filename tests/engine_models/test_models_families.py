"""Each family against `transformers` on a tiny random checkpoint, from safetensors and from GGUF, cut and shared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from millicent.core.errors import ModelError
from millicent.engine.batch import Model, Piece
from millicent.engine.models import FAMILIES, is_encoder, load_model
from millicent.engine.weights import open_checkpoint
from support.tiny_gguf import write_gguf
from support.tiny_models import write_tiny_tokenizer

transformers = pytest.importorskip("transformers")

TOKENS = [1, 5, 90, 17, 200, 3, 44, 45, 46, 250, 9, 9, 9, 30, 31, 32, 33, 34, 35, 36, 37]
OTHERS = [[7, 8, 9], [100 + token for token in range(30)]]
# The compiled kernels, where there are any, run these; torch the others.
KERNEL_WIDTHS: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": False, "sliding_window": 32, "use_sliding_window": False}),
    "qwen3": ("Qwen3", {"head_dim": 24, "tie_word_embeddings": False}),
    "qwen2 in the kernels' widths": ("Qwen2", KERNEL_WIDTHS),
    "qwen3 in the kernels' widths": ("Qwen3", KERNEL_WIDTHS | {"head_dim": 32}),
    "qwen3 tied": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True, "rope_theta": 1000000.0}),
}


def write(directory: Path, kind: str, **changes: Any) -> Any:
    """A checkpoint of that kind with random weights, norms and biases included; the model that wrote it."""
    directory.mkdir(exist_ok=True)
    shape = {
        "vocab_size": write_tiny_tokenizer(directory),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
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
    model.save_pretrained(directory)
    return model


def loaded(path: Path) -> Model:
    model = load_model(path, dtype="fp32", name="tiny")
    model.allocate(32, 4)
    return model


def last(model: Model, tokens: list[int], *cuts: int, blocks: range = range(8)) -> torch.Tensor:
    """The logits after the last token, of a prompt computed in pieces."""
    logits = torch.empty(0)
    for start, stop in zip((0, *cuts), (*cuts, len(tokens)), strict=True):
        logits = model.forward([Piece(0, tokens[start:stop], start, blocks, stop == len(tokens))])
    return logits[0]


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_a_family_gives_the_logits_of_transformers_however_cut_and_shared(case: str, tmp_path: Path) -> None:
    kind, changes = CASES[case]
    reference = write(tmp_path, kind, **changes)
    with torch.no_grad():
        expected = reference(torch.tensor([TOKENS])).logits[0]
    model = loaded(tmp_path)
    assert_close(last(model, TOKENS), expected[-1])
    assert_close(last(model, TOKENS, 1, 8, 9, 20), expected[-1])
    assert_close(last(model, TOKENS[:1]), expected[0])
    alone = [last(model, tokens) for tokens in OTHERS]
    pieces = [
        Piece(1, OTHERS[0], 0, range(8, 16), True),
        Piece(0, TOKENS, 0, range(8), True),
        Piece(2, OTHERS[1], 0, range(16, 24), True),
    ]
    assert_close(model.forward(pieces), torch.stack([alone[0], expected[-1], alone[1]]))


def write_qwen(path: Path, directory: Path, architecture: str) -> Path:
    """The checkpoint in `directory` as llama.cpp's converter writes a Qwen."""
    head_dim = open_checkpoint(directory, FAMILIES).spec.head_dim

    def with_lengths(writer: gguf.GGUFWriter) -> None:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)

    return write_gguf(path, directory, architecture=architecture, change=with_lengths)


@pytest.mark.parametrize("case", [case for case in CASES if "qwen" in case])
def test_a_qwen_gguf_gives_the_logits_of_the_checkpoint_it_was_made_from(case: str, tmp_path: Path) -> None:
    kind, changes = CASES[case]
    write(tmp_path / "made", kind, **changes)
    path = write_qwen(tmp_path / "made.gguf", tmp_path / "made", kind.lower())
    assert_close(last(loaded(path), TOKENS), last(loaded(tmp_path / "made"), TOKENS))


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3"])
def test_a_sliding_window_that_is_used_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    write(tmp_path, kind, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    with pytest.raises(ModelError, match=r"sliding-window attention \(16 tokens\) is not supported"):
        load_model(tmp_path, dtype="fp32", name="tiny")


@pytest.mark.parametrize("widths", [{}, KERNEL_WIDTHS])
def test_a_qwen3_without_its_head_norms_is_refused_by_the_tensor_s_name(widths: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, "Qwen2", **widths)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "qwen3"}))
    with pytest.raises(ModelError, match=r"tensor model\.layers\.0\.self_attn\.q_norm\.weight is missing"):
        load_model(tmp_path, dtype="fp32", name="tiny")


def test_an_architecture_that_is_not_known_is_refused_with_all_that_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ModelError, match=r"'mamba' is not supported.*llama, mistral, qwen2, qwen3, bert"):
        is_encoder(tmp_path)
