"""Costs by volume: staircases, and every crossing point, against counting."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from millicent.economics.curves import MOST_STEPS, Curve, Range, cheapest

UP_TO = 240


@st.composite
def curves(draw: st.DrawFn) -> list[Curve]:
    found = []
    for number in range(draw(st.integers(1, 4))):
        stair = draw(st.booleans())
        found.append(
            Curve(
                name=f"c{number}",
                per_request=Fraction(draw(st.integers(0, 12)), draw(st.integers(1, 5))),
                per_machine=Fraction(draw(st.integers(0, 60)) if stair else 0),
                capacity=draw(st.integers(1, 90)) if stair else None,
                spares=draw(st.integers(0, 3)) if stair else 0,
                least=draw(st.integers(1, 3)),
            )
        )
    return found


@given(curves())
def test_the_ranges_are_where_counting_finds_the_cheapest(given_curves: list[Curve]) -> None:
    counted = [min(given_curves, key=lambda curve: curve.cost(volume)).name for volume in range(1, UP_TO + 1)]
    told = [each.name for each in cheapest(given_curves, UP_TO) for _ in range(each.from_volume, each.to_volume + 1)]
    assert told == counted


@given(curves())
def test_the_ranges_join_without_gaps_and_each_is_another_ones(given_curves: list[Curve]) -> None:
    ranges = cheapest(given_curves, UP_TO)
    assert (ranges[0].from_volume, ranges[-1].to_volume) == (1, UP_TO)
    for before, after in pairwise(ranges):
        assert after.from_volume == before.to_volume + 1
        assert after.name != before.name


@given(curves(), st.integers(1, UP_TO))
def test_more_requests_never_cost_less(given_curves: list[Curve], volume: int) -> None:
    for curve in given_curves:
        assert curve.cost(volume) <= curve.cost(volume + 1)


@given(curves(), st.integers(1, UP_TO))
def test_a_spare_more_is_never_cheaper(given_curves: list[Curve], volume: int) -> None:
    for curve in given_curves:
        more = Curve(**{name: getattr(curve, name) for name in curve.__struct_fields__} | {"spares": curve.spares + 1})
        assert more.cost(volume) >= curve.cost(volume)


def test_a_staircase_is_paid_in_whole_machines() -> None:
    """$100 a month carry 1,000 requests; one spare."""
    rented = Curve(name="rented", per_machine=Fraction(100 * 10**9), capacity=1000, spares=1)
    assert [rented.machines(volume) for volume in (1, 1000, 1001, 2000, 2001)] == [2, 2, 3, 3, 4]
    assert rented.cost(1001) == 300 * 10**9


def test_a_machine_can_be_overtaken_again_at_each_of_its_first_steps() -> None:
    """By hand: an API at $0.15 a request against $100 for each 1,000. The first machine pays from 667 requests
    (666 cost $99.90), the second from 1,334 ($200.10); at 1,001 two machines cost more than $150.15. The third pays
    from its first request on: 2,001 cost $300.15."""
    api = Curve(name="api", per_request=Fraction(15, 100))
    rented = Curve(name="rented", per_machine=Fraction(100), capacity=1000)
    assert cheapest([api, rented], 5000) == [
        Range(1, 666, "api"),
        Range(667, 1000, "rented"),
        Range(1001, 1333, "api"),
        Range(1334, 5000, "rented"),
    ]


def test_staircases_that_never_part_are_followed_only_so_far() -> None:
    """The same in the long run: ten requests for $1, and twenty for $2."""
    small = Curve(name="small", per_machine=Fraction(1), capacity=10)
    large = Curve(name="large", per_machine=Fraction(2), capacity=20)
    ranges = cheapest([large, small], 10**9)
    assert ranges[:3] == [Range(1, 10, "small"), Range(11, 20, "large"), Range(21, 30, "small")]
    assert ranges[-1].to_volume == 10 * MOST_STEPS


def test_staircases_that_part_are_compared_to_the_end() -> None:
    """A thousandth dearer in the long run: step k begins at 10k - 9, and $1,000k buy 9.99001k requests: k < 901."""
    stair = Curve(name="stair", per_machine=Fraction(1000), capacity=10)
    ranges = cheapest([Curve(name="api", per_request=Fraction(1001, 10)), stair], 10**12)
    assert ranges[-1] == Range(8992, 10**12, "stair")
