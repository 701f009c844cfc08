"""Requests on machines that don't exist: the engine's own scheduler, driven by a clock that the step-time model moves.

Each machine has a scheduler. A step lasts as long as the model predicts for what the scheduler put into it, and the gap
that follows each; requests that come meanwhile wait for the next. Nothing else is made up: who runs, who waits, who is
thrown out for want of KV blocks and what a cached prefix saves is decided by the code that decides it in the engine.
Only guesses of what comes next (speculation) aren't made again: those that were recorded count, as so many more rows in
each step, and so many fewer steps.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from millicent.economics.arrivals import Arrival
from millicent.economics.steady import Contents, PrefixCache, SteadyScheduler
from millicent.engine.scheduling.sequences import Sequence as Running
from millicent.step_time import Coefficients, Work


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """One machine with one model: what its steps take, and the engine's settings.

    Of what isn't in steps: `entry_ns` from a request's arrival until the engine has it, `gap_ns` after each step,
    `exit_ns` from the last token until the answer has ended.
    """

    coefficients: Coefficients
    kv_blocks: int
    context_tokens: int
    block_tokens: int = 16
    max_sequences: int = 32
    step_tokens: int = 512
    prefix_cache: PrefixCache = "tenant"
    entry_ns: float = 0
    gap_ns: float = 0
    exit_ns: float = 0


class Gate(Protocol):
    """What may refuse a request before it costs anything: rate limits, say."""

    def enter(self, arrival: Arrival, at_ns: int) -> str | None:
        """A word that says why it is refused; None lets it in."""
        ...

    def leave(self, arrival: Arrival, at_ns: int, serving_ns: int) -> None: ...


@dataclass(slots=True, eq=False)
class Fate:
    """What became of a request. Times in nanoseconds from its arrival; None where it didn't happen. `refused` says why
    it never ran; `serving_ns` is its share of the steps that it was in. `last_ns` is when its last token came."""

    arrival: Arrival
    machine: int | None = None
    refused: str | None = None
    queue_ns: float | None = None
    ttft_ns: float | None = None
    last_ns: float | None = None
    total_ns: float | None = None
    serving_ns: float = 0.0
    cached_tokens: int = 0

    @property
    def tpot_ns(self) -> float | None:
        if self.last_ns is None or self.ttft_ns is None or self.arrival.output_tokens < 2:
            return None
        return (self.last_ns - self.ttft_ns) / (self.arrival.output_tokens - 1)

    @property
    def in_time(self) -> bool | None:
        """Whether its latency target was met; None where it has none. What was refused has missed it."""
        if self.arrival.target_ns is None:
            return None
        waited = self.ttft_ns if self.arrival.streamed else self.total_ns
        return waited is not None and waited <= self.arrival.target_ns


@dataclass(slots=True)
class Load:
    """What one machine did. `kv_peak` is the most blocks that were ever used."""

    requests: int = 0
    steps: int = 0
    busy_ns: float = 0.0
    preemptions: int = 0
    kv_peak: int = 0


@dataclass(slots=True)
class Course:
    """Everything that happened, from the first arrival to the last end, in the order of arrival."""

    fates: list[Fate]
    loads: list[Load]
    wall_ns: float


def simulate(
    arrivals: Sequence[Arrival],
    machine: Machine,
    *,
    machines: int = 1,
    max_concurrent: int | None = None,
    gate: Callable[[], Gate] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Course:
    """`arrivals` in order of time. Each goes to the machine with the fewest requests; more than `max_concurrent` at
    once are refused. `gate` makes one that has seen nothing yet; `progress` hears how many have arrived."""

    def run(settings: Machine, *, give_up: bool) -> Course | None:
        fleet = _Fleet(settings, machines, gate() if gate is not None else None)
        fates = []
        for number, arrival in enumerate(arrivals):
            fleet.run_until(arrival.at_ns + settings.entry_ns)
            fates.append(fleet.take(number, arrival, max_concurrent))
            if number % 256 == 0:
                if give_up and fleet.preempted:
                    return None
                if progress is not None:
                    progress(number)
        fleet.run_until(float("inf"))
        if give_up and fleet.preempted:
            return None
        ends = [fate.arrival.at_ns + (fate.total_ns or 0.0) for fate in fates]
        return Course(fates, fleet.loads(), max(ends) - arrivals[0].at_ns if fates else 0.0)

    # Where no two prompts are known to begin alike, the cache serves only those that were thrown out and come back.
    # As long as nobody is, keeping it up (half of all the work) changes nothing.
    if machine.prefix_cache != "off" and not any(arrival.prefix for arrival in arrivals):
        course = run(msgspec.structs.replace(machine, prefix_cache="off"), give_up=True)
        if course is not None:
            return course
    course = run(machine, give_up=False)
    assert course is not None
    return course


class _Fleet:
    """Machines side by side, and what comes next on each."""

    def __init__(self, machine: Machine, count: int, gate: Gate | None) -> None:
        self._machine = machine
        self._gate = gate
        self._count = count
        self._engines: list[_Engine] = []  # those that were ever given a request
        # (when, 1 to plan or 0 to end, which machine, the version of its plan): a step that ends goes before one that
        # begins, and a request that comes in between is in it.
        self._events: list[tuple[float, int, int, int]] = []
        self.running = 0

    def take(self, number: int, arrival: Arrival, max_concurrent: int | None) -> Fate:
        fate = Fate(arrival)
        if max_concurrent is not None and self.running >= max_concurrent:
            fate.refused = "too_many_requests"
        elif self._gate is not None:
            fate.refused = self._gate.enter(arrival, arrival.at_ns)
        if fate.refused is None:
            engine = self._least_busy()
            fate.refused = engine.add(number, fate)
            if fate.refused is None:
                self.running += 1
                self._schedule(engine)
            elif self._gate is not None:
                self._gate.leave(arrival, arrival.at_ns, 0)
        return fate

    def _least_busy(self) -> _Engine:
        """The first of those with the fewest requests."""
        engine = min(self._engines, key=len, default=None)
        if (engine is None or len(engine)) and len(self._engines) < self._count:
            engine = _Engine(self._machine, len(self._engines))
            self._engines.append(engine)
        assert engine is not None, "a fleet has a machine"
        return engine

    def run_until(self, until_ns: float) -> None:
        """Everything that ends by then, and every step that begins before."""
        while self._events and self._events[0] < (until_ns, 1):
            at_ns, _, number, version = heapq.heappop(self._events)
            engine = self._engines[number]
            if version != engine.version:
                continue
            for fate in engine.go_on(at_ns):
                self.running -= 1
                if self._gate is not None:
                    self._gate.leave(fate.arrival, int(at_ns), int(fate.serving_ns))
            self._schedule(engine)

    def _schedule(self, engine: _Engine) -> None:
        if engine.next_ns is not None:
            heapq.heappush(self._events, (engine.next_ns, int(engine.idle), engine.number, engine.version))

    @property
    def preempted(self) -> bool:
        return any(engine.preemptions for engine in self._engines)

    def loads(self) -> list[Load]:
        idle = self._count - len(self._engines)
        return [*(engine.finished() for engine in self._engines), *(Load() for _ in range(idle))]


@dataclass(slots=True, eq=False)
class _Job:
    fate: Fate
    sequence: Running
    left: int  # steps that it is yet to be in, from the end of its prompt on
    guesses: float  # that are checked in each of its steps, on average


@dataclass(slots=True)
class _Step:
    """What is running: the sequences that a token is drawn for, in `steps` passes. Those of a `steady` one are
    alike, and the scheduler hears of them at the end."""

    start_ns: float
    jobs: list[_Job] = field(default_factory=list)
    steps: int = 1
    first_ns: float = 0.0  # how long the first takes, with its gap
    more_ns: float = 0.0  # and how much longer each is than the one before
    steady: bool = False

    def until(self, steps: int) -> float:
        """How long so many of them take."""
        return steps * self.first_ns + self.more_ns * (steps * (steps - 1) // 2)


class _Engine:
    """One machine: what it does now, and when that ends."""

    def __init__(self, machine: Machine, number: int) -> None:
        self.number = number
        self.load = Load()
        self.version = 0
        self.next_ns: float | None = None
        self._machine = machine
        self._costs = machine.coefficients
        self._jobs: dict[int, _Job] = {}
        self._step: _Step | None = None
        self._arrived: list[Running] = []
        self._scheduler = SteadyScheduler(
            machine.coefficients,
            blocks=machine.kv_blocks,
            block_tokens=machine.block_tokens,
            context_tokens=machine.context_tokens,
            max_sequences=machine.max_sequences,
            step_tokens=machine.step_tokens,
            prefix_cache=machine.prefix_cache,
        )

    def __len__(self) -> int:
        """Requests that are here."""
        return len(self._jobs)

    @property
    def idle(self) -> bool:
        """Nothing runs; what is there begins at `next_ns`."""
        return self._step is None

    def add(self, number: int, fate: Fate) -> str | None:
        """One more request, from now on. A word that says why it could never run, else None."""
        arrival = fate.arrival
        at_ns = arrival.at_ns + self._machine.entry_ns
        sequence = Running(
            number,
            Contents(arrival.input_tokens, arrival.prefix, number.to_bytes(8, "little")),
            tenant=arrival.tenant,
            priority=arrival.priority,
            deadline_ns=None if arrival.target_ns is None else arrival.at_ns + arrival.target_ns,
        )
        context = self._scheduler.context_tokens
        if arrival.input_tokens + max(1, arrival.output_tokens) > context:
            return "context_length_exceeded"
        fate.machine = self.number
        self.load.requests += 1
        drafted, accepted = arrival.guessed
        left = max(1, arrival.output_tokens - accepted)
        self._jobs[number] = _Job(fate, sequence, left, drafted / max(1, left - 1))
        self._arrived.append(sequence)
        if self.next_ns is None:
            self.next_ns = at_ns
            self.version += 1
        elif self._step is not None and self._step.steady:
            self._cut(self._step, at_ns)
        return None

    def _cut(self, step: _Step, at_ns: float) -> None:
        """Of alike steps those that have begun before it are done, and then the next is planned anew."""
        step.steps = bisect.bisect_left(range(1, step.steps), at_ns - step.start_ns, key=step.until) + 1
        self.next_ns = step.start_ns + step.until(step.steps)
        self.version += 1

    def go_on(self, at_ns: float) -> list[Fate]:
        """Plan a step, or end the one that runs; those that ended with it."""
        self.version += 1
        if self._step is None:
            self._step = self._plan(at_ns)
            self.next_ns = at_ns + self._step.until(self._step.steps)
            return []
        step, self._step = self._step, None
        ended = self._end(step, at_ns)
        self.next_ns = at_ns if self._jobs else None
        return ended

    def _plan(self, at_ns: float) -> _Step:
        """As the engine does, it looks between steps for who has come."""
        for sequence in self._arrived:
            self._scheduler.add(sequence)
        self._arrived.clear()
        running = [self._jobs[sequence.id] for sequence in self._scheduler.decoding_now()]
        most = min((job.left for job in running), default=0)
        steps = self._scheduler.steady_steps(most)
        return self._steady(at_ns, running, steps) if steps else self._mixed(at_ns)

    def _steady(self, at_ns: float, running: list[_Job], steps: int) -> _Step:
        count = len(running)
        context = sum(len(job.sequence.tokens) for job in running)
        first_ns = self._costs.step_ns(Work(count, count, context, 0)) + self._machine.gap_ns
        first_ns += self._guessing_ns(count, sum(job.guesses for job in running))
        return _Step(at_ns, running, steps, first_ns, self._costs.kv_token_ns * count, steady=True)

    def _mixed(self, at_ns: float) -> _Step:
        """Whatever the scheduler makes of it."""
        pieces = self._scheduler.schedule()
        works = [Work.of(self._scheduler.advance(piece)) for piece in pieces]
        whole = Work.total(works)
        jobs = [self._jobs[piece.sequence] for piece in pieces]
        guesses = [job.guesses if job.sequence.output_tokens else 0.0 for job in jobs]
        guessing_ns = self._guessing_ns(whole.rows, sum(guesses))
        each_ns = guessing_ns / sum(guesses) if guessing_ns else 0.0
        step = _Step(at_ns, first_ns=self._costs.step_ns(whole) + guessing_ns + self._machine.gap_ns)
        for piece, job, guessed, share_ns in zip(pieces, jobs, guesses, self._costs.shares(works), strict=True):
            job.fate.serving_ns += share_ns + guessed * each_ns
            if job.fate.queue_ns is None:
                job.fate.queue_ns = at_ns - job.fate.arrival.at_ns
                job.fate.cached_tokens = job.sequence.cached_tokens or 0
            if piece.sample:
                step.jobs.append(job)
        self._note_memory()
        return step

    def _end(self, step: _Step, at_ns: float) -> list[Fate]:
        steps = step.steps
        self.load.steps += steps
        self.load.busy_ns += at_ns - step.start_ns - steps * self._machine.gap_ns
        if step.steady:
            self._charge(step)
            self._scheduler.skip(steps)
            self._note_memory()
        ended = []
        for job in step.jobs:
            job.left -= steps
            if not step.steady:
                job.sequence.tokens.append(0)
            if job.fate.ttft_ns is None:
                job.fate.ttft_ns = at_ns - job.fate.arrival.at_ns
            if job.left == 0:
                ended.append(self._leave(job, at_ns))
        return ended

    def _charge(self, step: _Step) -> None:
        """The shares of steps in which all decode, in closed form."""
        costs, steps, count = self._costs, step.steps, len(step.jobs)
        alike_ns = (costs.fixed_ns + max(costs.weights_ns, costs.row_ns * count)) / count + costs.sampled_row_ns
        grown = steps * (steps - 1) // 2
        guesses = sum(job.guesses for job in step.jobs)
        each_ns = self._guessing_ns(count, guesses) / guesses if guesses else 0.0
        for job in step.jobs:
            read = steps * len(job.sequence.tokens) + grown
            job.fate.serving_ns += steps * (alike_ns + job.guesses * each_ns) + costs.kv_token_ns * read

    def _guessing_ns(self, rows: int, guesses: float) -> float:
        """What so many more rows, of guesses that are checked, add to a step."""
        costs = self._costs
        before_ns = max(costs.weights_ns, costs.row_ns * rows)
        return max(costs.weights_ns, costs.row_ns * (rows + guesses)) - before_ns + costs.sampled_row_ns * guesses

    def _leave(self, job: _Job, at_ns: float) -> Fate:
        fate = job.fate
        fate.last_ns = at_ns - fate.arrival.at_ns
        fate.total_ns = fate.last_ns + self._machine.exit_ns
        self._scheduler.remove(job.sequence.id)
        del self._jobs[job.sequence.id]
        return fate

    def _note_memory(self) -> None:
        self.load.kv_peak = max(self.load.kv_peak, self._scheduler.pool.used)

    @property
    def preemptions(self) -> int:
        return self._scheduler.preemptions

    def finished(self) -> Load:
        self.load.preemptions = self.preemptions
        return self.load
