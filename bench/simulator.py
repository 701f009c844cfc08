"""The simulator against really run traffic: what it says of latency and cost, beside what they were.

    python bench/simulator.py AzureLLMInferenceTrace_conv.csv --requests 200 [--utilization 0.6] [--shrink 4]

A server is started with the embedded engine. It answers a few requests, from which it learns what its steps take; then
requests come as in the trace, at its moments and lengths: lengths are divided by `--shrink`, and time is stretched or
shortened so that the engine is busy for about `--utilization` of it. The first half of them calibrates the simulator
(`millicent.economics.calibration`), the second half is what it has to predict: it knows of those when they came and how
long they were, and nothing of how it went. Errors go to bench/results/simulator.jsonl.

On a machine that others use, steps are longer at some times than at others, which nobody can predict: `same_half` says
how far the simulator is off on the traffic that it was calibrated on, `pace` by how much each half's steps were longer
than the step-time model says, and `knowing_the_pace` how far off it would have been, had it known the second.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from results import environment, write
from served import Measured, Target, free_port, one, ours, running

from millicent.economics.arrivals import Arrival, read_trace
from millicent.economics.calibration import Calibration, calibrate, fidelity, slower
from millicent.economics.outcomes import latencies_of, latency_of
from millicent.economics.recorded import Recorded, read_recorded
from millicent.economics.simulator import Course, Machine, simulate
from millicent.ledger.queries import LedgerQueries, ReceiptFilter
from millicent.step_time import Coefficients

WARM_UP = ((300, 30), (40, 60), (600, 8), (100, 40), (20, 80), (900, 16))
KV_BLOCKS, CONTEXT_TOKENS = 16_384, 8192
SETTLED_S = 2.0


def shrunk(trace: list[Arrival], shrink: float, count: int) -> list[Arrival]:
    """The first requests, from time 0."""
    begin_ns = trace[0].at_ns
    return [
        Arrival(
            each.at_ns - begin_ns,
            max(1, round(each.input_tokens / shrink)),
            max(1, round(each.output_tokens / shrink)),
        )
        for each in trace[:count]
    ]


def stretched(arrivals: list[Arrival], factor: float) -> list[Arrival]:
    return [msgspec.structs.replace(each, at_ns=int(each.at_ns * factor)) for each in arrivals]


def paced(arrivals: list[Arrival], machine: Machine, utilization: float, most_s: float) -> list[Arrival]:
    """In such a time that the engine is busy for this part of it, as far as the simulator can say; in no longer than
    `most_s`."""
    factor = 1.0
    for _ in range(8):
        course = simulate(stretched(arrivals, factor), machine)
        busy = course.loads[0].busy_ns / course.wall_ns
        factor *= busy / utilization if busy < 0.98 else 1.5
    return stretched(arrivals, min(factor, most_s * 1e9 / arrivals[-1].at_ns))


async def send(target: Target, arrivals: list[Arrival], vocabulary: int, seed: int) -> None:
    """Each at its moment, whether or not those before it have ended."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(100, vocabulary) for _ in range(each.input_tokens)] for each in arrivals]
    measured = Measured()
    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=900), connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        begin = time.perf_counter()

        async def at_its_moment(arrival: Arrival, prompt: list[int]) -> None:
            await asyncio.sleep(max(0.0, arrival.at_ns / 1e9 - (time.perf_counter() - begin)))
            await one(session, target, target.body(prompt, arrival.output_tokens), measured)

        await asyncio.gather(*map(at_its_moment, arrivals, prompts))


def learned(queries: LedgerQueries, until_ns: int | None = None) -> Machine:
    """With the newest step-time fit that was there by then and that a receipt names."""
    versions = {each.receipt.accelerator.step_time_version for each in recorded(queries, 0)} - {None}
    fits = queries.fits_named([version for version in versions if version])
    newest = max(
        (each for each in fits if until_ns is None or each.fitted_at_ns < until_ns), key=lambda each: each.fitted_at_ns
    )
    return Machine(coefficients=Coefficients.of(newest), kv_blocks=KV_BLOCKS, context_tokens=CONTEXT_TOKENS)


def recorded(queries: LedgerQueries, from_ns: int) -> list[Recorded]:
    return read_recorded(queries, ReceiptFilter(from_ns=from_ns))


