"""What the ledger writes, as functions of a connection inside a transaction. Each is safe to repeat."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from millicent.core.accounts import Checkpoint, DeviceSession, Reading
from millicent.core.idempotency import Claim
from millicent.core.receipts import HourShare, Line, Receipt
from millicent.ledger import budgets, claims, rollups, rows, stored_responses, tallies


class Opening(NamedTuple):
    receipt: Receipt
    gateway: str
    claim: Claim | None = None


class Closing(NamedTuple):
    receipt: Receipt
    shares: tuple[HourShare, ...]
    gateway: str
    answer: str | None = None


def open_receipts(connection: sqlite3.Connection, openings: Sequence[Opening]) -> list[bool]:
    """Insert the receipts unless they are there, with their holds and claims, those of their attempts that are new,
    and the costs they came with.

    Whether a hard budget bounds each. Raises PaymentRequired or Conflict: call it anew in a transaction without the one
    that is refused.
    """
    for receipt, _, _ in openings:
        if receipt.status is not None:
            raise ValueError(f"receipt {receipt.id} is {receipt.status} already: only an open one can be opened")
    there = _statuses(connection, [each.receipt.id for each in openings])
    new = {each.receipt.id: each for each in openings if each.receipt.id not in there}
    _insert_receipts(connection, [(each.receipt, each.gateway) for each in new.values()])
    for receipt, _, claim in new.values():
        if claim is not None:
            claims.claim(connection, claim, receipt.id, receipt.created_at_ns)
    budgeted = budgets.any_budget(connection)
    if budgeted:
        for receipt, _, _ in new.values():
            budgets.reserve(connection, receipt)
    still_open = [each.receipt for each in openings if there.get(each.receipt.id) is None]
    _write_attempts(connection, still_open)
    _write_lines(connection, still_open)
    return [
        budgeted and there.get(each.receipt.id) is None and budgets.is_bounded(connection, each.receipt.id)
        for each in openings
    ]


def open_receipt(connection: sqlite3.Connection, receipt: Receipt, gateway: str, claim: Claim | None = None) -> bool:
    (bounded,) = open_receipts(connection, [Opening(receipt, gateway, claim)])
    return bounded


def close_receipts(connection: sqlite3.Connection, closings: Sequence[Closing]) -> list[None]:
    """Settle the receipts with their lines, attempts and device time, their holds, and their claims with the answer;
    one that was never opened is written whole, and its cost booked. Of a receipt that is closed nothing changes.

    Whom a receipt is for and when it was created were fixed when it was opened.
    """
    for receipt, *_ in closings:
        if receipt.status is None or receipt.settled_at_ns is None:
            raise ValueError(f"receipt {receipt.id} has no status or settlement time: it cannot be closed")
    there = _statuses(connection, [each.receipt.id for each in closings])
    closing: dict[str, Closing] = {}
    for each in closings:
        if there.get(each.receipt.id) is None:
            closing.setdefault(each.receipt.id, each)
    receipts = [each.receipt for each in closing.values()]
    unopened = [each for each in closing.values() if each.receipt.id not in there]
    _insert_receipts(
        connection,
        [(msgspec.structs.replace(each.receipt, status=None, settled_at_ns=None), each.gateway) for each in unopened],
    )
    budgeted = budgets.any_budget(connection)
    if budgeted:
        for each in unopened:
            budgets.reserve(connection, each.receipt, enforce=False)
    _write_attempts(connection, receipts)
    _write_shares(connection, [(each.receipt.id, each.shares) for each in closing.values()])
    _write_lines(connection, receipts)
    rows.write_many(connection, rows.SETTLE_RECEIPT, map(rows.settlement_row, receipts))
    if budgeted:
        budgets.settle(connection, receipts)
    claims.answer_claims(connection, [(each.receipt, each.answer) for each in closing.values()])
    return [None] * len(closings)


def begin_attempt(connection: sqlite3.Connection, receipt: Receipt) -> bool:
    """Write an open receipt's attempts so far, the last of which is about to begin, with the lines of those that have
    ended, and raise its holds. False where a hard budget lacks the money; nothing is written then."""
    if _statuses(connection, [receipt.id]).get(receipt.id, "missing") is not None:
        raise ValueError(f"receipt {receipt.id} is not open: no attempt can begin")
    if not budgets.grow(connection, receipt):
        return False
    _write_attempts(connection, [receipt])
    _write_lines(connection, [receipt])
    now = rows.receipt_columns(receipt, _OF_THE_ATTEMPT)
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
    close_receipts(connection, [Closing(receipt, shares, gateway, answer)])


def add_lines(connection: sqlite3.Connection, entries: Mapping[str, tuple[Line, ...]]) -> None:
    """Lines for closed receipts, by receipt. A receipt that has lines in a line's book already gets none of that book:
    what was added once isn't added again."""
    for receipt_id, lines in entries.items():
        if _statuses(connection, [receipt_id]).get(receipt_id) is None:
            raise ValueError(f"receipt {receipt_id} is not closed: its lines are written when it is")
        found = connection.execute("SELECT book, ordinal FROM lines WHERE receipt = ?", (receipt_id,)).fetchall()
        kept = {book for book, _ in found}
        following = max((ordinal for _, ordinal in found), default=-1) + 1
        for ordinal, line in enumerate((line for line in lines if line.book not in kept), start=following):
            connection.execute(rows.INSERT_LINE, rows.line_row(receipt_id, ordinal, line))


