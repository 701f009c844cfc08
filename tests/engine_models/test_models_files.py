"""Model files as they come: GGUF built here and now, and everything that can be wrong with them."""

from __future__ import annotations

import json
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from millicent.core.errors import ModelError
from millicent.engine.batch import Piece
from millicent.engine.config import Dtype
from millicent.engine.layers import rotary_frequencies
from millicent.engine.models import FAMILIES, load_model
from millicent.engine.quantization import dequantize
from millicent.engine.weights import open_checkpoint
from support.tiny_gguf import write_gguf
from support.tiny_models import TinyLlama, write_tiny_model

SHAPE_EPS = 1e-5
SHAPE = TinyLlama(tied=False, seed=5)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny", SHAPE)


@pytest.fixture
def gguf_path(tmp_path: Path, directory: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", directory)


def last_logits(path: Path) -> torch.Tensor:
    model = load_model(path, dtype="fp32", name="tiny")
    model.allocate(2, 16)
    return model.forward([Piece(0, list(range(3, 25)), 0, [1, 0], True)])[0]


def test_a_gguf_gives_the_logits_of_the_checkpoint_it_was_made_from(directory: Path, gguf_path: Path) -> None:
    torch.testing.assert_close(last_logits(gguf_path), last_logits(directory), atol=1e-5, rtol=1e-5)
    spec = replace(open_checkpoint(gguf_path, FAMILIES).spec, norm_eps=SHAPE_EPS)  # a float32 there
    assert spec == open_checkpoint(directory, FAMILIES).spec


def test_a_directory_with_one_gguf_is_that_gguf(tmp_path: Path, gguf_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    gguf_path.rename(tmp_path / "alone" / "model.gguf")
    assert open_checkpoint(tmp_path / "alone", FAMILIES).label == "model.gguf"


def test_linear_scaling_in_a_gguf_divides_positions(tmp_path: Path, directory: Path) -> None:
    def scale(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    scaled = open_checkpoint(write_gguf(tmp_path / "scaled.gguf", directory, change=scale), FAMILIES).spec
    plain = open_checkpoint(directory, FAMILIES).spec
    torch.testing.assert_close(rotary_frequencies(scaled) * 4, rotary_frequencies(plain))


def test_rotary_divisors_in_a_gguf_divide_frequencies(tmp_path: Path, directory: Path) -> None:
    divisors = np.array([1, 1, 4, 8], dtype=np.float32)
    path = write_gguf(
        tmp_path / "scaled.gguf", directory, change=lambda writer: writer.add_tensor("rope_freqs.weight", divisors)
    )
    found, plain = (
        rotary_frequencies(open_checkpoint(path, FAMILIES).spec),
        rotary_frequencies(open_checkpoint(directory, FAMILIES).spec),
    )
    torch.testing.assert_close(found * torch.from_numpy(divisors), plain)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q6_K"])
def test_dequantized_blocks_equal_those_of_the_gguf_library(kind: str) -> None:
    quantization = gguf.GGMLQuantizationType[kind]
    elements, size_bytes = gguf.GGML_QUANT_SIZES[quantization]
    blocks = 512 // elements * 4
    raw = np.random.default_rng(3).integers(0, 256, (4, blocks // 4 * size_bytes), dtype=np.uint8)
    if kind in {"F32", "F16", "BF16"}:
        values = np.random.default_rng(3).standard_normal((4, 512)).astype(np.float32)
        raw = gguf.quantize(values, quantization).view(np.uint8)
    elif kind not in {"Q4_K", "Q6_K"}:
        raw = gguf.quantize(np.random.default_rng(3).standard_normal((4, 512)).astype(np.float32), quantization)
    else:
        raw &= 0x3B  # keeps the float16 scales finite
    expected = torch.from_numpy(np.array(gguf.dequantize(raw, quantization), dtype=np.float32)).reshape(4, 512)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = dequantize(raw.reshape(-1).copy(), quantization.value, (4, 512), torch.float32)
    assert torch.equal(found, expected)
    rounded = dequantize(raw.reshape(-1).copy(), quantization.value, (4, 512), torch.bfloat16)
    assert torch.equal(rounded, expected.bfloat16())


def refusal(path: Path, dtype: Dtype = "fp32") -> str:
    with pytest.raises(ModelError) as caught:
        load_model(path, dtype=dtype, name="tiny")
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("kept", [0, 3, 20, 400, 5000, 0.5, 0.99])
def test_a_gguf_cut_off_anywhere_is_refused_in_one_line(gguf_path: Path, kept: float) -> None:
    data = gguf_path.read_bytes()
    gguf_path.write_bytes(data[: int(kept if kept >= 3 or kept == 0 else len(data) * kept)])
    message = refusal(gguf_path)
    assert "tiny.gguf" in message
    assert "fetch the model again" in message


def test_a_damaged_gguf_never_ends_in_a_traceback(gguf_path: Path) -> None:
    whole = gguf_path.read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        data = bytearray(whole)
        for place in random.integers(0, 6000, 3):
            data[place] = random.integers(0, 256)
        gguf_path.write_bytes(data)
        with suppress(ModelError):
            load_model(gguf_path, dtype="fp32", name="tiny")
            continue
        refused += 1
    assert refused


def test_an_architecture_that_is_not_known_is_refused_with_those_that_are(tmp_path: Path, directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    other = write_gguf(tmp_path / "other.gguf", write_tiny_model(tmp_path / "other"), architecture="mamba")
    for path in (directory, other):
        message = refusal(path)
        assert "'mamba'" in message
        assert "llama, mistral" in message


def test_a_sliding_window_in_a_gguf_is_refused_by_name(tmp_path: Path, directory: Path) -> None:
    path = write_gguf(tmp_path / "window.gguf", directory, change=lambda writer: writer.add_sliding_window(4096))
    assert "sliding-window" in refusal(path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sliding_window": 4096}, "sliding-window"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
        ({"quantization_config": {"bits": 4}}, "quantized safetensors"),
        ({"num_key_value_heads": 3}, "evenly"),
        ({"head_dim": 7}, "odd"),
        ({"num_hidden_layers": "many"}, "many"),
        ({"intermediate_size": 64}, "gate_proj"),
        ({"num_hidden_layers": 3}, "model.layers.2"),
    ],
)
def test_a_configuration_we_cannot_honour_is_refused_by_name(
    directory: Path, change: dict[str, Any], named: str
) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **change}))
    assert named in refusal(directory)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(directory: Path, missing: str) -> None:
    (directory / missing).unlink()
    assert missing in refusal(directory)


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_truncated_file_is_named(directory: Path, broken: str) -> None:
    data = (directory / broken).read_bytes()
    (directory / broken).write_bytes(data[: len(data) // 2])
    assert broken in refusal(directory)


def test_an_index_that_points_outside_its_directory_is_refused(directory: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside" in refusal(directory)


def test_a_path_without_a_model_says_how_to_get_one(tmp_path: Path) -> None:
    assert "millicent pull" in refusal(tmp_path / "nothing")
