"""What this month will have cost, with a range that its own past errors give.

A remaining day is expected to cost what its weekday usually does: the mean of the last four weeks for that weekday over
their mean for all days, times the mean of the last seven days; with less than two whole weeks known, the mean of the
days there are. The range comes from making the same forecast, for as many days, at the end of every past day: 80% of
what really came lay between the factors `low` and `high` of what was expected. With fewer than `LEAST_ORIGINS` such
tries the range is that of the days seen: every remaining day like the cheapest, or like the dearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import msgspec

from millicent.core.clock import iso_utc
from millicent.core.money import Money
from millicent.core.periods import DAY_NS, month_of
from millicent.ledger.queries import LedgerQueries, ReceiptFilter

# As far back as is looked, and as many past forecasts as make a range.
HISTORY_DAYS = 120
LEAST_ORIGINS = 8
_WEEK, _PROFILE_DAYS = 7, 28


class Forecast(msgspec.Struct, frozen=True):
    """Of the calendar month (UTC): `spent` so far, and what it will be in all. `origins` counts the past forecasts that
    the range rests on, 0 where it is only the range of days; `days` the whole days known."""

    from_ns: int
    to_ns: int
    spent: Money
    low: Money
    expected: Money
    high: Money
    days: int
    origins: int


def month_end(ledger: LedgerQueries, where: ReceiptFilter, now_ns: int) -> Forecast | None:
    """None before there is a whole day to go by. `where`'s times are left aside."""
    month = month_of(now_ns)
    today_ns = now_ns // DAY_NS * DAY_NS
    from_ns = min(today_ns - HISTORY_DAYS * DAY_NS, month.from_ns)
    until = msgspec.structs.replace(where, from_ns=from_ns, to_ns=now_ns)
    by_day = {each.group or "": each.cost.nanousd for each in ledger.totals("day", until)}
    costs = [by_day.get(_day_name(at_ns), 0) for at_ns in range(from_ns, today_ns, DAY_NS)]
    while costs and costs[0] == 0:
        costs.pop(0)
    if not costs:
        return None
    spent = sum(cost for day, cost in by_day.items() if day >= _day_name(month.from_ns))
    weekday = today_ns // DAY_NS % _WEEK
    ahead = (month.to_ns - today_ns) // DAY_NS
    gone = Fraction(now_ns - today_ns, DAY_NS)
    first, *others = expected_days(costs, weekday, ahead)
    rest = first * (1 - gone) + sum(others)
    low, high, origins = _factors(costs, weekday, ahead)
    if not origins:
        days_left = ahead - gone
        ends = (min(costs) * days_left, max(costs) * days_left)
    else:
        ends = (rest * low, rest * high)
    return Forecast(
        month.from_ns,
        month.to_ns,
        Money(spent),
        Money(spent + round(ends[0])),
        Money(spent + round(rest)),
        Money(spent + round(ends[1])),
        len(costs),
        origins,
    )


def expected_days(costs: Sequence[int], weekday: int, ahead: int) -> list[Fraction]:
    """What each of the following days should cost, given the whole days before; `weekday` (0 to 6) is the first's."""
    level = Fraction(sum(costs[-_WEEK:]), len(costs[-_WEEK:]))
    recent = costs[-_PROFILE_DAYS:]
    if len(recent) < 2 * _WEEK or not sum(recent):
        return [level] * ahead
    recent = recent[len(recent) % _WEEK :]
    mean = Fraction(sum(recent), len(recent))
    profile = []
    for day in range(_WEEK):
        same = [cost for back, cost in enumerate(reversed(recent), start=1) if (weekday - back) % _WEEK == day]
        profile.append(Fraction(sum(same), len(same)) / mean)
    return [level * profile[(weekday + day) % _WEEK] for day in range(ahead)]


def _factors(costs: Sequence[int], weekday: int, ahead: int) -> tuple[Fraction, Fraction, int]:
    """What really came over what was expected, from past forecasts of as many days: the middle 80%, widened to the
    next try on either side since there are few of them; and how many tries."""
    errors = []
    for origin in range(2 * _WEEK, len(costs) - ahead + 1):
        back = len(costs) - origin
        expected = sum(expected_days(costs[:origin], (weekday - back) % _WEEK, ahead))
        if expected:
            errors.append(Fraction(sum(costs[origin : origin + ahead])) / expected)
    if len(errors) < LEAST_ORIGINS:
        return Fraction(0), Fraction(0), 0
    errors.sort()
    cut = max(0, (len(errors) + 1) // 10 - 1)
    # Whatever the past missed by, the middle of the range is what is expected.
    return min(errors[cut], Fraction(1)), max(errors[-1 - cut], Fraction(1)), len(errors)


def _day_name(ns: int) -> str:
    return iso_utc(ns)[:10]
