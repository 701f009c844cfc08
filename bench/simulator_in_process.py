"""The simulator against the engine's runner with a real model, on a clock that only processor time moves.

    python bench/simulator_in_process.py AzureLLMInferenceTrace_conv.csv --requests 100 --stretch 1.3

Unlike bench/simulator.py it has no server, no HTTP and one thread, and what else the machine does hardly counts: a step
lasts as long as it kept a processor busy. So it says how good the scheduler, the step-time model and the treatment of
guesses are, and nothing of what passes outside of steps. The model is fitted on the steps of the first half of the
requests; the second half is predicted. Errors go to bench/results/simulator.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from results import environment, write
from simulator import shrunk

from millicent.config import cache
from millicent.core.clock import ManualClock
from millicent.core.request import Limits, Sampling
from millicent.economics.arrivals import Arrival, read_trace
from millicent.economics.calibration import slower
from millicent.economics.simulator import Machine, simulate
from millicent.engine.config import EngineConfig, Speculation
from millicent.engine.models import load_model
from millicent.engine.protocol import Submit
from millicent.engine.runner import OpenModel, Runner
from millicent.hub import resolve
from millicent.step_time import Fitter, Work
from millicent.text import TextStream, load_tokenizer

BLOCKS = 4096
LEARNS_EVERY = 50  # steps, as what they take is told to the scheduler


class Really:
    """What the runner did: its steps, and of each request the times from its arrival and the guesses."""

    def __init__(self, runner: Runner, arrivals: list[Arrival], vocabulary: int) -> None:
        self.steps: list[tuple[int, Work, int]] = []
        self.ttft_ns: dict[int, int] = {}
        self.total_ns: dict[int, int] = {}
        self.guessed = {number: [0, 0] for number in range(len(arrivals))}
        self._arrivals = arrivals
        clock, draw, fitter = ManualClock(0), random.Random(0), Fitter()
        waiting = list(enumerate(arrivals))
        while waiting or runner.busy:
            if not runner.busy:
                clock.advance(max(0, waiting[0][1].at_ns - clock.monotonic_ns()))
            while waiting and waiting[0][1].at_ns <= clock.monotonic_ns():
                number, each = waiting.pop(0)
                prompt = tuple(draw.randrange(100, vocabulary) for _ in range(each.input_tokens))
                limits = Limits(max_tokens=each.output_tokens, ignore_eos=True)
                assert runner.submit(Submit(number, "measured", prompt, Sampling(temperature=0), limits)) is None
            self._step(runner, clock, fitter)

    def _step(self, runner: Runner, clock: ManualClock, fitter: Fitter) -> None:
        start_ns, before_ns = clock.monotonic_ns(), time.process_time_ns()
        step = runner.step("cpu", len(self.steps), clock)
        wall_ns = time.process_time_ns() - before_ns
        clock.advance(wall_ns)
        assert step.record is not None
        work = Work.total(Work.of(each) for each in step.record.sequences)
        self.steps.append((start_ns, work, wall_ns))
        fitter.observe(work, wall_ns)
        if len(self.steps) % LEARNS_EVERY == 0 and (costs := fitter.coefficients()) is not None:
            runner.learn("measured", costs)
        for each in step.record.sequences:
            self.guessed[each.sequence][0] += each.drafted_tokens
            self.guessed[each.sequence][1] += each.accepted_tokens
        for output in step.outputs:
            passed_ns = clock.monotonic_ns() - self._arrivals[output.sequence].at_ns
            if output.tokens:
                self.ttft_ns.setdefault(output.sequence, passed_ns)
            if output.finish:
                self.total_ns[output.sequence] = passed_ns


def p95(values: list[float]) -> float:
    return sorted(values)[-(-len(values) * 95 // 100) - 1]


def compare(really: Really, arrivals: list[Arrival], context_tokens: int) -> dict[str, Any]:
    half = len(arrivals) // 2
    seen = [(work, wall_ns) for start_ns, work, wall_ns in really.steps if start_ns < arrivals[half].at_ns]
    fitter = Fitter()
    for work, wall_ns in seen:
        fitter.observe(work, wall_ns)
    costs = fitter.coefficients()
    assert costs is not None, "too few requests to learn from"
    pace = sum(wall_ns for _, wall_ns in seen) / sum(costs.step_ns(work) for work, _ in seen)
    machine = Machine(coefficients=slower(costs, pace), kv_blocks=BLOCKS, context_tokens=context_tokens)
    told = [
        msgspec.structs.replace(each, guessed=(really.guessed[number][0], really.guessed[number][1]))
        for number, each in enumerate(arrivals)
    ]
    course = simulate(told, machine)
    second = range(half, len(arrivals))
    ours, theirs = [course.fates[i].total_ns or 0.0 for i in second], [float(really.total_ns[i]) for i in second]
    first = statistics.fmean(course.fates[i].ttft_ns or 0.0 for i in second)
    busy_ns = sum(wall_ns for _, _, wall_ns in really.steps)
    errors = {
        "mean_total": statistics.fmean(ours) / statistics.fmean(theirs) - 1,
        "p95_total": p95(ours) / p95(theirs) - 1,
        "mean_ttft": first / statistics.fmean(really.ttft_ns[i] for i in second) - 1,
        "cost": course.loads[0].busy_ns / busy_ns - 1,
    }
    return {
        "errors": {name: round(error, 4) for name, error in errors.items()},
        "pace": round(pace, 3),
        "utilization": round(busy_ns / course.wall_ns, 3),
        "steps": len(really.steps),
        "guessed": [sum(column) for column in zip(*really.guessed.values(), strict=True)],
        "measured_total_s": {
            "mean": round(statistics.fmean(theirs) / 1e9, 3),
            "p95": round(p95(theirs) / 1e9, 3),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--shrink", type=float, default=4.0)
    parser.add_argument("--stretch", type=float, default=1.3, help="of the trace's time")
    parser.add_argument("--speculation", default="ngram", choices=["off", "ngram"])
    parser.add_argument("--vocabulary", type=int, default=49_000)
    options = parser.parse_args()
    speculation: Speculation = options.speculation
    path = resolve(options.model, cache()).path
    tokenizer = load_tokenizer(path)
    model = load_model(path, dtype="auto", name="measured", threads=1, tokenizer=tokenizer)
    opened = OpenModel(model, tokenizer.eos_tokens, partial(TextStream, tokenizer))
    runner = Runner(opened, EngineConfig(speculation=speculation), blocks=BLOCKS)
    arrivals = [
        msgspec.structs.replace(each, at_ns=int(each.at_ns * options.stretch))
        for each in shrunk(read_trace(options.trace), options.shrink, options.requests)
    ]
    found = compare(Really(runner, arrivals, options.vocabulary), arrivals, model.context_tokens)
    configuration = {name: str(value) for name, value in vars(options).items()} | {"trace": options.trace.name}
    row = {"bench": "simulator_in_process", "clock": "processor time", "configuration": configuration, **found}
    print(json.dumps(row, indent=1))
    write("simulator", environment() | row)


if __name__ == "__main__":
    main()
