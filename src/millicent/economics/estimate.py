"""Before building: what so many users would cost a month, model by model, with a range."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Annotated

import msgspec

from millicent.core.errors import InvalidRequest
from millicent.core.money import NANOUSD_PER_USD, Money
from millicent.core.usage import Provenance, Usage
from millicent.economics.api_cost import ApiCost, api_cost
from millicent.economics.capacity import stated
from millicent.economics.places import ApiModel
from millicent.economics.traffic import HOURS_PER_MONTH, Spread, Traffic
from millicent.economics.where import Setup, apis_compared
from millicent.meter.placements import Placement
from millicent.meter.prices import Prices

_Count = Annotated[int, msgspec.Meta(ge=0, le=10**12)]
_Percent = Annotated[int, msgspec.Meta(ge=0, le=100)]
_MOST = 10**6


class Scenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is expected of a month. Each user opens `sessions` with `calls` each; a call has `input_tokens` and
    `output_tokens`, `spread_percent` more or fewer. Of the input, `cache_percent` is read from a cache; of the calls,
    `batch_percent` wait for batch prices. The busiest hour has `peak` times the average one's calls.

    `feature` is what it will be called, so that what happened can be put beside it.
    """

    users: _Count
    input_tokens: _Count
    output_tokens: _Count
    sessions: Decimal = Decimal(1)
    calls: Decimal = Decimal(1)
    spread_percent: _Percent = 30
    cache_percent: _Percent = 0
    batch_percent: _Percent = 0
    peak: Decimal = Decimal(3)
    models: tuple[str, ...] = ()
    feature: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("sessions", 0), ("calls", 0), ("peak", 1)):
            value = getattr(self, name)
            if not value.is_finite() or not least <= value <= _MOST:
                raise ValueError(f"{name} = {value}: must be a number from {least} to {_MOST:,}")

    @property
    def calls_per_month(self) -> Fraction:
        return self.users * Fraction(self.sessions) * Fraction(self.calls)


class Estimated(msgspec.Struct, frozen=True, kw_only=True):
    """One model's, or machine's, month; None where there is no price, and `notes` say of what. `machines` go with
    `expected`."""

    name: str
    low: Money | None = None
    expected: Money | None = None
    high: Money | None = None
    per_call: Money | None = None
    per_user: Money | None = None
    machines: int | None = None
    provenance: Provenance = Provenance.UNKNOWN
    source: str = ""
    notes: tuple[str, ...] = ()


def estimate(scenario: Scenario, setup: Setup, at_ns: int) -> list[Estimated]:
    """Cheapest first, what is unknown last. Low: tokens fewer by the spread. High: more by it, and nothing is read from
    a cache, since nobody has measured yet that it would be. Prices are today's."""
    found = [_of_api(scenario, setup, api, at_ns) for api in apis_compared(setup, scenario.models, at_ns)]
    for name, machine in setup.machines.items():
        found.append(_of_machine(scenario, name, machine.machine(name).at(at_ns), setup))
    return sorted(found, key=lambda each: (each.expected is None, each.expected or Money(0), each.name))


def like(scenario: Scenario, traffic: Traffic) -> Scenario:
    """With the lengths and the cache share that this traffic has, and its peak: what can be measured need not be
    stated. Raises InvalidRequest where there was none."""
    if traffic.input_tokens is None or traffic.output_tokens is None or traffic.peak is None:
        raise InvalidRequest(
            "like: no answers whose tokens are known in the last 30 days: state the tokens", param="like"
        )
    return msgspec.structs.replace(
        scenario,
        input_tokens=round(traffic.input_tokens.mean),
        output_tokens=round(traffic.output_tokens.mean),
        cache_percent=round(100 * (traffic.cached or 0)),
        peak=Decimal(round(traffic.peak * 10)) / 10,
    )


