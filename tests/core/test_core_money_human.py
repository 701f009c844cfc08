from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.core.money import Money

CASES = [
    ("0", "$0.00"),
    ("1.2", "$1.20"),
    ("1234.567", "$1,234.57"),
    ("0.034", "3.4 cents"),
    ("0.0345678", "3.46 cents"),
    ("0.01", "1 cent"),
    ("0.0021", "210 millicents"),
    ("0.0000042", "0.42 millicents"),
    ("0.00001", "1 millicent"),
    ("0.000000001", "0.0001 millicents"),
    ("0.999", "99.9 cents"),
    ("0.99996", "$1.00"),
    ("0.0099996", "1 cent"),
    ("0.0099949", "999 millicents"),
    ("-0.0021", "-210 millicents"),
    ("-1.2", "-$1.20"),
]


@pytest.mark.parametrize(("usd", "text"), CASES)
def test_an_amount_is_told_in_the_unit_a_person_can_read(usd: str, text: str) -> None:
    assert Money.from_usd(usd).human() == text


def _back(text: str) -> Decimal:
    sign = -1 if text.startswith("-") else 1
    text = text.removeprefix("-").replace(",", "")
    if text.startswith("$"):
        return sign * Decimal(text[1:])
    number, unit = text.split(" ")
    return sign * Decimal(number) * (Decimal("0.01") if unit.startswith("cent") else Decimal("0.00001"))


@given(st.integers(-(10**15), 10**15))
def test_the_readable_amount_is_within_half_a_unit_of_its_last_digit(nanousd: int) -> None:
    amount = Money(nanousd)
    allowed = max(abs(amount.usd) * Decimal("0.005"), Decimal(0))
    assert abs(_back(amount.human()) - amount.usd) <= allowed
    assert (-amount).human().removeprefix("-") == amount.human().removeprefix("-")
