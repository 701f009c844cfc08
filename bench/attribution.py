"""Is a step's time split fairly? Measured on the real engine model, against Shapley values of really measured steps.

Every subset of a few very different sequences (short and long contexts, decodes and prefills) is run as a forward pass
of its own, again and again, interleaved; the median is what that coalition costs. The Shapley value over those medians
is the fair share. Beside it stand the shares the meter would charge, and those of the usual ways: equally, by tokens,
by time on the clock (everybody pays for the whole step, in proportion to what remains). At 32 sequences the Shapley
value is sampled (`shapley.py`), with its standard error; a step that is always the same is timed in between, so that a
machine that gets slower or faster meanwhile is noticed and taken out.

    python bench/attribution.py            # the report: about six minutes on two cores, of which the 32 take four
    python bench/attribution.py --record   # and one line in bench/results/attribution.jsonl
    python bench/attribution.py --rounds 3 --orders 2 --repeats 1 --steps 60    # a look, in two minutes
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import results
import shapley

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

# The kinds of sequences in a step of 32: four of each. Twenty-four decode, eight read their prompts.
PER_KIND = 4
KINDS = (
    Member(1, 15), Member(1, 120), Member(1, 400), Member(1, 800), Member(1, 1400), Member(1, 1950), Member(6, 0),
    Member(12, 600),
)  # fmt: skip
# Timed now and then: as long as others', if the machine is as fast as it was.
REFERENCE = tuple(enumerate((Member(1, 200), Member(1, 900), Member(4, 0))))
REFERENCE_EVERY = 8


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


def variation(charge: Callable[[Sequence[int]], Sequence[float]], count: int) -> dict[str, float]:
    """How much a member's charge depends on its neighbours: standard deviation over mean, averaged over members. `any`:
    whoever and however many they are; `same_number`: whoever they are, averaged over how many.

    Under any rule that shares a step's fixed cost the first can't be nothing, since one pays less in company.
    """
    subsets = [subset for size in range(1, count + 1) for subset in itertools.combinations(range(count), size)]
    charges = {subset: dict(zip(subset, charge(subset), strict=True)) for subset in subsets}
    either, same = [], []
    for i in range(count):
        own = {subset: found[i] for subset, found in charges.items() if i in subset}
        either.append(_relative_spread(list(own.values())))
        same += [
            _relative_spread([value for subset, value in own.items() if len(subset) == size])
            for size in range(2, count)
        ]
    return {"any": round(statistics.fmean(either), 4), "same_number": round(statistics.fmean(same), 4)}


def _relative_spread(values: Sequence[float]) -> float:
    return statistics.pstdev(values) / statistics.fmean(values)


def variations(
    fit: Coefficients, costs: dict[frozenset[int], float], members: Sequence[Member]
) -> dict[str, dict[str, float]]:
    """Under each way of splitting, and under the Shapley value of each batch itself: what fairness asks for."""

    def by(way: str) -> Callable[[Sequence[int]], Sequence[float]]:
        return lambda subset: shares_by(way, fit, [members[i] for i in subset], costs[frozenset(subset)])

    fair = variation(lambda subset: shapley.by_definition(costs, subset), len(members))
    return {"shapley": fair} | {way: variation(by(way), len(members)) for way in WAYS}


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


class Steady:
    """Times steps, and takes out what the machine as a whole got slower or faster since the beginning."""

    def __init__(self, machine: Machine, repeats: int) -> None:
        self._machine = machine
        self._repeats = repeats
        self._asked = 0
        self._usual_ns = statistics.median(machine.step_ns(REFERENCE) for _ in range(4 * REFERENCE_EVERY))
        self._lately: deque[int] = deque([int(self._usual_ns)], maxlen=5)
        self.drift: list[float] = []

    def step_ns(self, counts: shapley.Counts) -> float:
        """The quickest of a few: what disturbs a step only ever makes it longer."""
        if self._asked % REFERENCE_EVERY == 0:
            self._lately.append(self._machine.step_ns(REFERENCE))
            self.drift.append(statistics.median(self._lately) / self._usual_ns)
        self._asked += 1
        present = [(PER_KIND * kind + i, KINDS[kind]) for kind, number in enumerate(counts) for i in range(number)]
        return min(self._machine.step_ns(present) for _ in range(self._repeats)) / self.drift[-1]


def thirty_two(machine: Machine, fit: Coefficients, sets: int, repeats: int) -> dict[str, object]:
    """A step of 32 against its sampled Shapley value."""
    steady = Steady(machine, repeats)
    fair_kinds, errors = shapley.sampled(steady.step_ns, PER_KIND, len(KINDS), sets, seed=9)
    members = [kind for kind in KINDS for _ in range(PER_KIND)]
    fair = [value for value in fair_kinds for _ in range(PER_KIND)]
    whole_ns = sum(fair)  # the mean of all measured whole steps: every order's additions sum to one
    mean_ns = statistics.fmean(fair)
    charged = shares_by("meter", fit, members, whole_ns)
    return {
        "orders": sets * 2 * len(KINDS),
        "step_ms": round(whole_ns / 1e6, 2),
        "fair_ms": [round(value / 1e6, 3) for value in fair_kinds],
        "standard_error_ms": [round(value / 1e6, 3) for value in errors],
        "meter_ms": [round(value / 1e6, 3) for value in charged[::PER_KIND]],
        "error": {way: round(error_of(shares_by(way, fit, members, whole_ns), fair), 4) for way in WAYS},
        # What error a perfect split would show, for want of measurements: the mean of |noise| is 0.8 of its deviation.
        "error_from_noise": round(0.8 * statistics.fmean(errors) / mean_ns, 4),
        "drift": [round(min(steady.drift), 3), round(max(steady.drift), 3)],
    }


def mix_report(
    machine: Machine, members: Sequence[Member], fit: Coefficients, calibrated: Coefficients, rounds: int
) -> dict[str, object]:
    """A few sequences against the brute-force Shapley value."""
    costs = measured_subsets(machine, members, rounds)
    count = len(members)
    fair = shapley.by_definition(costs, range(count))
    whole_ns = costs[frozenset(range(count))]
    return {
        "fair_ms": [round(value / 1e6, 3) for value in fair],
        "alone_ms": [round(costs[frozenset({i})] / 1e6, 3) for i in range(count)],
        "meter_ms": [round(value / 1e6, 3) for value in shares_by("meter", fit, members, whole_ns)],
        "error": {way: round(error_of(shares_by(way, fit, members, whole_ns), fair), 4) for way in WAYS}
        | {"calibrated": round(error_of(shares_by("meter", calibrated, members, whole_ns), fair), 4)},
        "variation": variations(fit, costs, members),
        "step_error": round(
            statistics.fmean(
                abs(fit.step_ns(Work.total(Work.of(members[i].work) for i in subset)) / cost - 1)
                for subset, cost in costs.items()
                if subset
            ),
            4,
        ),
    }


def report(arguments: argparse.Namespace) -> dict[str, object]:
    start = time.monotonic()
    machine = Machine(cpu_time=arguments.cpu_time)
    machine.fill()
    say(f"{MODEL}: learning from {arguments.steps} steps")
    calibrated, fit, fit_error = learned(machine, arguments.steps)
    mixes = {}
    for name, members in MIXES.items():
        say(f"{name}: {2 ** len(members) - 1} subsets, {arguments.rounds} times each")
        mixes[name] = mix_report(machine, members, fit, calibrated, arguments.rounds)
    say(f"32 sequences: {arguments.orders} sets of {2 * len(KINDS)} orders")
    many = thirty_two(machine, fit, arguments.orders, arguments.repeats)
    return {
        **results.environment(),
        "model": MODEL,
        "threads": usable_cores(machine.config),
        "timed": "processor" if arguments.cpu_time else "wall",
        "rounds": arguments.rounds,
        "fit": {name: round(value, 1) for name, value in zip(fit.__struct_fields__, vars_of(fit), strict=True)},
        "fit_error": None if fit_error is None else round(fit_error, 4),
        "mixes": mixes,
        "thirty_two": many,
        "seconds": round(time.monotonic() - start),
    }


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def vars_of(fit: Coefficients) -> list[float]:
    return [getattr(fit, name) for name in fit.__struct_fields__]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each subset")
    parser.add_argument(
        "--orders", type=int, default=5, help="independent sets of 16 orders at 32 sequences, two or more"
    )
    parser.add_argument("--repeats", type=int, default=2, help="measurements of each coalition there; the least counts")
    parser.add_argument("--steps", type=int, default=200, help="ordinary steps to learn from before measuring")
    parser.add_argument("--cpu-time", action="store_true", help="one thread and its processor time: on a busy machine")
    parser.add_argument("--record", action="store_true", help="add the result to results/attribution.jsonl")
    arguments = parser.parse_args()
    result = report(arguments)
    print(json.dumps(result, indent=1))
    if arguments.record:
        results.write("attribution", result)


if __name__ == "__main__":
    main()
