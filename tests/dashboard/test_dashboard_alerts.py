"""The Alerts page, its JSON, and the same on the command line."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
from starlette.testclient import TestClient

from millicent.cli import run
from millicent.core.clock import NS_PER_S, ManualClock
from millicent.core.identifiers import SequentialIds
from millicent.dashboard.alerts import alerts_page
from millicent.dashboard.site import Alone, Queries
from millicent.ledger.config import LedgerConfig
from millicent.ledger.schema import write_once
from millicent.watch import store
from support.alert_looks import NOW_NS, evaluation
from support.pages import pages_of, site_of
from support.watched_traffic import alert_tables

T = TypeVar("T")
HOSTILE = "<script>alert(1)</script>"
CLOCK = ManualClock(NOW_NS)


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    with closing(alert_tables()) as made:
        yield made


def browser(connection: sqlite3.Connection, queries: Queries) -> TestClient:
    def ask(question: Callable[[sqlite3.Connection], T]) -> T | None:
        return question(connection)

    async def write(operation: Callable[[sqlite3.Connection], None]) -> None:
        operation(connection)

    page = partial(alerts_page, ask=ask, write=write, rules=["ops"], told=["ops"])
    return pages_of(site_of(queries, CLOCK, visitor=lambda _: Alone(form_token="t")), page)


def test_an_alert_says_what_changed_who_caused_it_and_since_when(
    connection: sqlite3.Connection, queries: Queries
) -> None:
    store.commit(connection, evaluation("search"), SequentialIds())
    page = browser(connection, queries).get("/alerts").text
    assert "rose to $4.00 an hour" in page
    assert "2026-01-01 00:00:00 UTC" in page
    assert 'href="/receipts?from=2026-01-01T00%3A00%3A00&amp;feature=search&amp;user=mallory"' in page
    assert "(92%)" in page
    assert 'href="/receipts?from=2026-01-01T00%3A00%3A00&amp;feature=search&amp;none=key"' in page


def test_names_are_only_text(connection: sqlite3.Connection, queries: Queries) -> None:
    store.commit(connection, evaluation(HOSTILE), SequentialIds())
    assert HOSTILE not in browser(connection, queries).get("/alerts").text


def test_what_is_over_moves_to_the_table_and_its_csv(connection: sqlite3.Connection, queries: Queries) -> None:
    ids = SequentialIds()
    store.commit(connection, evaluation("search"), ids)
    store.commit(connection, evaluation(at_ns=NOW_NS + 10**12), ids)
    client = browser(connection, queries)
    assert "Nothing is unusual now" in client.get("/alerts").text
    assert '"The cost of feature ""search"" rose' in client.get("/alerts?csv=past").text
    (alert,) = client.get("/alerts.json").json()["data"]
    assert (alert["state"], alert["causes"][0]["member"]) == ("resolved", "mallory")


def test_an_open_alert_shows_how_it_stands_and_what_it_was_at_first_and_at_worst(
    connection: sqlite3.Connection, queries: Queries
) -> None:
    ids, minute_ns = SequentialIds(), 60 * NS_PER_S
    for number, size in enumerate((4, 9, 6)):
        at_ns = NOW_NS + number * minute_ns
        before_ns = at_ns - minute_ns if number else None
        store.commit(connection, evaluation("search", at_ns=at_ns, before_ns=before_ns, size=size), ids)
    page = browser(connection, queries)
    (alert,) = page.get("/alerts.json").json()["data"]
    assert (alert["facts"]["value"], alert["opened_with"], alert["peak"]) == ("$6.00", "$4.00", "$9.00")
    assert "rose to $6.00 an hour" in alert["title"]
    shown = page.get("/alerts").text
    assert "<dt>Value</dt><dd>$6.00</dd>" in shown
    assert "<dt>At first</dt><dd>$4.00</dd>" in shown
    assert "<dt>At worst</dt><dd>$9.00</dd>" in shown


def test_a_rule_is_muted_from_the_page_by_its_own_form_only(connection: sqlite3.Connection, queries: Queries) -> None:
    page = browser(connection, queries)
    form = {"rule": "ops", "hours": "8", "form_token": "t"}
    assert page.post("/alerts/mute", data={**form, "form_token": "elsewhere"}).status_code == 403
    assert page.post("/alerts/mute", data={**form, "rule": "nobody's"}).status_code == 400
    assert page.post("/alerts/mute", data={**form, "hours": "9999"}).status_code == 400
    assert store.read_mutes(connection, NOW_NS) == {}
    assert page.post("/alerts/mute", data=form, follow_redirects=False).status_code == 303
    assert store.read_mutes(connection, NOW_NS) == {"ops": NOW_NS + 8 * 3600 * NS_PER_S}
    assert "Rule ops is muted until 2026-01-01 08:00:00 UTC" in page.get("/alerts").text
    page.post("/alerts/mute", data={**form, "hours": "0"})
    assert store.read_mutes(connection, NOW_NS) == {}


def test_an_unknown_parameter_is_refused_by_name(connection: sqlite3.Connection, queries: Queries) -> None:
    answer = browser(connection, queries).get("/alerts.json?feature=x")
    assert answer.status_code == 400
    assert "'feature'" in answer.json()["error"]["message"]


def test_the_command_line_shows_open_alerts_and_with_all_those_that_are_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MILLICENT_HOME", str(tmp_path))
    path, ids = tmp_path / "ledger.db", SequentialIds()
    write_once(path, LedgerConfig(), CLOCK, partial(store.commit, found=evaluation("search"), ids=ids))
    assert run(["alerts"]) == 0
    told = capsys.readouterr().out
    assert "rose to $4.00" in told
    assert "most of it: user mallory 92%, key (none) 40%" in told
    later = evaluation(at_ns=NOW_NS + 10**12)
    write_once(path, LedgerConfig(), CLOCK, partial(store.commit, found=later, ids=ids))
    assert run(["alerts", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"] == []
    assert run(["alerts", "--all"]) == 0
    assert "over at" in capsys.readouterr().out
