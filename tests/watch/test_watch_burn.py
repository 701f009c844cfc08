"""Budgets and latency targets that burn too fast, and what drifts."""

from __future__ import annotations

from datetime import date
from decimal import Decimal

import msgspec
import pytest

from millicent.core.budgets import Balance, Budget, Every
from millicent.core.clock import NS_PER_S, ManualClock
from millicent.core.identifiers import SequentialIds
from millicent.core.money import Money
from millicent.ledger.queries import GroupBy, ReceiptFilter, Sample, Totals
from millicent.watch.burn import Target, budget_findings, latency_findings
from millicent.watch.causes import causes
from millicent.watch.config import AlertConfig
from millicent.watch.coverage import coverage_findings
from millicent.watch.drift import drift_findings
from millicent.watch.findings import Cause
from millicent.watch.store import read_alerts
from millicent.watch.watcher import Watcher
from support.watched_traffic import DAY_NS, QUARTER_NS, START_NS, Flow, WatchedLedger, pass_time, steady

HOUR_NS = 3600 * NS_PER_S
# Noon of the third day of a month.
NOW_NS = START_NS + 2 * DAY_NS + 12 * HOUR_NS
MONTH = Budget(name="team", limit=Money.from_usd(720), every=Every.MONTH)  # a dollar in each of 720 hours, about


