"""Whose time a step was: the step-time model, learned from the steps themselves, says in what proportion."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import msgspec

from millicent.core.clock import Clock
from millicent.core.fits import StepTimeFit
from millicent.core.identifiers import Ids
from millicent.core.steps import SequenceWork, StepRecord
from millicent.step_time import Coefficients, Fitter, Work

# Weights are whole picoseconds, so that no share is rounded to nothing.
_WEIGHTS_PER_NS = 1000
_LEAST_STEPS = 16
_REFIT_STEPS = 256
# Observing a step costs some 40 microseconds of the gateway's time: steps that come faster are sampled, and once a
# refit has become a matter of fine tuning, most of them are let go.
_OBSERVED_EVERY_NS = 10_000_000
_REFINED_EVERY_NS = 100_000_000
# A new version replaces the one in use when its predictions of the latest steps differ by so much on average.
_WORTH_A_VERSION_PERCENT = 2
_LATEST_STEPS = 32
# Steps of a calibration are chosen to tell the coefficients apart, so few will do.
_LEAST_CALIBRATION = 8
# Steps to come are expected to take as much more than predicted as this many mean errors.
_ERRORS_ABOVE = 2


class StepTimeShares:
    """Weights for `Meter`: each sequence by what the model predicts it added to the step.

    Until there is a fit for a device and model, a step is split evenly, as if reading the weights were all of it.
    A fit in use is a version, which the ledger must be given: `unsaved`. `configuration` names what else step
    times depend on, so that fits made under another aren't taken for this one's.
    """

    def __init__(self, clock: Clock, ids: Ids, configuration: str = "") -> None:
        self._clock = clock
        self._ids = ids
        self._configuration = configuration
        self._models: dict[tuple[str, str], _Model] = {}
        self._unsaved: list[StepTimeFit] = []

    def load(self, fits: Iterable[StepTimeFit]) -> None:
        """Go on from these, one per device and model, which the ledger has."""
        for fit in fits:
            self._models[fit.device, fit.model] = _Model(fit)

    def __call__(self, record: StepRecord) -> Sequence[int]:
        model = self._of(record)
        weights = model.weights(record.sequences)
        if model.learn(record):
            self._adopt(record, model)
        return weights

    def next_shares(self, record: StepRecord) -> Sequence[int] | None:
        """Nanoseconds that each sequence of this step will be given of the next, were the same ones in it, with room
        for the prediction's error. None while steps are split evenly."""
        return self._of(record).next_shares(record)

    def calibrate(self, steps: Sequence[StepRecord]) -> None:
        """Learn from steps that were run for that: all of them, and at once.

        Each counts as fast as the fastest that was like it: the others were disturbed.
        """
        fastest_ns: dict[tuple[SequenceWork, ...], int] = {}
        for record in steps:
            fastest_ns[record.sequences] = min(record.wall_ns, fastest_ns.get(record.sequences, record.wall_ns))
        for record in steps:
            self._of(record).observe(record, fastest_ns[record.sequences])
        if steps:
            self._adopt(steps[-1], self._of(steps[-1]), _LEAST_CALIBRATION)

    def version(self, device: str, model: str) -> str | None:
        """The fit by which steps are split now; None while they are split evenly."""
        found = self._models.get((device, model))
        return None if found is None or found.fit is None else found.fit.version

    def costs(self, device: str, model: str) -> Coefficients | None:
        """What steps take, by the fit in use; None while they are split evenly."""
        found = self._models.get((device, model))
        return None if found is None else found.coefficients

    def coefficients(self, model: str) -> Coefficients | None:
        """The model's fit, on whichever device it ran last; None until there is one."""
        known = [held.coefficients for (_, name), held in self._models.items() if name == model]
        return next((coefficients for coefficients in reversed(known) if coefficients is not None), None)

    def unsaved(self) -> tuple[StepTimeFit, ...]:
        """Versions in use that the ledger doesn't have yet."""
        return tuple(self._unsaved)

    def saved(self, fits: Sequence[StepTimeFit]) -> None:
        self._unsaved = [fit for fit in self._unsaved if fit not in fits]

    def _of(self, record: StepRecord) -> _Model:
        key = (record.device, record.model)
        if key not in self._models:
            self._models[key] = _Model()
        return self._models[key]

    def _adopt(self, record: StepRecord, model: _Model, least_steps: int = _LEAST_STEPS) -> None:
        coefficients = model.better(least_steps)
        if coefficients is None:
            return
        whose = (record.device, record.model, self._configuration)
        model.use(self.version_of(whose, coefficients, model.fitter, model.steps_before))

    def version_of(
        self, whose: tuple[str, str, str], coefficients: Coefficients, fitter: Fitter, steps_before: int = 0
    ) -> StepTimeFit:
        """A fit that is in use from now on, as a version that the ledger must be given. `whose` is its device, model
        and configuration; `steps_before` those that earlier versions were learned from."""
        device, model, configuration = whose
        fit = StepTimeFit(
            version=self._ids.new("fit"),
            device=device,
            model=model,
            configuration=configuration,
            **msgspec.structs.asdict(coefficients),
            steps=steps_before + fitter.steps,
            error=fitter.error,
            fitted_at_ns=self._clock.now_ns(),
        )
        self._unsaved.append(fit)
        return fit


