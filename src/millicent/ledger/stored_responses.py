"""Answers of OpenAI's Responses that are stored: for their owner alone, until they expire, are deleted, or make way for
newer ones."""

from __future__ import annotations

import sqlite3
from typing import NamedTuple

# How many answers a conversation is followed back. A model's context ends long before.
MAX_TURNS = 1000

_CHAIN = """
    WITH RECURSIVE chain (id, previous, input, body, turn) AS (
        SELECT id, previous, input, body, 1 FROM stored_responses WHERE id = :id AND owner = :owner
        UNION ALL
        SELECT each.id, each.previous, each.input, each.body, turn + 1
        FROM chain JOIN stored_responses AS each ON each.id = chain.previous AND each.owner = :owner
        WHERE turn < :turns
    )
"""


class StoredResponse(NamedTuple):
    """`input` is a JSON array of the items sent for this answer, without those of earlier ones; `body` the answer as
    it was given. `owner` is a key, empty for callers without one."""

    id: str
    owner: str
    user: str | None
    previous: str | None
    input: str
    body: str


def keep(connection: sqlite3.Connection, response: StoredResponse, *, expires_at_ns: int, max_bytes: int) -> None:
    """Those it goes on from stay as long as it does. The ones that would go first make room for it."""
    size = len(response.input.encode()) + len(response.body.encode())
    connection.execute(
        "INSERT INTO stored_responses (id, owner, user, previous, input, body, bytes, expires_at_ns)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (*response, size, expires_at_ns),
    )
    if response.previous is not None:
        connection.execute(
            f"{_CHAIN} UPDATE stored_responses SET expires_at_ns = max(expires_at_ns, :until)"  # noqa: S608 - our own text
            " WHERE id IN (SELECT id FROM chain)",
            {"id": response.previous, "owner": response.owner, "turns": MAX_TURNS, "until": expires_at_ns},
        )
    (kept,) = connection.execute("SELECT bytes FROM stored_responses_size").fetchone()
    while kept > max_bytes:
        oldest, its = connection.execute(
            "SELECT id, bytes FROM stored_responses ORDER BY expires_at_ns, id LIMIT 1"
        ).fetchone()
        connection.execute("DELETE FROM stored_responses WHERE id = ?", (oldest,))
        kept -= its


def conversation(connection: sqlite3.Connection, owner: str, response_id: str, now_ns: int) -> list[StoredResponse]:
    """The answer and all that it goes on from, oldest first. Empty where one of them isn't there any more."""
    rows = connection.execute(
        f"{_CHAIN} SELECT id, previous, input, body FROM chain ORDER BY turn DESC",  # noqa: S608 - our own text
        {"id": response_id, "owner": owner, "turns": MAX_TURNS},
    ).fetchall()
    if not rows or rows[0][1] is not None or find(connection, owner, response_id, now_ns) is None:
        return []
    return [StoredResponse(each, owner, None, previous, sent, body) for each, previous, sent, body in rows]


def find(connection: sqlite3.Connection, owner: str, response_id: str, now_ns: int) -> StoredResponse | None:
    row = connection.execute(
        "SELECT id, owner, user, previous, input, body FROM stored_responses"
        " WHERE id = ? AND owner = ? AND expires_at_ns > ?",
        (response_id, owner, now_ns),
    ).fetchone()
    return None if row is None else StoredResponse(*row)


def delete(connection: sqlite3.Connection, owner: str, response_id: str, now_ns: int) -> bool:
    """Whether it was there."""
    gone = connection.execute(
        "DELETE FROM stored_responses WHERE id = ? AND owner = ? AND expires_at_ns > ?", (response_id, owner, now_ns)
    )
    return gone.rowcount > 0


def drop_expired(connection: sqlite3.Connection, now_ns: int) -> None:
    connection.execute("DELETE FROM stored_responses WHERE expires_at_ns <= ?", (now_ns,))


def purge(connection: sqlite3.Connection, *, user: str | None = None) -> int:
    """Forget all, or one user's; how many."""
    condition, values = ("", ()) if user is None else (" WHERE user = ?", (user,))
    return connection.execute(f"DELETE FROM stored_responses{condition}", values).rowcount  # noqa: S608 - our own text
