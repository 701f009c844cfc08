"""Weeks of traffic in which something goes wrong: what is told, of whom, and when it is over."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from millicent.core.clock import NS_PER_S, ManualClock
from millicent.core.identifiers import SequentialIds
from millicent.watch.config import AlertConfig
from millicent.watch.messages import message_body
from millicent.watch.store import Alert, Changes, read_alerts
from millicent.watch.watcher import Watcher
from support.watched_traffic import DAY_NS, QUARTER_NS, START_NS, Flow, Plan, WatchedLedger, pass_time, steady

HOUR_NS = 3600 * NS_PER_S
# Late enough that the week is known; the trouble begins in a night.
WRONG_NS = START_NS + 9 * DAY_NS + 2 * HOUR_NS


def changed(**changes: object) -> Plan:
    """Steady, but for what `search` is from then on, for six hours."""

    def plan(at_ns: int) -> list[Flow]:
        search, *others = steady(at_ns)
        wrong = WRONG_NS <= at_ns < WRONG_NS + 6 * HOUR_NS
        return [msgspec.structs.replace(search, **changes) if wrong else search, *others]

    return plan


def watched(plan: Plan, until_ns: int, **config: object) -> list[Alert]:
    """What was noticed by then, oldest first."""
    ledger, clock = WatchedLedger(plan), ManualClock(START_NS)
    rules = {"all": AlertConfig(**{"watch": ("anomaly",), "features": ("search",)} | config)}  # type: ignore[arg-type]
    watcher = Watcher(rules, ledger=ledger, queries=ledger, clock=clock, ids=SequentialIds())
    pass_time(watcher.tick, clock, until_ns)
    return sorted(read_alerts(ledger.connection), key=lambda alert: alert.opened_at_ns)


@pytest.mark.parametrize(
    ("figure", "changes"),
    [
        ("cost", {"nanousd": 8_000_000}),
        ("latency", {"took_ms": 4000}),
        ("errors", {"failed": 0.5}),
        ("tokens", {"tokens": 3000}),
        ("cache", {"cached": 0.0}),
    ],
)
def test_what_goes_wrong_is_noticed_within_the_hour_and_told_to_be_over(
    figure: str, changes: dict[str, object]
) -> None:
    found = watched(changed(**changes), WRONG_NS + DAY_NS, figures=(figure,))
    assert found, "nothing was noticed"
    alert = next(alert for alert in found if alert.opened_at_ns > WRONG_NS)
    assert (alert.subject.figure, alert.subject.member) == (figure, "search")
    assert WRONG_NS <= alert.since_ns <= WRONG_NS + HOUR_NS
    assert alert.opened_at_ns - alert.since_ns < HOUR_NS
    assert alert.resolved_at_ns is not None
    assert len(found) - found.index(alert) <= 2, "one thing that went wrong is told of once, and at most its end"


def test_quiet_weeks_bring_at_most_one_false_alert_a_week_and_series() -> None:
    found = watched(steady, START_NS + 14 * DAY_NS)
    series = 5
    assert len(found) <= 2 * series


def test_who_made_it_is_named() -> None:
    def plan(at_ns: int) -> list[Flow]:
        more = [Flow("search", key="key_9", user="mallory", per_quarter=90)] if at_ns >= WRONG_NS else []
        return [*steady(at_ns), *more]

    found = watched(plan, WRONG_NS + 2 * HOUR_NS, figures=("cost",))
    causes = {(cause.dimension, cause.member): cause.percent for cause in found[-1].causes}
    assert causes["user", "mallory"] > 60
    assert causes["key", "key_9"] > 60
    assert found[-1].title.startswith('The cost of feature "search" rose to ')


def test_where_nothing_has_a_key_an_anomaly_of_what_has_none_is_not_told_beside_everything_s() -> None:
    def plan(at_ns: int) -> list[Flow]:
        dearer = START_NS + 10 * DAY_NS <= at_ns < START_NS + 10 * DAY_NS + DAY_NS // 4
        return [Flow("search", key="", nanousd=20_000_000 if dearer else 2_000_000)]

    found = watched(plan, START_NS + 11 * DAY_NS, figures=("cost",), features=())
    assert {each.subject.dimension for each in found} == {"all", "feature", "model"}


def test_a_model_that_takes_over_is_noticed() -> None:
    def plan(at_ns: int) -> list[Flow]:
        search, other = steady(at_ns)
        return [msgspec.structs.replace(search, model="large") if at_ns >= WRONG_NS else search, other]

    found = watched(plan, WRONG_NS + 3 * HOUR_NS, figures=("mix",), features=())
    assert {alert.subject.member for alert in found if alert.opened_at_ns > WRONG_NS} == {"small", "large"}


def test_a_gateway_that_starts_on_an_old_ledger_writes_down_what_was_and_tells_nothing_old() -> None:
    ledger = WatchedLedger(changed(nanousd=9_000_000))
    clock = ManualClock(WRONG_NS + DAY_NS)
    rules = {"all": AlertConfig(watch=("anomaly",), features=("search",), figures=("cost",))}
    watcher = Watcher(rules, ledger=ledger, queries=ledger, clock=clock, ids=SequentialIds(), webhooks=frozenset(rules))

    async def catch_up() -> None:
        while await watcher.tick():
            pass

    asyncio.run(catch_up())
    found = [alert for alert in read_alerts(ledger.connection) if alert.opened_at_ns > WRONG_NS]
    assert found
    assert all(alert.resolved_at_ns is not None and alert.resolved_at_ns < clock.now_ns() for alert in found)
    (messages,) = ledger.connection.execute("SELECT count(*) FROM alert_messages").fetchone()
    assert messages == 0
    (seen,) = ledger.connection.execute("SELECT count(*) FROM watch_series").fetchone()
    assert seen == 1


def test_of_several_gateways_one_writes_and_sends() -> None:
    ledger, clock = WatchedLedger(changed(nanousd=9_000_000)), ManualClock(START_NS)
    rules = {"all": AlertConfig(watch=("anomaly",), features=("search",), figures=("cost",))}
    ids = SequentialIds()
    first, second = (
        Watcher(rules, ledger=ledger, queries=ledger, clock=clock, ids=ids, webhooks=frozenset({"all"}))
        for _ in range(2)
    )

    async def both() -> bool:
        one, other = await asyncio.gather(first.tick(), second.tick())
        return one or other

    pass_time(both, clock, WRONG_NS + 2 * HOUR_NS)
    opened = [alert for alert in read_alerts(ledger.connection) if alert.opened_at_ns > WRONG_NS]
    bodies = [body for (body,) in ledger.connection.execute("SELECT body FROM alert_messages")]
    assert len(opened) == 1
    assert sum(opened[0].id in body for body in bodies) == 1


def test_a_rule_that_is_gone_leaves_nothing_open() -> None:
    ledger, clock = WatchedLedger(changed(nanousd=9_000_000)), ManualClock(START_NS)
    rules = {"old": AlertConfig(watch=("anomaly",), features=("search",), figures=("cost",))}
    pass_time(
        Watcher(rules, ledger=ledger, queries=ledger, clock=clock, ids=SequentialIds()).tick,
        clock,
        WRONG_NS + HOUR_NS,
    )
    assert read_alerts(ledger.connection, only_open=True)
    renamed = Watcher(
        {"new": AlertConfig(watch=("budget",))}, ledger=ledger, queries=ledger, clock=clock, ids=SequentialIds()
    )
    pass_time(renamed.tick, clock, clock.now_ns() + QUARTER_NS)
    assert read_alerts(ledger.connection, only_open=True) == []


def test_names_cannot_mention_a_channel() -> None:
    def plan(at_ns: int) -> list[Flow]:
        hostile = msgspec.structs.replace(steady(at_ns)[0], feature="<!channel>")
        return [msgspec.structs.replace(hostile, nanousd=20_000_000 if at_ns >= WRONG_NS else hostile.nanousd)]

    found = watched(plan, WRONG_NS + HOUR_NS, figures=("cost",), features=("<!channel>",))
    body = message_body("all", Changes(tuple(found), ()))
    assert body is not None
    assert "<" not in body
    assert "&lt;!channel&gt;" in body
