"""Sections `attention`, `linears` and `profile` of gpu.py: kernels by themselves, cut in several ways, each as a share
of its floor; and what a step is made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from gpu_sections import Settings, copies, seconds, tell

from millicent.engine.batch import Piece
from millicent.engine.config import EngineConfig
from millicent.engine.cuda.decoder import splits_for
from millicent.engine.cuda.kernels.attention import (
    DECODE,
    PREFILL,
    DecodeRows,
    PrefillTiles,
    Turns,
    attend_decode,
    attend_prefill,
    tile_rows,
)
from millicent.engine.cuda.kernels.matmul import ONE_ROW, SEVERAL_ROWS, Cut, multiply_few
from millicent.engine.cuda.kernels.rows import Turning, quantize_rows
from millicent.engine.cuda.linear import Fp8Linear, PlainLinear
from millicent.engine.sampler import Draw

if TYPE_CHECKING:
    from millicent.engine.cuda.ahead import AheadRunner

_TURNS = (
    DECODE,
    replace(DECODE, stages=4),
    replace(DECODE, tokens=32),
    replace(DECODE, tokens=128),
    replace(DECODE, warps=8),
    replace(DECODE, warps=2),
    replace(DECODE, least=256),
    replace(DECODE, least=64),
)
_PREFILL_TURNS = (PREFILL, replace(PREFILL, stages=2), replace(PREFILL, stages=4), replace(PREFILL, warps=4))
_ONE = (
    ONE_ROW,
    replace(ONE_ROW, weights=4096),
    replace(ONE_ROW, weights=16_384),
    replace(ONE_ROW, weights=16_384, warps=8),
    replace(ONE_ROW, inputs=2048),
    replace(ONE_ROW, programs=264),
)
_SEVERAL = (
    SEVERAL_ROWS,
    replace(SEVERAL_ROWS, weights=4096),
    replace(SEVERAL_ROWS, weights=16_384),
    replace(SEVERAL_ROWS, inputs=128),
    replace(SEVERAL_ROWS, weights=16_384, warps=8),
)


def attention(settings: Settings) -> None:
    dtype = torch.float32 if settings.rehearsal else torch.bfloat16
    place, head_dim, size = settings.device, settings.sized(128, 16), 16
    for heads, kv_heads, count, context in ((16, 8, 1, 512), (16, 8, 256, 1024), (32, 8, 1, 8192), (32, 8, 64, 2048)):
        rows, tokens = settings.sized(count, 2), settings.sized(context, 20)
        blocks = -(-tokens // size)
        bytes_read = 2 * rows * tokens * kv_heads * head_dim * dtype.itemsize
        layer = partial(torch.randn, rows * blocks, kv_heads, size, head_dim, dtype=dtype, device=place)
        caches = [(layer(), layer()) for _ in copies(settings, bytes_read)]
        tables = torch.randperm(rows * blocks, device=place).int()
        starts = torch.arange(rows, device=place).int() * blocks
        qkv = torch.randn(max(rows, tokens), (heads + 2 * kv_heads) * head_dim, dtype=dtype, device=place)
        out = torch.empty(len(qkv), heads * head_dim, dtype=dtype, device=place)
        angles = torch.rand(tokens, head_dim // 2, device=place)
        gain = torch.ones(head_dim, dtype=dtype, device=place)
        turning = Turning((angles, angles), (gain, gain), 1e-6)
        chip = 132 if settings.rehearsal else torch.cuda.get_device_properties(0).multi_processor_count
        arrivals = torch.zeros(rows * kv_heads, dtype=torch.int32, device=place)
        lengths = torch.full_like(starts, tokens)
        decode = DecodeRows(starts, lengths, tables, arrivals, splits_for(rows * kv_heads, chip))
        floor = bytes_read / settings.ceilings["bytes_per_s"]
        runs = [partial(attend_decode, qkv, turning, *cache, decode, out) for cache in caches]
        _best(
            settings, f"decode attention, {heads}/{kv_heads} heads, {count} x {context}", floor, "turns", _TURNS, runs
        )
        step = tile_rows(heads, kv_heads, dtype)
        firsts = torch.arange(0, tokens, step, device=place).int()
        tiles = PrefillTiles(tables, firsts, (tokens - firsts).clamp(max=step), firsts, torch.zeros_like(firsts))
        floor = 2 * tokens**2 * heads * head_dim / settings.ceilings["bf16_flops"]  # two products of half a square
        runs = [partial(attend_prefill, qkv, *caches[0], tiles, out)]
        _best(settings, f"prefill attention, {heads}/{kv_heads} heads, {context}", floor, "turns", _PREFILL_TURNS, runs)
        del caches, runs


def _best(
    settings: Settings,
    label: str,
    floor_s: float,
    keyword: str,
    ways: tuple[Turns, ...] | tuple[Cut, ...],
    runs: Sequence[Callable[..., object]],
) -> None:
    """The way that serves, and the fastest, if that is another: its name is what to put in the kernel's file."""
    took: dict[Turns | Cut, float] = {}
    for way in ways[: settings.sized(len(ways), 1)]:
        try:
            took[way] = seconds(settings, *(partial(run, **{keyword: way}) for run in runs))
        except Exception as error:  # noqa: BLE001 - one way may need more of the chip than there is: that is a finding
            print(json.dumps({"way": f"{label}: {way}", "failed": " ".join(str(error).split())[:200]}), flush=True)
    if ways[0] in took:
        tell(label, took[ways[0]] * 1e6, "us", share=round(floor_s / took[ways[0]], 4))
    best = min(took, key=took.__getitem__, default=ways[0])
    if best is not ways[0]:
        tell(f"{label}: best as {best}", took[best] * 1e6, "us", share=round(floor_s / took[best], 4))


