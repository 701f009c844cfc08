"""What is posted, to a real server; and the same tables in a real ledger."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from millicent.core.budgets import Budget, Every
from millicent.core.clock import NS_PER_S, ManualClock
from millicent.core.errors import ConfigError
from millicent.core.identifiers import SequentialIds
from millicent.core.money import Money
from millicent.ledger.budgets import put_budget
from millicent.ledger.config import LedgerConfig
from millicent.ledger.queries import LedgerQueries, ReceiptFilter
from millicent.ledger.sqlite import SqliteLedger
from millicent.watch.alerting import webhooks_of
from millicent.watch.config import AlertConfig
from millicent.watch.notifier import Notifier, Webhook
from millicent.watch.store import add_messages, read_alerts, undelivered
from millicent.watch.watcher import Watcher
from support import receipts
from support.http_server import Handler, http_server
from support.watched_traffic import WatchedLedger


@dataclass
class Hook:
    """A webhook that answers each post with the next of `statuses`, then 200."""

    statuses: list[int] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""


@contextmanager
def hook(*statuses: int) -> Iterator[Hook]:
    made = Hook(list(statuses))

    class Told(Handler):
        def do_POST(self) -> None:
            made.bodies.append(json.loads(self.read_body()))
            self.send(made.statuses.pop(0) if made.statuses else 200, headers={"Location": "/elsewhere"})

    with http_server(Told) as url:
        made.url = f"{url}/hook"
        yield made


def posted(made: Hook, clock: ManualClock, waits_s: list[int], *, private: bool = True) -> WatchedLedger:
    """A message, and a look for what is due after each wait."""
    ledger = WatchedLedger()
    add_messages(ledger.connection, [("ops", '{"text": "too dear"}')], SequentialIds(), clock.now_ns())

    async def run() -> None:
        notifier = Notifier({"ops": Webhook(made.url, private)}, ledger=ledger, clock=clock)
        for wait_s in waits_s:
            clock.advance(wait_s * NS_PER_S)
            await notifier.deliver()

    asyncio.run(run())
    return ledger


def test_a_message_arrives_once() -> None:
    with hook() as made:
        ledger = posted(made, ManualClock(), [0, 60, 3600])
    assert made.bodies == [{"text": "too dear"}]
    assert undelivered(ledger.connection) == []


def test_what_is_not_taken_is_sent_again_later_and_later() -> None:
    with hook(500, 302, 429) as made:
        ledger = posted(made, ManualClock(), [0, 14, 1, 29, 1, 59, 1, 3600])
        assert len(made.bodies) == 4
    assert undelivered(ledger.connection) == []


def test_a_webhook_that_is_down_for_an_hour_loses_nothing() -> None:
    ledger, clock, ids = WatchedLedger(), ManualClock(), SequentialIds()
    with hook(*[503] * 1000) as made:

        async def run() -> None:
            notifier = Notifier({"ops": Webhook(made.url, True)}, ledger=ledger, clock=clock)
            for minute in range(60):
                if minute % 20 == 0:
                    add_messages(ledger.connection, [("ops", json.dumps({"text": minute}))], ids, clock.now_ns())
                clock.advance(60 * NS_PER_S)
                await notifier.deliver()
            made.statuses.clear()
            made.bodies.clear()
            clock.advance(3600 * NS_PER_S)
            # The gateway was started anew meanwhile.
            await Notifier({"ops": Webhook(made.url, True)}, ledger=ledger, clock=clock).deliver()

        asyncio.run(run())
    assert [body["text"] for body in made.bodies] == [0, 20, 40]


def test_after_a_day_it_is_given_up_and_said() -> None:
    with hook(*[500] * 100) as made:
        ledger = posted(made, ManualClock(), [0, *[3600] * 40])
    assert len(made.bodies) <= 27
    ((rule, error, _),) = undelivered(ledger.connection)
    assert (rule, error) == ("ops", "the answer was 500")


def test_nothing_is_posted_to_this_machine_unless_that_is_allowed() -> None:
    with hook() as made:
        ledger = posted(made, ManualClock(), [0], private=False)
        by_name = Hook(url=made.url.replace("127.0.0.1", "localhost"))
        posted(by_name, ManualClock(), [0], private=False)
        assert made.bodies == []
    assert "private_targets" in undelivered(ledger.connection)[0][1]


def test_a_hook_that_nobody_answers_is_tried_again_without_telling_its_address() -> None:
    with hook() as made:
        url = made.url
    ledger = posted(Hook(url=url + "?secret=1"), ManualClock(), [0])
    assert "secret" not in undelivered(ledger.connection)[0][1]


def test_two_notifiers_send_a_message_once() -> None:
    with hook() as made:
        ledger, clock = WatchedLedger(), ManualClock()
        bodies = [("ops", json.dumps({"text": str(number)})) for number in range(6)]
        add_messages(ledger.connection, bodies, SequentialIds(), clock.now_ns())

        async def run() -> None:
            both = [Notifier({"ops": Webhook(made.url, True)}, ledger=ledger, clock=clock) for _ in range(2)]
            await asyncio.gather(*(each.deliver() for each in both))

        asyncio.run(run())
        assert sorted(body["text"] for body in made.bodies) == [str(number) for number in range(6)]


def test_an_address_comes_from_the_environment_or_a_file_and_is_never_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hook").write_text("https://hooks.example.com/abc\n")
    monkeypatch.setenv("A_HOOK", "https://hooks.example.com/def")
    rules = {
        "file": AlertConfig(webhook_file=str(tmp_path / "hook")),
        "env": AlertConfig(webhook_env="A_HOOK"),
        "none": AlertConfig(),
    }
    found = webhooks_of(rules)
    assert {name: each.url[-3:] for name, each in found.items()} == {"file": "abc", "env": "def"}
    monkeypatch.setenv("A_HOOK", "mysecret")
    with pytest.raises(ConfigError, match=r"\[alerts.env\] webhook_env: holds no address") as told:
        webhooks_of(rules)
    assert "mysecret" not in str(told.value)
    monkeypatch.delenv("A_HOOK")
    with pytest.raises(ConfigError, match="A_HOOK is not set"):
        webhooks_of(rules)


def test_in_a_real_ledger_a_budget_that_is_spent_is_told_once_by_one_of_two_gateways(tmp_path: Path) -> None:
    clock = ManualClock(receipts.START_NS)
    queries = LedgerQueries(tmp_path / "ledger.db")
    closed = receipts.settled()
    latency = msgspec.structs.replace(closed, policy={"latency_target_met": "false"})

    async def run(url: str) -> None:
        ledger = SqliteLedger(tmp_path / "ledger.db", LedgerConfig(), clock, "gw_1")
        await ledger.start()
        try:
            budget = Budget(name="tiny", limit=Money(25_000), every=Every.DAY, hard=False)
            await ledger.write(lambda connection: put_budget(connection, budget))
            await ledger.open(receipts.running())
            await ledger.close(latency, ())
            clock.advance(120 * NS_PER_S)
            rules = {"ops": AlertConfig(webhook_env="A_HOOK")}
            for _ in range(2):
                watcher = Watcher(
                    rules,
                    ledger=ledger,
                    queries=queries,
                    clock=clock,
                    ids=SequentialIds(),
                    webhooks=frozenset(rules),
                )
                await watcher.tick()
            await Notifier({"ops": Webhook(url, True)}, ledger=ledger, clock=clock).deliver()
        finally:
            await ledger.stop()

    with hook() as made:
        asyncio.run(run(made.url))
    found = queries.ask(read_alerts)
    assert found is not None
    assert {alert.subject.figure for alert in found} == {"spent_80", "spent_100"}
    (body,) = made.bodies
    assert "is spent, 100%." in body["text"]
    (sample,) = queries.samples(ReceiptFilter(), most=10)
    assert (sample.feature, sample.input_tokens, sample.met) == ("search", 12, False)
    assert queries.first_created_ns() == receipts.START_NS


def test_of_many_receipts_about_as_many_are_looked_at_as_asked_for(tmp_path: Path) -> None:
    clock = ManualClock(receipts.START_NS)

    async def fill() -> None:
        ledger = SqliteLedger(tmp_path / "ledger.db", LedgerConfig(), clock, "gw_1")
        await ledger.start()
        await asyncio.gather(*(ledger.close(receipts.settled(f"rcpt_{number:026d}"), ()) for number in range(60)))
        await ledger.stop()

    asyncio.run(fill())
    queries = LedgerQueries(tmp_path / "ledger.db")
    assert len(queries.samples(ReceiptFilter(), most=60)) == 60
    assert 10 <= len(queries.samples(ReceiptFilter(), most=20)) <= 40
