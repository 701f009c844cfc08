"""What is earned beside what is spent: worked cases, exact sums, and changes that really restore the target."""

from __future__ import annotations

import asyncio
import tomllib
from collections.abc import Sequence
from datetime import date
from decimal import Decimal
from fractions import Fraction

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.control.config import BudgetConfig
from millicent.core.entries import Entry, Kind
from millicent.core.errors import ConfigError, Conflict, InvalidRequest
from millicent.core.money import ZERO, Money
from millicent.core.periods import DAY_NS, Period, months_of, parse_period, parse_two
from millicent.core.request import Attribution
from millicent.economics.config import CostConfig, EarningsConfig, PlanConfig
from millicent.economics.margin import Books, margins
from millicent.economics.plans import (
    Mend,
    UserUse,
    allowance,
    bill,
    feature_mends,
    largest_limit,
    mends,
    needed,
    plans_by_tier,
    smallest_price,
)
from millicent.ledger.entries import add_entries
from millicent.ledger.maintenance import purge_user
from millicent.ledger.memory import MemoryLedger
from millicent.wire.entries import entries_of_rows
from support.economy import answered, ledger_of

NOVEMBER = parse_period("2026-11")
PRO = PlanConfig(price_usd_per_month=Decimal(20), margin_target=Decimal("0.75"))


def usd(amount: str | int | Decimal) -> Money:
    return Money.from_usd(amount)


def uses(count: int, requests: int, cost: str) -> list[UserUse]:
    return [UserUse(f"u{number}", requests, 0, usd(cost)) for number in range(count)]


def mended(plan: PlanConfig, members: Sequence[UserUse], *, outside: Money = ZERO, days: int = 30) -> list[Mend]:
    inside = Period(NOVEMBER.from_ns, NOVEMBER.from_ns + days * DAY_NS)
    paid = [bill(plan, use, inside, NOVEMBER) for use in members]
    return mends("pro", plan, members, paid, outside, Fraction(days, 30))


@pytest.mark.parametrize(
    ("users", "requests", "per_request", "a_day"),
    [(10_000, 10, "0.01", 1_000), (100_000, 5, "0.003", 1_500)],
)
def test_the_worked_cases_cost_what_the_documentation_says(
    users: int, requests: int, per_request: str, a_day: int
) -> None:
    """10,000 x 10 x $0.01 = $1,000 a day. 100,000 x 5 x $0.003 = $1,500 a day, not $15,000: that would be 3 cents each.
    The price that just pays for it follows: $3 and 45 cents a month."""
    per_user = Money.price(requests, Decimal(per_request))
    day = [UserUse("each", requests, 0, per_user)] * users
    assert Money.total(use.cost for use in day) == usd(a_day)
    [price, *_] = mended(PlanConfig(), day, days=1)
    assert price.amount == usd(Decimal(a_day) * 30 / users)


def test_a_user_pays_the_price_by_time_and_what_goes_beyond_what_it_includes() -> None:
    plan = PlanConfig(
        price_usd_per_month=Decimal(30),
        included_tokens=10_000,
        usd_per_1k_tokens=Decimal("0.02"),
        included_requests=100,
        usd_per_request=Decimal("0.001"),
    )
    whole, third = NOVEMBER, Period(NOVEMBER.from_ns, NOVEMBER.from_ns + 10 * DAY_NS)
    assert bill(plan, UserUse("a", 100, 10_000, ZERO), whole, NOVEMBER) == usd(30)
    assert bill(plan, UserUse("a", 101, 12_500, ZERO), third, NOVEMBER) == usd("10.051")


amounts = st.integers(0, 10**12).map(Money)


@given(amounts, st.integers(1, 400))
def test_what_accrues_day_by_day_sums_to_the_whole(amount: Money, days: int) -> None:
    over = Period(NOVEMBER.from_ns, NOVEMBER.from_ns + days * DAY_NS)
    parts = [Period(over.from_ns + day * DAY_NS, over.from_ns + (day + 1) * DAY_NS) for day in range(days)]
    assert Money.total(part.accrued(amount, over) for part in parts) == amount
    assert Money.total(month.accrued(amount, over) for month in months_of(over)) == amount


@given(amounts, st.integers(0, 99).map(lambda percent: Decimal(percent) / 100))
def test_what_is_needed_is_the_least_revenue_that_allows_the_cost(cost: Money, target: Decimal) -> None:
    least = needed(cost, target)
    assert allowance(least, target) >= cost
    assert least == ZERO or allowance(Money(least.nanousd - 1), target) < cost


