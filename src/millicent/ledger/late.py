"""What is added to closed receipts, and the fits that receipts refer to. Each write is safe to repeat."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence

import msgspec

from millicent.core.errors import Conflict, NotFound
from millicent.core.fits import StepTimeFit
from millicent.core.receipts import Feedback, Line
from millicent.ledger import rows
from millicent.ledger.reading import select

# What tells two postings under one identifier apart; the rest follows from when they came.
_SAME_LINE = ("role", "meter", "quantity", "unit", "amount_nanousd", "note")
_SAME_FEEDBACK = ("score", "label", "comment")
# People's words, which a purge takes away: nothing contradicts what is gone.
_WORDS = frozenset({"note", "label", "comment"})


def post_lines(connection: sqlite3.Connection, receipt_id: str, lines: Iterable[Line]) -> None:
    """Append to a closed receipt, later than it was settled whatever the system clock says. Raises NotFound and
    Conflict as the Ledger protocol says."""
    found = connection.execute("SELECT settled_at_ns FROM receipts WHERE id = ?", (receipt_id,)).fetchone()
    if found is None:
        raise _not_found(receipt_id)
    (settled_at_ns,) = found
    if settled_at_ns is None:
        raise Conflict(
            f"Receipt `{receipt_id}` is still open: post its lines once its answer has ended, or send them with the "
            "request in `X-Millicent-Lines`.",
            code="receipt_open",
        )
    (ordinal,) = connection.execute(
        "SELECT coalesce(max(ordinal), -1) + 1 FROM lines WHERE receipt = ?", (receipt_id,)
    ).fetchone()
    for line in lines:
        posted_at_ns = max(line.posted_at_ns, settled_at_ns + 1)
        row = rows.line_row(receipt_id, ordinal, msgspec.structs.replace(line, posted_at_ns=posted_at_ns))
        if line.id is not None and _is_there(
            connection, "lines", dict(zip(rows.LINE_COLUMNS, row, strict=True)), _SAME_LINE
        ):
            continue
        connection.execute(rows.INSERT_LINE, row)
        ordinal += 1


_CORRECTED_BY = {
    "lines": "lines never change; post a correction with role `adjustment` and an id of its own.",
    "feedback": "feedback never changes; send what you think now with an id of its own.",
}


def _is_there(connection: sqlite3.Connection, table: str, row: dict[str, object], same: Sequence[str]) -> bool:
    """Raises Conflict where the identifier stands for something else."""
    sql = f"SELECT * FROM {table} WHERE receipt = ? AND id = ?"  # noqa: S608 - our own names
    there = select(connection, sql, (row["receipt"], row["id"]))
    if not there:
        return False
    kept = [name for name in same if there[0][name] is not None or name not in _WORDS]
    if different := [name for name in kept if there[0][name] != row[name]]:
        what = different[0].removesuffix("_nanousd")
        thing = "a line" if table == "lines" else "feedback"
        raise Conflict(
            f"Receipt `{row['receipt']}` has {thing} `{row['id']}` with another {what}: {_CORRECTED_BY[table]}",
            param="id",
        )
    return True


def add_feedback(connection: sqlite3.Connection, feedback: Iterable[Feedback]) -> None:
    """Raises NotFound, or Conflict where an `id` stands for other feedback, and then nothing was added."""
    for given in feedback:
        if connection.execute("SELECT 1 FROM receipts WHERE id = ?", (given.receipt,)).fetchone() is None:
            raise _not_found(given.receipt)
        row = msgspec.structs.asdict(given) | {"score": None if given.score is None else format(given.score, "f")}
        if given.id is not None and _is_there(connection, "feedback", row, _SAME_FEEDBACK):
            continue
        (row["ordinal"],) = connection.execute(
            "SELECT coalesce(max(ordinal), -1) + 1 FROM feedback WHERE receipt = ?", (given.receipt,)
        ).fetchone()
        connection.execute(rows.insert("feedback", row), row)


def save_fits(connection: sqlite3.Connection, fits: Iterable[StepTimeFit]) -> None:
    for fit in fits:
        row = msgspec.structs.asdict(fit)
        connection.execute(rows.insert("step_time_fits", row, "ON CONFLICT DO NOTHING"), row)


def latest_fits(connection: sqlite3.Connection, device: str, configuration: str | None = None) -> list[StepTimeFit]:
    """The newest of each model, in this configuration or, without one, in any."""
    found = select(
        connection,
        "SELECT *, max(fitted_at_ns) FROM step_time_fits WHERE device = ? AND configuration = ifnull(?, configuration)"
        " GROUP BY model",
        (device, configuration),
    )
    return [_fit_of(row) for row in found]


def fits_of(connection: sqlite3.Connection, versions: Sequence[str]) -> list[StepTimeFit]:
    """Those that exist, in no order."""
    wanted = (msgspec.json.encode(versions).decode(),)
    sql = "SELECT * FROM step_time_fits WHERE version IN (SELECT value FROM json_each(?))"
    return [_fit_of(row) for row in select(connection, sql, wanted)]


def _fit_of(row: sqlite3.Row) -> StepTimeFit:
    return StepTimeFit(**{name: row[name] for name in StepTimeFit.__struct_fields__})


def _not_found(receipt_id: str) -> NotFound:
    return NotFound(
        f"There is no receipt `{receipt_id[:100]}`: check the `X-Millicent-Receipt` header.", param="receipt"
    )
