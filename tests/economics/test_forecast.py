"""What the month will have cost: weekdays matter, and the range holds what it says it holds."""

from __future__ import annotations

import asyncio
import random
from fractions import Fraction

from millicent.core.money import Money
from millicent.core.periods import DAY_NS, month_of, parse_period
from millicent.economics import forecast
from millicent.economics.forecast import expected_days, month_end
from millicent.ledger.memory import MemoryLedger
from millicent.ledger.queries import ReceiptFilter
from support.economy import answered, ledger_of


def test_a_weekday_is_expected_to_cost_what_that_weekday_does() -> None:
    """Two weeks of 10 on workdays and 2 at weekends, the first day a Monday: the next week is just the same."""
    costs = [10, 10, 10, 10, 10, 2, 2] * 4
    assert expected_days(costs, 0, 9) == [10, 10, 10, 10, 10, 2, 2, 10, 10]
    assert expected_days(costs[:-2], 5, 3) == [2, 2, 10]
    risen = [*costs, *(2 * cost for cost in costs[:7])]
    assert expected_days(risen, 0, 7) == [Fraction(8, 5) * cost * Fraction(5, 4) for cost in costs[:7]]


def test_with_little_to_go_by_every_day_is_expected_to_be_like_the_mean() -> None:
    assert expected_days([4, 8], 3, 2) == [6, 6]


def test_of_many_invented_months_the_range_holds_about_as_many_ends_as_it_says() -> None:
    """Noisy weeks of 150 businesses, forecast on a random day of the month; the range is meant for 80%."""
    chance = random.Random(7)
    held = tried = 0
    for _ in range(150):
        weekly = [chance.uniform(0.3, 1.7) for _ in range(7)]
        costs = [round(10**9 * weekly[day % 7] * chance.lognormvariate(0, 0.4)) for day in range(120)]
        ahead = chance.randrange(3, 28)
        known = costs[: 120 - ahead]
        low, high, origins = forecast._factors(known, len(known) % 7, ahead)
        assert origins >= forecast.LEAST_ORIGINS
        expected = sum(expected_days(known, len(known) % 7, ahead))
        held += expected * low <= sum(costs[120 - ahead :]) <= expected * high
        tried += 1
    assert 0.72 <= held / tried <= 0.95, held / tried


def test_the_month_is_what_was_spent_and_what_is_still_to_come() -> None:
    """A dollar a day from 11 to 20 January: on the 21st at noon there are ten and a half days to go."""
    january = month_of(parse_period("2026-01").from_ns)
    dollar = (("1000000", "0", "0"), 1)
    receipts = [
        answered(day, january.from_ns + day * DAY_NS + 5, fresh=dollar[1], output=0, prices=dollar[0])
        for day in range(10, 20)
    ]
    ledger = ledger_of(receipts)
    found = month_end(ledger.queries, ReceiptFilter(), january.from_ns + 20 * DAY_NS + DAY_NS // 2)
    assert found is not None
    assert (found.spent, found.expected) == (Money.from_usd(10), Money.from_usd("20.5"))
    assert (found.low, found.high, found.origins, found.days) == (found.expected, found.expected, 0, 10)
    assert found.expected - found.spent == Money.from_usd("10.5")
    nothing_yet = month_end(ledger.queries, ReceiptFilter(), january.from_ns + 10 * DAY_NS + 100)
    assert nothing_yet is None
    asyncio.run(ledger.stop())


def test_an_empty_ledger_forecasts_nothing() -> None:
    assert month_end(MemoryLedger().queries, ReceiptFilter(), month_of(0).from_ns + DAY_NS) is None
