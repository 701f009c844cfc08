"""Is a step's time split fairly? Measured on the real engine model, against Shapley values of really measured steps.

Every subset of a few very different sequences (short and long contexts, decodes and prefills) is run as a forward pass
of its own, again and again, interleaved; the median is what that coalition costs. The Shapley value over those medians
is the fair share. Beside it stand the shares the meter would charge, and those of the usual ways: equally, by tokens,
by time on the clock (everybody pays for the whole step, in proportion to what remains). At 32 sequences the Shapley
value is sampled.

    python bench/attribution.py            # the report; a minute or two
    python bench/attribution.py --record   # and one line in bench/results/attribution.jsonl
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from millicent.core.clock import SystemClock
from millicent.core.identifiers import SequentialIds
from millicent.core.steps import SequenceWork
from millicent.engine.batch import Model, Piece
from millicent.engine.calibration import calibrate
from millicent.engine.config import EngineConfig
from millicent.engine.machine import usable_cores
from millicent.engine.models import load_model
from millicent.engine.sampler import Draw, sample
from millicent.hub import pull
from millicent.meter.attribution import StepTimeShares
from millicent.step_time import Coefficients, Fitter, Work

RESULTS = Path(__file__).parent / "results" / "attribution.jsonl"
MODEL = "smollm2:135m"
BLOCK_TOKENS = 16
CONTEXT_TOKENS = 2048
LANES = 33
GREEDY = Draw(0.0, 1.0, 0, 0, 0)
WAYS = ("meter", "equal", "tokens", "wall")


@dataclass(frozen=True)
class Member:
    """One sequence of a step: `rows` rows from `start` on; one row is a decode."""

    rows: int
    start: int

    @property
    def work(self) -> SequenceWork:
        decodes = self.rows == 1
        return SequenceWork(0, 0 if decodes else self.rows, int(decodes), 1, self.start + self.rows)


# Up to six sequences of very different lengths, prefills and decodes mixed.
MIXES: dict[str, tuple[Member, ...]] = {
    "decodes": tuple(Member(1, start) for start in (15, 100, 300, 700, 1300, 2000)),
    "prefill beside decodes": (Member(100, 0), *(Member(1, start) for start in (20, 500, 1200, 1900))),
    "prefills and decodes": (
        Member(8, 0), Member(60, 0), Member(40, 900), Member(1, 30), Member(1, 800), Member(1, 1900),
    ),
}  # fmt: skip


class CpuClock(SystemClock):
    """This process's processor time. With one thread it is what the clock on the wall would show on a quiet machine."""

    def monotonic_ns(self) -> int:
        return time.process_time_ns()


