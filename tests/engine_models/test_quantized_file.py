"""What `millicent quantize` writes: it runs like weights rounded at load time, and says what its source did."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch

from millicent.core.errors import ConfigError, ModelError
from millicent.engine import kernels
from millicent.engine.batch import Piece
from millicent.engine.calibrated_rounding import round_to_inputs
from millicent.engine.kernels.weights import Format, quantize
from millicent.engine.models import FAMILIES, load_model
from millicent.engine.models.kernel_decoder import KernelDecoder
from millicent.engine.quantized_file import Width, write_quantized
from millicent.engine.weights import open_checkpoint
from millicent.text import load_tokenizer
from millicent.text.gguf import read_gguf_head
from millicent.text.stored_precision import stored_precision
from support.tiny_gguf import write_gguf
from support.tiny_models import TinyLlama, write_tiny_model

SHAPE = TinyLlama(hidden=64, head_dim=16, intermediate=96, tied=False, context_tokens=64)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return write_gguf(
        tmp_path / "tiny.gguf",
        write_tiny_model(tmp_path / "tiny", SHAPE),
        change=lambda writer: writer.add_chat_template(template),
    )


def last_logits(path: Path, quantize: str = "auto") -> torch.Tensor:
    model = load_model(path, dtype="auto", name="tiny", quantize=quantize)  # type: ignore[arg-type]
    assert isinstance(model, KernelDecoder)
    model.allocate(2, 16)
    return model.forward([Piece(0, list(range(3, 25)), 0, [1, 0], True)])[0]


@pytest.mark.parametrize(("to", "kind"), [("int8", "Q8_0"), ("int4", "Q4_1")])
def test_the_file_appears_whole_and_runs_as_it_is(source: Path, tmp_path: Path, to: Width, kind: str) -> None:
    """int8 to the bit like weights rounded when loading; int4 is calibrated, and near the original everywhere."""
    if kernels.available().instruction_set is None:
        pytest.skip(kernels.available().reason)
    seen: list[tuple[int, int]] = []
    file = write_quantized(source, tmp_path / "out", to, lambda done, total: seen.append((done, total)))
    if to == "int8":
        assert torch.equal(last_logits(tmp_path / "out"), last_logits(source, to))
    before, after = open_checkpoint(source, FAMILIES), open_checkpoint(file, FAMILIES)
    for name in before.shapes:
        original, found = before.read(name, torch.float32), after.read(name, torch.float32)
        assert (found - original).norm() <= 0.15 * original.norm(), name
    assert stored_precision(file) == kind
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"tiny-{kind}.gguf"]
    assert not list(tmp_path.glob(".*partial"))


@pytest.mark.parametrize("format_", [Format.Q4, Format.Q4_MIN])
def test_rounding_to_inputs_loses_less_on_them_than_rounding_to_the_nearest(format_: Format) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 96, generator=generator)
    few_directions = torch.randn(24, 96, generator=generator)
    inputs = torch.randn(400, 24, generator=generator) @ few_directions + 0.1 * torch.randn(
        400, 96, generator=generator
    )
    calibrated = round_to_inputs(weight, inputs.T @ inputs, format_).dequantized()
    nearest = quantize(weight, format_).dequantized()
    losses = [(inputs @ (weight - found).T).square().sum() for found in (calibrated, nearest)]
    assert losses[0] < 0.25 * losses[1]


def test_the_first_and_the_last_of_many_layers_keep_eight_bits(tmp_path: Path) -> None:
    if kernels.available().instruction_set is None:
        pytest.skip(kernels.available().reason)
    deep = replace(SHAPE, layers=8, hidden=32, head_dim=16, heads=2, kv_heads=1, intermediate=32)
    source = write_gguf(tmp_path / "deep.gguf", write_tiny_model(tmp_path / "deep", deep))
    file = write_quantized(source, tmp_path / "out", "int4")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    found = [kinds[f"blk.{layer}.ffn_down.weight"] for layer in range(8)]
    assert found == ["Q8_0", *["Q4_1"] * 6, "Q8_0"]
    assert stored_precision(file) == "Q4_1"


def test_other_readers_find_the_same_metadata_tokenizer_and_values(source: Path, tmp_path: Path) -> None:
    file = write_quantized(source, tmp_path / "out", "int8")
    before, after = read_gguf_head(source).metadata, read_gguf_head(file).metadata
    changed = {"general.file_type": 7, "general.quantization_version": 2}
    assert after == {**before, **changed}
    assert load_tokenizer(file).encode("the thing") == load_tokenizer(source).encode("the thing")
    originals = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    for tensor in gguf.GGUFReader(file).tensors:
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        expected = torch.from_numpy(originals[tensor.name].data.copy())
        greatest = expected.abs().max().item()
        tolerance = greatest / 127 if tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0 else 0.0
        torch.testing.assert_close(values, expected, atol=tolerance, rtol=0)


def test_what_cannot_be_quantized_into_a_file_is_refused_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ModelError, match="only GGUF files can be quantized into files"):
        write_quantized(tmp_path / "tiny", out, "int8")
    write_quantized(source, out, "int4")
    with pytest.raises(ConfigError, match="exists already"):
        write_quantized(source, out, "int8")
    with pytest.raises(ConfigError, match="has nothing of more bits than int8"):
        write_quantized(out, tmp_path / "again", "int8")
    assert not (tmp_path / "again").exists()


def test_a_write_that_fails_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    def fail(done: int, total: int) -> None:
        raise OSError(f"no space left after {done} of {total}")

    with pytest.raises(OSError, match="no space left"):
        write_quantized(source, tmp_path / "out", "int8", fail)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny", "tiny.gguf"]


def test_weights_stored_in_few_bits_already_are_not_rounded_again(source: Path, tmp_path: Path) -> None:
    if kernels.available().instruction_set is None:
        pytest.skip(kernels.available().reason)
    write_quantized(source, tmp_path / "out", "int4")
    as_stored = last_logits(tmp_path / "out", "native")
    assert torch.equal(last_logits(tmp_path / "out", "int4"), as_stored)
    assert torch.equal(last_logits(tmp_path / "out", "int8"), as_stored)
