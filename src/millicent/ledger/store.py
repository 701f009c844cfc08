"""What the ledger writes, as functions of a connection inside a transaction. Each is safe to repeat."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from millicent.core.accounts import Checkpoint, DeviceSession, Reading
from millicent.core.idempotency import Claim
from millicent.core.receipts import Attempt, HourShare, Line, Receipt
from millicent.ledger import budgets, claims, rows
from millicent.ledger import rollups


def open_receipt(connection: sqlite3.Connection, receipt: Receipt, gateway: str, claim: Claim | None = None) -> bool:
    """Insert the receipt unless it is there, with its holds and claim, those of its attempts that are new, and the
    costs it came with.

    Whether a hard budget bounds it. Raises PaymentRequired or Conflict; nothing is written then.
    """
    if receipt.status is not None:
        raise ValueError(f"receipt {receipt.id} is {receipt.status} already: only an open one can be opened")
    status = _status(connection, receipt.id)
    if status == "closed":
        return False
    if status is None:
        _insert_receipt(connection, receipt, gateway)
        if claim is not None:
            claims.claim(connection, claim, receipt.id, receipt.created_at_ns)
        budgets.reserve(connection, receipt)
    _write_attempts(connection, receipt.id, receipt.attempts)
    _write_lines(connection, receipt)
    return budgets.is_bounded(connection, receipt.id)


def begin_attempt(connection: sqlite3.Connection, receipt: Receipt) -> bool:
    """Write an open receipt's attempts so far, the last of which is about to begin, with the lines of those that have
    ended, and raise its holds. False where a hard budget lacks the money; nothing is written then."""
    if _status(connection, receipt.id) != "open":
        raise ValueError(f"receipt {receipt.id} is not open: no attempt can begin")
    if not budgets.grow(connection, receipt):
        return False
    _write_attempts(connection, receipt.id, receipt.attempts)
    _write_lines(connection, receipt)
    base = rows.receipt_row(receipt)
    now = {name: base[name] for name in _OF_THE_ATTEMPT}
    connection.execute(
        f"UPDATE receipts SET {rows.assignments(now)} WHERE id = :id",  # noqa: S608 - our own names
        {**now, "id": receipt.id},
    )
    return True


# What a receipt says of the attempt that runs.
_OF_THE_ATTEMPT = ("served_model", "placement", "backend", "basis", "price_source", "price_snapshot", "hold_nanousd")


def close_receipt(
    connection: sqlite3.Connection,
    receipt: Receipt,
    shares: tuple[HourShare, ...],
    gateway: str,
    answer: str | None = None,
) -> None:
    """Settle the receipt with its lines, attempts and device time, its holds, and its claim with the `answer`; one that
    was never opened is written whole, and its cost booked.

    Whom it is for and when it was created were fixed when it was opened.
    """
    if receipt.status is None or receipt.settled_at_ns is None:
        raise ValueError(f"receipt {receipt.id} has no status or settlement time: it cannot be closed")
    status = _status(connection, receipt.id)
    if status == "closed":
        return
    if status is None:
        _insert_receipt(connection, msgspec.structs.replace(receipt, status=None, settled_at_ns=None), gateway)
        budgets.reserve(connection, receipt, enforce=False)
    _write_attempts(connection, receipt.id, receipt.attempts)
    _write_shares(connection, receipt.id, shares)
    _write_lines(connection, receipt)
    base = rows.receipt_row(receipt)
    connection.execute(rows.settlement(tuple(base)), base)
    budgets.settle(connection, receipt)
    claims.answer_claim(connection, receipt, answer)


def add_lines(connection: sqlite3.Connection, entries: Mapping[str, tuple[Line, ...]]) -> None:
    """Lines for closed receipts, by receipt. A receipt that has lines in a line's book already gets none of that book:
    what was added once isn't added again."""
    for receipt_id, lines in entries.items():
        if _status(connection, receipt_id) != "closed":
            raise ValueError(f"receipt {receipt_id} is not closed: its lines are written when it is")
        found = connection.execute("SELECT book, ordinal FROM lines WHERE receipt = ?", (receipt_id,)).fetchall()
        kept = {book for book, _ in found}
        following = max((ordinal for _, ordinal in found), default=-1) + 1
        for ordinal, line in enumerate((line for line in lines if line.book not in kept), start=following):
            row = rows.line_row(receipt_id, ordinal, line)
            connection.execute(rows.insert("lines", row), row)


