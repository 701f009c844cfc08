"""What is told and when: quiet hours, mutes, a webhook that is down; and the message's form."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from contextlib import closing

import pytest

from millicent.core.clock import NS_PER_HOUR, NS_PER_S, ManualClock, parse_time_ns
from millicent.core.errors import ConfigError
from millicent.core.identifiers import SequentialIds
from millicent.watch import store
from millicent.watch.config import AlertConfig
from millicent.watch.messages import message_body
from millicent.watch.watcher import Watcher
from support.alert_looks import NOW_NS, evaluation
from support.watched_traffic import START_NS, Flow, WatchedLedger, alert_tables, pass_time

QUARTER_NS = NS_PER_HOUR // 4


class Looks:
    """One look each quarter-hour, in which these features cost so much; what it told."""

    def __init__(self) -> None:
        self.connection = alert_tables()
        weakref.finalize(self, self.connection.close)
        self.at_ns = NOW_NS
        self._ids = SequentialIds()
        self._before_ns = -1

    def look(self, dear: Mapping[str, float], *, quiet: bool = False) -> tuple[list[str], list[str]]:
        """Features of which it was told that they are dear, and that they no longer are."""
        found = evaluation(at_ns=self.at_ns, before_ns=self._before_ns)
        for member, size in dear.items():
            found.looks[0] = store.Look(
                self.at_ns,
                frozenset({"anomaly"}),
                [*found.looks[0].findings, *evaluation(member, size=size).looks[0].findings],
            )
        changes = store.commit(self.connection, found, self._ids, ["ops"] if quiet else [])
        assert changes is not None
        self._before_ns, self.at_ns = self.at_ns, self.at_ns + QUARTER_NS
        opened, over = ([alert.subject.member for alert in alerts] for alerts in (changes.opened, changes.resolved))
        return opened, over


def test_what_still_goes_on_when_quiet_hours_end_is_told_then_and_what_came_and_went_is_not() -> None:
    looks = Looks()
    assert looks.look({"a": 4, "b": 4}) == (["a", "b"], [])
    assert looks.look({"a": 4, "night": 4, "long": 4}, quiet=True) == ([], [])
    assert looks.look({"a": 4, "long": 4}, quiet=True) == ([], [])
    assert looks.look({"a": 4, "long": 9}) == (["long"], ["b"])
    assert looks.look({"a": 4, "long": 9}) == ([], [])
    assert looks.look({}) == ([], ["a", "long"])


def test_a_mute_lasts_as_long_as_it_was_said_and_is_of_its_rule_only() -> None:
    looks = Looks()
    store.mute(looks.connection, "others", NOW_NS + 10 * NS_PER_HOUR)
    assert looks.look({"a": 4}) == (["a"], [])
    store.mute(looks.connection, "ops", NOW_NS + 2 * QUARTER_NS)
    assert looks.look({"a": 4, "b": 4}) == ([], [])
    assert looks.look({"a": 4, "b": 4}) == (["b"], [])
    store.mute(looks.connection, "ops", looks.at_ns + NS_PER_HOUR)
    store.mute(looks.connection, "ops", looks.at_ns)  # and no longer
    assert looks.look({"a": 4, "b": 4, "c": 4}) == (["c"], [])


def test_what_waits_to_be_sent_waits_while_its_rule_is_muted() -> None:
    with closing(alert_tables()) as connection:
        store.add_messages(connection, [("ops", "{}")], SequentialIds(), NOW_NS)
        store.mute(connection, "ops", NOW_NS + NS_PER_HOUR)
        assert store.claim_message(connection, ["ops"], NOW_NS, NS_PER_S) is None
        assert store.claim_message(connection, ["ops"], NOW_NS + NS_PER_HOUR, NS_PER_S) is not None


@pytest.mark.parametrize(
    ("hours", "zone", "quiet"),
    [
        ("22:00-07:00", "UTC", ["22:00", "23:59", "00:00", "06:59"]),
        ("12:00-23:30", "UTC", ["12:00", "22:00", "23:29"]),
        ("22:00-07:00", "America/New_York", ["06:59", "07:00", "11:59"]),  # 01:59, 02:00, 06:59 there
    ],
)
def test_quiet_hours_are_by_the_clocks_of_their_zone_and_may_pass_midnight(
    hours: str, zone: str, quiet: list[str]
) -> None:
    config = AlertConfig(quiet_hours=hours, timezone=zone)
    config.check("ops")
    times = ["00:00", "06:59", "07:00", "11:59", "12:00", "21:59", "22:00", "23:29", "23:30", "23:59"]
    times = sorted({*times, *quiet})
    found = [time for time in times if config.is_quiet(parse_time_ns(f"2026-01-15T{time}"))]
    assert set(quiet) <= set(found)
    assert not AlertConfig().is_quiet(NOW_NS)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (AlertConfig(quiet_hours="08:00-08:00"), "quiet_hours"),
        (AlertConfig(timezone="Mars/Olympus"), "timezone"),
        (AlertConfig(pages_url="millicent.example.com"), "pages_url"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(config: AlertConfig, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"\[alerts.ops\] {told}"):
        config.check("ops")


def test_a_restart_tells_nothing_twice() -> None:
    ledger, clock = (
        WatchedLedger(lambda at_ns: [Flow("chat", met=at_ns < START_NS + 4 * NS_PER_HOUR)]),
        ManualClock(START_NS),
    )
    rules = {"ops": AlertConfig(watch=("latency",))}
    for _ in range(4):  # each a gateway that knows only what stands in the ledger
        watcher = Watcher(
            rules, ledger=ledger, queries=ledger, clock=clock, ids=SequentialIds(), webhooks=frozenset(rules)
        )
        pass_time(watcher.tick, clock, clock.now_ns() + 2 * NS_PER_HOUR)
    bodies = [json.loads(body) for (body,) in ledger.connection.execute("SELECT body FROM alert_messages")]
    assert ["missed their latency target" in body["text"] for body in bodies] == [True]
    (alert,) = store.read_alerts(ledger.connection)
    assert alert.seen_at_ns == clock.now_ns()


def test_a_message_has_the_form_that_slack_documents() -> None:
    """`text`, and attachments of the fields of its reference for secondary attachments; links only to our pages."""
    looks = Looks()
    names = [f"f{number}" for number in range(11)] + ["https://evil.example/<!channel>&"]
    changes = store.commit(looks.connection, evaluation(*names), SequentialIds())
    assert changes is not None
    body = json.loads(message_body("ops", changes, "https://millicent.example.com/") or "")
    assert set(body) == {"text", "attachments"}
    assert body["text"].startswith(':rotating_light: The cost of feature "f0" rose to $4.00 an hour')
    assert body["text"].endswith("and 2 more on the Alerts page")
    assert len(body["attachments"]) == 10  # of at most 20
    for each in body["attachments"]:
        assert set(each) == {"color", "fallback", "title", "title_link", "fields", "footer", "ts"}
        assert each["color"] == "danger"
        assert isinstance(each["ts"], int)
        assert all(set(field) == {"title", "value", "short"} for field in each["fields"])
        assert {"title": "most of it", "value": "user mallory 92%, key (none) 40%", "short": True} in each["fields"]
    link = body["attachments"][0]["title_link"]
    assert link == "https://millicent.example.com/receipts?from=2026-01-01T00%3A00%3A00&feature=f0"


def test_the_end_is_told_with_the_worst_that_it_was() -> None:
    looks = Looks()
    looks.look({"a": 4})
    looks.look({"a": 9})
    looks.look({"a": 5})
    over = store.commit(
        looks.connection, evaluation(at_ns=looks.at_ns, before_ns=looks.at_ns - QUARTER_NS), SequentialIds()
    )
    assert over is not None
    (told,) = json.loads(message_body("ops", over) or "")["attachments"]
    fields = {field["title"]: field["value"] for field in told["fields"]}
    assert (fields["value"], fields["at first"], fields["at worst"]) == ("$5.00", "$4.00", "$9.00")
    assert fields["over at"] == "2026-01-01 00:45 UTC"
    assert told["color"] == "good"


def test_names_that_look_like_addresses_or_mentions_are_neither() -> None:
    looks = Looks()
    changes = store.commit(looks.connection, evaluation("https://evil.example/<!channel>&"), SequentialIds())
    assert changes is not None
    body = message_body("ops", changes) or ""
    assert "://" not in body
    assert "<" not in body
    assert "&lt;!channel&gt;&amp;" in body