def linears(settings: Settings) -> None:
    dtype = torch.float32 if settings.rehearsal else torch.bfloat16
    for name in ("QWEN3_0_6B", "LLAMA_3_1_8B"):
        shape = settings.shape(name)
        inner = shape.heads * shape.head_dim
        sizes = {
            "qkv": (inner + 2 * shape.kv_heads * shape.head_dim, shape.hidden),
            "o": (shape.hidden, inner),
            "gate-up": (2 * shape.intermediate, shape.hidden),
            "down": (shape.hidden, shape.intermediate),
            "head": (shape.vocabulary, shape.hidden),
        }
        for part, (outputs, inputs) in sizes.items():
            shown = copies(settings, outputs * inputs)  # in FP8; more than enough in bf16
            weights = [torch.randn(outputs, inputs, dtype=dtype, device=settings.device) for _ in shown]
            few = [partial(multiply_few, weight=weight) for weight in weights]
            _products(settings, f"{name} {part} bf16", weights[0], list(map(PlainLinear, weights)), few)
            if Fp8Linear.fits(outputs, inputs) and part != "head":
                rounded = map(quantize_rows, weights)
                few = [partial(multiply_few, weight=values, scales=scales.view(-1)) for values, scales in rounded]
                _products(settings, f"{name} {part} fp8", weights[0], list(map(Fp8Linear, weights)), few)
            del weights, few


def _products(
    settings: Settings,
    label: str,
    like: torch.Tensor,
    library: list[PlainLinear] | list[Fp8Linear],
    few: list[partial[torch.Tensor]],
) -> None:
    """By the kernel for few rows, cut in several ways, and by the library: which is faster where both could serve."""
    outputs, inputs = like.shape
    unit = "fp8_flops" if label.endswith("fp8") else "bf16_flops"

    def floor(rows: int) -> float:
        reading = library[0].nbytes / settings.ceilings["bytes_per_s"]
        return max(reading, 2 * rows * outputs * inputs / settings.ceilings[unit])

    def rows_of(count: int) -> torch.Tensor:
        return torch.randn(settings.sized(count, min(count, 2)), inputs, dtype=like.dtype, device=settings.device)

    for count, ways in ((1, _ONE), (16, _SEVERAL)):
        runs = [partial(each, rows_of(count)) for each in few]
        _best(settings, f"{label}, {count} rows, own kernel", floor(count), "cut", ways, runs)
    for count in (1, 16, 64, 256, 512)[: settings.sized(5, 1)]:
        took = seconds(settings, *(partial(linear, rows_of(count)) for linear in library))
        tell(f"{label}, {count} rows, library", took * 1e6, "us", share=round(floor(count) / took, 4))


def profile(settings: Settings, label: str, subject: AheadRunner, sequences: int) -> None:
    """Recorded passes of sequences that decode at 500 tokens, each kernel's part of a step."""
    launcher, steps = subject._launcher, settings.sized(20, 1)  # noqa: SLF001 - the model, without its scheduler
    context = settings.sized(500, 12)
    blocks = -(-(context + 1) // EngineConfig().block_tokens)
    pieces = [
        Piece(number, [5], context, list(range(number * blocks, (number + 1) * blocks)), sample=True)
        for number in range(sequences)
    ]
    draws = [Draw(0.0, 1.0, 0, 0, 0)] * sequences

    def run() -> None:
        for _ in range(steps):
            flight = launcher.launch(pieces, draws)
            flight.bring(())
            flight.land(None)

    run()
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU if settings.rehearsal else kinds.CUDA]) as found:
        run()
    rows = [
        (row.self_device_time_total, row.count, row.key) for row in found.key_averages() if row.self_device_time_total
    ]
    tell(f"{label}: kernels in a step", sum(count for _, count, _ in rows) / steps, "")
    tell(f"{label}: their time", sum(took for took, _, _ in rows) / steps, "us")
    for took, count, key in sorted(rows, reverse=True)[:12]:
        tell(f"{label}: {key[:60]}", took / steps, "us", launches=count / steps, each_us=round(took / count, 2))
