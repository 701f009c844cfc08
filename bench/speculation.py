"""Tokens per second with and without guesses: on text that repeats what was read, on ordinary chat, at several batches.

Both ways run interleaved in one process, on the real engine's runner, knowing what steps cost as the gateway learns it.
Figures are medians of the repeats; `same` says whether all answers were the same token for token.

    python bench/speculation.py            # prompt lookup, smollm2:135m; about three minutes
    python bench/speculation.py --draft int4 --dtype bf16   # its own four-bit weights guess for the bf16 ones
    python bench/speculation.py --record   # and one line in bench/results/speculation.jsonl
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from typing import Any

import results

from millicent.config import cache
from millicent.core.clock import SystemClock
from millicent.core.identifiers import SystemIds
from millicent.core.request import Limits, Message, Sampling
from millicent.engine.config import EngineConfig
from millicent.engine.machine import usable_cores
from millicent.engine.models import load_model
from millicent.engine.protocol import Submit
from millicent.engine.runner import OpenModel, Runner
from millicent.hub import pull
from millicent.meter.attribution import StepTimeShares
from millicent.text import TextStream, load_tokenizer

MODEL = "smollm2:135m"
DRAFT = "draft"
CLOCK = SystemClock()
PASSAGE = (
    "The harbour town of Brekke lies where two fjords meet. In the winter of 1893 a merchant called Aksel Dahl bought"
    " the old rope works by the quay and turned it into a school for navigators. Its first class had eleven pupils,"
    " among them two sisters who would later chart the northern sounds. The school burned in 1921 and was rebuilt in"
    " stone; today it holds the archive of the sounding charts, 4,212 sheets in all."
)
RECORDS = json.dumps(
    [{"id": 100 + i, "name": f"item {i}", "price": 3 * i + 5, "in_stock": i % 3 > 0} for i in range(8)], indent=1
)
CODE = "\n".join(f"def area_{name}(width, height):\n    return width * height\n" for name in ("door", "wall", "roof"))
TEXTS = {
    "repetitive": (
        f"Repeat this text word for word:\n\n{PASSAGE}",
        f"Return this JSON again with the price of item 3 set to 99:\n\n{RECORDS}",
        f"Summarise by quoting the most important sentences:\n\n{PASSAGE}",
        f"Rename the parameter width to w in this code and show all of it:\n\n{CODE}",
    ),
    "chat": (
        "What should I see in Lisbon in two days?",
        "Explain to a child why the sky is blue.",
        "Write a short letter to a landlord about a broken heater.",
        "Which is better for a beginner, the guitar or the piano, and why?",
    ),
}
SAMPLINGS = {"greedy": Sampling(temperature=0), "sampled": Sampling(temperature=0.7, top_p=0.95, seed=7)}
WAYS = ("off", "on")


class Way:
    """A runner with or without guesses."""

    def __init__(self, opened: OpenModel, config: EngineConfig, *, guesses: bool) -> None:
        self.shares = StepTimeShares(CLOCK, SystemIds(CLOCK))
        self.runner = Runner(opened, config, blocks=2048)
        self.guesses = guesses
        for calibration in self.runner.calibrate(config, CLOCK):
            self.shares.calibrate(calibration.steps)

    def run(self, frames: list[Submit]) -> dict[str, Any]:
        for frame in frames:
            self.runner.submit(frame)
        texts: dict[int, str] = {}
        tokens = drafted = accepted = steps = 0
        decode_ns = 0
        while self.runner.busy:
            step = self.runner.step("cpu", steps, CLOCK)
            steps += 1
            assert step.record is not None
            if step.record.model == DRAFT:
                decode_ns += step.record.wall_ns  # its prompts too: they are what guessing costs
            elif not any(work.prefill_rows for work in step.record.sequences):
                decode_ns += step.record.wall_ns
                tokens += sum(output.tokens for output in step.outputs)
            drafted += sum(work.drafted_tokens for work in step.record.sequences)
            accepted += sum(work.accepted_tokens for work in step.record.sequences)
            for output in step.outputs:
                texts[output.sequence] = texts.get(output.sequence, "") + output.text
            self.shares(step.record)
            if self.guesses:
                for name in (MODEL, DRAFT):
                    if costs := self.shares.costs("cpu", name):
                        self.runner.learn(name, costs)
        rate = tokens / decode_ns * 1e9
        return {"rate": rate, "drafted": drafted, "accepted": accepted, "steps": steps, "texts": [*texts.values()]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="the model's, not its draft's"
    )
    parser.add_argument("--draft", choices=["native", "int4", "int8"], help="the same model drafts, in this precision")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="append to bench/results/speculation.jsonl")
    arguments = parser.parse_args()
    path = pull(MODEL, cache()).path
    config = EngineConfig(prefix_cache="off")
    tokenizer = load_tokenizer(path)

    load = partial(load_model, path, threads=usable_cores(config), tokenizer=tokenizer)

    def opened(*, guesses: bool) -> OpenModel:
        model = load(dtype=arguments.dtype, name=MODEL)
        draft = load(dtype="auto", name=DRAFT, quantize=arguments.draft) if guesses and arguments.draft else None
        return OpenModel(model, tokenizer.eos_tokens, partial(TextStream, tokenizer), draft=draft)

    ways = {name: Way(opened(guesses=name == "on"), config, guesses=name == "on") for name in WAYS}
    rows = []
    number = 0
    for kind, prompts in TEXTS.items():
        for label, sampling in SAMPLINGS.items():
            for batch in arguments.batches:
                found: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
                for _ in range(arguments.repeats):
                    for name, way in ways.items():
                        frames = []
                        # A batch of one is each prompt alone, in turn.
                        for index in range(max(batch, len(prompts))):
                            number += 1
                            tokens = tuple(tokenizer.encode_chat([Message("user", prompts[index % len(prompts)])]))
                            limits = Limits(max_tokens=arguments.tokens, ignore_eos=True)
                            frames.append(Submit(number, MODEL, tokens, sampling, limits))
                        groups = [frames[at : at + batch] for at in range(0, len(frames), batch)]
                        found[name].append(_sum([way.run(group) for group in groups]))
                row = _row(found) | {"kind": kind, "sampling": label, "batch": batch}
                rows.append(row)
                print(
                    f"{kind:10} {label:8} batch {batch:2}  off {row['off']:7.1f}  on {row['on']:7.1f} tokens/s",
                    f"x{row['ratio']:.2f}  drafted {row['drafted']:5} accepted {row['accepted']:5}  same {row['same']}",
                    flush=True,
                )
    if arguments.record:
        results.write(
            "speculation",
            {"rows": rows, "model": MODEL, "dtype": arguments.dtype, "draft": arguments.draft} | results.environment(),
        )


def _sum(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of several runs of the same batch: tokens over time in all, which for equal tokens is the harmonic mean."""
    return {
        "rate": statistics.harmonic_mean([run["rate"] for run in runs]),
        "drafted": sum(run["drafted"] for run in runs),
        "accepted": sum(run["accepted"] for run in runs),
        "texts": [text for run in runs for text in run["texts"]],
    }


def _row(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    off, on = (statistics.median(run["rate"] for run in found[name]) for name in WAYS)
    ratios = sorted(b["rate"] / a["rate"] for a, b in zip(found["off"], found["on"], strict=True))
    same = all(run["texts"] == found["off"][0]["texts"] for runs in found.values() for run in runs)
    last = found["on"][-1]
    return {
        "off": round(off, 1),
        "on": round(on, 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "drafted": last["drafted"],
        "accepted": last["accepted"],
        "same": same,
    }


if __name__ == "__main__":
    main()