class Spent:
    """A ledger in which so much was spent in each quarter-hour, as dollars of `usd(start)`."""

    def __init__(self, usd_at: dict[int, str], otherwise: str = "0.25") -> None:
        self._usd_at = usd_at
        self._otherwise = otherwise
        self.asked: list[ReceiptFilter] = []

    def totals(self, by: GroupBy, where: ReceiptFilter) -> list[Totals]:
        self.asked.append(where)
        assert where.from_ns is not None
        assert where.to_ns is not None
        starts = range(where.from_ns, min(where.to_ns, NOW_NS), QUARTER_NS)
        cost = Money.total(
            Money.from_usd(Decimal(self._usd_at.get((NOW_NS - start) // QUARTER_NS, self._otherwise)))
            for start in starts
        )
        return [Totals(None, 1, 0, 0, 0, cost, 0, 0, 0)]


def burning(spent: str, usd_at: dict[int, str], budget: Budget = MONTH) -> list[str]:
    balance = Balance("", *budget.every.period_ns(NOW_NS)[:1], Money.from_usd(spent), Money(0))
    found = budget_findings("r", AlertConfig(), [(budget, [balance])], Spent(usd_at), NOW_NS)
    return [finding.subject.figure for finding in found]


def test_a_budget_that_is_spent_evenly_is_not_told_of() -> None:
    assert burning("60", {}) == []


def test_a_fast_burn_is_told_of_while_it_lasts() -> None:
    hour = dict.fromkeys(range(5), "4")  # sixteen dollars an hour
    assert burning("76", hour) == ["burn"]
    over = {**dict.fromkeys(range(3, 6), "6"), 0: "0.25", 1: "0.25", 2: "0.25"}
    assert burning("76", over) == []


def test_a_slow_burn_is_told_of_too() -> None:
    assert burning("130", dict.fromkeys(range(97), "0.75")) == ["burn"]


def test_a_burst_that_the_budget_outlasts_is_not_told_of() -> None:
    rich = msgspec.structs.replace(MONTH, limit=Money.from_usd(100_000))
    assert burning("76", dict.fromkeys(range(5), "4"), rich) == []


@pytest.mark.parametrize(("spent", "told"), [("575.99", []), ("576", ["spent_80"]), ("720", ["spent_80", "spent_100"])])
def test_each_share_that_is_spent_is_told_of_once_it_is_reached(spent: str, told: list[str]) -> None:
    assert [figure for figure in burning(spent, {}) if figure != "burn"] == told


def test_a_budget_of_each_key_asks_for_that_keys_spending_only() -> None:
    each = msgspec.structs.replace(MONTH, per="key", limit=Money.from_usd(10))
    spending = Spent({}, otherwise="1")
    balances = [Balance(key, START_NS, Money.from_usd(5), Money(0)) for key in ("key_a", "")]
    found = budget_findings("r", AlertConfig(), [(each, balances)], spending, NOW_NS)
    assert [finding.subject.member for finding in found] == ["team/key_a", "team/"]
    assert {where.key for where in spending.asked} == {"key_a", ""}
    only = AlertConfig(keys=("key_b",))
    assert budget_findings("r", only, [(each, balances)], spending, NOW_NS) == []


def targets(missed_of_100: int, quarters: range) -> list[Target]:
    return [Target(NOW_NS - back * QUARTER_NS, "chat", 100, 100 - missed_of_100) for back in quarters]


@pytest.mark.parametrize(
    ("seen", "told"),
    [
        (targets(3, range(1, 30)), 0),
        (targets(40, range(1, 5)), 1),
        (targets(40, range(5, 9)), 0),  # it is over
        (targets(20, range(1, 25)), 1),  # slowly
        ([Target(NOW_NS - QUARTER_NS, "chat", 5, 0)], 0),  # too few to tell
    ],
)
def test_targets_that_are_missed_too_often_are_told_of(seen: list[Target], told: int) -> None:
    found = latency_findings("r", AlertConfig(), seen, NOW_NS)
    assert len(found) == told
    assert latency_findings("r", AlertConfig(features=("other",)), seen, NOW_NS) == []


def test_missed_targets_come_from_the_receipts_and_end_when_they_are_met_again() -> None:
    from_ns, to_ns = START_NS + 4 * HOUR_NS, START_NS + 6 * HOUR_NS

    def plan(at_ns: int) -> list[Flow]:
        return [Flow("chat", met=not from_ns <= at_ns < to_ns)]

    ledger, clock = WatchedLedger(plan), ManualClock(START_NS)
    rules = {"targets": AlertConfig(watch=("latency",))}
    watcher = Watcher(rules, ledger=ledger, queries=ledger, clock=clock, ids=SequentialIds())
    pass_time(watcher.tick, clock, START_NS + 14 * HOUR_NS)
    (alert,) = read_alerts(ledger.connection)
    assert alert.subject.member == "chat"
    assert from_ns < alert.opened_at_ns <= from_ns + HOUR_NS + QUARTER_NS
    assert alert.resolved_at_ns is not None
    assert alert.resolved_at_ns <= to_ns + 2 * HOUR_NS


def growing(at_ns: int) -> list[Flow]:
    """The prompts of `search` grow by a percent a day: nothing an anomaly would be."""
    search, other = steady(at_ns)
    days = (at_ns - START_NS) // DAY_NS
    return [msgspec.structs.replace(search, tokens=1000 + 10 * days, per_quarter=10), other]


def test_what_grows_slowly_is_told_against_a_fixed_week_though_not_against_the_last() -> None:
    ledger, now_ns = WatchedLedger(growing), START_NS + 36 * DAY_NS
    assert drift_findings("r", AlertConfig(features=("search",)), ledger, now_ns) == []
    fixed = AlertConfig(features=("search",), baseline=date(2026, 1, 1))
    (found,) = drift_findings("r", fixed, ledger, now_ns)
    assert (found.subject.figure, found.subject.member) == ("tokens", "search")
    assert found.title.endswith("% more than in the week from 2026-01-01.")


def test_what_has_no_key_where_nothing_has_one_is_told_of_once() -> None:
    """It is everything, which is told of already; beside something that has one it is a member like others."""

    def plan(at_ns: int) -> list[Flow]:
        days = (at_ns - START_NS) // DAY_NS
        return [Flow("search", key="", tokens=1000 + 100 * days), Flow("other", key=key, per_quarter=10)]

    key, ledger = "", WatchedLedger(plan)
    now_ns = START_NS + 16 * DAY_NS

    def whose() -> set[tuple[str, str]]:
        found = drift_findings("r", AlertConfig(), ledger, now_ns)
        return {(each.subject.dimension, each.subject.member) for each in found}

    assert whose() == {("all", ""), ("feature", "search")}
    key = "key_2"
    assert whose() == {("all", ""), ("feature", "search"), ("key", "")}


def test_an_open_drift_alert_shows_how_it_stands_and_at_worst() -> None:
    """Another user's prompts are four times as long, for a day and a half."""

    def plan(at_ns: int) -> list[Flow]:
        days = (at_ns - START_NS) / DAY_NS
        ada = Flow("search", per_quarter=2)
        return [ada, Flow("search", key="key_2", user="bob", per_quarter=2, tokens=4000)] if 7 <= days < 8.5 else [ada]

    ledger, clock = WatchedLedger(plan), ManualClock(START_NS + 7 * DAY_NS + QUARTER_NS)
    rules = {"slow": AlertConfig(watch=("drift",), features=("search",))}
    watcher = Watcher(rules, ledger=ledger, queries=ledger, clock=clock, ids=SequentialIds())
    seen = []
    for _ in range(8):
        pass_time(watcher.tick, clock, clock.now_ns() + 8 * HOUR_NS, step_ns=8 * HOUR_NS)
        seen += read_alerts(ledger.connection, only_open=True)
    first, last = seen[0], seen[-1]
    assert first.id == last.id
    assert last.opened_with == first.opened_with
    assert last.peak > last.opened_with  # of as many digits
    assert last.facts["value"] > last.opened_with
    assert last.facts["value"] in last.title
    assert {(cause.dimension, cause.member) for cause in first.causes} == {("user", "bob"), ("key", "key_2")}


class Day:
    """A ledger of one day, by feature and model."""

    def __init__(self, *groups: tuple[str, int, int]) -> None:
        self._groups = groups

    def totals(self, by: GroupBy, where: ReceiptFilter) -> list[Totals]:
        return [
            Totals(name, requests, 0, 0, 0, Money(0), unpriced, 0, 0)
            for name, requests, unpriced in self._groups
            if where.feature in {None, name}
        ]

    def samples(self, where: ReceiptFilter, *, most: int) -> list[Sample]:
        raise AssertionError("sums tell it")


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        ((("chat", 900, 0), ("", 100, 0)), []),
        ((("chat", 900, 49), ("", 100, 0)), []),
        ((("chat", 900, 50), ("", 100, 0)), ["unpriced"]),
        ((("chat", 700, 0), ("", 300, 0)), ["unattributed"]),
        ((("", 1000, 0),), []),  # who names no feature anywhere doesn't want them
        ((("chat", 10, 10), ("", 20, 20)), []),  # too few to tell
        ((), []),
    ],
)
def test_requests_without_a_price_or_a_feature_are_told_of(
    groups: tuple[tuple[str, int, int], ...], told: list[str]
) -> None:
    found = coverage_findings("r", AlertConfig(), Day(*groups), NOW_NS)
    assert [finding.subject.figure for finding in found] == told
    assert coverage_findings("r", AlertConfig(features=("chat",)), Day(*groups), NOW_NS) == []


def test_who_has_most_of_what_has_no_price_is_named() -> None:
    ledger = Day(("large", 600, 90), ("small", 400, 10))
    (found,) = coverage_findings("r", AlertConfig(), ledger, NOW_NS)
    assert found.title == (
        "100 of 1,000 requests of the last 24 hours (10%) have no known price and are in no cost: "
        "price their models in [prices.NAME], or their machine in [placements.NAME]."
    )
    assert Cause("model", "large", 90) in causes(ledger, found.change)


def test_who_spends_a_budget_and_who_misses_a_target_is_named() -> None:
    def plan(at_ns: int) -> list[Flow]:
        late = at_ns >= START_NS + 8 * DAY_NS
        return [
            Flow("chat", user="ada", nanousd=1_000_000, met=True),
            Flow("chat", key="key_2", user="mallory", nanousd=9_000_000, met=not late),
        ]

    ledger, clock = WatchedLedger(plan), ManualClock(START_NS + 8 * DAY_NS)
    budget = Budget(name="chat", limit=Money.from_usd(1), every=Every.DAY, per="feature")
    ledger.balances = [(budget, [Balance("chat", START_NS + 8 * DAY_NS, Money.from_usd("0.9"), Money(0))])]
    rules = {"r": AlertConfig(watch=("latency", "budget"), spent_percent=(80,))}
    watcher = Watcher(rules, ledger=ledger, queries=ledger, clock=clock, ids=SequentialIds())
    pass_time(watcher.tick, clock, START_NS + 8 * DAY_NS + 3 * HOUR_NS)
    found = {alert.subject.figure: alert for alert in read_alerts(ledger.connection)}
    assert {"spent_80", "target"} <= set(found)
    for figure in ("spent_80", "target"):
        who = {(cause.dimension, cause.member): cause.percent for cause in found[figure].causes}
        assert who["user", "mallory"] >= 85
        assert who["key", "key_2"] >= 85
        assert found[figure].receipts == {"feature": "chat"}
