"""Device time at an engine elsewhere that doesn't show its steps: estimated from when its answers' tokens come.

Time in which this gateway has calls there is cut into stretches: at every call's begin and end, and otherwise some
times a second. A stretch is split whole among those that were there, so receipts can't come to more than the device's
time. What others have there takes its part, as far as the engine's own figures tell of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from millicent.core.clock import NS_PER_MS, Clock
from millicent.core.fits import StepTimeFit
from millicent.core.steps import DeviceState, SequenceWork, StepRecord
from millicent.meter.attribution import StepTimeShares
from millicent.meter.energy import EnergySource
from millicent.meter.meter import OTHERS, Meter
from millicent.meter.placements import Placement
from millicent.step_time import Coefficients, Stream, UnseenSteps

# Stretches in which nobody comes or goes are about so long.
_STRETCH_NS = 200 * NS_PER_MS
# What its fits say instead of a model: see EstimatedDevice.
ANY_MODEL = "*"


class Flight(Stream):
    """One call on its way there and back."""

    def __init__(
        self, device: EstimatedDevice, number: int, model: str, prompt_tokens: int, answers: int, prompts: int
    ) -> None:
        super().__init__(prompt_tokens, answers, prompts)
        self.number = number
        self.model = model
        self.entered_ns = 0
        self.alone = False  # since it came
        self.queued = False  # there, by the engine's own figures
        self.told = False  # those have come since it came
        self._device = device

    def heard(self, tokens: int) -> None:
        """Some output has come."""
        self._device.heard(self, tokens)

    def leave(self, *, answered: bool) -> None:
        """It has ended. Not `answered`: nobody can say that it was ever worked on, if nothing came of it."""
        self._device.leave(self, answered=answered)


class EstimatedDevice:
    """One placement's engine, taken to serve one model at a time, and watched by `meter` as `estimated:PLACEMENT`."""

    def __init__(
        self,
        placement: Placement,
        meter: Meter,
        clock: Clock,
        numbers: Iterator[int],
        versions: StepTimeShares,
        configuration: str = "",
    ) -> None:
        """`numbers` of sequences that no other device uses; none is OTHERS. What is learned of its steps goes to
        `versions`, for the ledger; `configuration` is what they depend on."""
        self.name = f"estimated:{placement.name}"
        self.configuration = configuration
        self._meter = meter
        self._clock = clock
        self._numbers = numbers
        self._flights: dict[int, Flight] = {}
        self._since_ns = 0
        self._others = 0
        self._index = 0
        self._steps = UnseenSteps()
        self._versions = versions
        self._fit: StepTimeFit | None = None
        self._steps_before = 0

    def watch(self, placement: Placement, energy: EnergySource | None = None) -> None:
        """Begin. It is up as long as this gateway watches: whether it is down in between, nobody here knows."""
        self._meter.add_device(self.name, placement, energy=energy)
        self._meter.device_state(self.name, DeviceState.UP, self._clock.monotonic_ns())

    def load_fit(self, fits: Sequence[StepTimeFit]) -> None:
        """Go on from what the ledger has of this device, before the first call; of nothing, from nothing."""
        for fit in fits:
            self._fit, self._steps_before = fit, fit.steps
            self._steps = UnseenSteps(Coefficients.of(fit))

    @property
    def costs(self) -> Coefficients | None:
        """What its steps take; None until that is learned."""
        return self._steps.learned

    @property
    def flights(self) -> int:
        return len(self._flights)

    def enter(self, model: str, prompt_tokens: int, answers: int = 1, prompts: int = 1) -> Flight:
        """A call is about to be sent, whose prompts have so many tokens together."""
        now_ns = self._clock.monotonic_ns()
        # What only waits so far may never have arrived: its time is not yet anybody's.
        if any(flight.answering for flight in self._flights.values()):
            self._settle(now_ns)
        for other in self._flights.values():
            other.alone = False
        flight = Flight(self, next(self._numbers), model, max(1, prompt_tokens), answers, prompts)
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
        if answered or flight.answering:
            flight.answering, flight.queued = True, False
            self._settle(self._clock.monotonic_ns())
        # Else its time is that of the others that were there.
        del self._flights[flight.number]

    def _learn_reading(self, flight: Flight, now_ns: int) -> bool:
        """Whether, since it came, it was the only one to be read."""
        others = [each for each in self._flights.values() if each is not flight]
        if self._others or not all(each.answering and not each.unread for each in others):
            return False
        if not flight.alone and (not others or self._since_ns != flight.entered_ns):
            return False
        self._steps.learn_reading(flight, others, now_ns - flight.entered_ns)
        return True

    def _settle(self, now_ns: int) -> None:
        """Split what has passed since the last time."""
        start_ns, self._since_ns = self._since_ns, now_ns
        there = [flight for flight in self._flights.values() if not flight.queued]
        if now_ns <= start_ns or not there:
            return
        version = self._version()
        split = self._steps.split(there, now_ns - start_ns, self._others)
        works, weights = [], split.weights
        for flight, rows in zip(there, split.rows, strict=True):
            read, tokens = 0 if flight.made else rows, flight.tokens
            flight.go_on(rows)
            works.append(SequenceWork(flight.number, read, 0 if read else tokens, tokens, flight.context))
        if self._others:
            works.append(SequenceWork(OTHERS, 0, self._others, self._others, 0))
            weights = [*weights, split.others_weight]
        record = StepRecord(self.name, there[0].model, self._index, start_ns, now_ns - start_ns, tuple(works))
        self._index += 1
        self._meter.stretch(record, weights, split.steps, version)

    def _version(self) -> str | None:
        """The fit by which a stretch is split now; None while nothing is learned."""
        costs = self._steps.learned
        if costs is None or self._steps.fitter is None:
            return None
        if self._fit is None or Coefficients.of(self._fit) != costs:
            whose = (self.name, ANY_MODEL, self.configuration)
            self._fit = self._versions.version_of(whose, costs, self._steps.fitter, self._steps_before)
        return self._fit.version
