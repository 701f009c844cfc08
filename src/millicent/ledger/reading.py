"""Rows to nouns, for recovery and for queries alike."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Sequence
from decimal import Decimal

import msgspec

from millicent.core.accounts import DeviceSession, HourTime
from millicent.core.receipts import Attempt, Line, Receipt
from millicent.core.usage import Provenance
from millicent.ledger import rows


def select(connection: sqlite3.Connection, sql: str, parameters: Sequence[object] = ()) -> list[sqlite3.Row]:
    """All rows, with columns by name."""
    cursor = connection.cursor()
    cursor.row_factory = sqlite3.Row
    return cursor.execute(sql, parameters).fetchall()


def read_receipts(connection: sqlite3.Connection, receipt_ids: Sequence[str]) -> list[Receipt]:
    """Those that exist, in the order asked for."""
    wanted = (msgspec.json.encode(receipt_ids).decode(),)
    lines: dict[str, list[Line]] = defaultdict(list)
    attempts: dict[str, list[Attempt]] = defaultdict(list)
    within = "receipt IN (SELECT value FROM json_each(?)) ORDER BY receipt, ordinal"
    for row in select(connection, f"SELECT * FROM lines WHERE {within}", wanted):  # noqa: S608 - our own text
        lines[row["receipt"]].append(rows.line_of(row))
    for row in select(connection, f"SELECT * FROM attempts WHERE {within}", wanted):  # noqa: S608 - our own text
        attempts[row["receipt"]].append(rows.attempt_of(row))
    found = {
        row["id"]: rows.receipt_of(row, lines[row["id"]], attempts[row["id"]])
        for row in select(connection, "SELECT * FROM receipts WHERE id IN (SELECT value FROM json_each(?))", wanted)
    }
    return [found[receipt_id] for receipt_id in receipt_ids if receipt_id in found]


def session_of(row: sqlite3.Row) -> DeviceSession:
    return DeviceSession(
        id=row["id"],
        gateway=row["gateway"],
        device=row["device"],
        placement=row["placement"],
        accelerators=row["accelerators"],
        usd_per_hour=None if row["usd_per_hour"] is None else Decimal(row["usd_per_hour"]),
        rate_provenance=Provenance(row["rate_provenance"]),
        started_at_ns=row["started_at_ns"],
        seen_at_ns=row["seen_at_ns"],
        busy=bool(row["busy"]),
        closed=bool(row["closed"]),
    )


def wall_covering(hour: HourTime, serving_ns: int, accelerators: int) -> int:
    """The hour's wall time, at least as long as the work known of it: receipts are posted between checkpoints."""
    used_ns = serving_ns + hour.overhead_ns + hour.lost_ns + hour.down_ns
    return max(hour.wall_ns, -(-used_ns // accelerators))
