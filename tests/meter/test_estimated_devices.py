"""Device time at engines that don't show their steps, held to the truth of simulated ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from decimal import Decimal
from random import Random

import pytest

from millicent.core.accounts import Reading
from millicent.core.clock import NS_PER_S, ManualClock
from millicent.core.fits import StepTimeFit
from millicent.core.identifiers import SequentialIds
from millicent.core.receipts import Attempt, Role
from millicent.core.usage import Provenance
from millicent.meter.attribution import StepTimeShares
from millicent.meter.estimated import EstimatedDevice, Flight
from millicent.meter.meter import Meter
from millicent.meter.placements import Placement
from millicent.meter.pricing import price
from millicent.step_time import Coefficients
from support.simulated_engine import LARGE, SMALL, Event, Job, jobs, simulate

BOX = Placement("box", 1, Decimal(2), Provenance.MEASURED)
ATTEMPT = Attempt(1, "vllm", "box", "m", Role.INFERENCE, 0)


class Watched:
    """A gateway's meter and one device elsewhere."""

    def __init__(self, accelerators: int = 1, fits: Sequence[StepTimeFit] = ()) -> None:
        self.clock = ManualClock()
        self.meter = Meter(self.clock, "gw_1", SequentialIds())
        placement = Placement("box", accelerators, Decimal(2), Provenance.MEASURED)
        self.versions = StepTimeShares(self.clock, SequentialIds())
        numbers = itertools.count(-1, -1)
        self.device = EstimatedDevice(placement, self.meter, self.clock, numbers, self.versions, "8 GPUs")
        self.device.load_fit(fits)
        self.device.watch(placement)

    def enter(self, receipt: str, prompt_tokens: int = 100, choices: int = 1) -> Flight:
        flight = self.device.enter("m", prompt_tokens, choices)
        self.meter.open(receipt, 1, (flight.number,), estimated_on=self.device.name)
        return flight

    def leave(self, receipt: str, flight: Flight, *, answered: bool = True) -> Reading:
        flight.leave(answered=answered)
        return self.meter.close(receipt)

    def sums(self) -> tuple[int, int, int, int]:
        """Wall, overhead, lost and down of the device, over all hours."""
        (session,) = self.meter.checkpoint().sessions
        hours = session.hours
        return (
            sum(hour.wall_ns for hour in hours), sum(hour.overhead_ns for hour in hours),
            sum(hour.lost_ns for hour in hours), sum(hour.down_ns for hour in hours),
        )  # fmt: skip


def play(
    events: Sequence[Event], *, polled_ns: int | None = None, fits: Sequence[StepTimeFit] = ()
) -> tuple[dict[int, Reading], Watched]:
    """What a gateway with this traffic has on its receipts; `polled_ns`: how often it asks for the engine's figures;
    `fits`: what it knew before."""
    watched = Watched(fits=fits)
    flights: dict[int, Flight] = {}
    closed: dict[int, Reading] = {}
    waiting = running = 0
    next_poll_ns = 0
    for event in events:
        job = event.job
        while polled_ns is not None and next_poll_ns < event.at_ns:
            watched.device.load(running, waiting)
            next_poll_ns += polled_ns
        watched.clock.advance(event.at_ns - watched.clock.monotonic_ns())
        if event.kind == "entered":
            waiting += 1
            if job.ours:
                flights[job.number] = watched.enter(f"r{job.number}", job.prompt)
        elif event.kind == "started":
            waiting, running = waiting - 1, running + 1
        elif event.kind == "token":
            if job.ours:
                flights[job.number].heard(1)
        else:
            running -= 1
            if job.ours:
                closed[job.number] = watched.leave(f"r{job.number}", flights[job.number])
    return closed, watched


