"""Stretches of time in UTC: months, days, and how an amount accrues over them."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta

import msgspec

from millicent.core.clock import NS_PER_S
from millicent.core.errors import InvalidRequest
from millicent.core.money import Money

DAY_NS = 86_400 * NS_PER_S
_WEEK = re.compile(r"(\d{4})-W(\d{2})")
_MONTH = re.compile(r"(\d{4})-(\d{2})")
_EPOCH = date(1970, 1, 1)


class Period(msgspec.Struct, frozen=True, order=True):
    """From `from_ns` to before `to_ns`, UTC nanoseconds."""

    from_ns: int
    to_ns: int

    @property
    def ns(self) -> int:
        return self.to_ns - self.from_ns

    def common(self, other: Period) -> Period | None:
        from_ns, to_ns = max(self.from_ns, other.from_ns), min(self.to_ns, other.to_ns)
        return Period(from_ns, to_ns) if from_ns < to_ns else None

    def accrued(self, amount: Money, over: Period) -> Money:
        """The part of an amount for `over` that falls in here, evenly by time; parts that adjoin sum to the whole."""
        inside = self.common(over)
        if inside is None:
            return Money(0)
        return Money(
            amount.nanousd * (inside.to_ns - over.from_ns) // over.ns
            - amount.nanousd * (inside.from_ns - over.from_ns) // over.ns
        )


def start_ns(day: date) -> int:
    return (day - _EPOCH).days * DAY_NS


def day_of(ns: int) -> date:
    return datetime.fromtimestamp(ns // NS_PER_S, UTC).date()


def month_of(ns: int) -> Period:
    """The calendar month that holds this time."""
    first = day_of(ns).replace(day=1)
    following = (first + timedelta(days=31)).replace(day=1)
    return Period(start_ns(first), start_ns(following))


def months_of(period: Period) -> list[Period]:
    """The calendar months that it touches, whole."""
    found = []
    at_ns = period.from_ns
    while at_ns < period.to_ns:
        found.append(month_of(at_ns))
        at_ns = found[-1].to_ns
    return found


def parse_period(text: str) -> Period:
    """A month `2026-11`, a week `2026-W47`, a day `2026-11-03`, or days `2026-11-03/2026-11-09`, the last one included.

    Raises InvalidRequest.
    """
    try:
        if week := _WEEK.fullmatch(text):
            first = date.fromisocalendar(int(week[1]), int(week[2]), 1)
            return Period(start_ns(first), start_ns(first + timedelta(days=7)))
        if month := _MONTH.fullmatch(text):
            return month_of(start_ns(date(int(month[1]), int(month[2]), 1)))
        first_text, _, last_text = text.partition("/")
        first = date.fromisoformat(first_text)
        last = date.fromisoformat(last_text) if last_text else first
        found = Period(start_ns(first), start_ns(last + timedelta(days=1)))
    except (ValueError, OverflowError):
        raise InvalidRequest(
            f"`{text[:40]}` is no period: write a month 2026-11, a week 2026-W47, a day 2026-11-03, or days"
            " 2026-11-03/2026-11-09.",
            param="period",
        ) from None
    if found.ns <= 0:
        raise InvalidRequest(f"`{text[:40]}` ends before it begins: write the earlier day first.", param="period")
    return found


def parse_two(text: str) -> tuple[Period, Period]:
    """`BEFORE..AFTER`, two periods. Raises InvalidRequest."""
    before, dots, after = text.partition("..")
    if not dots:
        raise InvalidRequest(
            f"`{text[:60]}` names one period: write two, such as 2026-10..2026-11 or 2026-11-02..2026-11-03.",
            param="period",
        )
    return parse_period(before), parse_period(after)
