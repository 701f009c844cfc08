from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.core.money import Money, apportion

amounts = st.integers(-(10**24), 10**24)


@given(amounts, st.lists(st.integers(0, 10**12), min_size=1, max_size=40))
def test_parts_sum_to_the_whole_and_stay_within_one_unit_of_their_proportion(total: int, weights: list[int]) -> None:
    parts = apportion(total, weights)
    assert sum(parts) == total
    shares = weights if sum(weights) else [1] * len(weights)
    for part, share in zip(parts, shares, strict=True):
        assert abs(part * sum(shares) - total * share) < sum(shares)


def test_a_remainder_goes_to_the_largest_fraction_and_ties_to_the_earlier_part() -> None:
    assert apportion(10, [1, 1, 1]) == [4, 3, 3]
    assert apportion(10, [1, 2, 4]) == [1, 3, 6]
    assert apportion(-10, [1, 1, 1]) == [-4, -3, -3]


@pytest.mark.parametrize("weights", [[], [1, -1]])
def test_splitting_among_nobody_or_by_negative_weights_is_an_error(weights: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one weight"):
        apportion(1, weights)


def test_half_a_nano_dollar_rounds_to_even() -> None:
    assert Money.from_usd("0.0000000005") == Money(0)
    assert Money.from_usd("0.0000000015") == Money(2)
    assert Money.from_usd("0.0000000025") == Money(2)


def test_a_price_is_rounded_once_after_an_exact_product() -> None:
    # 1,000,003 tokens at $0.42 per million: 0.42000126 exactly
    assert Money.price(1_000_003, Decimal("0.42") / 10**6) == Money(420_001_260)


@given(amounts)
def test_text_is_plain_decimal_and_reads_back_exactly(nanousd: int) -> None:
    text = str(Money(nanousd))
    assert "e" not in text.lower()
    assert Money.from_usd(text) == Money(nanousd)


@given(amounts, amounts)
def test_money_adds_like_integers(a: int, b: int) -> None:
    assert Money(a) + Money(b) - Money(b) == Money(a)
    assert Money.total([Money(a), -Money(a)]) == Money(0)
