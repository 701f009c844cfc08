"""What a simulated machine must be told so that it behaves as the real one did: learned by comparing the two.

The step-time model says what steps take. What it leaves out is found on traffic that was really run: how much longer
steps were on average (`pace`: the model is fitted to be right for most steps, and stalls are longer), and what passes
outside of steps: until the engine has a request, between steps, and from the last token to the end of the answer.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec

from millicent.core.tallies import nearest_rank
from millicent.economics.recorded import Recorded
from millicent.economics.simulator import Course, Fate, Machine, simulate
from millicent.step_time import Coefficients

# Each round simulates with what the one before found; more change next to nothing.
_ROUNDS = 4
# Of fewer answers nothing is learned.
LEAST_ANSWERS = 20


class Fidelity(msgspec.Struct, frozen=True):
    """How far the simulator is off what was measured of the same requests, as parts of it: positive is too much.
    `answers` is how many were compared."""

    answers: int
    mean_total: float
    p95_total: float
    mean_ttft: float
    cost: float


class Calibration(msgspec.Struct, frozen=True):
    """`pace` is by how much steps were longer than the fit says. `fidelity` None: too few answers to learn from."""

    machine: Machine
    pace: float
    fidelity: Fidelity | None


def slower(costs: Coefficients, factor: float) -> Coefficients:
    """Of a machine on which every step takes so many times as long."""
    return Coefficients(*(getattr(costs, name) * factor for name in costs.__struct_fields__))


def calibrate(recorded: Sequence[Recorded], machine: Machine) -> Calibration:
    """`recorded` ran on one machine like this one, and nothing else did."""
    if len(recorded) < LEAST_ANSWERS:
        return Calibration(machine, 1.0, None)
    arrivals = [each.arrival for each in recorded]
    pace = 1.0
    for _ in range(_ROUNDS):
        course = simulate(arrivals, machine)
        pairs = _pairs(recorded, course)
        if not pairs:
            return Calibration(machine, 1.0, None)
        faster = _ratio(pairs)
        pace *= faster
        machine = _corrected(machine, pairs, faster)
    return Calibration(machine, pace, fidelity(recorded, simulate(arrivals, machine)))


def fidelity(recorded: Sequence[Recorded], course: Course) -> Fidelity | None:
    """None where nothing was answered in both."""
    pairs = _pairs(recorded, course)
    if not pairs:
        return None
    totals = [float(each.receipt.timing.total_ns or 0) for each, _ in pairs]
    simulated = [fate.total_ns or 0.0 for _, fate in pairs]
    first = [(each.receipt.timing.ttft_ns, fate.ttft_ns) for each, fate in pairs]
    return Fidelity(
        len(pairs),
        _off(statistics.fmean(simulated), statistics.fmean(totals)),
        _off(nearest_rank(sorted(simulated), 95), nearest_rank(sorted(totals), 95)),
        _off(statistics.fmean(ours or 0 for _, ours in first), statistics.fmean(theirs or 0 for theirs, _ in first)),
        _ratio(pairs) ** -1 - 1,
    )


def _pairs(recorded: Sequence[Recorded], course: Course) -> list[tuple[Recorded, Fate]]:
    return [
        (each, fate)
        for each, fate in zip(recorded, course.fates, strict=True)
        if fate.total_ns is not None and each.receipt.timing.queue_ns is not None and each.receipt.accelerator.steps
    ]


def _ratio(pairs: Sequence[tuple[Recorded, Fate]]) -> float:
    """Measured device time over simulated."""
    return sum(each.receipt.accelerator.serving_ns for each, _ in pairs) / sum(fate.serving_ns for _, fate in pairs)


def _corrected(machine: Machine, pairs: Sequence[tuple[Recorded, Fate]], faster: float) -> Machine:
    """The gap after each step makes up for what answers took longer, on average, than all else explains."""
    waits, exits, longer_ns, steps = [], [], 0.0, 0
    for each, fate in pairs:
        took = each.receipt.timing
        if took.queue_ns is None or took.total_ns is None or fate.queue_ns is None or fate.total_ns is None:
            continue
        if fate.queue_ns <= machine.entry_ns:  # it found nobody
            waits.append(took.queue_ns - machine.entry_ns)
        if took.ttft_ns is not None and took.tpot_ns is not None:
            exits.append(took.total_ns - took.ttft_ns - took.tpot_ns * (each.arrival.output_tokens - 1))
        longer_ns += (took.total_ns - took.queue_ns) - (fate.total_ns - fate.queue_ns - machine.exit_ns) * faster
        steps += each.receipt.accelerator.steps
    exit_ns = max(0.0, statistics.median(exits)) if exits else 0.0
    gap_ns = (longer_ns - exit_ns * len(pairs)) / steps
    return msgspec.structs.replace(
        machine,
        coefficients=slower(machine.coefficients, faster),
        entry_ns=max(0.0, machine.entry_ns + (statistics.median(waits) if waits else 0.0)),
        gap_ns=max(0.0, machine.gap_ns * faster + gap_ns),
        exit_ns=exit_ns,
    )


def _off(ours: float, theirs: float) -> float:
    return ours / theirs - 1 if theirs else 0.0
