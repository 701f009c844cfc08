"""The part that needs a GPU: recorded passes, real shapes, bfloat16 and FP8, whole answers.

Runs without a network on a machine with a CUDA build of PyTorch and its Triton; skipped everywhere else.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Iterator
from dataclasses import replace

import msgspec
import pytest
import torch

if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
    pytest.skip("needs an NVIDIA GPU, and PyTorch and Triton that use it", allow_module_level=True)

from millicent.core.clock import SystemClock
from millicent.core.request import Sampling
from millicent.core.steps import StepRecord
from millicent.engine.batch import Piece
from millicent.engine.config import Dtype, EngineConfig
from millicent.engine.cuda.ahead import AheadRunner
from millicent.engine.cuda.decoder import DeviceDecoder
from millicent.engine.cuda.device import Device, open_device
from millicent.engine.runner import OpenModel
from millicent.engine.sampler import Draw, sample
from support.device_answers import said_by_device, said_by_reference, submits
from support.device_decoders import BLOCKS, errors, mixed_passes, on_device
from support.random_weights import LLAMA_3_1_8B, QWEN3_0_6B, KeptCheckpoint, RandomCheckpoint
from support.scripted_model import Letters

GREEDY = Draw(0.0, 1.0, 0, 0, 0)
CONFIG = EngineConfig(device="cuda:0", max_sequences=8, step_tokens=256, block_tokens=4)
SHAPES = {
    "qwen3-0.6b": replace(QWEN3_0_6B, layers=2, vocabulary=2048, context_tokens=1024),
    "llama-3.1-8b": replace(LLAMA_3_1_8B, layers=2, vocabulary=2048, context_tokens=1024),
    "qwen2": replace(QWEN3_0_6B, family="qwen2", qkv_bias=True, layers=2, vocabulary=2048, context_tokens=1024),
}


@pytest.fixture(scope="module")
def gpu() -> Iterator[Device]:
    yield open_device("cuda:0")
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def qwen(gpu: Device) -> DeviceDecoder:
    return on_device(RandomCheckpoint(SHAPES["qwen3-0.6b"]), CONFIG, dtype="bf16", device=gpu, blocks=200)


def tokens(count: int, seed: int = 1) -> list[int]:
    return torch.randint(2048, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@functools.lru_cache(maxsize=1)
def kept(name: str) -> KeptCheckpoint:
    return KeptCheckpoint(SHAPES[name])


@pytest.mark.parametrize(
    ("dtype", "fp8", "limit"), [("fp32", False, 1e-4), ("bf16", False, 3e-2), ("bf16", True, 0.15)]
)
@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_near_those_of_float64(name: str, dtype: Dtype, fp8: bool, limit: float, gpu: Device) -> None:
    checkpoint = kept(name)
    model = on_device(checkpoint, CONFIG, dtype=dtype, fp8=fp8, device=gpu)
    assert max(errors(model, checkpoint, mixed_passes(2048), CONFIG)) < limit


def test_greedy_answers_in_float32_are_those_of_float64(gpu: Device) -> None:
    """With arrivals of all lengths, preemption (the cache is small) and prefixes in common."""
    checkpoint = RandomCheckpoint(replace(SHAPES["qwen3-0.6b"], hidden=256, intermediate=512))
    shared = tokens(40)
    prompts = {number: (shared if number % 3 == 0 else []) + tokens(3 + 7 * number, number) for number in range(1, 13)}
    frames = submits(prompts, 40)
    model = on_device(checkpoint, CONFIG, device=gpu, allocate=False)
    found = said_by_device(model, frames, CONFIG, blocks=120)
    assert found == said_by_reference(checkpoint, frames, CONFIG, blocks=2000)


def test_seeded_draws_in_float32_are_those_of_the_processor(gpu: Device) -> None:
    checkpoint = RandomCheckpoint(replace(SHAPES["llama-3.1-8b"], hidden=256, intermediate=512, heads=8, kv_heads=2))
    settings = {
        1: Sampling(seed=1),
        2: Sampling(seed=2, temperature=0.7, top_k=30, top_p=0.9),
        3: Sampling(seed=3, temperature=1.4, min_p=0.05),
        4: Sampling(seed=4, temperature=0.9, repetition_penalty=1.3, frequency_penalty=0.3),
        5: Sampling(temperature=0, presence_penalty=0.8, logit_bias={7: 3.0}),
    }
    frames = submits({number: tokens(20, number) for number in settings}, 40, settings)
    model = on_device(checkpoint, CONFIG, device=gpu, allocate=False)
    assert said_by_device(model, frames, CONFIG, blocks=200) == said_by_reference(
        checkpoint, frames, CONFIG, blocks=200
    )


def test_recorded_passes_say_what_the_same_passes_say_unrecorded(qwen: DeviceDecoder) -> None:
    """Of every prepared shape, with poison where nothing may be read."""
    contexts = {number: tokens(9 + number, number) for number in range(8)}
    tables = {number: list(range(number * 20, number * 20 + 20)) for number in range(8)}
    for count in range(1, 9):
        prefill = [Piece(n, contexts[n], 0, tables[n], sample=True) for n in range(count)]
        decode = [Piece(n, [5 + n], len(contexts[n]), tables[n], sample=True) for n in range(count)]
        mixed = [*decode[: count // 2], *prefill[count // 2 :]]
        for pieces in (prefill, decode, mixed):
            if not pieces:
                continue
            logits = qwen.forward(pieces)
            draws = [Draw(0.8, 0.95, 0, n, 1) if n % 2 else GREEDY for n in range(len(pieces))]
            qwen._logits.fill_(float("nan"))
            qwen._drawn.fill_(-77)
            flight = qwen.launch(pieces, draws)
            flight.bring(range(len(pieces)))
            landed = flight.land(None)
            recorded = torch.stack([torch.from_numpy(landed.logits[row]) for row in range(len(pieces))])
            assert (recorded - logits).norm() / logits.norm() < 2e-2
            assert landed.tokens == sample(recorded, draws)
            assert landed.device_ns > 0


def test_tokens_reach_the_next_pass_on_the_device(qwen: DeviceDecoder) -> None:
    prompt, table = tokens(30), list(range(30))
    chain, number = [qwen.launch([Piece(1, prompt, 0, table, sample=True)], [GREEDY])], 30
    drawn: list[int | None] = []
    for _ in range(20):
        chain[-1].bring(())
        chain.append(qwen.launch([Piece(1, [-1], number, table, sample=True)], [GREEDY]))
        number += 1
        drawn += chain[-2].land(None).tokens
    chain[-1].bring(())
    drawn += chain[-1].land(chain[-2]).tokens
    context = [*prompt]
    for token in drawn:
        assert token is not None
        logits = qwen.forward([Piece(2, context, 0, [*range(100, 130)], sample=True)])[0]
        assert logits[token] > logits.max() - 0.5  # bfloat16's near-ties may differ between a prompt and a step
        context.append(token)


def test_deterministic_answers_are_bit_for_bit_the_same_beside_any_neighbours(gpu: Device) -> None:
    config = msgspec.structs.replace(CONFIG, deterministic=True)
    checkpoint = RandomCheckpoint(SHAPES["qwen3-0.6b"])
    frames = submits({number: tokens(30 * number, 1) for number in range(1, 5)}, 30)
    model = on_device(checkpoint, config, dtype="bf16", device=gpu, allocate=False)
    together = said_by_device(model, frames, config, blocks=300)
    for frame in frames:
        alone = on_device(checkpoint, config, dtype="bf16", device=gpu, allocate=False)
        assert said_by_device(alone, [frame], config, blocks=300)[frame.sequence] == together[frame.sequence]


def test_records_add_up_to_the_time_that_passed(gpu: Device) -> None:
    model = on_device(RandomCheckpoint(SHAPES["qwen3-0.6b"]), CONFIG, dtype="bf16", device=gpu, allocate=False)
    runner = AheadRunner(model, OpenModel(model, frozenset(), Letters), CONFIG, blocks=BLOCKS * 20, wake=lambda: None)
    clock = SystemClock()
    for frame in submits({number: tokens(20, number) for number in range(1, 9)}, 200):
        runner.submit(frame)
    start_ns = clock.monotonic_ns()
    records: list[StepRecord] = []
    while runner.busy:
        record = runner.step("cuda:0", len(records), clock, ahead=True).record
        assert record is not None
        records.append(record)
    passed_ns = clock.monotonic_ns() - start_ns
    assert all(after.start_ns >= before.start_ns + before.wall_ns for before, after in itertools.pairwise(records))
    assert records[-1].start_ns + records[-1].wall_ns <= clock.monotonic_ns()
    assert 0.9 < sum(record.wall_ns for record in records) / passed_ns <= 1


def test_memory_needed_by_passes_is_what_the_profile_says_at_least(gpu: Device) -> None:
    before = torch.cuda.mem_get_info()[0]
    model = on_device(RandomCheckpoint(SHAPES["llama-3.1-8b"]), CONFIG, dtype="bf16", device=gpu, blocks=500)
    taken = before - torch.cuda.mem_get_info()[0]
    cache = 500 * CONFIG.block_tokens * model.kv_bytes_per_token
    assert taken <= model.weight_bytes + cache + model.working_bytes + (600 << 20)  # libraries' workspaces


def test_a_model_is_opened_again_after_the_last_one_is_gone(gpu: Device) -> None:
    checkpoint, prompt = RandomCheckpoint(SHAPES["qwen3-0.6b"]), [Piece(1, tokens(9), 0, [0, 1, 2], sample=True)]
    drawn = []
    for _ in range(2):
        model = on_device(checkpoint, CONFIG, dtype="bf16", device=gpu)
        flight = model.launch(prompt, [GREEDY])
        flight.bring(())
        drawn.append(flight.land(None).tokens)
        del model, flight
    assert drawn[0] == drawn[1]