class Machine:
    """The engine's model, and passes over exactly the members asked for."""

    def __init__(self, *, cpu_time: bool) -> None:
        self.clock = CpuClock() if cpu_time else SystemClock()
        self.config = EngineConfig(threads=1 if cpu_time else 0)
        cache = Path(os.environ.get("MILLICENT_CACHE") or "~/.cache/millicent").expanduser()
        path = pull(MODEL, cache).path
        self.model: Model = load_model(path, dtype="auto", name=MODEL, threads=usable_cores(self.config))
        self.per_lane = CONTEXT_TOKENS // BLOCK_TOKENS
        self.model.allocate(self.per_lane * LANES, BLOCK_TOKENS)

    def fill(self) -> None:
        """Write something into every page of the KV cache: memory that was never written is quick to read."""
        ends = [(block, at) for block in range(self.per_lane * LANES) for at in (BLOCK_TOKENS // 2, BLOCK_TOKENS - 1)]
        for first in range(0, len(ends), 256):
            self.model.forward([Piece(0, [1], at, [block], sample=False) for block, at in ends[first : first + 256]])

    def piece(self, lane: int, member: Member) -> Piece:
        blocks = range(lane * self.per_lane, (lane + 1) * self.per_lane)
        tokens = [(7 + 31 * i) % self.model.vocabulary_size for i in range(member.rows)]
        return Piece(lane, tokens, member.start, blocks, sample=True)

    def step_ns(self, members: Sequence[tuple[int, Member]]) -> int:
        """`(lane, member)` of one pass, sampling included, as the engine's step times it."""
        pieces = [self.piece(lane, member) for lane, member in members]
        start_ns = self.clock.monotonic_ns()
        sample(self.model.forward(pieces), [GREEDY] * len(pieces))
        return self.clock.monotonic_ns() - start_ns


def shapley(costs: dict[frozenset[int], float], count: int) -> list[float]:
    """By definition: what each adds, over all orders of arrival."""
    added = [0.0] * count
    orders = list(itertools.permutations(range(count)))
    for order in orders:
        before: frozenset[int] = frozenset()
        for i in order:
            after = before | {i}
            added[i] += costs[after] - costs[before]
            before = after
    return [value / len(orders) for value in added]


def shares_by(way: str, fit: Coefficients, members: Sequence[Member], whole_ns: float) -> list[float]:
    """Nanoseconds for each member, scaled to the measured step except for `wall`, where everybody is charged it all."""
    if way == "wall":
        return [whole_ns] * len(members)
    if way == "meter":
        weights = fit.shares([Work.of(member.work) for member in members])
    elif way == "tokens":
        weights = [float(member.rows) for member in members]
    else:
        weights = [1.0] * len(members)
    return [whole_ns * weight / sum(weights) for weight in weights]


def error_of(charged: Sequence[float], fair: Sequence[float]) -> float:
    """Mean absolute error as a part of the mean fair share."""
    return statistics.fmean(abs(a - b) for a, b in zip(charged, fair, strict=True)) / statistics.fmean(fair)


def measured_subsets(machine: Machine, members: Sequence[Member], rounds: int) -> dict[frozenset[int], float]:
    """Median nanoseconds of every subset; rounds are interleaved, so that a busy machine touches all alike."""
    subsets = [
        frozenset(subset)
        for size in range(1, len(members) + 1)
        for subset in itertools.combinations(range(len(members)), size)
    ]
    times: dict[frozenset[int], list[int]] = {subset: [] for subset in subsets}
    for number in range(rounds + 1):
        random.Random(number).shuffle(subsets)
        for subset in subsets:
            taken_ns = machine.step_ns([(i, members[i]) for i in sorted(subset)])
            if number:  # the first round warms up
                times[subset].append(taken_ns)
    return {frozenset(): 0.0} | {subset: statistics.median(taken) for subset, taken in times.items()}


def variation(fit: Coefficients, costs: dict[frozenset[int], float], members: Sequence[Member]) -> dict[str, float]:
    """How much a member's charge depends on its neighbours: standard deviation over all subsets it is in, over the
    mean, averaged over members. Under Shapley it isn't zero either: a step's fixed part is shared."""
    found = {}
    for way in WAYS:
        per_member = []
        for i in range(len(members)):
            charged = []
            for subset, cost in costs.items():
                if i in subset:
                    order = sorted(subset)
                    shares = shares_by(way, fit, [members[j] for j in order], cost)
                    charged.append(shares[order.index(i)])
            per_member.append(statistics.pstdev(charged) / statistics.fmean(charged))
        found[way] = statistics.fmean(per_member)
    return found


def learned(machine: Machine, steps: int) -> tuple[Coefficients, Coefficients, float | None]:
    """What calibration knows, what a while of ordinary traffic makes of it, and the latter's error."""
    overhead = calibrate(machine.model, machine.config, machine.clock, blocks=machine.per_lane * LANES)
    shares = StepTimeShares(machine.clock, SequentialIds())
    shares.calibrate(overhead.steps)
    calibrated = shares.coefficients(MODEL)
    assert calibrated is not None, "calibration was too short for a fit"
    fitter = Fitter(known=calibrated)
    draw = random.Random(5)
    for _ in range(steps):
        members = [Member(1, draw.choice([30, 200, 600, 1200, 1900])) for _ in range(draw.randrange(0, 9))]
        if draw.random() < 0.5 or not members:
            rows = draw.choice([8, 16, 40, 80, 120])
            members.append(Member(rows, draw.choice([0, 0, 500, 1500])))
        taken_ns = machine.step_ns(list(enumerate(members)))
        fitter.observe(Work.total(Work.of(member.work) for member in members), taken_ns)
        if fitter.steps % 32 == 0:
            fitter.coefficients()
    fit = fitter.coefficients()
    assert fit is not None
    return calibrated, fit, fitter.error


def sampled_shapley(machine: Machine, members: Sequence[Member], orders: int) -> tuple[list[float], float]:
    """Shapley values from random orders and their reverses, which cancels much of the noise; and the whole step."""
    added = [0.0] * len(members)
    wholes = []
    draw = random.Random(9)
    taken = 0
    for _ in range(orders):
        order = draw.sample(range(len(members)), len(members))
        for way in (order, order[::-1]):
            before = 0.0
            for position in range(1, len(way) + 1):
                cost = machine.step_ns([(i, members[i]) for i in way[:position]])
                added[way[position - 1]] += cost - before
                before = float(cost)
            wholes.append(before)
            taken += 1
    return [value / taken for value in added], statistics.fmean(wholes)


def report(rounds: int, orders: int, steps: int, *, cpu_time: bool) -> dict[str, object]:
    machine = Machine(cpu_time=cpu_time)
    machine.fill()
    calibrated, fit, fit_error = learned(machine, steps)
    mixes: dict[str, object] = {}
    for name, members in MIXES.items():
        costs = measured_subsets(machine, members, rounds)
        count = len(members)
        fair = shapley(costs, count)
        whole_ns = costs[frozenset(range(count))]
        mixes[name] = {
            "fair_ms": [round(value / 1e6, 3) for value in fair],
            "alone_ms": [round(costs[frozenset({i})] / 1e6, 3) for i in range(count)],
            "meter_ms": [round(value / 1e6, 3) for value in shares_by("meter", fit, members, whole_ns)],
            "error": {way: round(error_of(shares_by(way, fit, members, whole_ns), fair), 4) for way in WAYS}
            | {"calibrated": round(error_of(shares_by("meter", calibrated, members, whole_ns), fair), 4)},
            "variation": {way: round(value, 4) for way, value in variation(fit, costs, members).items()},
            "step_error": round(
                statistics.fmean(
                    abs(fit.step_ns(Work.total(Work.of(members[i].work) for i in subset)) / cost - 1)
                    for subset, cost in costs.items()
                    if subset
                ),
                4,
            ),
        }
    draw = random.Random(2)
    many = [Member(1, draw.randrange(16, 2000)) for _ in range(28)] + [
        Member(rows, start) for rows, start in ((20, 0), (40, 0), (80, 0), (30, 900))
    ]
    fair, whole_ns = sampled_shapley(machine, many, orders)
    sampled = {way: round(error_of(shares_by(way, fit, many, whole_ns), fair), 4) for way in WAYS}
    return {
        "model": MODEL,
        "machine": f"{platform.machine()}, {usable_cores(machine.config)} threads",
        "timed": "processor" if cpu_time else "wall",
        "rounds": rounds,
        "fit": {name: round(value, 1) for name, value in zip(fit.__struct_fields__, vars_of(fit), strict=True)},
        "fit_error": None if fit_error is None else round(fit_error, 4),
        "mixes": mixes,
        "sampled_32": {"orders": 2 * orders, "error": sampled},
    }


def vars_of(fit: Coefficients) -> list[float]:
    return [getattr(fit, name) for name in fit.__struct_fields__]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each subset")
    parser.add_argument("--orders", type=int, default=4, help="random orders at 32 sequences")
    parser.add_argument("--steps", type=int, default=200, help="ordinary steps to learn from before measuring")
    parser.add_argument("--cpu-time", action="store_true", help="one thread and its processor time: on a busy machine")
    parser.add_argument("--record", action="store_true", help=f"add the result to {RESULTS.name}")
    arguments = parser.parse_args()
    result = report(arguments.rounds, arguments.orders, arguments.steps, cpu_time=arguments.cpu_time)
    print(json.dumps(result, indent=1))
    if arguments.record:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
