"""From which volume on a machine pays, how sure that is, and whether the rule of thumb holds for this traffic."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Literal

import msgspec

from millicent.core.money import Money
from millicent.economics.curves import Curve, Range, cheapest
from millicent.economics.places import Place

# As far as anybody compares, in requests a month.
UP_TO = 10**9
# "Under a million requests a month take an API, over a hundred million host yourself."
RULE_BELOW, RULE_ABOVE = 10**6, 10**8

Verdict = Literal["confirmed", "refuted", "untested"]


class BreakEven(msgspec.Struct, frozen=True):
    """One machine against the cheapest API. `ranges` end at every crossing up to `up_to` requests a month.

    It pays first at `pays_from` and, beyond the steps at which another machine costs more than it carries,
    `pays_always_from`; None where it doesn't. `utilization` is the part of what one machine carries a month, at this
    traffic's peak, from which it pays; above 1 it never does.
    """

    machine: str
    api: str
    up_to: int
    ranges: tuple[Range, ...]
    pays_from: int | None
    pays_always_from: int | None
    utilization: Fraction | None


class Sensitivity(msgspec.Struct, frozen=True):
    """How the break-even moves when one thing is otherwise."""

    what: str
    pays_from: int | None
    pays_always_from: int | None


class Rule(msgspec.Struct, frozen=True):
    """The rule of thumb on this traffic: its two halves, and what the cheapest of each costs at the two volumes."""

    verdict: Verdict
    below: Verdict
    above: Verdict
    api_at: tuple[Money | None, ...]
    machine_at: tuple[Money | None, ...]


def break_even(machine: Curve, api: Curve) -> BreakEven:
    """Of equals, the API."""
    ranges = tuple(cheapest([api, machine], UP_TO))
    pays = [each for each in ranges if each.name == machine.name]
    always = pays[-1].from_volume if pays and pays[-1] is ranges[-1] else None
    per_machine = machine.per_machine
    breaking = None
    if api.per_request > machine.per_request and machine.capacity:
        breaking = per_machine / ((api.per_request - machine.per_request) * machine.capacity)
    return BreakEven(
        machine.name, api.name, ranges[-1].to_volume, ranges, pays[0].from_volume if pays else None, always, breaking
    )


def break_evens(places: Sequence[Place]) -> list[BreakEven]:
    """Of each machine whose cost is known, against the cheapest API; none without one."""
    api = cheapest_api(places)
    return [] if api is None else [break_even(curve, api) for curve in machines(places)]


def first_to_pay(evens: Sequence[BreakEven]) -> BreakEven | None:
    return min(
        (each for each in evens if each.pays_from is not None),
        key=lambda each: (each.pays_from or 0, each.machine),
        default=None,
    )


def cheapest_api(places: Sequence[Place]) -> Curve | None:
    return min(apis(places), key=lambda curve: curve.per_request, default=None)


def apis(places: Sequence[Place]) -> list[Curve]:
    """Of those whose cost is known and that aren't known to be too late."""
    return [
        each.curve for each in places if each.kind == "api" and each.curve is not None and each.in_time is not False
    ]


def machines(places: Sequence[Place]) -> list[Curve]:
    """Cheapest first at this volume, as the places are."""
    return [each.curve for each in places if each.curve is not None and each.curve.capacity is not None]


def sensitivities(machine: Curve, api: Curve, peak: Fraction, falls_percent: Decimal, years: int) -> list[Sensitivity]:
    """One thing otherwise at a time. Requests that are longer cost an API and occupy a machine in proportion.

    A price that falls by x% a year is, on average over n years, its first year's times (1 + (1-x) + ... + (1-x)^(n-1))
    / n.
    """
    stays = 1 - Fraction(falls_percent) / 100
    falling = sum((stays**year for year in range(years)), Fraction(0)) / years
    cases: list[tuple[str, Fraction, Fraction, Fraction]] = [
        ("as it is", Fraction(1), Fraction(1), Fraction(1)),
        ("API prices 50% lower", Fraction(1, 2), Fraction(1), Fraction(1)),
        ("API prices 50% higher", Fraction(3, 2), Fraction(1), Fraction(1)),
        (f"API prices fall {falls_percent:f}% a year, over {years} years", falling, Fraction(1), Fraction(1)),
        ("the machine 30% cheaper", Fraction(1), Fraction(7, 10), Fraction(1)),
        ("the machine 30% dearer", Fraction(1), Fraction(13, 10), Fraction(1)),
        ("every hour like the average one", Fraction(1), Fraction(1), peak),
        ("a peak twice as high", Fraction(1), Fraction(1), Fraction(1, 2)),
        ("requests half as long", Fraction(1, 2), Fraction(1), Fraction(2)),
        ("requests twice as long", Fraction(2), Fraction(1), Fraction(1, 2)),
    ]
    found = []
    for what, api_price, machine_price, carries in cases:
        capacity = max(int((machine.capacity or 0) * carries), 1)
        moved = break_even(
            msgspec.structs.replace(machine, per_machine=machine.per_machine * machine_price, capacity=capacity),
            msgspec.structs.replace(api, per_request=api.per_request * api_price),
        )
        found.append(Sensitivity(what, moved.pays_from, moved.pays_always_from))
    return found


def rule_of_thumb(places: Sequence[Place]) -> Rule:
    """Each half holds if it does at every volume it speaks of, as far as volumes are compared."""
    offered, others = apis(places), machines(places)
    volumes = (RULE_BELOW, RULE_ABOVE)
    api_at = tuple(_least(offered, volume) for volume in volumes)
    machine_at = tuple(_least(others, volume) for volume in volumes)
    if not offered or not others:
        return Rule("untested", "untested", "untested", api_at, machine_at)
    owned = {curve.name for curve in others}
    ranges = cheapest([*offered, *others], UP_TO)
    below = all(each.name not in owned for each in ranges if each.from_volume < RULE_BELOW)
    # Where too many steps were to be followed, the last speaks for what is beyond.
    above = all(each.name in owned for each in ranges if each.to_volume > RULE_ABOVE or each is ranges[-1])
    return Rule(_verdict(below and above), _verdict(below), _verdict(above), api_at, machine_at)


def _verdict(holds: bool) -> Verdict:
    return "confirmed" if holds else "refuted"


def _least(curves: Sequence[Curve], volume: int) -> Money | None:
    costs = [curve.cost(volume) for curve in curves]
    return Money(round(min(costs))) if costs else None
