"""Device time at an engine elsewhere that doesn't show its steps: estimated from when its answers' tokens come.

Time in which this gateway has calls there is cut into stretches: at least at every call's begin and end, and otherwise
some times a second. Of each it is known how long it was, who was there, and how many tokens each got; so about how many
steps there were, and by the step-time model whose they were. A stretch is split whole, so receipts can't come to more
than the device's time. What others have there takes its part, as far as the engine's own figures tell of it.

The coefficients are learned from calls that were alone (their time to the first token is a step of the whole prompt,
their time per token a step of one row), from those that were the only ones to be read, and from stretches in which all
only wrote. Until then they are those of an 8-billion-parameter model of 16 bits on an accelerator with 2 TB/s and 312
TFLOPS, of which only the proportions matter.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from millicent.core.clock import NS_PER_MS, Clock
from millicent.core.steps import DeviceState, SequenceWork, StepRecord
from millicent.meter.energy import EnergySource
from millicent.meter.meter import OTHERS, Meter
from millicent.meter.placements import Placement
from millicent.step_time import Coefficients, Fitter, Work

_STANDING = Coefficients(fixed_ns=1e6, weights_ns=8e6, row_ns=51_000, sampled_row_ns=1_000, kv_token_ns=65, pair_ns=1.7)
# So many observations set the scale of those; from then on they are learned.
_SCALED_BY = 16
_REFIT_EVERY = 64
# Stretches in which nobody comes or goes are about so long.
_STRETCH_NS = 200 * NS_PER_MS
# Fewer steps than this are too few to say how long each took.
_LEAST_STEPS = 4
_WEIGHTS_PER_NS = 1000


class Flight:
    """One call on its way there and back. It counts as being read until its first tokens come."""

    def __init__(self, device: EstimatedDevice, number: int, model: str, prompt_tokens: int, choices: int) -> None:
        self.number = number
        self.model = model
        self.choices = choices
        self.entered_ns = 0
        self.alone = False  # since it came
        self.queued = False  # there, by the engine's own figures
        self.told = False  # the engine's figures have come since it came
        self.unread = prompt_tokens  # of its prompt, as far as is known
        self.read = 0
        self.answering = False
        self.made = 0  # tokens of each choice before this stretch
        self.tokens = 0  # of all choices, in this stretch
        self._device = device

    def heard(self, tokens: int) -> None:
        """Some output has come."""
        self._device.heard(self, tokens)

    def leave(self, *, answered: bool) -> None:
        """It has ended. Not `answered`: nobody can say that it was ever worked on, if nothing came of it."""
        self._device.leave(self, answered=answered)

    @property
    def context(self) -> int:
        return self.read + self.unread + self.made


class EstimatedDevice:
    """One placement's engine, taken to serve one model at a time, and watched by `meter` as `estimated:PLACEMENT`."""

    def __init__(self, placement: Placement, meter: Meter, clock: Clock, numbers: Iterator[int]) -> None:
        """`numbers` of sequences that no other device uses; none is OTHERS."""
        self.name = f"estimated:{placement.name}"
        self._meter = meter
        self._clock = clock
        self._numbers = numbers
        self._flights: dict[int, Flight] = {}
        self._since_ns = 0
        self._others = 0
        self._index = 0
        self._learned = _Learned()

    def watch(self, placement: Placement, energy: EnergySource | None = None) -> None:
        """Begin. It is up as long as this gateway watches: whether it is down in between, nobody here knows."""
        self._meter.add_device(self.name, placement, energy=energy)
        self._meter.device_state(self.name, DeviceState.UP, self._clock.monotonic_ns())

    @property
    def flights(self) -> int:
        return len(self._flights)

    def enter(self, model: str, prompt_tokens: int, choices: int = 1) -> Flight:
        """A call is about to be sent."""
        now_ns = self._clock.monotonic_ns()
        if any(flight.answering for flight in self._flights.values()):
            self._settle(now_ns)
        for flight in self._flights.values():
            flight.alone = False
        flight = Flight(self, next(self._numbers), model, max(1, prompt_tokens), max(1, choices))
        if not self._flights:
            self._since_ns = now_ns
            flight.alone = True
        flight.entered_ns = now_ns
        self._flights[flight.number] = flight
        return flight

    def load(self, running: int, waiting: int) -> None:
        """What the engine says of itself: requests that it works on, and that wait, this gateway's among them."""
        pending = [flight for flight in self._flights.values() if not flight.answering]
        queued = min(waiting, len(pending)) if running else 0
        for i, flight in enumerate(pending):
            # One that has just come may only be waiting for the step that runs to end.
            flight.queued, flight.told = flight.told and i >= len(pending) - queued, True
        self._others = max(0, running - (len(self._flights) - queued))

    def heard(self, flight: Flight, tokens: int) -> None:
        if tokens <= 0 or flight.number not in self._flights:
            return
        now_ns = self._clock.monotonic_ns()
        learned = not flight.answering and self._learn_reading(flight, now_ns)
        flight.answering, flight.queued = True, False
        flight.tokens += tokens
        if learned or now_ns - self._since_ns >= _STRETCH_NS:
            self._settle(now_ns)

    def leave(self, flight: Flight, *, answered: bool) -> None:
        if flight.number not in self._flights:
            return
        next_one = next((each for each in self._flights.values() if each.queued and each is not flight), None)
        if next_one is not None:
            next_one.queued = False
        if not answered and not flight.answering:
            del self._flights[flight.number]  # its time is that of the others that were there
            return
        flight.answering, flight.queued = True, False
        self._settle(self._clock.monotonic_ns())
        del self._flights[flight.number]

    def _settle(self, now_ns: int) -> None:
        """Split what has passed since the last time."""
        start_ns, self._since_ns = self._since_ns, now_ns
        wall_ns = now_ns - start_ns
        there = [flight for flight in self._flights.values() if not flight.queued]
        if wall_ns <= 0 or not there:
            return
        shares, steps = self._shares(there, wall_ns)
        works = []
        for flight, (rows, _) in zip(there, shares, strict=True):
            made = flight.tokens // flight.choices
            prefills = rows > 0 and not flight.made
            works.append(
                SequenceWork(
                    flight.number, rows if prefills else 0, 0 if prefills else flight.tokens, flight.tokens,
                    flight.context + made,
                )
            )  # fmt: skip
            flight.read += rows
            flight.unread = 0 if flight.answering else max(1, flight.unread - rows)
            flight.made += made
            flight.tokens = 0
        weights = [1 + int(share_ns * _WEIGHTS_PER_NS) for _, share_ns in shares]
        if self._others:
            works.append(SequenceWork(OTHERS, 0, self._others, self._others, 0))
            weights.append(self._others * self._weight_of_another(there, steps))
        record = StepRecord(self.name, there[0].model, self._index, start_ns, wall_ns, tuple(works))
        self._index += 1
        self._meter.stretch(record, weights, steps)

    def _shares(self, there: list[Flight], wall_ns: int) -> tuple[list[tuple[int, float]], int]:
        """Of each flight, the rows of its prompt that were read, and its nanoseconds by the model; and the steps.

        All that was read is taken to be of one step, which the others shared; in the rest they only wrote.
        """
        costs = self._learned.coefficients
        writing = [flight for flight in there if flight.tokens]
        steps = max([1, *(-(-flight.tokens // flight.choices) for flight in writing)])
        rows = self._rows(there, writing, wall_ns, steps)
        works = {flight.number: _writing(flight) for flight in writing if flight.number not in rows}
        mixed = works | {
            flight.number: Work(rows[flight.number], int(flight.answering), 0, _pairs(flight.read, rows[flight.number]))
            for flight in there
            if flight.number in rows
        }
        if not rows and len(works) == len(there):
            self._learn_writing(writing, Work.total(works.values()), wall_ns, steps)
        shares = dict.fromkeys((flight.number for flight in there), 0.0)
        if mixed:
            shares |= zip(mixed, costs.shares(list(mixed.values())), strict=True)
        later = [flight for flight in writing if flight.tokens > flight.choices]
        if later:
            for flight, share_ns in zip(later, costs.shares([_writing(flight) for flight in later]), strict=True):
                shares[flight.number] += share_ns * (flight.tokens / flight.choices - 1)
        return [(rows.get(flight.number, 0), shares[flight.number]) for flight in there], steps

    def _rows(self, there: list[Flight], writing: list[Flight], wall_ns: int, steps: int) -> dict[int, int]:
        """How much of which prompts was read. Of those that don't answer yet, in the order in which they came, as much
        as there was time for."""
        costs = self._learned.coefficients
        rows = {flight.number: flight.unread for flight in there if flight.answering and flight.unread}
        written = [_writing(flight) for flight in writing if flight.number not in rows]
        left_ns = wall_ns - sum(costs.row_ns * read for read in rows.values())
        if written:
            left_ns -= costs.step_ns(Work.total(written)) * steps
        for flight in there:
            if flight.answering:
                continue
            possible = int(left_ns / costs.row_ns) if self._learned.scaled and costs.row_ns else flight.unread
            if (read := min(flight.unread, possible)) > 0:
                rows[flight.number] = read
                left_ns -= costs.row_ns * read
        return rows

    def _learn_writing(self, writing: list[Flight], total: Work, wall_ns: int, steps: int) -> None:
        """All wrote, and nothing else was done."""
        if self._others or steps < _LEAST_STEPS:
            return
        if all(flight.tokens >= 0.9 * steps * flight.choices for flight in writing):
            self._learned.observe(total, wall_ns // steps)

    def _learn_reading(self, flight: Flight, now_ns: int) -> bool:
        """Whether, since it came, it was the only one to read its prompt; then what that took is learned."""
        others = [each for each in self._flights.values() if each is not flight]
        if self._others or not all(each.answering and not each.unread for each in others):
            return False
        if not others:
            started_ns = flight.entered_ns
            if not flight.alone:
                return False
        else:
            started_ns = self._since_ns
            if started_ns != flight.entered_ns or not self._learned.scaled:
                return False
        prompt = Work(flight.unread, 1, 0, _pairs(0, flight.unread))
        works = [_writing(each) for each in others if each.tokens]
        wall_ns = float(now_ns - started_ns)
        if works:
            # It came in the middle of a step, and was read in the last one.
            steps = max(each.tokens / each.choices for each in others)
            wall_ns -= max(0.0, steps - 1.5) * self._learned.coefficients.step_ns(Work.total(works))
        self._learned.observe(Work.total([*works, prompt]), int(wall_ns))
        return True

    def _weight_of_another(self, there: list[Flight], steps: int) -> int:
        """Somebody else is taken to write, with a context like the others', in as many steps as there was time for."""
        costs = self._learned.coefficients
        context = sum(flight.context for flight in there) // len(there)
        works = [Work(1, 1, context, 0)] * (len(there) + self._others)
        return 1 + int(costs.shares(works)[0] * steps * _WEIGHTS_PER_NS)


class _Learned:
    """What steps take there: in the standing proportions, then in those that were seen."""

    def __init__(self) -> None:
        self.coefficients = _STANDING
        self._first: list[tuple[Work, int]] = []
        self._fitter: Fitter | None = None

    @property
    def scaled(self) -> bool:
        return self._fitter is not None

    def observe(self, work: Work, wall_ns: int) -> None:
        if wall_ns <= 0:
            return
        if self._fitter is not None:
            self._fitter.observe(work, wall_ns)
            if self._fitter.steps % _REFIT_EVERY == 0:
                self.coefficients = self._fitter.coefficients() or self.coefficients
            return
        self._first.append((work, wall_ns))
        if len(self._first) < _SCALED_BY:
            return
        scale = statistics.median(wall_ns / _STANDING.step_ns(work) for work, wall_ns in self._first)
        known = Coefficients(*(scale * getattr(_STANDING, field) for field in _STANDING.__struct_fields__))
        self._fitter = Fitter(known=known)
        for seen, seen_ns in self._first:
            self._fitter.observe(seen, seen_ns)
        self._first.clear()
        self.coefficients = self._fitter.coefficients() or known


def _writing(flight: Flight) -> Work:
    """One step of a flight that writes."""
    context = flight.context + flight.tokens // flight.choices // 2
    return Work(flight.choices, flight.choices, context * flight.choices, 0)


def _pairs(before: int, rows: int) -> int:
    return rows * before + rows * (rows + 1) // 2
