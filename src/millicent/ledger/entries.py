"""Revenue and outside costs: appended, never changed, safe to post again."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence

import msgspec

from millicent.core.entries import Entry, Kind
from millicent.core.errors import Conflict, InvalidRequest
from millicent.core.money import Money
from millicent.ledger import rows
from millicent.ledger.reading import select

# What tells two postings under one identifier apart; the rest follows from when they came.
_SAME = ("amount_nanousd", "from_ns", "to_ns", "feature", "user", "tier", "note")


def add_entries(connection: sqlite3.Connection, entries: Iterable[Entry]) -> int:
    """How many were new. Raises Conflict where an identifier stands for something else, and then nothing was added."""
    added = 0
    for entry in entries:
        row = _row(entry)
        there = select(connection, "SELECT * FROM entries WHERE kind = ? AND id = ?", (entry.kind, entry.id))
        if not there:
            connection.execute(rows.insert("entries", row), row)
            added += 1
        elif different := [name for name in _SAME if there[0][name] != row[name]]:
            what = different[0].removesuffix("_nanousd").removesuffix("_ns")
            raise Conflict(
                f"There is {entry.kind} `{entry.id[:100]}` with another {what}: entries never change; post what"
                " corrects it, negative if need be, with an id of its own.",
                param="id",
            )
    return added


def read_entries(
    connection: sqlite3.Connection,
    kind: Kind | None,
    from_ns: int,
    to_ns: int,
    limit: int = -1,
    after: str | None = None,
) -> list[Entry]:
    """Those whose time overlaps [from_ns, to_ns), in order of it; after the one of a kind with that identifier. Raises
    InvalidRequest where there is none."""
    place: tuple[object, ...] = (-(2**63), "", "")
    if after is not None:
        found = connection.execute("SELECT from_ns, kind, id FROM entries WHERE kind = ? AND id = ?", (kind, after))
        if (last := found.fetchone()) is None:
            raise InvalidRequest(f"after: there is no {kind} `{after[:100]}`; pass the `next` of a page", param="after")
        place = last
    sql = (
        "SELECT * FROM entries WHERE to_ns > ? AND from_ns < ? AND kind = ifnull(?, kind)"
        " AND (from_ns, kind, id) > (?, ?, ?) ORDER BY from_ns, kind, id LIMIT ?"
    )
    return [_entry(row) for row in select(connection, sql, (from_ns, to_ns, kind, *place, limit))]


def latest_tiers(connection: sqlite3.Connection, users: Sequence[str], to_ns: int) -> dict[str, str | None]:
    """The tier of each user's latest request created before this."""
    sql = (
        "SELECT value, (SELECT tier FROM receipts WHERE user = value AND created_at_ns < ?"
        " ORDER BY created_at_ns DESC, id DESC LIMIT 1) FROM json_each(?)"
    )
    return dict(connection.execute(sql, (to_ns, msgspec.json.encode(list(users)).decode())).fetchall())


def _row(entry: Entry) -> dict[str, object]:
    row = msgspec.structs.asdict(entry)
    row["amount_nanousd"] = row.pop("amount").nanousd
    return row


def _entry(row: sqlite3.Row) -> Entry:
    values = dict(row)
    return Entry(amount=Money(values.pop("amount_nanousd")), **values)
