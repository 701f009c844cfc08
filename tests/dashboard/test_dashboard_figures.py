from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.core.money import Money
from millicent.core.receipts import Timing
from millicent.dashboard import figures


@pytest.mark.parametrize(
    ("ns", "shown"),
    [
        (0, "0 s"),
        (999, "0.999 µs"),
        (420_000, "420 µs"),
        (999_499, "999 µs"),
        (999_500, "1.00 ms"),
        (12_345_678, "12.3 ms"),
        (999_499_999, "999 ms"),
        (999_500_000, "1.00 s"),
        (4_560_000_000, "4.56 s"),
        (200_000_000_000, "3 min 20 s"),
        (7_500_000_000_000, "2 h 05 min"),
    ],
)
def test_a_duration_is_told_in_the_unit_a_person_can_read(ns: int, shown: str) -> None:
    figure = figures.duration(ns)
    assert f"{figure.text} {figure.unit}" == shown


@given(st.integers(1, 59 * 10**9))
def test_a_short_duration_keeps_three_digits(ns: int) -> None:
    figure = figures.duration(ns)
    scale = {"s": 10**9, "ms": 10**6, "µs": 10**3}[figure.unit]
    assert abs(Decimal(figure.text) * scale - ns) <= Decimal(ns) * Decimal("0.005")


def test_what_is_unknown_or_unpriced_is_never_shown_as_zero() -> None:
    assert figures.amount(None).text == "unpriced"
    assert figures.count(None).text == "unknown"
    assert figures.duration(None).text == "—"
    assert figures.rate(None).text == "unpriced"


def test_an_amounts_exact_figure_stands_in_its_title() -> None:
    assert figures.amount(Money.from_usd("0.000012345")) == figures.Figure("1.23", "millicents", "0.000012345 USD")


@given(st.lists(st.integers(-(10**12), 10**12), min_size=1, max_size=8))
def test_a_column_of_dollars_adds_up_as_it_is_written(nanousd: list[int]) -> None:
    column = figures.usd_column([*map(Money, nanousd), Money(sum(nanousd))])
    *parts, total = (Decimal(text.replace(",", "")) for text in column)
    assert sum(parts) == total
    assert len({len(text.partition(".")[2]) for text in column}) == 1


@given(st.lists(st.integers(0, 10**15), min_size=1, max_size=6))
def test_a_bars_parts_lie_end_to_end_over_its_whole_width(sizes: list[int]) -> None:
    parts = figures.bar([(str(i), ns) for i, ns in enumerate(sizes)])
    edge = 0
    for part in parts:
        assert part.start == edge
        edge += part.width
    assert edge == (figures.BAR_UNITS if any(sizes) else 0)


_TIMES = st.none() | st.integers(0, 10**12)


@given(_TIMES, _TIMES, st.integers(0, 10**12))
def test_a_requests_time_is_cut_into_parts_that_sum_to_its_total(
    queue_ns: int | None, ttft_ns: int | None, total_ns: int
) -> None:
    parts = figures.timing_parts(Timing(queue_ns, ttft_ns, None, total_ns))
    assert sum(ns for _, ns in parts) == total_ns
    assert min(ns for _, ns in parts) >= 0
