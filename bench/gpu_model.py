"""What a step should take, before it is measured: bytes and operations counted, launches counted, and shares of the
ceilings that kernels like these reach elsewhere. Where a measured figure is far from it, something isn't as thought.

    python bench/gpu_model.py      # the table, for an H200 that nobody has measured
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

if TYPE_CHECKING:
    from millicent.engine.weights import ModelSpec

# The vendor's, for an H200, but for memory, of whose 4.8e12 a copy moves nine tenths.
NOMINAL = {"bytes_per_s": 4.3e12, "bf16_flops": 989e12, "fp8_flops": 1979e12}

# Assumed, all of them. What a kernel costs besides its bytes: from the end of the one before to the first byte, and
# from the last byte to its end. Where it may begin before that one has ended, the first part is hidden.
NODE_S, OVERLAPPED_NODE_S = 2.2e-6, 1.4e-6
READING = 0.91  # of what a copy moves, by products and attention alike
MULTIPLYING = {"bf16_flops": 0.6, "fp8_flops": 0.5}
SMALL_ROWS = 16


@dataclass(frozen=True)
class Work:
    """A step: rows, the contexts that they attend to, in tokens, and how many rows come to logits."""

    rows: int
    context_tokens: int
    samples: int


def step_s(shape: ModelSpec, work: Work, rates: Mapping[str, float], *, fp8: bool) -> float:
    few = work.rows <= SMALL_ROWS
    kind = "fp8_flops" if fp8 else "bf16_flops"
    inner, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    products = ((inner + 2 * kv), inner, 2 * shape.intermediate, shape.intermediate)  # times hidden: weights of each
    read = rates["bytes_per_s"] * READING
    layer = 0.0
    for outputs in products:
        weights = outputs * shape.hidden
        moved = weights * (1 if fp8 else 2) / read
        layer += max(moved, 0.0 if few else 2 * work.rows * weights / (rates[kind] * MULTIPLYING[kind]))
    layer += work.context_tokens * 2 * kv * 2 / read
    layer += 5 * OVERLAPPED_NODE_S if few else (8 + 4 * fp8) * NODE_S
    head = shape.vocabulary * shape.hidden
    output = max(
        2 * head / read,
        0.0 if few else 2 * work.samples * head / (rates["bf16_flops"] * MULTIPLYING["bf16_flops"]),
    )
    logits = work.samples * shape.vocabulary * 2 * 2 / read  # written and read once
    return shape.layers * layer + output + logits + (4 if few else 5) * NODE_S


def run_s(
    shape: ModelSpec,
    lengths: list[tuple[int, int]],
    batch: int,
    rates: Mapping[str, float],
    *,
    fp8: bool,
    step_tokens: int = 2048,
) -> float:
    """All of them, `batch` at a time: prompts in passes of `step_tokens`, then steps in which all decode, counted at
    every sixteenth."""
    total = 0.0
    for first in range(0, len(lengths), batch):
        wave = lengths[first : first + batch]
        prompts = sum(given for given, _ in wave)
        whole, rest = divmod(prompts, step_tokens)
        for rows in [step_tokens] * whole + [rest] * bool(rest):
            total += step_s(shape, Work(rows, 0, min(rows, 32)), rates, fp8=fp8)
        for step in range(1, max(made for _, made in wave), 16):
            going = [given + step for given, made in wave if made > step]
            if going:
                total += 16 * step_s(shape, Work(len(going), sum(going), len(going)), rates, fp8=fp8)
    return total


def random_lengths(low: int = 100, high: int = 1024, count: int = 256) -> list[tuple[int, int]]:
    draw = random.Random(5)
    return [(draw.randint(low, high), draw.randint(low, high)) for _ in range(count)]


def expected(rates: Mapping[str, float]) -> list[tuple[str, float, int]]:
    """What each figure that has a target should come to, in output tokens/s, and the target."""
    from support.random_weights import LLAMA_3_1_8B, QWEN3_0_6B

    cases = (
        ("Qwen3-0.6B bf16, batch 1, 128 in 512 out", QWEN3_0_6B, False, [(128, 512)], 1, 1200),
        ("Qwen3-0.6B bf16, 256 requests of 100 to 1,024 in and out", QWEN3_0_6B, False, random_lengths(), 256, 30_000),
        ("Llama-3.1-8B bf16, batch 1", LLAMA_3_1_8B, False, [(128, 256)], 1, 240),
        ("Llama-3.1-8B FP8, batch 1", LLAMA_3_1_8B, True, [(128, 256)], 1, 420),
        ("Llama-3.1-8B FP8, 128 in 128 out, offline", LLAMA_3_1_8B, True, [(128, 128)] * 1024, 512, 20_000),
    )
    found = []
    for label, shape, fp8, lengths, batch, target in cases:
        took = run_s(shape, lengths, batch, rates, fp8=fp8)
        found.append((label, sum(made for _, made in lengths) / took, target))
    return found


if __name__ == "__main__":
    for label, rate, target in expected(NOMINAL):
        print(json.dumps({"figure": label, "expected": round(rate), "target": target, "unit": "output tokens/s"}))