@given(st.lists(st.integers(0, 10**11).map(Money), min_size=1, max_size=20), amounts)
def test_a_limit_is_the_highest_in_cents_under_which_the_costs_fit(costs: list[Money], allowed: Money) -> None:
    limit = largest_limit(costs, allowed)

    def total(cap: Money) -> Money:
        return Money.total(min(cost, cap) for cost in costs)

    if limit is None:
        assert Money.total(costs) <= allowed
        return
    cent = Money(10**7)
    assert limit.nanousd % cent.nanousd == 0
    assert total(limit) <= allowed
    assert total(limit + cent) > allowed


@given(amounts, amounts, st.integers(1, 1000), st.sampled_from(["0", "0.5", "0.75"]))
def test_a_price_is_the_lowest_in_cents_that_restores_the_target(
    cost: Money, charged: Money, users: int, target: str
) -> None:
    price = smallest_price(cost, charged, Fraction(users), Decimal(target))
    assert price is not None
    revenue = Money(price.nanousd * users) + charged
    assert allowance(revenue, Decimal(target)) >= cost
    if price > ZERO:
        assert allowance(revenue - Money(10**7 * users), Decimal(target)) < cost


def test_one_heavy_user_of_a_twenty_dollar_plan_is_mended_by_a_price_or_by_a_limit() -> None:
    """Ten users pay $200, of which a quarter is for models: $50. Nine cost $1, one costs $100: a price of
    $109 / 0.25 / 10 = $43.60, or a limit of $41 on each."""
    members = [*uses(9, 10, "1"), UserUse("heavy", 900, 0, usd(100))]
    price, limit = mended(PRO, members)
    assert (price.amount, limit.amount) == (usd("43.60"), usd(41))
    assert tomllib.loads("\n".join(price.lines)) == {"plans": {"pro": {"price_usd_per_month": 43.60}}}
    written = tomllib.loads("\n".join(limit.lines), parse_float=Decimal)["budgets"]["pro-users"]
    budget = msgspec.convert(written, BudgetConfig).budget("pro-users")
    assert (budget.limit, budget.per, budget.tier) == (usd(41), "user", "pro")
    assert "on each user (1 would have reached it)" in limit.what
    assert mended(PRO, uses(10, 10, "5")) == []


def test_a_feature_is_mended_by_what_it_earns_or_by_a_limit_on_its_models() -> None:
    """Over half a month a feature misses $30 on 1,000 requests and may spend $20 on models: $40 a month."""
    more, limit = feature_mends('a "b"/c', usd(30), 1000, usd("20.004"), Fraction(1, 2))
    assert more.amount == usd("0.03")
    (budget,) = tomllib.loads("\n".join(limit.lines))["budgets"].values()
    assert (budget["only"], budget["limit_usd"]) == ('a "b"/c', 40.0)


def test_what_other_costs_eat_up_no_limit_can_restore() -> None:
    (only,) = mended(PRO, uses(2, 1, "1"), outside=usd(1000))
    assert only.what.startswith("a price of")


def test_a_plans_limit_is_for_each_user_of_its_tier_whatever_it_is_called() -> None:
    plan = msgspec.structs.replace(PRO, tier='o"dd')
    members = [UserUse("heavy", 1, 0, usd(90)), *uses(1, 1, "1")]
    found = mends("a/b", plan, members, [usd(20), usd(20)], ZERO, Fraction(1))
    ((name, written),) = tomllib.loads("\n".join(found[1].lines), parse_float=Decimal)["budgets"].items()
    budget = msgspec.convert(written, BudgetConfig).budget(name)
    told = [budget.subject(Attribution(user="heavy", tier=tier)) for tier in ('o"dd', "other", None)]
    assert told == ["heavy", None, None]


def entry(number: str, amount: str, *, kind: Kind = "revenue", period: Period = NOVEMBER, **of: str) -> Entry:
    return Entry(
        id=number, kind=kind, amount=usd(amount), from_ns=period.from_ns, to_ns=period.to_ns, posted_at_ns=1, **of
    )


def add(ledger: MemoryLedger, *entries: Entry) -> int:
    return asyncio.run(ledger.write(lambda connection: add_entries(connection, entries)))


def business() -> MemoryLedger:
    """Three users over November, a dollar for each million tokens, and one without a plan."""
    price = ("1", "0", "0")
    made = []
    for number, (user, tier, feature, tokens) in enumerate(
        [
            ("ada", "pro", "chat", 2_000_000),
            ("ada", "pro", "search", 4_000_000),
            ("bob", "free", "chat", 21_000_000),
            ("bob", "pro", "chat", 1_000_000),
            ("eve", None, "search", 3_000_000),
        ]
    ):
        at_ns = NOVEMBER.from_ns + number * DAY_NS
        made.append(
            answered(number, at_ns, user=user, tier=tier, feature=feature, fresh=tokens, output=0, prices=price)
        )
    return ledger_of(made)


