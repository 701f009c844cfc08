"""Whole models on the kernels: against the same model in torch, quantized and not, and whatever the batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, dequantize
from gguf import quantize as gguf_quantize

from millicent.core.errors import ConfigError
from millicent.engine import kernels
from millicent.engine.batch import Model, Piece
from millicent.engine.config import Dtype
from millicent.engine.kernels import library
from millicent.engine.kernels.weights import Format, quantize
from millicent.engine.models import load_model
from millicent.engine.models.decoder import Decoder
from millicent.engine.models.kernel_decoder import KernelDecoder
from support.tiny_models import TinyLlama, write_tiny_model

SHAPE = TinyLlama(hidden=64, head_dim=16, intermediate=96)
BLOCK = 16


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    if kernels.available().instruction_set is None:
        pytest.skip(kernels.available().reason)
    return write_tiny_model(tmp_path / "tiny", SHAPE)


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLICENT_KERNELS", "off")


def logits(model: Model, pieces: Sequence[Piece]) -> torch.Tensor:
    found = model.forward(pieces)
    assert found.dtype is torch.float32
    return found


def prompt(tokens: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 100, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize(
    ("dtype", "quantize", "error"),
    [
        ("fp32", "auto", 1e-5),
        ("bf16", "auto", 0.03),
        ("fp32", "int8", 0.04),
        ("bf16", "int8", 0.05),
        ("fp32", "int4", 0.5),
    ],
)
def test_the_kernels_logits_are_torchs_within_what_rounding_costs(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, dtype: Dtype, quantize: str, error: float
) -> None:
    """Errors are relative to the norm of the logits: bf16 rounds to 8 bits, int8 both sides to 8, int4 weights to 4."""
    ours = load_model(tiny, dtype=dtype, name="tiny", quantize=quantize)  # type: ignore[arg-type]
    without_kernels(monkeypatch)
    theirs = load_model(tiny, dtype="fp32", name="tiny")
    assert isinstance(ours, KernelDecoder)
    assert isinstance(theirs, Decoder)
    pieces = [Piece(0, prompt(40), 0, [3, 1, 4], True), Piece(1, prompt(7, 1), 0, [5], True)]
    for model in (ours, theirs):
        model.allocate(8, BLOCK)
    found, expected = logits(ours, pieces), logits(theirs, pieces)
    assert (found - expected).norm() / expected.norm() < error


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_logits_have_the_same_bits_whatever_the_batch_and_the_cuts(tiny: Path, quantize: str) -> None:
    model = load_model(tiny, dtype="bf16", name="tiny", quantize=quantize)  # type: ignore[arg-type]
    model.allocate(16, BLOCK)
    tokens = prompt(60)
    whole = logits(model, [Piece(0, tokens, 0, [0, 1, 2, 3], True)])
    for start, stop in ((0, 25), (25, 26)):
        assert logits(model, [Piece(1, tokens[start:stop], start, [4, 5, 6, 7], False)]).shape[0] == 0
    company = [Piece(2, prompt(30, 2), 0, [8, 9], True), Piece(1, tokens[26:], 26, [4, 5, 6, 7], True)]
    assert torch.equal(logits(model, company)[1:], whole)
    for position, token in enumerate(tokens):
        last = logits(model, [Piece(3, [token], position, [10, 11, 12, 13], True)])
    assert torch.equal(last, whole)


def test_pieces_that_do_not_sample_give_no_logits_and_the_order_is_the_pieces(tiny: Path) -> None:
    model = load_model(tiny, dtype="fp32", name="tiny")
    model.allocate(8, BLOCK)
    first, second = prompt(5, 3), prompt(9, 4)
    alone = logits(model, [Piece(0, second, 0, [0], True)])
    mixed = logits(model, [Piece(1, first, 0, [1], False), Piece(2, second, 0, [2], True)])
    assert torch.equal(alone, mixed)


def test_untied_heads_and_wide_groups_run_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny_model(
        tmp_path / "untied", TinyLlama(hidden=64, heads=6, kv_heads=1, head_dim=32, intermediate=96, tied=False)
    )
    ours = load_model(path, dtype="fp32", name="tiny")
    without_kernels(monkeypatch)
    theirs = load_model(path, dtype="fp32", name="tiny")
    for model in (ours, theirs):
        model.allocate(4, BLOCK)
    pieces = [Piece(0, prompt(33), 0, [0, 2, 1], True)]
    assert torch.allclose(logits(ours, pieces), logits(theirs, pieces), atol=1e-4)


def test_what_the_kernels_cannot_run_goes_to_torch_and_cannot_be_quantized(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "narrow", TinyLlama(head_dim=8))
    assert isinstance(load_model(path, dtype="fp32", name="tiny"), Decoder)
    with pytest.raises(ConfigError, match="quantize = 'int4' needs the compiled kernels"):
        load_model(path, dtype="fp32", name="tiny", quantize="int4")


def test_turning_the_kernels_off_is_said_and_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    without_kernels(monkeypatch)
    found = library.available()
    assert found.instruction_set is None
    assert "unset it" in found.reason


@pytest.mark.model
def test_smollm2s_four_bit_weights_run_as_stored_and_predict_as_well(
    smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file's Q4_1 values are kept, activations are rounded to 8 bits in groups of 32: perplexity moves by under 5%
    on this text, where four-bit weights against 16 bits cost it more."""
    text = (
        "Water boils at one hundred degrees Celsius and freezes at zero. The city of Paris is the capital of France. "
        "A good engineer writes down what was measured, how, and what the numbers do not say."
    )
    from millicent.text import load_tokenizer

    tokens = list(load_tokenizer(smollm2_path).encode(text))
    ours = load_model(smollm2_path, dtype="auto", name="smollm2")
    without_kernels(monkeypatch)
    theirs = load_model(smollm2_path, dtype="fp32", name="smollm2")
    assert ours.weight_bytes < theirs.weight_bytes / 4
    losses = []
    for model in (ours, theirs):
        model.allocate(8, BLOCK)
        rows = [logits(model, [Piece(0, [token], at, list(range(8)), True)])[0] for at, token in enumerate(tokens[:-1])]
        losses.append(torch.nn.functional.cross_entropy(torch.stack(rows), torch.tensor(tokens[1:])).exp().item())
    assert abs(losses[0] / losses[1] - 1) < 0.05


