"""The decoder on the device says what the plain one says in float64, however its passes are made up."""

from __future__ import annotations

import importlib.util

import msgspec
import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton isn't installed", allow_module_level=True)

from millicent.core.errors import ConfigError
from millicent.core.request import Limits, Sampling
from millicent.engine.batch import Piece
from millicent.engine.config import EngineConfig
from millicent.engine.cuda.ahead import Changes, Landed
from millicent.engine.cuda.decoder import DeviceDecoder, DeviceFlight, apply_changes, splits_for
from millicent.engine.cuda.opening import GpuModels
from millicent.engine.processors import Adjustments
from millicent.engine.protocol import Load
from millicent.engine.sampler import Draw, sample
from support.device_answers import said_by_device, said_by_reference, submits
from support.device_decoders import CONFIG, errors, mixed_passes, on_device
from support.random_weights import RandomCheckpoint, spec

# Rows of padding hold what memory held before.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

GREEDY = Draw(0.0, 1.0, 0, 0, 0)
PROMPT = [(17 * index + 5) % 199 for index in range(11)]
FAMILIES = {
    "llama": spec(),
    "llama untied, odd groups": spec(layers=1, tied_embeddings=False, heads=3, kv_heads=1, head_dim=24),
    "qwen2": spec(layers=1, family="qwen2", qkv_bias=True),
    "qwen3": spec(layers=1, family="qwen3", mlp_bias=True, attention_output_bias=True),
}


@pytest.fixture(scope="module")
def model() -> DeviceDecoder:
    return on_device(RandomCheckpoint(spec(layers=1)))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_float64(family: str) -> None:
    checkpoint = RandomCheckpoint(FAMILIES[family])
    found = errors(on_device(checkpoint), checkpoint, mixed_passes(199))
    assert max(found) < 3e-5


def test_fp8_weights_are_as_far_off_as_fp8_is() -> None:
    """With few rows weights alone are rounded, with many the rows too."""
    checkpoint = RandomCheckpoint(spec(layers=1))
    gpu = torch.cuda.is_available()
    model = on_device(checkpoint, dtype="bf16" if gpu else "fp32", fp8=True)
    found = errors(model, checkpoint, mixed_passes(199))
    assert min(found) > 1e-3
    assert max(found) < (0.15 if gpu else 0.25)  # the interpreter rounds towards zero


def land(flight: DeviceFlight, *scored: int) -> Landed:
    flight.bring(scored)
    return flight.land(None)


def test_a_launch_draws_what_the_host_would_from_the_same_logits(model: DeviceDecoder) -> None:
    draws = [Draw(1.5, 0.95, 0, 7, 3), GREEDY, Draw(0.8, 1.0, 20, 9, 1)]
    pieces = [
        Piece(1, PROMPT, 0, [0, 1, 2], sample=True),
        Piece(2, PROMPT[3:6], 0, [3], sample=True),
        Piece(3, PROMPT[:2], 0, [4], sample=True),
    ]
    logits = model.forward(pieces)
    landed = land(model.launch(pieces, draws), 0, 2)
    assert landed.tokens == sample(logits, draws)
    assert set(landed.logits) == {0, 2}
    np.testing.assert_allclose(landed.logits[2], logits[2].numpy(), rtol=1e-5, atol=1e-5)


def test_a_pass_takes_tokens_that_the_host_hasnt_seen(model: DeviceDecoder) -> None:
    """The second pass reads them where the first one left them, decoding or at the end of a prompt."""
    first = [Piece(1, PROMPT[:4], 0, [0], sample=True), Piece(2, PROMPT[4:9], 0, [1, 2], sample=True)]
    flights = [model.launch(first, [GREEDY, GREEDY])]
    second = [Piece(2, [-2], 5, [1, 2], sample=True), Piece(3, [*PROMPT[:3], -1], 0, [5], sample=True)]
    flights[0].bring(())
    flights.append(model.launch(second, [GREEDY, GREEDY]))
    flights[1].bring(())
    drawn = [flights[0].land(None).tokens, flights[1].land(flights[0]).tokens]
    again = model.forward(first)
    assert drawn[0] == again.argmax(-1).tolist()
    known = [
        Piece(2, [drawn[0][1] or 0], 5, [1, 2], sample=True),
        Piece(3, [*PROMPT[:3], drawn[0][0] or 0], 0, [5], True),
    ]
    assert drawn[1] == model.forward(known).argmax(-1).tolist()


