"""Whose time a step was: the step-time model, learned from the steps themselves, says in what proportion."""

from __future__ import annotations

from collections.abc import Sequence

from millicent.core.steps import SequenceWork, StepRecord
from millicent.step_time import Coefficients, Fitter, Work

# Weights are whole picoseconds, so that no share is rounded to nothing.
_WEIGHTS_PER_NS = 1000
_REFIT_STEPS = 256
# Observing a step costs some 40 microseconds of the gateway's time; steps that come faster are sampled.
_OBSERVED_EVERY_NS = 10_000_000


class StepTimeShares:
    """Weights for `Meter`: each sequence by what the model predicts it added to the step.

    Until there is a fit for a device and model, a step is split evenly, as if reading the weights were all of it.
    """

    def __init__(self) -> None:
        self._fits: dict[tuple[str, str], _Fit] = {}

    def __call__(self, record: StepRecord) -> Sequence[int]:
        fit = self._fits.get((record.device, record.model))
        if fit is None:
            fit = self._fits[record.device, record.model] = _Fit()
        weights = fit.weights(record.sequences)
        fit.learn(record)
        return weights

    def coefficients(self, model: str) -> Coefficients | None:
        """The model's latest fit, on whichever device it ran last; None until there is one."""
        fitted = [fit.coefficients for (_, name), fit in self._fits.items() if name == model]
        return next((coefficients for coefficients in reversed(fitted) if coefficients is not None), None)


class _Fit:
    def __init__(self) -> None:
        self._fitter = Fitter()
        self.coefficients: Coefficients | None = None
        self._next_fit = 16
        self._unobserved_ns = _OBSERVED_EVERY_NS

    def weights(self, sequences: Sequence[SequenceWork]) -> Sequence[int]:
        if self.coefficients is None or not sequences:
            return [1] * len(sequences)
        shares = self.coefficients.shares([Work.of(work) for work in sequences])
        return [int(share * _WEIGHTS_PER_NS) for share in shares]

    def learn(self, record: StepRecord) -> None:
        self._unobserved_ns += record.wall_ns
        if self._unobserved_ns < _OBSERVED_EVERY_NS or not record.sequences:
            return
        self._unobserved_ns = 0
        self._fitter.observe(Work.total(Work.of(work) for work in record.sequences), record.wall_ns)
        if self._fitter.steps >= self._next_fit:
            self.coefficients = self._fitter.coefficients()
            # Early fits are refined soon, later ones now and then.
            self._next_fit += min(self._fitter.steps, _REFIT_STEPS)