def write_checkpoint(connection: sqlite3.Connection, checkpoint: Checkpoint) -> None:
    for reading in checkpoint.running:
        _write_reading(connection, reading, checkpoint.at_ns)
    for session in checkpoint.sessions:
        write_session(connection, session)
    claims.drop_expired(connection, checkpoint.at_ns)
    stored_responses.drop_expired(connection, checkpoint.at_ns)
    rollups.backfill(connection)
    tallies.backfill(connection)
    tallies.widen(connection)


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


def _insert_receipts(connection: sqlite3.Connection, opened: Iterable[tuple[Receipt, str]]) -> None:
    rows.write_many(
        connection, rows.INSERT_RECEIPT, [rows.opening_row(receipt, gateway) for receipt, gateway in opened]
    )


def _write_reading(connection: sqlite3.Connection, reading: Reading, at_ns: int) -> None:
    """Unless a newer one was written: device time only grows, whatever the system clock does."""
    row = {
        "checkpointed_at_ns": at_ns,
        **rows.usage_columns(reading.usage),
        **rows.accelerator_columns(reading.accelerator),
        **rows.energy_columns(reading.energy),
    }
    updated = connection.execute(
        f"UPDATE receipts SET {rows.assignments(row)} WHERE id = :id AND status IS NULL"  # noqa: S608 - our own names
        " AND serving_ns <= :serving_ns",
        {**row, "id": reading.receipt},
    )
    if updated.rowcount:
        _write_shares(connection, [(reading.receipt, reading.shares)])


# Who was asked, and when, is known when an attempt begins.
_END_ATTEMPT = (
    "ON CONFLICT DO UPDATE SET ended_at_ns = excluded.ended_at_ns, status = excluded.status, error = excluded.error"
    " WHERE attempts.ended_at_ns IS NULL AND excluded.ended_at_ns IS NOT NULL"
)


def _write_attempts(connection: sqlite3.Connection, receipts: Iterable[Receipt]) -> None:
    rows.write_many(
        connection,
        f"{rows.INSERT_ATTEMPT} {_END_ATTEMPT}",
        [rows.attempt_row(receipt.id, attempt) for receipt in receipts for attempt in receipt.attempts],
    )


def _write_lines(connection: sqlite3.Connection, receipts: Iterable[Receipt]) -> None:
    """In order: those written at opening come first in a receipt, and are there already when it closes."""
    rows.write_many(
        connection,
        f"{rows.INSERT_LINE} ON CONFLICT (receipt, ordinal) DO NOTHING",
        [
            rows.line_row(receipt.id, ordinal, line)
            for receipt in receipts
            for ordinal, line in enumerate(receipt.lines)
        ],
    )


def _write_shares(connection: sqlite3.Connection, given: Iterable[tuple[str, tuple[HourShare, ...]]]) -> None:
    connection.executemany(
        "INSERT INTO device_time VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT DO UPDATE SET serving_ns = excluded.serving_ns WHERE serving_ns != excluded.serving_ns",
        [
            (receipt_id, share.attempt, share.session, share.hour_ns, share.serving_ns)
            for receipt_id, shares in given
            for share in shares
        ],
    )


def _statuses(connection: sqlite3.Connection, receipt_ids: Sequence[str]) -> dict[str, str | None]:
    """Of those that exist; None is open."""
    wanted = (msgspec.json.encode(receipt_ids).decode(),)
    found = connection.execute("SELECT id, status FROM receipts WHERE id IN (SELECT value FROM json_each(?))", wanted)
    return dict(found.fetchall())
