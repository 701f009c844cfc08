import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.core.clock import NS_PER_HOUR, NS_PER_S, ManualClock, SystemClock, hours_between, iso_utc, parse_time_ns
from millicent.core.identifiers import SequentialIds, SystemIds


@given(st.integers(0, 4 * 10**18), st.integers(0, 50 * NS_PER_HOUR))
def test_an_interval_cut_at_hours_keeps_every_nanosecond(start_ns: int, length_ns: int) -> None:
    pieces = hours_between(start_ns, start_ns + length_ns)
    assert sum(ns for _, ns in pieces) == length_ns
    assert all(hour % NS_PER_HOUR == 0 and 0 < ns <= NS_PER_HOUR for hour, ns in pieces)
    assert [hour for hour, _ in pieces] == sorted({hour for hour, _ in pieces})


@given(st.integers(0, 9_214_646_399 * 10**6))  # to the end of 2261
def test_a_shown_time_reads_back_to_the_microsecond(microseconds: int) -> None:
    assert parse_time_ns(iso_utc(microseconds * 1000)) == microseconds * 1000


@pytest.mark.parametrize("text", ["9999-12-31", "2262-01-01", "1677-12-31", "0001-01-01T00:00:00+23:59"])
def test_a_time_that_no_64_bits_hold_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="beyond"):
        parse_time_ns(text)


def test_a_date_is_midnight_utc_and_zones_are_honoured() -> None:
    assert parse_time_ns("2026-01-01") == 1_767_225_600 * 10**9
    assert parse_time_ns("2026-01-01T01:00:00+01:00") == parse_time_ns("2026-01-01")
    with pytest.raises(ValueError, match="Invalid isoformat"):
        parse_time_ns("yesterday")


def test_the_system_clock_ties_utc_to_the_monotonic_clock() -> None:
    clock = SystemClock()
    before = clock.monotonic_ns()
    assert clock.utc_ns(before) <= clock.now_ns()
    assert clock.utc_ns(before + 5) - clock.utc_ns(before) == 5


@pytest.mark.parametrize("set_ns", [-NS_PER_HOUR, -NS_PER_S, NS_PER_S, 30 * NS_PER_HOUR])
def test_the_system_clock_follows_when_it_is_set_and_elapsed_time_does_not(
    monkeypatch: pytest.MonkeyPatch, set_ns: int
) -> None:
    machine = ManualClock()
    monkeypatch.setattr(time, "time_ns", machine.now_ns)
    monkeypatch.setattr(time, "monotonic_ns", machine.monotonic_ns)
    clock = SystemClock()
    machine.advance(5)
    # Less than a second is what clocks differ by: intervals stay as they are.
    machine.set(NS_PER_S - 1)
    assert clock.now_ns() == machine.now_ns() - NS_PER_S + 1
    machine.set(1 - NS_PER_S)
    machine.set(set_ns)
    assert (clock.now_ns(), clock.monotonic_ns()) == (machine.now_ns(), 5)
    assert clock.utc_ns(5) == machine.now_ns()


def test_a_manual_clock_refuses_to_go_back() -> None:
    clock = ManualClock()
    clock.advance(7)
    assert clock.monotonic_ns() == 7
    with pytest.raises(ValueError, match="cannot go back"):
        clock.advance(-1)


def test_identifiers_sort_by_time() -> None:
    clock = ManualClock()
    ids = SystemIds(clock)
    first = ids.new("rcpt")
    clock.advance(1_000_000)
    assert first < ids.new("rcpt")
    assert len(first) == len("rcpt_") + 26
    assert SequentialIds().new("rcpt") == "rcpt_" + "0" * 25 + "1"
