"""The Alerts page, its JSON, and the same on the command line."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from millicent.cli import run
from millicent.core.clock import ManualClock
from millicent.core.identifiers import SequentialIds
from millicent.dashboard.alerts import alerts_page
from millicent.dashboard.routes import dashboard_routes
from millicent.dashboard.site import Queries, Site
from millicent.ledger.config import LedgerConfig
from millicent.ledger.schema import write_once
from millicent.watch import store
from millicent.watch.findings import Cause, Finding, Subject

T = TypeVar("T")
HOSTILE = "<script>alert(1)</script>"
CLOCK = ManualClock()
NOW_NS = CLOCK.now_ns()


def evaluation(*members: str, at_ns: int = NOW_NS) -> store.Evaluation:
    findings = [
        Finding(
            Subject("ops", "anomaly", "cost", "feature", member),
            f"The cost of feature `{member}` rose to $4.00 an hour; at this time it is usually $1.00.",
            {"value": "$4.00", "usual": "$1.00"},
            NOW_NS,
            (Cause("user", "mallory", 92), Cause("key", "", 40)),
        )
        for member in members
    ]
    return store.Evaluation(
        what="quarter",
        before_ns=NOW_NS if at_ns > NOW_NS else -1,
        through_ns=at_ns,
        at_ns=at_ns,
        rules=frozenset({"ops"}),
        looks=[store.Look(at_ns, frozenset({"anomaly"}), findings)],
    )


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)) as made:
        made.executescript((files("millicent.ledger") / "migrations" / "0013_alerts.sql").read_text("utf-8"))
        yield made


def browser(connection: sqlite3.Connection, queries: Queries) -> TestClient:
    async def refresh() -> None:
        return

    def ask(question: Callable[[sqlite3.Connection], T]) -> T | None:
        return question(connection)

    site = Site(queries, models=list, clock=CLOCK, refresh=refresh)
    page = partial(alerts_page, ask=ask, rules=["ops"], told=[])
    return TestClient(Starlette(routes=dashboard_routes(site, [page])))


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
    assert "The cost of feature `search` rose" in client.get("/alerts?csv=past").text
    (alert,) = client.get("/alerts.json").json()["data"]
    assert (alert["state"], alert["causes"][0]["member"]) == ("resolved", "mallory")


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