class _Model:
    """One model on one device."""

    def __init__(self, fit: StepTimeFit | None = None) -> None:
        self.fit: StepTimeFit | None = None
        self.coefficients: Coefficients | None = None
        self.steps_before = 0
        if fit is not None:
            self.use(fit)
            self.steps_before = fit.steps
        self.fitter = Fitter(known=self.coefficients)
        self._next_fit = _LEAST_STEPS
        self._unobserved_ns = _OBSERVED_EVERY_NS
        self._latest: deque[Work] = deque(maxlen=_LATEST_STEPS)

    def use(self, fit: StepTimeFit) -> None:
        self.fit = fit
        self.coefficients = Coefficients.of(fit)

    def weights(self, sequences: Sequence[SequenceWork]) -> Sequence[int]:
        if self.coefficients is None or not sequences:
            return [1] * len(sequences)
        shares = self.coefficients.shares([Work.of(work) for work in sequences])
        return [int(share * _WEIGHTS_PER_NS) for share in shares]

    def next_shares(self, record: StepRecord) -> Sequence[int] | None:
        if self.coefficients is None or not record.sequences:
            return None
        error = self.fitter.error or (self.fit.error if self.fit is not None else None) or 0
        shares = self.coefficients.shares([Work.of(_next_work(work)) for work in record.sequences])
        return [int(share * (1 + _ERRORS_ABOVE * error)) for share in shares]

    def learn(self, record: StepRecord) -> bool:
        """Whether it is time for a new fit."""
        self._unobserved_ns += record.wall_ns
        every_ns = _OBSERVED_EVERY_NS if self.fitter.steps < _REFIT_STEPS else _REFINED_EVERY_NS
        if self._unobserved_ns < every_ns or not record.sequences:
            return False
        self._unobserved_ns = 0
        self.observe(record, record.wall_ns)
        if self.fitter.steps < self._next_fit:
            return False
        # Early fits are refined soon, later ones now and then.
        self._next_fit += min(self.fitter.steps, _REFIT_STEPS)
        return True

    def observe(self, record: StepRecord, wall_ns: int) -> None:
        work = Work.total(Work.of(work) for work in record.sequences)
        self.fitter.observe(work, wall_ns)
        self._latest.append(work)

    def better(self, least_steps: int) -> Coefficients | None:
        """A new fit, if there is one that differs from the one in use by enough to be a version of its own."""
        found = self.fitter.coefficients(least_steps)
        if found is None or self.coefficients is None:
            return found
        worth_it = found.differs(self.coefficients, self._latest, _WORTH_A_VERSION_PERCENT)
        return found if worth_it else None


def _next_work(work: SequenceWork) -> SequenceWork:
    """What a sequence asks of the step after this one: as many rows of its prompt again, or else one more token."""
    if work.prefill_rows and not work.sampled_rows:
        rows = work.prefill_rows
        return msgspec.structs.replace(work, kv_read_tokens=work.kv_read_tokens + rows)
    rows = max(1, work.decode_rows)
    return SequenceWork(work.sequence, 0, rows, rows, work.kv_read_tokens + rows)
