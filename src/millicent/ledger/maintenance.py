"""What may leave the ledger: detail that has outlived its retention, and people's names. The sums stay as they are."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from millicent.ledger import rollups, stored_responses, tallies
from millicent.ledger.claims import purge_answers

# Receipts deleted in one transaction: some tens of milliseconds.
_BATCH = 1_000


def delete_expired(connection: sqlite3.Connection, before_ns: int) -> int:
    """Delete the detail of the oldest receipts created before `before_ns`, some at a time; how many. Their sums stay.

    Receipts that run are left, and nothing is deleted while receipts of an older version are still being taken in.
    """
    if not (rollups.is_complete(connection) and tallies.is_complete(connection)):
        return 0
    oldest = connection.execute(
        "SELECT min(created_at_ns), max(created_at_ns) FROM (SELECT created_at_ns FROM receipts"
        " WHERE created_at_ns < ? AND status IS NOT NULL ORDER BY created_at_ns LIMIT ?)",
        (before_ns, _BATCH),
    ).fetchone()
    if oldest[0] is None:
        return 0
    from_ns, to_ns = oldest[0], oldest[1] + 1
    rollups.post_all(connection)
    rollups.archive(connection, from_ns, to_ns)
    going = "SELECT id FROM receipts WHERE created_at_ns >= ? AND created_at_ns < ? AND status IS NOT NULL"
    connection.execute(
        f"INSERT INTO device_time_archived SELECT session, hour_ns, sum(serving_ns) FROM device_time"  # noqa: S608 - our own text
        f" WHERE receipt IN ({going}) GROUP BY session, hour_ns"
        " ON CONFLICT DO UPDATE SET serving_ns = serving_ns + excluded.serving_ns",
        (from_ns, to_ns),
    )
    connection.execute(
        f"INSERT INTO holds_archived SELECT budget, subject, period_ns, sum(spent_nanousd) FROM holds"  # noqa: S608 - our own text
        f" WHERE receipt IN ({going}) GROUP BY budget, subject, period_ns"
        " ON CONFLICT DO UPDATE SET spent_nanousd = spent_nanousd + excluded.spent_nanousd",
        (from_ns, to_ns),
    )
    with _permitted(connection, "retention"):
        for table, column in _parts_of_receipts(connection):
            connection.execute(f"DELETE FROM {table} WHERE {column} IN ({going})", (from_ns, to_ns))  # noqa: S608 - our own names
        deleted = connection.execute(f"DELETE FROM receipts WHERE id IN ({going})", (from_ns, to_ns))  # noqa: S608 - our own text
    return deleted.rowcount


def purge_user(connection: sqlite3.Connection, user: str) -> int:
    """Take this person off every closed receipt; how many. A random name that nothing links to them stands instead, so
    that sums by user stay. Conversation, run, tags, error texts, hashes of prompts, notes of costs from outside, words
    of feedback, alerts about them, answers kept for idempotency and stored responses go. A budget per user begins anew
    for them."""
    rollups.fold(connection)
    purge_answers(connection, user=user)
    stored_responses.purge(connection, user=user)
    nobody = f"purged-{secrets.token_hex(8)}"
    with _permitted(connection, "purge"):
        connection.execute(
            "UPDATE lines SET note = NULL WHERE note IS NOT NULL AND attempt = 0 AND provenance = 'reported'"
            " AND receipt IN (SELECT id FROM receipts WHERE user = ? AND status IS NOT NULL)",
            (user,),
        )
        connection.execute(
            "UPDATE feedback SET comment = NULL, label = NULL"
            " WHERE receipt IN (SELECT id FROM receipts WHERE user = ?)",
            (user,),
        )
        connection.execute(
            "UPDATE attempts SET error = NULL WHERE error IS NOT NULL AND ended_at_ns IS NOT NULL"
            " AND receipt IN (SELECT id FROM receipts WHERE user = ? AND status IS NOT NULL)",
            (user,),
        )
        purged = connection.execute(
            "UPDATE receipts SET user = ?, conversation = NULL, run = NULL, tags = '{}', error = NULL,"
            " request_digest = NULL, segments = NULL"
            " WHERE user = ? AND status IS NOT NULL",
            (nobody, user),
        )
        connection.execute("UPDATE rollup_groups SET user = ? WHERE user = ?", (nobody, user))
        connection.execute("UPDATE entries SET user = ?, note = NULL WHERE user = ?", (nobody, user))
        _purge_alerts(connection, user, nobody)
        for table in ("budget_periods", "holds", "holds_archived"):
            connection.execute(
                f"UPDATE {table} SET subject = ?"  # noqa: S608 - our own names
                " WHERE subject = ? AND budget IN (SELECT name FROM budgets WHERE per = 'user')",
                (nobody, user),
            )
    return purged.rowcount


def _purge_alerts(connection: sqlite3.Connection, user: str, nobody: str) -> None:
    """Those about this person's budget go; of others they are no longer who caused them. Messages that tell them go."""
    gone = connection.execute("DELETE FROM alerts WHERE instr(title, ?) RETURNING id", (f'user "{user}"',)).fetchall()
    was, now = ('"dimension":"user","member":' + msgspec.json.encode(name).decode() for name in (user, nobody))
    gone += connection.execute(
        "UPDATE alerts SET causes = replace(causes, ?, ?) WHERE instr(causes, ?) RETURNING id", (was, now, was)
    ).fetchall()
    connection.executemany("DELETE FROM alert_messages WHERE instr(body, ?)", gone)


@contextmanager
def _permitted(connection: sqlite3.Connection, reason: str) -> Iterator[None]:
    """The tables let go of what is settled while the permit stands; the transaction never ends with one."""
    connection.execute("INSERT INTO maintenance VALUES (?)", (reason,))
    yield
    connection.execute("DELETE FROM maintenance")


def _parts_of_receipts(connection: sqlite3.Connection) -> list[tuple[str, str]]:
    """Tables whose rows belong to a receipt, with the column that names it."""
    found = connection.execute(
        'SELECT t.name, f."from" FROM sqlite_schema AS t, pragma_foreign_key_list(t.name) AS f'
        " WHERE t.type = 'table' AND f.\"table\" = 'receipts'"
    )
    return found.fetchall()