def _of_api(scenario: Scenario, setup: Setup, api: ApiModel, at_ns: int) -> Estimated:
    name = api.model if api.placement is None else f"{api.placement} {api.model}"
    prices = setup.prices.find(api.model, at_ns, "standard", api.provider)
    if prices is None:
        return Estimated(
            name=name, notes=(f"nobody publishes prices for {api.model}: state them in [prices.{api.model!r}]",)
        )
    batch = setup.prices.find(api.model, at_ns, "batch", api.provider) if scenario.batch_percent else None
    notes = ("no batch prices: all calls at the standard ones",) if scenario.batch_percent and not batch else ()
    months: list[Fraction] = []
    for percent, cached in _range(scenario):
        cost = _per_call(scenario, prices, batch, api.discount, percent, cached)
        if isinstance(cost, str):
            return Estimated(name=name, source=prices.source, notes=(f"{prices.source}: {cost}",))
        months.append(cost * scenario.calls_per_month)
    return _estimated(scenario, name, months, prices.source, notes)


def _range(scenario: Scenario) -> tuple[tuple[int, int], ...]:
    """Tokens in percent of those stated, and the part of the input that is cached: low, expected, high."""
    spread, cached = scenario.spread_percent, scenario.cache_percent
    return (100 - spread, cached), (100, cached), (100 + spread, 0)


def _per_call(
    scenario: Scenario, prices: Prices, batch: Prices | None, discount: Decimal, percent: int, cached: int
) -> Fraction | str:
    """Nano-dollars, or what has no price."""
    usage = _usage(scenario, percent, cached)
    part = Fraction(scenario.batch_percent, 100) if batch is not None else Fraction(0)
    total = Fraction(0)
    for each, share in ((prices, 1 - part), (batch, part)):
        if each is not None and share:
            cost = api_cost([usage], each.service, discount)
            if not isinstance(cost, ApiCost):
                return cost
            total += cost.per_request * share
    return total


def _usage(scenario: Scenario, percent: int, cached: int) -> Usage:
    """Whole tokens of one call."""
    given = round(Fraction(scenario.input_tokens * percent, 100))
    read = round(Fraction(given * cached, 100))
    output = round(Fraction(scenario.output_tokens * percent, 100))
    return Usage.of(Provenance.ASSUMED, input_fresh=given - read, input_cache_read=read, output_text=output)


def _of_machine(scenario: Scenario, name: str, placement: Placement, setup: Setup) -> Estimated:
    """Whole machines for the busiest hour."""
    source = f"machines.{name}"
    rate = placement.usd_per_hour
    months: list[Fraction] = []
    machines = []
    for percent, _ in _range(scenario):
        output = round(Fraction(scenario.output_tokens * percent, 100))
        capacity = stated(setup.machines[name], Spread(Fraction(output), output, output))
        if capacity is None or not capacity.requests_per_hour or rate is None:
            what = "state its output_tokens_per_s or requests_per_hour"
            return Estimated(name=name, source=source, notes=(f"what it carries is not stated: {what} [{source}]",))
        busiest = scenario.calls_per_month / HOURS_PER_MONTH * Fraction(scenario.peak)
        needed = max(-(-busiest // capacity.requests_per_hour), 1)
        machines.append(int(needed))
        months.append(needed * Fraction(rate) * placement.accelerators * HOURS_PER_MONTH * NANOUSD_PER_USD)
    notes = (f"whole machines for a busiest hour of {scenario.peak:f} times the average",)
    found = _estimated(scenario, name, months, source, notes)
    return msgspec.structs.replace(found, machines=machines[1])


def _estimated(
    scenario: Scenario,
    name: str,
    months: Sequence[Fraction],
    source: str,
    notes: tuple[str, ...],
) -> Estimated:
    low, expected, high = months
    calls = scenario.calls_per_month
    return Estimated(
        name=name,
        low=_money(low),
        expected=_money(expected),
        high=_money(high),
        per_call=_money(expected / calls) if calls else None,
        per_user=_money(expected / scenario.users) if scenario.users else None,
        provenance=Provenance.ASSUMED,
        source=source,
        notes=notes,
    )


def _money(nanousd: Fraction) -> Money:
    return Money(round(nanousd))
