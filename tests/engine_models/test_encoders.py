"""Vectors equal those of `transformers` and sentence-transformers on the same weights, within 1e-4."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millicent.core.errors import ModelError
from millicent.engine.batch import Encoder
from millicent.engine.models import ENCODERS, is_encoder, load_encoder, load_model
from millicent.engine.weights import open_checkpoint
from millicent.text import load_tokenizer
from support.minilm_golden import TEXTS
from support.tiny_encoders import HIDDEN, write_tiny_encoder

TOKENS = [[2, 4, 5, 3], [2, 3], [2, *range(4, 20), 3], [2, 9, 9, 9, 3]]
GGUF_NAMES = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.LayerNorm": "token_embd_norm",
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
GOLDEN = Path(__file__).parent / "golden" / "minilm_vectors.json"


def load(path: Path) -> Encoder:
    return load_encoder(path, dtype="auto", name="tiny")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_encoder(tmp_path_factory.mktemp("tiny"))


def rows_of_transformers(path: Path, tokens: list[int]) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    reference: Any = transformers.BertModel.from_pretrained(path, add_pooling_layer=False).eval()
    with torch.no_grad():
        rows: torch.Tensor = reference(torch.tensor([tokens])).last_hidden_state[0]
    return rows


def test_vectors_are_the_normalized_mean_of_what_transformers_computes(tiny: Path) -> None:
    vectors = load(tiny).encode(TOKENS)
    assert (vectors.shape, vectors.dtype) == ((4, HIDDEN), torch.float32)
    for tokens, vector in zip(TOKENS, vectors, strict=True):
        expected = torch.nn.functional.normalize(rows_of_transformers(tiny, tokens).mean(0), dim=0)
        torch.testing.assert_close(vector, expected, atol=1e-5, rtol=1e-4)


def test_the_first_row_alone_is_the_vector_where_the_files_say_so(tmp_path: Path) -> None:
    path = write_tiny_encoder(tmp_path, pooling="cls_token", normalize=False)
    vectors = load(path).encode(TOKENS)
    for tokens, vector in zip(TOKENS, vectors, strict=True):
        torch.testing.assert_close(vector, rows_of_transformers(path, tokens)[0], atol=1e-5, rtol=1e-4)


def test_an_encoder_inside_a_larger_model_is_found(tmp_path: Path, tiny: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = write_tiny_encoder(tmp_path)
    tensors = load_file(str(path / "model.safetensors"))
    save_file({f"bert.{name}": tensor for name, tensor in tensors.items()}, str(path / "model.safetensors"))
    torch.testing.assert_close(load(path).encode(TOKENS), load(tiny).encode(TOKENS))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 19), min_size=1, max_size=40), min_size=1, max_size=6))
def test_a_batch_of_texts_gives_each_the_vector_it_gets_alone(tiny: Path, texts: list[list[int]]) -> None:
    encoder = load(tiny)
    alone = torch.cat([encoder.encode([text]) for text in texts])
    torch.testing.assert_close(encoder.encode(texts), alone, atol=1e-5, rtol=1e-4)


def test_an_encoder_tells_its_sizes(tiny: Path) -> None:
    encoder = load(tiny)
    assert is_encoder(tiny)
    assert (encoder.name, encoder.context_tokens, encoder.vocabulary_size, encoder.dimensions) == ("tiny", 40, 20, 32)
    layer = 4 * (32 * 32 + 32) + 2 * 32 * 48 + 48 + 32 + 2 * 2 * 32
    assert encoder.weight_bytes == 4 * ((20 + 64) * 32 + 2 * 32 + 2 * layer)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"hidden_act": "relu"}, "activation 'relu' is not supported"),
        ("config.json", {"position_embedding_type": "relative_key"}, "positions 'relative_key' are not supported"),
        ("config.json", {"num_attention_heads": 5}, "cannot be split among 5 heads"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pooling 'mean_tokens.max_tokens'"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(
    tmp_path: Path, file: str, change: dict[str, Any], message: str
) -> None:
    path = write_tiny_encoder(tmp_path)
    content = json.loads((path / file).read_text()) | change
    (path / file).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=message):
        load(path)


def test_a_module_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    path = write_tiny_encoder(tmp_path)
    (path / "modules.json").write_text(json.dumps([{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(ModelError, match="module 'Dense' is not supported"):
        load(path)


def test_an_encoder_is_not_taken_for_a_model_that_makes_text(tiny: Path) -> None:
    with pytest.raises(ModelError, match="architecture 'bert' is not supported"):
        load_model(tiny, dtype="fp32", name="tiny")


def write_gguf(path: Path, directory: Path) -> Path:
    """The encoder as llama.cpp's converter writes it: words marked where they begin."""
    checkpoint = open_checkpoint(directory, ENCODERS)
    spec = checkpoint.encoder_spec
    words = list(json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"])
    plain = [word.removeprefix("##") if word.startswith("##") else f"\u2581{word}" for word in words]
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_block_count(spec.layers)
    writer.add_context_length(spec.context_tokens)
    writer.add_embedding_length(spec.hidden)
    writer.add_feed_forward_length(spec.intermediate)
    writer.add_head_count(spec.heads)
    writer.add_layer_norm_eps(spec.norm_eps)
    writer.add_causal_attention(value=False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_tokenizer_model("bert")
    writer.add_token_list([*words[:4], *plain[4:]])
    writer.add_token_types([3] * 4 + [1] * (len(words) - 4))
    writer.add_unk_token_id(1)
    writer.add_uint32("tokenizer.ggml.cls_token_id", 2)
    writer.add_sep_token_id(3)
    for name in checkpoint.shapes:
        stem, _, suffix = name.rpartition(".")
        if stem.startswith("encoder.layer."):
            _, _, layer, part = stem.split(".", 3)
            stored = f"blk.{layer}.{GGUF_NAMES[part]}.{suffix}"
        else:
            stored = f"{GGUF_NAMES[stem]}.{suffix}"
        writer.add_tensor(stored, np.ascontiguousarray(checkpoint.read(name, torch.float32).numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_gives_the_tokens_and_vectors_of_the_checkpoint_it_was_made_from(tiny: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny)
    assert is_encoder(path)
    text = "The SUN sets, the moon rises; [SEP] abc and rising?"
    tokens = load_tokenizer(path).encode(text)
    assert tokens == load_tokenizer(tiny).encode(text)
    assert (tokens[0], tokens[-1], tokens.count(3)) == (2, 3, 1)
    torch.testing.assert_close(load(path).encode([tokens]), load(tiny).encode([tokens]), atol=1e-5, rtol=1e-4)


@pytest.mark.model
def test_minilm_gives_the_vectors_of_sentence_transformers(minilm_path: Path) -> None:
    encoder = load(minilm_path)
    tokenizer = load_tokenizer(minilm_path)
    assert (encoder.context_tokens, encoder.dimensions) == (256, 384)
    found = encoder.encode([tokenizer.encode(text, limit=256) for text in TEXTS])
    golden = [np.frombuffer(base64.b64decode(vector), "<f4") for vector in json.loads(GOLDEN.read_text())]
    np.testing.assert_allclose(found.numpy(), np.stack(golden), atol=1e-4, rtol=0)
