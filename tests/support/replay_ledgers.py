"""Ledgers of traffic that a simulated machine answered: so it is known what a replay must find out about it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

import msgspec

from millicent.core.clock import NS_PER_MS, NS_PER_S
from millicent.core.fits import StepTimeFit
from millicent.core.money import Money
from millicent.core.prompts import Prompt
from millicent.core.receipts import Accelerator, PriceSource, Receipt, Status, Timing
from millicent.core.request import Attribution
from millicent.core.usage import Provenance, Usage
from millicent.economics.arrivals import Arrival
from millicent.economics.basis import EngineShape
from millicent.economics.simulator import Fate, Machine, simulate
from millicent.step_time import Coefficients
from support.plan_ledgers import RATE, T0, answer, write

# A small model on a few cores, in whole nanoseconds.
COSTS = Coefficients(200_000, 4_000_000, 500_000, 30_000, 300, 40)
FIT = StepTimeFit(
    version="fit_1",
    device="cpu",
    model="small",
    configuration="bf16",
    steps=500,
    error=0.05,
    fitted_at_ns=T0,
    **msgspec.structs.asdict(COSTS),
)

SHAPE = EngineShape(
    kv_blocks=2048,
    context_tokens=2048,
    block_tokens=16,
    max_sequences=32,
    step_tokens=512,
    prefix_cache="tenant",
    memory_known=True,
)


def machine(**changes: object) -> Machine:
    settings = Machine(coefficients=COSTS, kv_blocks=2048, context_tokens=2048)
    return msgspec.structs.replace(settings, **changes)


def traffic(count: int, *, every_ms: int, seed: int = 1, keys: Sequence[str | None] = (None,)) -> list[Arrival]:
    """Poisson arrivals of some hundred tokens, from T0 on."""
    draw = Random(seed)
    at_ns, found = T0, []
    for _ in range(count):
        at_ns += int(draw.expovariate(1 / (every_ms * NS_PER_MS)))
        key = draw.choice(keys)
        found.append(Arrival(at_ns, draw.randint(20, 400), draw.randint(4, 80), tenant=0, key=key, streamed=False))
    return found


def recorded(arrivals: Sequence[Arrival], machine: Machine, prompts: Sequence[Prompt | None] = ()) -> list[Receipt]:
    """As receipts would have it, had this machine answered them."""
    course = simulate(arrivals, machine)
    given = prompts or [None] * len(arrivals)
    return [
        _receipt(number, fate, machine, prompt)
        for number, (fate, prompt) in enumerate(zip(course.fates, given, strict=True))
        if fate.refused is None
    ]


def _receipt(number: int, fate: Fate, machine: Machine, prompt: Prompt | None) -> Receipt:
    arrival, serving_ns = fate.arrival, round(fate.serving_ns)
    fresh = arrival.input_tokens - fate.cached_tokens
    steps = -(-fresh // machine.step_tokens) + arrival.output_tokens - 1
    cost = Money.of_time(serving_ns, RATE)
    plain = answer(number, arrival.at_ns)
    return answer(
        number,
        arrival.at_ns,
        settled_at_ns=arrival.at_ns + NS_PER_S * 100,
        status=Status.SUCCEEDED,
        stream=arrival.streamed,
        attribution=Attribution(feature=arrival.feature or "search", user=arrival.user, key=arrival.key),
        usage=Usage.of(
            Provenance.MEASURED,
            input_fresh=fresh,
            input_cache_read=fate.cached_tokens,
            output_text=arrival.output_tokens,
        ),
        timing=Timing(
            queue_ns=round(fate.queue_ns or 0),
            ttft_ns=round(fate.ttft_ns or 0),
            tpot_ns=None if fate.tpot_ns is None else round(fate.tpot_ns),
            total_ns=round(fate.total_ns or 0),
        ),
        accelerator=Accelerator(
            serving_ns, serving_ns, 0, steps, steps, Provenance.MEASURED, step_time_version=FIT.version
        ),
        lines=(msgspec.structs.replace(plain.lines[0], amount=cost),),
        prices=PriceSource("placements.box", {"rate_usd_per_hour": "1", "usd_per_hour": "1"}),
        prompt=prompt,
    )


def keep(home: Path, receipts: Sequence[Receipt], hours: int = 2, fits: Sequence[StepTimeFit] = (FIT,)) -> None:
    """In the ledger of this home, with the fit that they name."""
    home.mkdir(parents=True, exist_ok=True)
    write(home, receipts, fits, hours)
