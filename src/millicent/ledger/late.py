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
_SAME = ("role", "meter", "quantity", "unit", "amount_nanousd", "note")


def post_lines(connection: sqlite3.Connection, receipt_id: str, lines: Iterable[Line]) -> None:
    """Append to a closed receipt. Raises NotFound and Conflict as the Ledger protocol says."""
    found = connection.execute("SELECT status FROM receipts WHERE id = ?", (receipt_id,)).fetchone()
    if found is None:
        raise _not_found(receipt_id)
    if found[0] is None:
        raise Conflict(
            f"Receipt `{receipt_id}` is still open: post its lines once its answer has ended, or send them with the "
            "request in `X-Millicent-Lines`.",
            code="receipt_open",
        )
    (ordinal,) = connection.execute(
        "SELECT coalesce(max(ordinal), -1) + 1 FROM lines WHERE receipt = ?", (receipt_id,)
    ).fetchone()
    for line in lines:
        row = rows.line_row(receipt_id, ordinal, line)
        if line.id is not None and _is_there(connection, dict(zip(rows.LINE_COLUMNS, row, strict=True))):
            continue
        connection.execute(rows.INSERT_LINE, row)
        ordinal += 1


def _is_there(connection: sqlite3.Connection, row: dict[str, object]) -> bool:
    """Raises Conflict where the identifier stands for another cost."""
    there = select(connection, "SELECT * FROM lines WHERE receipt = ? AND id = ?", (row["receipt"], row["id"]))
    if not there:
        return False
    if different := [name for name in _SAME if there[0][name] != row[name]]:
        what = different[0].removesuffix("_nanousd")
        raise Conflict(
            f"Receipt `{row['receipt']}` has a line `{row['id']}` with another {what}: "
            "lines never change; post a correction with role `adjustment` and an id of its own.",
            param="id",
        )
    return True


def add_feedback(connection: sqlite3.Connection, feedback: Iterable[Feedback]) -> None:
    """Raises NotFound, and then nothing was added."""
    for given in feedback:
        if connection.execute("SELECT 1 FROM receipts WHERE id = ?", (given.receipt,)).fetchone() is None:
            raise _not_found(given.receipt)
        row = msgspec.structs.asdict(given) | {"score": None if given.score is None else format(given.score, "f")}
        (row["ordinal"],) = connection.execute(
            "SELECT coalesce(max(ordinal), -1) + 1 FROM feedback WHERE receipt = ?", (given.receipt,)
        ).fetchone()
        connection.execute(
            rows.insert("feedback", row, "ON CONFLICT (receipt, id) WHERE id IS NOT NULL DO NOTHING"), row
        )


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
