"""Stored responses: each owner's own, whole conversations, never beyond the bound, and gone when they should be."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millicent.core.clock import ManualClock
from millicent.ledger import stored_responses as stored
from millicent.ledger.config import LedgerConfig
from millicent.ledger.maintenance import purge_user
from millicent.ledger.schema import migrate, open_writer
from millicent.ledger.stored_responses import StoredResponse

ROOM = 10**6


def opened() -> sqlite3.Connection:
    connection = open_writer(":memory:", LedgerConfig())
    migrate(connection, ManualClock())
    return connection


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    with closing(opened()) as made:
        yield made


def put(
    connection: sqlite3.Connection,
    name: str,
    previous: str | None = None,
    *,
    owner: str = "key_a",
    user: str | None = None,
    until_ns: int = 100,
    max_bytes: int = ROOM,
) -> None:
    response = StoredResponse(name, owner, user, previous, f'["{name}?"]', f'{{"id": "{name}"}}')
    stored.keep(connection, response, expires_at_ns=until_ns, max_bytes=max_bytes)


def names(connection: sqlite3.Connection, last: str, *, owner: str = "key_a", now_ns: int = 0) -> list[str]:
    return [each.id for each in stored.conversation(connection, owner, last, now_ns)]


def test_a_conversation_is_followed_back_to_its_beginning(connection: sqlite3.Connection) -> None:
    put(connection, "r1")
    put(connection, "r2", "r1")
    put(connection, "r3", "r2")
    put(connection, "fork", "r1")
    assert names(connection, "r3") == ["r1", "r2", "r3"]
    assert names(connection, "fork") == ["r1", "fork"]


def test_another_key_finds_nothing(connection: sqlite3.Connection) -> None:
    put(connection, "r1")
    assert names(connection, "r1", owner="key_b") == []
    assert names(connection, "r1", owner="") == []
    assert not stored.delete(connection, "key_b", "r1", 0)
    put(connection, "theirs", "r1", owner="key_b")
    assert names(connection, "theirs", owner="key_b") == []  # it can't be continued from another's


def test_what_is_gone_in_the_middle_ends_the_conversation(connection: sqlite3.Connection) -> None:
    put(connection, "r1")
    put(connection, "r2", "r1")
    assert stored.delete(connection, "key_a", "r1", 0)
    assert names(connection, "r2") == []
    assert stored.find(connection, "key_a", "r2", 0) is not None


def test_a_conversation_in_use_stays_whole(connection: sqlite3.Connection) -> None:
    put(connection, "r1", until_ns=100)
    put(connection, "r2", "r1", until_ns=180)
    put(connection, "other", until_ns=100)
    stored.drop_expired(connection, 150)
    assert names(connection, "r2", now_ns=150) == ["r1", "r2"]
    assert names(connection, "other", now_ns=50) == []
    assert names(connection, "r2", now_ns=180) == []  # expired, though nobody has dropped it yet


def test_a_users_are_purged_and_so_are_all(connection: sqlite3.Connection) -> None:
    for name, user in (("r1", "ada"), ("r2", "bob"), ("r3", None)):
        put(connection, name, user=user)
    connection.execute("BEGIN IMMEDIATE")
    purge_user(connection, "ada")
    connection.execute("COMMIT")
    assert [names(connection, name) for name in ("r1", "r2", "r3")] == [[], ["r2"], ["r3"]]
    assert stored.purge(connection, user="bob") == 1
    assert stored.purge(connection) == 1


@given(
    st.lists(st.tuples(st.sampled_from(["keep", "delete", "expire"]), st.integers(0, 9), st.integers(1, 40))),
    st.integers(1, 200),
)
@settings(max_examples=60, deadline=None)
def test_what_is_stored_never_outgrows_its_bound_and_its_size_is_known(
    steps: list[tuple[str, int, int]], max_bytes: int
) -> None:
    with closing(opened()) as connection:
        for turn, (what, number, until_ns) in enumerate(steps):
            if what == "keep":
                put(connection, f"r{turn}", f"r{number}", until_ns=until_ns, max_bytes=max_bytes)
                (kept,) = connection.execute("SELECT bytes FROM stored_responses_size").fetchone()
                assert kept <= max_bytes
            elif what == "delete":
                stored.delete(connection, "key_a", f"r{number}", 0)
            else:
                stored.drop_expired(connection, until_ns)
        told, found = connection.execute(
            "SELECT (SELECT bytes FROM stored_responses_size),"
            " (SELECT coalesce(sum(length(input) + length(body)), 0) FROM stored_responses)"
        ).fetchone()
        assert told == found
