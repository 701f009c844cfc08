"""How figures look in a terminal."""

from __future__ import annotations

from datetime import UTC, datetime

import click
import pytest

from millicent.cli.options import utc_ns
from millicent.cli.show import count, duration, printable, size, table
from millicent.core.clock import NS_PER_HOUR, NS_PER_S, SystemClock


def at(day: int, hour: int = 0, minute: int = 0, second: int = 0) -> int:
    return int(datetime(2026, 1, day, hour, minute, second, tzinfo=UTC).timestamp()) * NS_PER_S


def read(written: str) -> int | None:
    command = click.Command("command")
    return utc_ns(click.Context(command), click.Option(["--since"]), written)


@pytest.mark.parametrize(
    ("written", "expected_ns"),
    [
        ("2026-01-31", at(31)),
        ("2026-01-31T09:30", at(31, 9, 30)),
        ("2026-01-31T09:30:05Z", at(31, 9, 30, 5)),
        ("2026-01-31T09:30+02:00", at(31, 7, 30)),
        ("2026-01-31T00:00:00.000001", at(31) + 1000),
    ],
)
def test_a_time_is_read_as_utc(written: str, expected_ns: int) -> None:
    assert read(written) == expected_ns


def test_a_time_can_be_told_by_how_long_ago() -> None:
    before = SystemClock().now_ns()
    found = read("24h")
    assert found is not None
    assert before - 24 * NS_PER_HOUR <= found <= SystemClock().now_ns() - 24 * NS_PER_HOUR


@pytest.mark.parametrize("written", ["", "h", "-3h", "1.5h", "tomorrow", "2026-13-01", "99999999999w", "9" * 30 + "d"])
def test_what_is_no_time_is_refused(written: str) -> None:
    with pytest.raises(click.BadParameter, match="is no time"):
        read(written)


@pytest.mark.parametrize(
    ("count_bytes", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (98_765_432, "98.8 MB"),
        (400_000_000, "400 MB"),
        (2 * 10**12, "2.0 TB"),
    ],
)
def test_sizes_are_in_decimal_units(count_bytes: int, shown: str) -> None:
    assert size(count_bytes) == shown


@pytest.mark.parametrize(
    ("ns", "shown"),
    [(None, "-"), (0, "0.0 ms"), (1_234_567, "1.2 ms"), (999_000_000, "999.0 ms"), (1_500_000_000, "1.50 s")],
)
def test_durations_are_in_the_unit_a_person_reads(ns: int | None, shown: str) -> None:
    assert duration(ns) == shown


def test_an_unknown_count_is_not_zero() -> None:
    assert (count(None), count(0), count(12345)) == ("unknown", "0", "12,345")


def test_columns_are_aligned() -> None:
    assert table(("A", "N"), [("x", "1"), ("yyy", "100")], right=frozenset({"N"})) == "A      N\nx      1\nyyy  100"


def test_names_cannot_move_the_cursor() -> None:
    assert printable("a\x1b[2Jb\nc é 你") == "a?[2Jb?c é 你"
    assert "\x1b" not in table(("A",), [("\x1b]0;x",)])