BOOKS = Books(
    plans={"pro": PRO, "basic": PlanConfig(tier="free")},
    features={"chat": EarningsConfig(revenue_usd_per_request=Decimal("0.5"), margin_target=Decimal("0.5"))},
    costs={
        "hosting": CostConfig(usd_per_month=Decimal(30), feature="chat"),
        "people": CostConfig(usd_per_month=Decimal(100)),
    },
)


def test_rows_sum_to_the_same_total_whatever_they_are_by() -> None:
    ledger = business()
    add(ledger, entry("r1", "70", feature="search"), entry("c1", "9.99", kind="cost", user="eve"))
    reports = {by: margins(ledger.queries, by, NOVEMBER, BOOKS) for by in ("feature", "tier", "user")}
    totals = [report.total for report in reports.values()]
    assert totals[0] == totals[1] == totals[2]
    # Two users of pro pay $20, three chats earn 50 cents, and $70 were recorded; $31 for models, $139.99 for the rest.
    assert (totals[0].revenue, totals[0].ai_cost, totals[0].other_cost) == (usd("111.5"), usd(31), usd("139.99"))
    assert totals[0].margin == usd("-59.49")
    for report in reports.values():
        earned = Money.total(row.revenue for row in report.rows if row.revenue is not None)
        spent = Money.total((row.ai_cost or ZERO) + row.other_cost for row in report.rows)
        assert earned - spent == report.total.margin
        # Where nobody said what is earned, it isn't nothing that is earned; those stand last.
        assert [row.margin is None for row in report.rows] == sorted(row.revenue is None for row in report.rows)
    features = {row.group: row for row in reports["feature"].rows}
    assert (features["chat"].revenue, features["chat"].other_cost) == (usd("1.5"), usd(30))
    assert features["chat"].needed == usd(108)  # ($24 + $30) / (1 - 0.5)
    assert (features[None].revenue, features[None].other_cost) == (usd(40), usd("109.99"))
    assert features["search"].ai_share == Decimal("0.1")
    # $106.50 are missing over three requests; of $1.50 half would be for models, and hosting takes $30: no limit helps.
    (more,) = reports["feature"].mends["chat"]
    assert more.amount == usd("35.5")
    asyncio.run(ledger.stop())


def test_users_are_on_the_plan_of_their_latest_request_and_those_over_it_are_told() -> None:
    """Bob moved from free to pro: his $22 in November are on a plan of $20 that leaves $5; ada's $6 too."""
    ledger = business()
    report = margins(ledger.queries, "user", NOVEMBER, BOOKS)
    assert [(each.user, each.losing, each.cost, each.allowed) for each in report.over] == [
        ("bob", True, usd(22), usd(5)),
        ("ada", False, usd(6), usd(5)),
    ]
    pro = next(each for each in report.plans if each.plan == "pro")
    assert (pro.users, pro.revenue, pro.ai_cost, pro.over, pro.losing) == (2, usd(40), usd(28), 2, 1)
    assert [mend.amount for mend in pro.mends] == [usd(56), usd(5)]
    rows = {row.group: row for row in report.rows}
    assert (rows["bob"].revenue, rows["eve"].revenue, rows["eve"].margin) == (usd(20), None, None)
    asyncio.run(ledger.stop())


def test_users_of_a_free_plan_who_all_cost_more_than_nothing_stand_after_those_who_pay() -> None:
    price = ("1", "0", "0")
    ledger = ledger_of(
        [
            answered(1, NOVEMBER.from_ns, user="free", tier="free", fresh=50_000_000, output=0, prices=price),
            answered(2, NOVEMBER.from_ns, user="paying", tier="pro", fresh=6_000_000, output=0, prices=price),
        ]
    )
    over = margins(ledger.queries, "tier", NOVEMBER, BOOKS).over
    assert [(each.user, each.losing) for each in over] == [("paying", False), ("free", True)]
    asyncio.run(ledger.stop())


def test_revenue_that_was_recorded_stands_instead_of_the_plans_bill() -> None:
    ledger = business()
    add(ledger, entry("r1", "35", user="bob"))
    by_user = {row.group: row.revenue for row in margins(ledger.queries, "user", NOVEMBER, BOOKS).rows}
    assert by_user == {"bob": usd(35), "ada": usd(20), "eve": None, None: usd("1.5")}
    add(ledger, entry("r2", "500", tier="pro"))
    tiers = {row.group: row.revenue for row in margins(ledger.queries, "tier", NOVEMBER, BOOKS).rows}
    assert tiers["pro"] == usd(535)
    add(ledger, entry("r3", "7", feature="chat"))
    features = {row.group: row.revenue for row in margins(ledger.queries, "feature", NOVEMBER, BOOKS).rows}
    assert features["chat"] == usd(7)
    asyncio.run(ledger.stop())