def compare(calibration: Calibration, everything: list[Recorded], half: int, before: Machine) -> dict[str, Any]:
    """The second half's errors; the first is simulated before it, so that it leaves the queue that it left."""
    course = simulate([each.arrival for each in everything], calibration.machine)
    second = Course(course.fates[half:], course.loads, course.wall_ns)
    found = fidelity(everything[half:], second)
    real = latencies_of([each.receipt.timing for each in everything[half:]])
    own = calibrate(everything[half:], before)
    # Had it known how slow the machine would be: what is left is the simulator's own.
    machine, slower_by = calibration.machine, own.pace / calibration.pace
    knowing = msgspec.structs.replace(
        machine, coefficients=slower(machine.coefficients, slower_by), gap_ns=machine.gap_ns * slower_by
    )
    knew = simulate([each.arrival for each in everything], knowing)
    return {
        "errors": shown(found),
        "same_half": shown(calibration.fidelity),
        "knowing_the_pace": shown(fidelity(everything[half:], Course(knew.fates[half:], knew.loads, knew.wall_ns))),
        "pace": [round(calibration.pace, 3), round(own.pace, 3)],
        "outside_steps_ms": {
            name: round(getattr(calibration.machine, f"{name}_ns") / 1e6, 3) for name in ("entry", "gap", "exit")
        },
        "measured_ms": {name: in_ms(getattr(real, name)) for name in ("queue", "ttft", "total")},
        "simulated_ms": {
            name: in_ms(latency_of(getattr(fate, f"{name}_ns") for fate in second.fates))
            for name in ("queue", "ttft", "total")
        },
    }


def shown(found: Any) -> Any:
    builtins = msgspec.to_builtins(found)
    return builtins and {name: round(value, 4) for name, value in builtins.items()}


def in_ms(latency: Any) -> dict[str, float] | None:
    return latency and {name: round(value / 1e6, 1) for name, value in msgspec.to_builtins(latency).items()}


def run(options: argparse.Namespace) -> dict[str, Any]:
    trace = shrunk(read_trace(options.trace), options.shrink, options.requests)
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        port = free_port()
        command = [sys.executable, "-m", "millicent", "serve", options.model, "--port", str(port)]
        stack.enter_context(running(command, port, "/ready", {"MILLICENT_HOME": str(home)}))
        queries = LedgerQueries(home / "ledger.db")
        target = ours(port, options.model)
        warm_up = [Arrival(number * 10**8, *lengths) for number, lengths in enumerate(WARM_UP * 3)]
        asyncio.run(send(target, warm_up, options.vocabulary, seed=1))
        time.sleep(SETTLED_S)
        # What it learned from the warm-up only says how fast to send; calibrating begins anew.
        warm = recorded(queries, 0)
        pacing = calibrate(warm, learned(queries)).machine
        arrivals = paced(trace, pacing, options.utilization, options.seconds)
        print(f"{len(arrivals)} requests in {arrivals[-1].at_ns / 1e9:.0f} s", file=sys.stderr)
        asyncio.run(send(target, arrivals, options.vocabulary, seed=2))
        time.sleep(SETTLED_S)
        everything = recorded(queries, warm[-1].arrival.at_ns + 1)
        assert len(everything) == len(arrivals), "not every request was answered"
        half = len(everything) // 2
        machine = learned(queries, everything[half].arrival.at_ns)
        calibration = calibrate(everything[:half], machine)
        return {
            "bench": "simulator",
            "configuration": {
                "model": options.model,
                "trace": options.trace.name,
                "requests": len(everything),
                "shrink": options.shrink,
                "wanted_utilization": options.utilization,
                "seconds": round(arrivals[-1].at_ns / 1e9, 1),
            },
            "utilization": round(
                sum(each.receipt.accelerator.serving_ns for each in everything)
                / (everything[-1].arrival.at_ns - everything[0].arrival.at_ns),
                3,
            ),
            **compare(calibration, everything, half, machine),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--shrink", type=float, default=4.0)
    parser.add_argument("--utilization", type=float, default=0.6)
    parser.add_argument("--seconds", type=float, default=400.0, help="that sending takes at most")
    parser.add_argument("--vocabulary", type=int, default=49_000)
    row = run(parser.parse_args())
    print(json.dumps(row, indent=1))
    write("simulator", environment() | row)


if __name__ == "__main__":
    main()
