"""A model's files become what runs on the device, and say there what they say on the processor."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton isn't installed", allow_module_level=True)

from millicent.core.clock import ManualClock
from millicent.core.request import Limits, Sampling
from millicent.engine.batch import Encoder
from millicent.engine.config import EngineConfig
from millicent.engine.cuda.opening import GpuModels
from millicent.engine.models import load_encoder, load_model
from millicent.engine.protocol import Load, Submit
from millicent.engine.runner import OpenModel, Runner
from millicent.text import TextStream, load_tokenizer
from support.tiny_encoders import write_tiny_encoder
from support.tiny_models import TinyLlama, write_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # rows of padding hold what memory held before

CONFIG = EngineConfig(device="cuda:0", dtype="fp32", max_sequences=2, step_tokens=16, block_tokens=4)


def answer(runner: Runner) -> str:
    prompt, limits = tuple(range(5, 14)), Limits(max_tokens=6, ignore_eos=True)
    assert runner.submit(Submit(1, "tiny", prompt, Sampling(temperature=0), limits)) is None
    clock, text = ManualClock(), ""
    while runner.busy:
        text += "".join(output.text for output in runner.step("cuda:0", 0, clock, ahead=True).outputs)
    return text


def test_a_model_and_its_words(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, TinyLlama(layers=1, heads=2, kv_heads=1))
    opened = GpuModels(CONFIG)(Load("tiny", str(folder), "fp32"))
    assert isinstance(opened, OpenModel)
    assert opened.working_bytes > 0
    assert opened.make_runner is not None
    tokenizer = load_tokenizer(folder)
    plain = load_model(folder, dtype="fp32", name="tiny", threads=1, quantize="none")
    reference = OpenModel(plain, tokenizer.eos_tokens, lambda stop: TextStream(tokenizer, stop))
    found = answer(opened.make_runner(opened, CONFIG, blocks=30, wake=lambda: None))
    assert found == answer(Runner(reference, CONFIG, blocks=30))
    assert found


def test_an_encoder_and_its_vectors(tmp_path: Path) -> None:
    folder = write_tiny_encoder(tmp_path)
    opened = GpuModels(CONFIG)(Load("tiny", str(folder), "auto"))
    assert not isinstance(opened, OpenModel)
    found, reference = opened, load_encoder(folder, dtype="auto", name="tiny", threads=1)
    texts = [[2, 5, 6, 3], [2, 7, 3]]
    torch.testing.assert_close(vectors(found, texts), vectors(reference, texts))


def vectors(encoder: Encoder, texts: list[list[int]]) -> torch.Tensor:
    found = encoder.encode(texts)
    assert found.device.type == "cpu"
    return found
