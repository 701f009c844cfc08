"""The step loop's own share of a step: scheduling, sampling, putting into words, and the frame to the gateway.

    python bench/step_loop.py MODEL.gguf [--batches 1,8,32] [--steps 40] [--rounds 3]

Sequences decode side by side, about 256 tokens cached each. The model's forward passes are timed inside the steps; all
else is the loop. Settings are interleaved; medians go to bench/results/step_loop.jsonl. The last row of each batch size
is for prompts that begin alike: how many rows of prefill as many newcomers with 512 tokens in common cost.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from results import environment, write

from millicent.core.clock import SystemClock
from millicent.core.request import Limits, Sampling
from millicent.engine.batch import Model, Piece
from millicent.engine.config import EngineConfig
from millicent.engine.machine import usable_cores
from millicent.engine.models import load_model
from millicent.engine.protocol import Submit, encode_frame
from millicent.engine.runner import OpenModel, Runner
from millicent.text import TextStream, load_tokenizer

PROMPT, SHARED, BLOCKS = 240, 512, 2048
SETTINGS = {
    "greedy": Sampling(temperature=0.0),
    "temperature": Sampling(),
    "top-p 0.9": Sampling(top_p=0.9),
    "top-k 40, top-p 0.95": Sampling(temperature=0.8, top_k=40, top_p=0.95),
    "min-p 0.05": Sampling(min_p=0.05),
    "typical-p 0.9": Sampling(typical_p=0.9),
    "penalties": Sampling(presence_penalty=0.5, repetition_penalty=1.1),
    "logprobs 5": Sampling(logprobs=5),
}


class Timed:
    """A model that notes how long its forward passes take."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.forward_s = 0.0

    def __getattr__(self, name: str) -> object:
        return getattr(self.model, name)

    def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        start = time.perf_counter()
        logits = self.model.forward(pieces)
        self.forward_s += time.perf_counter() - start
        return logits


class Loop:
    def __init__(self, path: Path, largest_batch: int) -> None:
        config = EngineConfig(max_sequences=largest_batch)
        tokenizer = load_tokenizer(path)
        model = load_model(path, dtype="auto", name="measured", threads=usable_cores(config), tokenizer=tokenizer)
        self.vocabulary = model.vocabulary_size
        self.timed = Timed(model)
        opened = OpenModel(self.timed, tokenizer.eos_tokens, partial(TextStream, tokenizer))  # type: ignore[arg-type]
        self.runner = Runner(opened, config, blocks=BLOCKS)
        self.random = random.Random(0)
        self.numbers = iter(range(1, 1 << 40))
        self.clock = SystemClock()

    def submit(self, prompt: Sequence[int], sampling: Sampling) -> int:
        number = next(self.numbers)
        limits = Limits(max_tokens=1000, ignore_eos=True)
        self.runner.submit(Submit(number, "measured", tuple(prompt), sampling, limits))
        return number

    def tokens(self, count: int) -> list[int]:
        return [self.random.randrange(100, self.vocabulary) for _ in range(count)]

    def decode(self, prompts: Sequence[Sequence[int]], sampling: Sampling, steps: int) -> dict[str, list[float]]:
        """Milliseconds of each step, and of the loop's own part in it. Prompts are computed the first time only."""
        running = [self.submit(prompt, sampling) for prompt in prompts]
        left = 1
        while left or self.runner.scheduler.running < len(prompts):
            left = self.step()[2]
        found: dict[str, list[float]] = {"step_ms": [], "own_ms": []}
        for _ in range(steps):
            step_s, own_s, _ = self.step()
            found["step_ms"].append(step_s * 1000)
            found["own_ms"].append(own_s * 1000)
        for number in running:
            self.runner.cancel(number)
        return found

    def step(self) -> tuple[float, float, int]:
        """Its seconds, those outside the forward pass, and the rows of prompts in it."""
        self.timed.forward_s = 0.0
        start = time.perf_counter()
        step = self.runner.step("cpu", 0, self.clock)
        encode_frame(step)
        step_s = time.perf_counter() - start
        assert step.record is not None
        return step_s, step_s - self.timed.forward_s, sum(work.prefill_rows for work in step.record.sequences)

    def prefill_rows(self, batch: int) -> int:
        """Rows computed for so many prompts that differ in their last 16 tokens only."""
        shared = self.tokens(SHARED)
        running = [self.submit(shared + self.tokens(16), SETTINGS["greedy"]) for _ in range(batch)]
        rows, left = 0, 1
        while left or self.runner.scheduler.running < batch:
            left = self.step()[2]
            rows += left
        for number in running:
            self.runner.cancel(number)
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    batches = [int(batch) for batch in options.batches.split(",")]
    loop = Loop(options.model, max(batches))
    for batch in batches:
        prompts = [loop.tokens(PROMPT) for _ in range(batch)]
        found: dict[str, list[dict[str, float]]] = {name: [] for name in SETTINGS}
        for _ in range(options.rounds):
            for name, sampling in SETTINGS.items():
                steps = loop.decode(prompts, sampling, options.steps)
                found[name].append({key: statistics.median(values) for key, values in steps.items()})
        medians = {
            name: {key: round(statistics.median(one[key] for one in rounds), 3) for key in rounds[0]}
            for name, rounds in found.items()
        }
        for times in medians.values():
            times["own_percent"] = round(100 * times["own_ms"] / times["step_ms"], 2)
        row: dict[str, Any] = {"model": options.model.name, "batch": batch, "medians": medians}
        row["shared_prefix"] = {"clients": batch, "tokens": SHARED, "prefill_rows": loop.prefill_rows(batch)}
        print(json.dumps(row, indent=1), flush=True)
        write("step_loop", row | environment())


if __name__ == "__main__":
    main()
