"""One model of how long a forward pass takes. It attributes, quotes, schedules and simulates."""

from millicent.step_time.fit import Fitter
from millicent.step_time.model import Coefficients, Work
from millicent.step_time.unseen import Stream, UnseenSteps

__all__ = ["Coefficients", "Fitter", "Stream", "UnseenSteps", "Work"]
