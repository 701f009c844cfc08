"""What replays start from: one engine's recorded traffic, and a simulated machine that behaves as that engine did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal

import msgspec

from millicent.core.errors import InvalidRequest
from millicent.core.fits import StepTimeFit
from millicent.core.receipts import RATE_KEY
from millicent.economics.arrivals import Arrival
from millicent.economics.calibration import LEAST_ANSWERS, Calibration, Fidelity, calibrate, fidelity
from millicent.economics.outcomes import Outcome, outcome
from millicent.economics.recorded import Recorded, fit_versions, main_engine
from millicent.economics.simulator import Course, Gate, Machine, simulate
from millicent.economics.steady import PrefixCache
from millicent.ledger.queries import LedgerQueries
from millicent.step_time import Coefficients

# As many of the newest answers say how the engine behaves.
_LEARNED_FROM = 1_000


class EngineShape(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's settings. `memory_known` says whether `kv_blocks` follows from the model's file and the memory."""

    kv_blocks: int
    context_tokens: int
    block_tokens: int
    max_sequences: int
    step_tokens: int
    prefix_cache: PrefixCache
    memory_known: bool


class Rates(msgspec.Struct, frozen=True):
    """Dollars per hour of one machine: what receipts are priced at, and what it costs. None: nobody knows."""

    receipt: Decimal | None
    hour: Decimal | None


class Basis(msgspec.Struct, frozen=True, kw_only=True):
    """`arrivals` are those of `recorded`, or of a trace in their place. `fidelity` says how far the simulator is off on
    newer answers than those that it learned from; None where there were too few."""

    placement: str
    model: str
    recorded: tuple[Recorded, ...]
    fit: StepTimeFit
    calibration: Calibration
    fidelity: Fidelity | None
    rates: Rates
    memory_known: bool
    arrivals: tuple[Arrival, ...]

    @property
    def machine(self) -> Machine:
        return self.calibration.machine

    def run(
        self,
        arrivals: Sequence[Arrival],
        machine: Machine | None = None,
        *,
        machines: int = 1,
        max_concurrent: int | None = None,
        gate: Callable[[], Gate] | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> tuple[Course, Outcome]:
        """What comes of it on machines like this one, or on others at the same rate."""
        machine = machine or self.machine
        course = simulate(
            arrivals, machine, machines=machines, max_concurrent=max_concurrent, gate=gate, progress=progress
        )
        return course, outcome(course, machine.kv_blocks, self.rates.receipt, self.rates.hour)


def basis_of(queries: LedgerQueries, recorded: Sequence[Recorded], shape: EngineShape) -> Basis:
    """Of the engine that answered most of them.

    Raises InvalidRequest where no engine shows its steps, or none of its steps were learned from yet.
    """
    placement, name = main_engine(recorded)
    mine = [each for each in recorded if each.place == (placement, name) and each.decoded]
    fit = _newest_fit(queries, mine, name)
    machine = Machine(
        coefficients=Coefficients.of(fit),
        kv_blocks=shape.kv_blocks,
        context_tokens=shape.context_tokens,
        block_tokens=shape.block_tokens,
        max_sequences=shape.max_sequences,
        step_tokens=shape.step_tokens,
        prefix_cache=shape.prefix_cache,
    )
    return Basis(
        placement=placement,
        model=name,
        recorded=tuple(mine),
        fit=fit,
        calibration=calibrate(mine[-_LEARNED_FROM:], machine),
        fidelity=_judged(mine[-_LEARNED_FROM:], machine),
        rates=_rates(mine),
        memory_known=shape.memory_known,
        arrivals=tuple(each.arrival for each in mine),
    )


def _newest_fit(queries: LedgerQueries, recorded: Sequence[Recorded], model: str) -> StepTimeFit:
    fits = queries.fits_named(fit_versions(recorded))
    if not fits:
        raise InvalidRequest(f"nobody knows yet what steps of {model} take: answer some requests first", param="model")
    return max(fits, key=lambda fit: fit.fitted_at_ns)


def _judged(recorded: Sequence[Recorded], machine: Machine) -> Fidelity | None:
    """Learned from the older half, compared with the newer one, which goes on from the queue that the older left."""
    half = len(recorded) // 2
    if half < LEAST_ANSWERS:
        return None
    course = simulate([each.arrival for each in recorded], calibrate(recorded[:half], machine).machine)
    return fidelity(recorded[half:], Course(course.fates[half:], course.loads, course.wall_ns))


def _rates(recorded: Sequence[Recorded]) -> Rates:
    """As the newest receipt that has one says."""
    for each in reversed(recorded):
        snapshot = each.receipt.prices.snapshot
        if RATE_KEY in snapshot:
            receipt = Decimal(snapshot[RATE_KEY])
            return Rates(receipt, Decimal(snapshot.get("usd_per_hour", snapshot[RATE_KEY])))
    return Rates(None, None)