def write_checkpoint(connection: sqlite3.Connection, checkpoint: Checkpoint) -> None:
    for reading in checkpoint.running:
        _write_reading(connection, reading, checkpoint.at_ns)
    for session in checkpoint.sessions:
        write_session(connection, session)
    claims.drop_expired(connection, checkpoint.at_ns)
    rollups.backfill(connection)
    rollups.fold(connection)


def write_session(connection: sqlite3.Connection, session: DeviceSession) -> None:
    """The session and its changed hours, unless something newer was written. Call after this instant's readings."""
    row = msgspec.structs.asdict(session)
    del row["hours"]
    row["usd_per_hour"] = None if session.usd_per_hour is None else format(session.usd_per_hour, "f")
    newer = (
        "ON CONFLICT DO UPDATE SET seen_at_ns = excluded.seen_at_ns, busy = excluded.busy, closed = excluded.closed"
        " WHERE NOT closed AND excluded.seen_at_ns >= seen_at_ns"
    )
    if connection.execute(rows.insert("device_sessions", row, newer), row).rowcount == 0:
        return
    connection.executemany(
        "INSERT INTO device_hours (session, hour_ns, wall_ns, overhead_ns, lost_ns, down_ns) VALUES (?, ?, ?, ?, ?, ?)"
        " ON CONFLICT DO UPDATE SET wall_ns = excluded.wall_ns, overhead_ns = excluded.overhead_ns,"
        " lost_ns = excluded.lost_ns, down_ns = excluded.down_ns, seen_serving_ns = serving_ns",
        [(session.id, *msgspec.structs.astuple(hour)) for hour in session.hours],
    )


def _insert_receipt(connection: sqlite3.Connection, receipt: Receipt, gateway: str) -> None:
    row = {**rows.receipt_row(receipt), "gateway": gateway}
    connection.execute(rows.insert("receipts", row), row)


def _write_reading(connection: sqlite3.Connection, reading: Reading, at_ns: int) -> None:
    row = {
        "checkpointed_at_ns": at_ns,
        **rows.usage_columns(reading.usage),
        **rows.accelerator_columns(reading.accelerator),
        **rows.energy_columns(reading.energy),
    }
    updated = connection.execute(
        f"UPDATE receipts SET {rows.assignments(row)} WHERE id = :id AND status IS NULL",  # noqa: S608 - our own names
        {**row, "id": reading.receipt},
    )
    if updated.rowcount:
        _write_shares(connection, reading.receipt, reading.shares)


# Who was asked, and when, is known when an attempt begins.
_END_ATTEMPT = (
    "ON CONFLICT DO UPDATE SET ended_at_ns = excluded.ended_at_ns, status = excluded.status, error = excluded.error"
    " WHERE attempts.ended_at_ns IS NULL AND excluded.ended_at_ns IS NOT NULL"
)


def _write_attempts(connection: sqlite3.Connection, receipt_id: str, attempts: Iterable[Attempt]) -> None:
    for attempt in attempts:
        row = rows.attempt_row(receipt_id, attempt)
        connection.execute(rows.insert("attempts", row, _END_ATTEMPT), row)


def _write_lines(connection: sqlite3.Connection, receipt: Receipt) -> None:
    """In order: those written at opening come first in a receipt, and are there already when it closes."""
    for ordinal, line in enumerate(receipt.lines):
        row = rows.line_row(receipt.id, ordinal, line)
        connection.execute(rows.insert("lines", row, "ON CONFLICT (receipt, ordinal) DO NOTHING"), row)


def _write_shares(connection: sqlite3.Connection, receipt_id: str, shares: Iterable[HourShare]) -> None:
    connection.executemany(
        "INSERT INTO device_time VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT DO UPDATE SET serving_ns = excluded.serving_ns WHERE serving_ns != excluded.serving_ns",
        [(receipt_id, share.attempt, share.session, share.hour_ns, share.serving_ns) for share in shares],
    )


def _status(connection: sqlite3.Connection, receipt_id: str) -> Literal["open", "closed"] | None:
    found = connection.execute("SELECT status FROM receipts WHERE id = ?", (receipt_id,)).fetchone()
    if found is None:
        return None
    return "open" if found[0] is None else "closed"
