"""`plan where`: this ledger's traffic, at each place it could run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import msgspec

from millicent.core.accounts import Account
from millicent.core.clock import Clock
from millicent.core.money import Money
from millicent.economics.breakeven import (
    UP_TO,
    BreakEven,
    Rule,
    Sensitivity,
    break_evens,
    cheapest_api,
    first_to_pay,
    machines,
    rule_of_thumb,
    sensitivities,
)
from millicent.economics.capacity import Slots
from millicent.economics.curves import Range, cheapest
from millicent.economics.machines import MachineConfig
from millicent.economics.places import ApiModel, Asked, Candidates, Comparing, Place
from millicent.economics.traffic import HOURS_PER_MONTH, Traffic, read_traffic
from millicent.ledger.queries import LedgerQueries, ReceiptFilter
from millicent.meter.placements import Placement
from millicent.meter.prices import PriceBook

# Compared where no API is configured and none is named: small models of several providers, an open one among them.
WELL_KNOWN = (
    "openai/gpt-5-nano",
    "openai/gpt-5-mini",
    "anthropic/claude-haiku-4-5",
    "google/gemini-2.5-flash-lite",
    "groq/llama-3.1-8b-instant",
)

# Over so many prices are taken to fall: as long as a machine is kept, about.
_YEARS = 3


@dataclass(frozen=True)
class Setup:
    """What is configured: placements of machines, models at providers, machines that could be had, and prices."""

    placements: Mapping[str, Placement]
    apis: tuple[ApiModel, ...]
    machines: Mapping[str, MachineConfig]
    prices: PriceBook
    slots: Slots


class Where(msgspec.Struct, frozen=True, kw_only=True):
    """The comparison at `volume` requests a month. `cheapest` says who is, at each volume up to `up_to`.

    `spent` is what this traffic's receipts came to, a month of it, and `accounts_spent` what its machines did, idle
    time included; None where something is unpriced. `sensitivities` are of `sensitive`: the machine that is the first
    to pay, or, where none ever does, the cheapest.
    """

    traffic: Traffic
    asked: Asked
    volume: int
    spent: Money | None
    accounts_spent: Money | None
    places: tuple[Place, ...]
    up_to: int
    cheapest: tuple[Range, ...]
    break_evens: tuple[BreakEven, ...]
    sensitive: str | None
    sensitivities: tuple[Sensitivity, ...]
    rule: Rule


def verdict(found: Where) -> str:
    """Whether a machine pays for this traffic; empty where that isn't known."""
    costs = {each.name: each.monthly for each in found.places}
    for even in found.break_evens[:1]:
        own, offered = costs[even.machine], costs[even.api]
        if own is None or offered is None:
            break
        does = "pays" if own < offered else "does not pay"
        told = (
            f"At {found.volume:,} requests a month a machine {does}: {even.machine} comes to {own.human()},"
            f" {even.api} to {offered.human()}."
        )
        if own < offered:
            return told
        first = first_to_pay(found.break_evens)
        if first is None or first.pays_from is None:
            return f"{told} None does at any volume up to a billion."
        times = Decimal(first.pays_from) / max(1, found.volume)
        return (
            f"{told} The first to pay is {first.machine}, from {first.pays_from:,} requests a month, {times:,.1f} times"
            " as many."
        )
    return ""


def api_named(name: str, prices: PriceBook, at_ns: int) -> ApiModel:
    """A model as a person names it: `gpt-5-nano`, or `groq/llama-3.1-8b-instant` where several offer it."""
    provider, _, model = name.partition("/")
    if model and prices.find(model, at_ns, "standard", provider) is not None:
        return ApiModel(model, provider)
    return ApiModel(name)


def apis_compared(setup: Setup, compared: Sequence[str], at_ns: int) -> tuple[ApiModel, ...]:
    """Those configured, and others that are named; without any, the well-known ones."""
    known = {name for api in setup.apis for name in (api.model, api.asked)}
    named = compared or (() if setup.apis else WELL_KNOWN)
    return (*setup.apis, *(api_named(name, setup.prices, at_ns) for name in dict.fromkeys(named) if name not in known))


def where(
    queries: LedgerQueries,
    clock: Clock,
    setup: Setup,
    chosen: ReceiptFilter,
    asked: Asked,
    *,
    compared: Sequence[str] = (),
    falls_percent: Decimal = Decimal(20),
) -> Where:
    """`compared` names more APIs; without any, and without one configured, well-known ones are."""
    traffic = read_traffic(queries, chosen)
    accounts = queries.accounts(traffic.from_ns, traffic.to_ns)
    given = Candidates(
        _seen(accounts) | dict(setup.placements),
        apis_compared(setup, compared, clock.now_ns()),
        setup.machines,
        setup.slots,
        _busy(accounts),
    )
    fits = queries.fits_named([each.fit_version for each in traffic.ran if each.fit_version is not None])
    comparing = Comparing(traffic, asked, given, setup.prices, fits, clock.now_ns())
    places = comparing.places()
    late = [each for each in places if each.kind == "api" and each.in_time is False]
    curves = [each.curve for each in places if each.curve is not None and each not in late]
    ranges = tuple(cheapest(curves, UP_TO)) if curves else ()
    evens = break_evens(places)
    api = cheapest_api(places)
    first = first_to_pay(evens) or next(iter(evens), None)
    curve = next((each for each in machines(places) if first is not None and each.name == first.machine), None)
    moved = (
        []
        if api is None or curve is None
        else sensitivities(curve, api, traffic.peak or Fraction(1), falls_percent, _YEARS)
    )
    return Where(
        traffic=traffic,
        asked=asked,
        volume=comparing.volume,
        spent=None if traffic.unpriced else _monthly(Money(traffic.cost_nanousd), traffic),
        accounts_spent=_accounts_spent(accounts, traffic),
        places=tuple(places),
        up_to=ranges[-1].to_volume if ranges else 0,
        cheapest=ranges,
        break_evens=tuple(evens),
        sensitive=curve.name if moved and curve is not None else None,
        sensitivities=tuple(moved),
        rule=rule_of_thumb(places),
    )


def _seen(accounts: Sequence[Account]) -> dict[str, Placement]:
    """Placements that machines were accounted under, with the newest rate: one that nobody configured is there too."""
    newest = {each.placement: each for each in sorted(accounts, key=lambda each: each.hour_ns)}
    return {
        name: Placement(name, each.accelerators, each.usd_per_hour, each.rate_provenance)
        for name, each in newest.items()
    }


def _busy(accounts: Sequence[Account]) -> dict[str, Fraction]:
    """The part of each placement's time that served."""
    serving: dict[str, int] = defaultdict(int)
    there: dict[str, int] = defaultdict(int)
    for each in accounts:
        serving[each.placement] += each.serving_ns
        there[each.placement] += each.wall_ns * each.accelerators
    return {name: Fraction(serving[name], there[name]) for name in there if there[name]}


def _accounts_spent(accounts: Sequence[Account], traffic: Traffic) -> Money | None:
    costs = [each.cost for each in accounts]
    priced = [cost for cost in costs if cost is not None]
    return _monthly(Money.total(priced), traffic) if priced and len(priced) == len(costs) else None


def _monthly(amount: Money, traffic: Traffic) -> Money | None:
    if not traffic.hours:
        return None
    return Money(round(Fraction(amount.nanousd * HOURS_PER_MONTH, traffic.hours)))
