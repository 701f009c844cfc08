"""A version of the step-time model, as the ledger keeps it."""

from __future__ import annotations

import msgspec


class StepTimeFit(msgspec.Struct, frozen=True):
    """Coefficients in nanoseconds (see `step_time.model`), learned from `steps` steps until `fitted_at_ns`.

    `configuration` is what else step times depend on: precision, threads. `error` is the mean absolute relative error
    of predictions made before each step was seen; None where none was made yet.
    """

    version: str
    device: str
    model: str
    configuration: str
    fixed_ns: float
    weights_ns: float
    row_ns: float
    sampled_row_ns: float
    kv_token_ns: float
    pair_ns: float
    steps: int
    error: float | None
    fitted_at_ns: int
