"""What a month costs by its volume: straight lines per request, staircases of whole machines, and which is cheapest.

All exact: costs are rational nano-dollars, volumes whole requests a month.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

import msgspec

# No staircase is followed further, where two are so alike that neither ever gets ahead for good.
MOST_STEPS = 5_000


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """`per_request` nano-dollars for each request, and `per_machine` a month for each machine.

    One machine carries `capacity` requests a month; None where there are no machines. `spares` stand beside those that
    the volume needs; `least` are paid for whatever the volume.
    """

    name: str
    per_request: Fraction = Fraction(0)
    per_machine: Fraction = Fraction(0)
    capacity: int | None = None
    spares: int = 0
    least: int = 1

    def machines(self, volume: int) -> int:
        """How many are paid for at so many requests a month: those needed and the spares, at least the `least`."""
        if self.capacity is None:
            return 0
        return max(self.least, -(-volume // self.capacity) + self.spares)

    def cost(self, volume: int) -> Fraction:
        """Nano-dollars a month."""
        return self.per_request * volume + self.per_machine * self.machines(volume)

    @property
    def slope(self) -> Fraction:
        """Nano-dollars a request in the long run: it never costs less than that for each."""
        return self.per_request + (Fraction(0) if self.capacity is None else self.per_machine / self.capacity)

    @property
    def beyond(self) -> Fraction:
        """It never costs more than this beyond its slope."""
        return Fraction(0) if self.capacity is None else self.per_machine * max(self.least, self.spares + 1)

    def step_starts(self, up_to: int) -> Iterator[int]:
        """The volumes at which another machine is needed, from the second on."""
        if self.capacity is not None:
            yield from range(self.capacity + 1, up_to + 1, self.capacity)


class Range(msgspec.Struct, frozen=True):
    """From this volume to that one, both included, `name` is the cheapest."""

    from_volume: int
    to_volume: int
    name: str


def cheapest(curves: Sequence[Curve], up_to: int) -> list[Range]:
    """Who is cheapest at each volume from 1 to `up_to`: the ends of the ranges are all the crossing points there are.

    Of equals, the earlier in `curves`. Between two steps every curve is a straight line, so that the next crossing
    follows from their slopes. It ends before `up_to` where that would take more than `MOST_STEPS` steps.
    """
    curves = _able(curves)
    settled, winner = _settled(curves)
    stop = min([up_to, settled, *(each.capacity * MOST_STEPS for each in curves if each.capacity is not None)])
    starts = sorted({1, *(start for curve in curves for start in curve.step_starts(stop))})
    found: list[Range] = []
    for start, following in zip(starts, [*starts[1:], stop + 1], strict=True):
        for each in _within(curves, start, following - 1):
            _append(found, each)
    if stop == settled < up_to:
        _append(found, Range(stop + 1, up_to, winner))
    return found


def _able(curves: Sequence[Curve]) -> list[Curve]:
    """Without staircases that a straight line is never above: their every step may be forgotten."""
    lines = [(curve.slope, i) for i, curve in enumerate(curves) if curve.beyond == 0]
    return [curve for i, curve in enumerate(curves) if not lines or (curve.slope, i) <= min(lines)]


def _append(found: list[Range], following: Range) -> None:
    if found and found[-1].name == following.name:
        following = Range(found.pop().from_volume, following.to_volume, following.name)
    found.append(following)


def _settled(curves: Sequence[Curve]) -> tuple[int, str]:
    """Beyond this volume the curve of this name is the cheapest for good, since its slope is the least. Where another's
    is the same, that may never be: then nobody knows a volume, and this one is beyond all."""
    best = min(curves, key=lambda curve: curve.slope)
    gaps = [curve.slope - best.slope for curve in curves if curve is not best]
    if best.beyond == 0:
        return 0, best.name
    if 0 in gaps:
        return _NEVER, best.name
    return max((best.beyond // gap for gap in gaps), default=0), best.name


# Beyond every volume that is asked about.
_NEVER = 10**30


def _within(curves: Sequence[Curve], low: int, high: int) -> Iterator[Range]:
    """Between two steps: no curve needs another machine from `low` to `high`."""
    fixed = [curve.per_machine * curve.machines(low) for curve in curves]
    slopes = [curve.per_request for curve in curves]
    everyone = range(len(curves))
    while low <= high:
        best = min(everyone, key=lambda i: (fixed[i] + slopes[i] * low, i))
        # Only one that rises less steeply can get below; an earlier one wins where they are equal.
        crossings = [
            _first_below((fixed[i] - fixed[best]) / (slopes[best] - slopes[i]), at=i < best)
            for i in everyone
            if slopes[i] < slopes[best]
        ]
        following = min([high + 1, *crossings])
        yield Range(low, following - 1, curves[best].name)
        low = following


def _first_below(crossing: Fraction, *, at: bool) -> int:
    """The first whole volume beyond the crossing, or at it."""
    return -(-crossing.numerator // crossing.denominator) if at else crossing.numerator // crossing.denominator + 1