def test_a_cache_of_bytes_moves_the_logits_by_three_percent_at_most_and_takes_half_the_memory(tiny: Path) -> None:
    models = [load_model(tiny, dtype="bf16", name="tiny", kv_dtype=kv_dtype) for kv_dtype in ("bf16", "int8")]
    pieces = [Piece(0, prompt(60), 0, [3, 1, 4, 0], True), Piece(1, prompt(7, 1), 0, [5], True)]
    for model in models:
        model.allocate(8, BLOCK)
    expected, found = (logits(model, pieces) for model in models)
    assert (found - expected).norm() / expected.norm() < 0.03
    assert models[1].kv_bytes_per_token <= models[0].kv_bytes_per_token * 0.63  # heads of 16: a scale is a fifth


def test_a_models_precision_is_said_in_the_log(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        load_model(tiny, dtype="fp32", name="tiny", quantize="int4", kv_dtype="int8")
    assert "tiny: weights int4 with minima and int8, cache int8" in caplog.text


def test_torch_refuses_a_cache_that_only_the_kernels_have(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_kernels(monkeypatch)
    with pytest.raises(ConfigError, match="kv_dtype = 'int8' needs the compiled kernels"):
        load_model(tiny, dtype="fp32", name="tiny", kv_dtype="int8")


@pytest.mark.parametrize("format_", [Format.Q4, Format.Q4_MIN])
def test_four_bits_are_nearer_than_plain_rounding_of_ggufs_kind(format_: Format) -> None:
    """On Gaussian weights, against `gguf`'s own blocks of the same size; a constant row and a row of zeros survive."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    weight[0], weight[1] = 0.0, 0.25
    kind = {Format.Q4: GGMLQuantizationType.Q4_0, Format.Q4_MIN: GGMLQuantizationType.Q4_1}[format_]
    plain = torch.from_numpy(dequantize(gguf_quantize(weight.numpy(), kind), kind))
    found = quantize(weight, format_).dequantized()
    assert (found - weight).square().mean() < 0.93 * (plain - weight).square().mean()
    assert torch.equal(found[0], weight[0])
    assert torch.allclose(found[1], weight[1], atol=1e-3)