def test_a_row_is_drawn_again_with_penalties_and_a_grammar(model: DeviceDecoder) -> None:
    sampling = Sampling(
        repetition_penalty=1.7, presence_penalty=0.5, frequency_penalty=0.4, logit_bias={3: 4.0, 9: -2.0}
    )
    adjust = Adjustments(sampling, Limits(min_tokens=5), PROMPT, ends=[11])
    adjust.note(30)
    adjust.note(30)
    pieces = [Piece(1, PROMPT[:3], 0, [0], sample=True), Piece(2, PROMPT, 0, [1, 2, 3], sample=True)]
    logits = model.forward(pieces)
    expected = logits.numpy().copy()
    adjust(expected[1])
    forbidden = np.arange(199) % 3 == 0
    expected[1][forbidden] = -np.inf
    draw = Draw(1.0, 1.0, 0, 4, 2)
    tokens, factors, minus, plus = adjust.changes()
    allowed = np.packbits(~forbidden, bitorder="little").tobytes()
    flight = model.launch(pieces, [GREEDY, GREEDY])
    rows = np.zeros(len(tokens), dtype=np.int64)
    flight.redraw([1], [draw], Changes(rows, tokens, factors, minus, plus, {0: allowed}))
    landed = land(flight, 1)
    assert landed.tokens == sample(torch.from_numpy(expected), [GREEDY, draw])
    np.testing.assert_allclose(landed.logits[1], logits[1].numpy(), rtol=1e-5, atol=1e-5)  # the model's own


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the interpreter runs")
def test_a_pass_of_few_rows_takes_five_launches_a_layer(model: DeviceDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches are what a small model's single answers wait for."""
    from triton.runtime.interpreter import GridExecutor

    launched: list[str] = []
    run = GridExecutor.__call__

    def counted(self: GridExecutor, *args: object, **options: object) -> None:
        launched.append(self.fn.__name__)
        run(self, *args, **options)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    for library in ("linear", "scaled_dot_product_attention"):
        monkeypatch.delattr(torch.nn.functional, library)
    flight = model.launch([Piece(1, [5], 0, [0], sample=True)], [GREEDY])
    layer = ["_multiply_few", "_decode", "_multiply_few", "_multiply_few", "_multiply_few"]
    assert launched == ["_embed", *layer, "_multiply_few", "_best", "_draw"]
    land(flight)


def test_changes_do_to_logits_what_adjustments_do() -> None:
    sampling = Sampling(
        repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.1, logit_bias={5: 1.0, 40: -9}
    )
    adjust = Adjustments(sampling, Limits(min_tokens=4), [1, 5, 5, 70], ends=[7])
    for token in (5, 8, 8):
        adjust.note(token)
    rows = torch.randn(2, 100, generator=torch.Generator().manual_seed(1))
    expected = rows.numpy().copy()
    adjust(expected[1])
    tokens, factors, minus, plus = adjust.changes()
    apply_changes(
        rows, Changes(np.ones(len(tokens), dtype=np.int64), tokens, factors, minus, plus, {}), torch.from_numpy
    )
    assert np.array_equal(rows.numpy(), expected)


def test_deterministic_rows_have_the_same_bits_however_they_came() -> None:
    config = msgspec.structs.replace(CONFIG, deterministic=True)
    model = on_device(RandomCheckpoint(spec(layers=1, heads=2, kv_heads=1)), config)
    whole = model.forward([Piece(1, PROMPT[:7], 0, [0, 1], sample=True)])
    model.forward([Piece(2, PROMPT[:6], 0, [4, 3], sample=False)])
    assert torch.equal(model.forward([Piece(2, [PROMPT[6]], 6, [4, 3], sample=True)]), whole)


def test_contexts_are_split_until_the_chip_is_full() -> None:
    assert [splits_for(programs, 132) for programs in (8, 64, 128, 256, 264, 2048)] == [32, 16, 8, 4, 4, 1]


def test_what_a_gpu_doesnt_do_is_refused_by_name() -> None:
    models = GpuModels(EngineConfig(device="cuda:0"))
    with pytest.raises(ConfigError, match=r"int8.*is for processors"):
        models(Load("tiny", "nowhere", "auto", quantize="int8"))
    with pytest.raises(ConfigError, match="kv_dtype"):
        GpuModels(EngineConfig(device="cuda:0", kv_dtype="int8"))


def test_greedy_answers_are_those_of_float64_through_a_whole_engine() -> None:
    checkpoint = RandomCheckpoint(spec(layers=1, heads=2, kv_heads=1, vocabulary=61))
    prompts = {1: PROMPT[:9], 2: PROMPT[2:7], 3: PROMPT[:6]}
    frames = submits({number: [token % 61 for token in tokens] for number, tokens in prompts.items()}, 5)
    assert said_by_device(on_device(checkpoint, allocate=False), frames) == said_by_reference(checkpoint, frames)