def errors(all_jobs: Sequence[Job], closed: dict[int, Reading], *, after: int) -> tuple[float, float, float]:
    """Median and 95th percentile of the relative error, and the total's, of jobs after the first `after`."""
    ours = [job for job in all_jobs if job.ours][after:]
    each = sorted(abs(closed[job.number].accelerator.serving_ns / job.true_ns - 1) for job in ours)
    total = sum(closed[job.number].accelerator.serving_ns for job in ours) / sum(job.true_ns for job in ours) - 1
    return each[len(each) // 2], each[int(len(each) * 0.95)], total


def by_time_on_the_clock(all_jobs: Sequence[Job], events: Sequence[Event], after: int) -> float:
    """The median error of splitting each moment evenly among those that are there."""
    got: dict[int, float] = {}
    there: set[int] = set()
    before_ns = 0
    for event in events:
        for number in there:
            got[number] = got.get(number, 0.0) + (event.at_ns - before_ns) / len(there)
        before_ns = event.at_ns
        if event.kind == "entered":
            there.add(event.job.number)
        elif event.kind == "ended":
            there.discard(event.job.number)
    each = sorted(abs(got[job.number] / job.true_ns - 1) for job in all_jobs[after:])
    return each[len(each) // 2]


# Traffic on an engine, and the most that the median, the 95th percentile and the total may be off.
TRAFFIC = {
    "a large model, calls mostly alone": (LARGE, 1.0, 400, 80, 0.01, 0.10),
    "a large model, half busy": (LARGE, 12.0, 400, 80, 0.05, 0.25),
    "a large model, long prompts": (LARGE, 8.0, 1500, 120, 0.04, 0.20),
    "a small model on a processor": (SMALL, 0.4, 400, 30, 0.02, 0.20),
    "a processor that is nearly full": (SMALL, 1.0, 100, 30, 0.02, 0.15),
}


@pytest.mark.parametrize(("costs", "per_s", "prompt", "output", "median", "most"), TRAFFIC.values(), ids=TRAFFIC)
def test_receipts_are_near_the_truth_where_the_engine_keeps_up(
    costs: Coefficients, per_s: float, prompt: int, output: int, median: float, most: float
) -> None:
    all_jobs = jobs(Random(7), 300, per_s, prompt=prompt, output=output)
    events = simulate(all_jobs, costs)
    closed, watched = play(events)
    found = errors(all_jobs, closed, after=40)
    assert found[0] <= median
    assert found[1] <= most
    assert abs(found[2]) < 0.01
    assert found[0] <= by_time_on_the_clock(all_jobs, events, 40) + 0.005
    serving_ns = sum(reading.accelerator.serving_ns for reading in closed.values())
    wall_ns, overhead_ns, lost_ns, down_ns = watched.sums()
    assert serving_ns <= wall_ns
    assert (overhead_ns, lost_ns, down_ns) == (0, 0, 0)
    assert serving_ns == pytest.approx(sum(job.true_ns for job in all_jobs), rel=0.02)


def test_where_calls_queue_up_the_engine_s_own_figures_make_it_better_than_the_clock() -> None:
    all_jobs = jobs(Random(7), 300, 60.0)
    events = simulate(all_jobs, LARGE)
    closed, watched = play(events, polled_ns=NS_PER_S)
    median, _, total = errors(all_jobs, closed, after=40)
    assert median < 0.8 * by_time_on_the_clock(all_jobs, events, 40)
    assert abs(total) < 0.05
    assert sum(reading.accelerator.serving_ns for reading in closed.values()) <= watched.sums()[0]


def test_what_others_have_there_is_overhead_as_far_as_the_engine_tells() -> None:
    all_jobs = jobs(Random(3), 300, 12.0, ours=0.5)
    events = simulate(all_jobs, LARGE)
    ours_ns = sum(job.true_ns for job in all_jobs if job.ours)
    blind, _ = play(events)
    told, watched = play(events, polled_ns=NS_PER_S)

    def charged(closed: dict[int, Reading]) -> float:
        return sum(reading.accelerator.serving_ns for reading in closed.values()) / ours_ns

    assert abs(charged(told) - 1) < 0.5 * abs(charged(blind) - 1)
    assert watched.sums()[1] > 0


def test_nothing_is_charged_beyond_the_device_s_time_and_every_account_balances() -> None:
    watched = Watched(accelerators=4)
    first = watched.enter("r1", 500)
    watched.clock.advance(NS_PER_S)
    second = watched.enter("r2", 5)
    for _ in range(50):
        watched.clock.advance(NS_PER_S // 100)
        first.heard(1)
        second.heard(3)
    readings = [watched.leave("r1", first), watched.leave("r2", second)]
    watched.clock.advance(NS_PER_S)
    assert sum(reading.accelerator.serving_ns for reading in readings) == 4 * (3 * NS_PER_S // 2)
    assert watched.sums() == (5 * NS_PER_S // 2, 0, 0, 0)
    for reading in readings:
        assert reading.accelerator.provenance is Provenance.ESTIMATED
        assert sum(share.serving_ns for share in reading.shares) == reading.accelerator.serving_ns
        assert reading.accelerator.step_time_version is None
    priced = price(readings[0], (ATTEMPT,), BOX, 0)
    assert priced.lines[0].provenance is Provenance.ESTIMATED
    assert priced.lines[0].amount is not None


def test_a_call_of_which_nothing_came_costs_nothing_and_its_time_is_idle() -> None:
    watched = Watched()
    flight = watched.enter("r")
    watched.clock.advance(5 * NS_PER_S)
    assert watched.leave("r", flight, answered=False).accelerator.serving_ns == 0
    flight.heard(1)
    flight.leave(answered=True)
    assert watched.sums() == (5 * NS_PER_S, 0, 0, 0)


def test_an_answer_without_any_tokens_is_charged_the_time_it_took() -> None:
    watched = Watched()
    flight = watched.enter("vectors")
    watched.clock.advance(NS_PER_S)
    reading = watched.leave("vectors", flight).accelerator
    assert (reading.serving_ns, reading.prefill_ns, reading.decode_ns) == (NS_PER_S, NS_PER_S, 0)


def test_a_call_that_waits_there_is_not_charged_while_others_are_worked_on() -> None:
    watched = Watched()
    first = watched.enter("r1")
    watched.clock.advance(NS_PER_S // 10)
    first.heard(1)
    second = watched.enter("r2", 10_000)
    for _ in range(40):
        watched.device.load(1, 1)
        watched.clock.advance(NS_PER_S // 10)
        first.heard(5)
    assert watched.meter.reading("r2").accelerator.serving_ns <= NS_PER_S // 10
    watched.leave("r1", first)
    watched.clock.advance(NS_PER_S)
    second.heard(1)
    assert watched.leave("r2", second).accelerator.serving_ns >= NS_PER_S


def test_what_was_learned_is_a_version_and_a_gateway_that_begins_with_it_is_right_from_the_first_call() -> None:
    learned, watched = play(simulate(jobs(Random(3), 400, 6.0), LARGE))
    versions = watched.versions.unsaved()
    newest = versions[-1]
    assert {(fit.device, fit.model, fit.configuration) for fit in versions} == {("estimated:box", "*", "8 GPUs")}
    assert watched.device.costs == Coefficients.of(newest)
    shown = [reading.accelerator.step_time_version for reading in learned.values()]
    assert shown[0] is None
    assert {fit.version for fit in versions} >= set(shown[-5:])
    # The next start, in traffic without a quiet moment to learn in.
    early = jobs(Random(4), 200, 60.0)
    events = simulate(early, LARGE)
    anew, _ = play(events, polled_ns=NS_PER_S)
    going_on, again = play(events, polled_ns=NS_PER_S, fits=[newest])
    assert going_on[min(going_on)].accelerator.step_time_version == newest.version
    assert all(fit.steps > newest.steps for fit in again.versions.unsaved())
    assert errors(early, going_on, after=0)[0] < 0.5 * errors(early, anew, after=0)[0]