def test_amounts_accrue_over_the_days_that_are_asked_for() -> None:
    ledger = business()
    add(ledger, entry("r1", "300", feature="chat"))
    ten_days = parse_period("2026-11-01/2026-11-10")
    chat = next(row for row in margins(ledger.queries, "feature", ten_days, BOOKS).rows if row.group == "chat")
    assert (chat.revenue, chat.other_cost) == (usd(100), usd(10))
    asyncio.run(ledger.stop())


def test_posting_an_entry_again_changes_nothing_and_another_under_its_name_is_refused() -> None:
    ledger = MemoryLedger()
    assert add(ledger, entry("r1", "1"), entry("r1", "1", kind="cost")) == 2
    assert add(ledger, entry("r1", "1")) == 0
    with pytest.raises(Conflict, match="another amount"):
        add(ledger, entry("r2", "5"), entry("r1", "2"))
    assert [each.id for each in ledger.queries.entries("revenue", 0, 2**62)] == ["r1"]
    with pytest.raises(Exception, match="never changes"):
        ledger._connection.execute("UPDATE entries SET amount_nanousd = 0")
    asyncio.run(ledger.stop())


def test_a_purged_user_is_in_no_entry_and_the_amount_stays() -> None:
    ledger = business()
    add(ledger, entry("r1", "9", user="bob", note="bob's card"))
    asyncio.run(ledger.write(lambda connection: purge_user(connection, "bob")))
    (kept,) = ledger.queries.entries("revenue", 0, 2**62)
    assert (kept.amount, kept.note) == (usd(9), None)
    assert kept.user is not None
    assert kept.user.startswith("purged-")
    asyncio.run(ledger.stop())


def test_rows_of_a_file_get_names_of_what_they_say() -> None:
    rows = [
        {"Month": "2026-11", "Amount": "$1,200.50", "Customer": "ada"},
        {"Month": "2026-11", "Amount": "$1,200.50", "Customer": "ada"},
        {"id": "mine", "Period": "2026-11-03", "usd": "5", "Tier": "pro", "Note": "late"},
    ]
    first, second, third = entries_of_rows(rows, "revenue", 7)
    assert (first.amount, first.user, first.to_ns) == (usd("1200.5"), "ada", NOVEMBER.to_ns)
    assert first.id != second.id
    assert entries_of_rows(rows, "revenue", 8)[0].id == first.id
    assert (third.id, third.tier, third.note, third.to_ns - third.from_ns) == ("mine", "pro", "late", DAY_NS)
    with pytest.raises(InvalidRequest, match="row 1 has no period"):
        entries_of_rows([{"amount": "5"}], "cost", 7)
    with pytest.raises(InvalidRequest, match="row 1: the amount is no number"):
        entries_of_rows([{"amount": "five", "month": "2026-11"}], "cost", 7)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (PlanConfig(price_usd_per_month=Decimal(-1)), "price_usd_per_month = -1"),
        (PlanConfig(margin_target=Decimal(1)), "margin_target = 1: must be a fraction below 1"),
        (PlanConfig(included_tokens=5), "included_tokens: says nothing"),
        (PlanConfig(included_requests=5), "included_requests: says nothing"),
        (CostConfig(usd_per_month=Decimal("NaN")), "usd_per_month = NaN"),
        (EarningsConfig(revenue_usd_per_request=Decimal("Infinity")), "revenue_usd_per_request"),
    ],
)
def test_amounts_that_make_no_sense_are_refused_by_name(
    config: PlanConfig | CostConfig | EarningsConfig, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        config.check("x")


def test_two_plans_for_one_tier_are_refused() -> None:
    with pytest.raises(ConfigError, match=r'\[plans.b\] tier = "a": is that of \[plans.a\]'):
        plans_by_tier({"a": PlanConfig(), "b": PlanConfig(tier="a")})


def test_periods_are_months_weeks_days_and_stretches_of_days() -> None:
    assert parse_period("2026-12").ns == 31 * DAY_NS
    assert parse_period("2026-W47") == parse_period("2026-11-16/2026-11-22")
    assert parse_two("2026-11-02..2026-11-03")[1].from_ns == parse_period("2026-11-03").from_ns
    assert date(2026, 11, 1).isoformat() in "2026-11-01"
    for wrong in ("2026-13", "november", "2026-11-09/2026-11-01", "2026-W60", ""):
        with pytest.raises(InvalidRequest, match=r"period|before it begins"):
            parse_period(wrong)
    with pytest.raises(InvalidRequest, match="names one period"):
        parse_two("2026-11")
