"""Idempotency keys inside the ledger's transactions: claimed in the commit that opens the receipt, answered in the one
that closes it. So there is never a bill without its answer, or an answer under two bills.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import NamedTuple

from millicent.core.errors import Conflict
from millicent.core.idempotency import KEPT_NS, Claim
from millicent.core.receipts import Receipt, Status

# The code of a Conflict that means: look again.
RACE = "idempotency_race"


class Claimed(NamedTuple):
    """A claim that stands. `answer` is the text once the request has ended well, None while it runs."""

    request_hash: bytes
    receipt: str
    answer: str | None


def claim(connection: sqlite3.Connection, made: Claim, receipt_id: str, now_ns: int) -> None:
    """Raises Conflict where another request holds the key: it may be running, or have ended since it was looked for."""
    connection.execute(
        "DELETE FROM claims WHERE owner = ? AND key = ? AND expires_at_ns <= ?", (made.owner, made.key, now_ns)
    )
    taken = connection.execute(
        "INSERT INTO claims (owner, key, request_sha256, receipt) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
        (made.owner, made.key, made.request_hash, receipt_id),
    )
    if taken.rowcount == 0:
        raise Conflict(
            "Another request with this `Idempotency-Key` has just begun: send this one again.",
            param="idempotency-key",
            code=RACE,
        )


def find_claim(connection: sqlite3.Connection, owner: str, key: str, now_ns: int) -> Claimed | None:
    found = connection.execute(
        "SELECT request_sha256, receipt, answer FROM claims"
        " WHERE owner = ? AND key = ? AND (expires_at_ns IS NULL OR expires_at_ns > ?)",
        (owner, key, now_ns),
    ).fetchone()
    return None if found is None else Claimed(*found)


def answer_claims(connection: sqlite3.Connection, closed: Iterable[tuple[Receipt, str | None]]) -> None:
    """Keep the answers of requests that succeeded; one that didn't leaves its key free for another try."""
    if connection.execute("SELECT 1 FROM claims LIMIT 1").fetchone() is None:
        return
    for receipt, answer in closed:
        if receipt.status is Status.SUCCEEDED and answer is not None and receipt.settled_at_ns is not None:
            connection.execute(
                "UPDATE claims SET answer = ?, expires_at_ns = ? WHERE receipt = ?",
                (answer, receipt.settled_at_ns + KEPT_NS, receipt.id),
            )
        else:
            connection.execute("DELETE FROM claims WHERE receipt = ?", (receipt.id,))


def drop_expired(connection: sqlite3.Connection, now_ns: int) -> None:
    connection.execute("DELETE FROM claims WHERE expires_at_ns <= ?", (now_ns,))


def purge_answers(connection: sqlite3.Connection, *, user: str | None = None) -> int:
    """Forget answers that are kept, all or one user's; how many. Requests that are running keep their claim."""
    condition, values = (
        ("", ()) if user is None else (" AND receipt IN (SELECT id FROM receipts WHERE user = ?)", (user,))
    )
    return connection.execute(f"DELETE FROM claims WHERE answer IS NOT NULL{condition}", values).rowcount  # noqa: S608 - our own text
