"""Sums of receipts per quarter-hour and day, by what reports group by.

Closing a receipt posts its figures to `rollup_deltas` (a trigger does, in the same transaction); `fold` moves them to
`rollups`, many at a time; `totals_sql` reads both. Each cube keeps the dimensions that are asked for together, so that
a year of many users doesn't make every report read every user of every quarter-hour.
"""

# ruff: noqa: S608 - every name in the SQL is ours; values are parameters

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence

from millicent.core.clock import NS_PER_S, iso_utc

DIMENSIONS = ("feature", "user", "team", "model", "key", "tier", "status", "placement")
MEASURES = (
    "requests",
    "input_tokens",
    "output_tokens",
    "serving_ns",
    "cost_nanousd",
    "unpriced",
    "assumed",
    "unknown_usage",
)
# From the smallest: the first that has what is asked for answers.
CUBES: dict[str, tuple[str, ...]] = {
    "time": ("status",),
    "user": ("user", "status"),
    "work": ("feature", "team", "model", "key", "tier", "status", "placement"),
}
ARCHIVE = "archive"
# The book that stands; the only one that is rolled up.
ACTUAL = "actual"
QUARTER_NS = 900 * NS_PER_S
DAY_NS = 86_400 * NS_PER_S
# Those of which a value is on the fewest receipts, fewest first.
_SELECTIVE = ("run", "conversation", "user")
_SPANS_S = (900, 86_400)
_LEAST = -(2**63)
_GREATEST = 2**63 - 1
# Receipts of an older version that one checkpoint takes in: some tens of milliseconds.
_BACKFILL = 2_000

_SUMS = ", ".join(f"sum({name}) AS {name}" for name in MEASURES)
_COLUMNS = ", ".join((*DIMENSIONS, *MEASURES))
# As `receipt_sums` is posted: no dimension is NULL.
_POSTED = ", ".join((*(f"ifnull({name}, '') AS {name}" for name in DIMENSIONS), *MEASURES))


def fold(connection: sqlite3.Connection) -> None:
    """Move what was posted into the rollups, and take in some of what an older version wrote."""
    _backfill(connection)
    if connection.execute("SELECT 1 FROM rollup_deltas LIMIT 1").fetchone() is None:
        return
    for cube, dimensions in CUBES.items():
        _add(connection, "rollup_deltas", cube, dimensions)
    connection.execute("DELETE FROM rollup_deltas")


def archive(connection: sqlite3.Connection, from_ns: int, to_ns: int) -> None:
    """Keep the sums, by every dimension, of the closed receipts created in [from_ns, to_ns): they will be deleted."""
    connection.execute(
        f"CREATE TEMP TABLE archived AS SELECT quarter_ns, {_POSTED} FROM receipt_sums"
        " WHERE created_at_ns >= ? AND created_at_ns < ?",
        (from_ns, to_ns),
    )
    _add(connection, "archived", ARCHIVE, DIMENSIONS, spans_s=(900,))
    connection.execute("DROP TABLE archived")


def raw_before_ns(connection: sqlite3.Connection) -> int:
    """Receipts created before this are not in the rollups yet."""
    (before_ns,) = connection.execute("SELECT raw_before_ns FROM rollup_progress").fetchone()
    return int(before_ns)


def is_complete(connection: sqlite3.Connection) -> bool:
    return raw_before_ns(connection) == _LEAST


def problems(connection: sqlite3.Connection) -> list[str]:
    """Where the rollups, with what is posted and not folded yet, differ from the receipts; one line each."""
    found = []
    for cube, dimensions in CUBES.items():
        kept = ", ".join(dimensions)
        posted = ", ".join(f"ifnull({name}, '') AS {name}" for name in dimensions)
        archived = f"""
            SELECT start_ns AS quarter_ns, {kept}, {", ".join(MEASURES)} FROM rollups JOIN rollup_groups
            ON grouped = rollup_groups.id WHERE cube = '{{}}' AND span_s = 900"""
        entries = f"""
            SELECT quarter_ns, {posted}, {", ".join(MEASURES)} FROM receipt_sums
            WHERE created_at_ns >= (SELECT raw_before_ns FROM rollup_progress) UNION ALL {archived.format(ARCHIVE)}"""
        rolled = f"""
            SELECT quarter_ns, {kept}, {", ".join(MEASURES)} FROM rollup_deltas UNION ALL {archived.format(cube)}"""
        sums = [
            f"SELECT quarter_ns, {kept}, {_SUMS} FROM ({rows}) GROUP BY quarter_ns, {kept} HAVING sum(requests) != 0"
            for rows in (entries, rolled)
        ]
        for one, other in (sums, sums[::-1]):
            for quarter_ns, *_ in connection.execute(f"SELECT DISTINCT quarter_ns FROM ({one} EXCEPT {other})"):
                found.append(
                    f"the rollup by {', '.join(dimensions)} of {iso_utc(quarter_ns)} isn't the sum of receipts"
                )
    days = f"SELECT grouped, start_ns - start_ns % {DAY_NS} AS day_ns, {_SUMS} FROM rollups WHERE span_s = {{}}"
    wrong = connection.execute(
        f"SELECT DISTINCT day_ns FROM ({days.format(900)} AND grouped IN (SELECT id FROM rollup_groups WHERE cube != ?)"
        f" GROUP BY grouped, day_ns EXCEPT {days.format(86_400)} GROUP BY grouped, day_ns)",
        (ARCHIVE,),
    )
    found += [f"the rollup of the day from {iso_utc(day_ns)} isn't the sum of its quarter-hours" for (day_ns,) in wrong]
    return list(dict.fromkeys(found))


def _add(
    connection: sqlite3.Connection,
    source: str,
    cube: str,
    dimensions: Sequence[str],
    spans_s: Iterable[int] = _SPANS_S,
) -> None:
    kept = ", ".join(dimensions)
    connection.execute(
        f"INSERT INTO rollup_groups (cube, {kept}) SELECT DISTINCT ?, {kept} FROM {source} WHERE 1"
        " ON CONFLICT DO NOTHING",
        (cube,),
    )
    # The dimensions that the cube leaves out are '', so that the unique index finds the group.
    match = " AND ".join(f"g.{name} = {f'd.{name}' if name in dimensions else chr(39) * 2}" for name in DIMENSIONS)
    sums = ", ".join(f"sum(d.{name})" for name in MEASURES)
    grown = ", ".join(f"{name} = {name} + excluded.{name}" for name in MEASURES)
    for span_s in spans_s:
        connection.execute(
            f"INSERT INTO rollups SELECT g.id, {span_s}, d.quarter_ns - d.quarter_ns % {span_s * NS_PER_S} AS start_ns,"
            f" {sums} FROM {source} AS d CROSS JOIN rollup_groups AS g ON g.cube = ? AND {match}"
            f" WHERE 1 GROUP BY g.id, start_ns ON CONFLICT DO UPDATE SET {grown}",
            (cube,),
        )


def _backfill(connection: sqlite3.Connection) -> None:
    """Post the newest receipts that are in no rollup; those still open are posted when they close."""
    before_ns = raw_before_ns(connection)
    if before_ns == _LEAST:
        return
    found = connection.execute(
        "SELECT created_at_ns FROM receipts WHERE created_at_ns < ? ORDER BY created_at_ns DESC LIMIT 1 OFFSET ?",
        (before_ns, _BACKFILL - 1),
    ).fetchone()
    from_ns = _LEAST if found is None else found[0]
    connection.execute(
        f"INSERT INTO rollup_deltas (quarter_ns, {_COLUMNS}) SELECT quarter_ns, {_POSTED} FROM receipt_sums"
        " WHERE created_at_ns >= ? AND created_at_ns < ?",
        (from_ns, before_ns),
    )
    connection.execute("UPDATE rollup_progress SET raw_before_ns = ?", (from_ns,))


def totals_sql(
    connection: sqlite3.Connection, by: str | None, fixed: dict[str, str], from_ns: int, to_ns: int
) -> tuple[str, list[object]]:
    """SQL for the sums by one dimension, or by quarter-hour where `by` is None, and its parameters.

    `fixed` holds the columns that must have a value, '' for none. Rollups answer where a cube has all of them; the
    receipts themselves do for the rest, and for the ends of a range that cut a quarter-hour. Deleted receipts count at
    the start of the quarter-hour in which they were created.
    """
    needed = {*fixed, *([by] if by else [])}
    cube = next((name for name, kept in CUBES.items() if needed <= {*kept}), None)
    first = max(_up(from_ns, QUARTER_NS), _up(raw_before_ns(connection), QUARTER_NS))
    last = _down(to_ns, QUARTER_NS)
    parts = _Parts(by, fixed)
    if cube is None or first >= last:
        parts.detail(from_ns, to_ns)
        return parts.sql, parts.values
    if from_ns < first:
        parts.detail(from_ns, first)
    if last < to_ns:
        parts.detail(last, to_ns)
    parts.deltas(first, last)
    first_day, last_day = _up(first, DAY_NS), _down(last, DAY_NS)
    if by is None or first_day >= last_day:
        parts.rollups(cube, 900, first, last)
    else:
        parts.rollups(cube, 900, first, first_day)
        parts.rollups(cube, 86_400, first_day, last_day)
        parts.rollups(cube, 900, last_day, last)
    return parts.sql, parts.values


def book_sql(by: str | None, condition: str) -> str:
    """The sums of another book, from the receipts themselves; the book's name is the first parameter."""
    member = f"ifnull({by}, '')" if by else f"created_at_ns - created_at_ns % {QUARTER_NS}"
    return f"""
        WITH priced AS (
            SELECT r.*, CASE WHEN count(l.receipt) = count(amount_nanousd) THEN sum(amount_nanousd) END AS nanousd,
                coalesce(max(l.provenance = 'assumed'), 0) AS assumed
            FROM receipts AS r LEFT JOIN lines AS l ON l.receipt = r.id AND l.book = ?
            WHERE status IS NOT NULL AND {condition} GROUP BY created_at_ns, r.id
        )
        SELECT {member} AS member, count(*), coalesce(sum(input_tokens), 0), coalesce(sum(output_tokens), 0),
            sum(serving_ns), coalesce(sum(nanousd), 0), count(*) - count(nanousd),
            sum(assumed AND nanousd IS NOT NULL), sum(input_tokens IS NULL OR output_tokens IS NULL)
        FROM priced GROUP BY member
    """


class _Parts:
    """Sums over pieces of time, joined into one statement: what each piece adds to each group."""

    def __init__(self, by: str | None, fixed: dict[str, str]) -> None:
        self._by = by
        self._fixed = fixed
        self._selects: list[str] = []
        self.values: list[object] = []

    @property
    def sql(self) -> str:
        parts = " UNION ALL ".join(self._selects)
        # A group whose receipts were all taken away, by a purge, has rows of nothing.
        return f"SELECT member, {_SUMS} FROM ({parts}) GROUP BY member HAVING sum(requests) != 0"

    def detail(self, from_ns: int, to_ns: int) -> None:
        """Receipts one by one, and those whose detail was deleted."""
        parts, values = ["1"], []
        best = next((name for name in _SELECTIVE if self._fixed.get(name)), None)
        for name, value in self._fixed.items():
            # A plus keeps SQLite from the index of a column that many receipts share.
            column = name if best in {None, name} else f"+{name}"
            parts.append(f"{column} = ?" if value else f"({column} IS NULL OR {column} = '')")
            values += [value] if value else []
        grouped = f"ifnull({self._by}, '')" if self._by else "quarter_ns"
        self._select(grouped, "receipt_sums", " AND ".join(parts), "created_at_ns", from_ns, to_ns, values)
        if {*self._fixed} <= {*DIMENSIONS}:
            self.rollups(ARCHIVE, 900, from_ns, to_ns)

    def deltas(self, from_ns: int, to_ns: int) -> None:
        condition, values = self._condition()
        self._select(self._by or "quarter_ns", "rollup_deltas", condition, "quarter_ns", from_ns, to_ns, values)

    def rollups(self, cube: str, span_s: int, from_ns: int, to_ns: int) -> None:
        if from_ns >= to_ns:
            return
        condition, values = self._condition()
        source = "rollup_groups CROSS JOIN rollups ON grouped = rollup_groups.id"
        where = f"cube = ? AND span_s = {span_s} AND {condition}"
        self._select(self._by or "start_ns", source, where, "start_ns", from_ns, to_ns, [cube, *values])

    def _select(
        self, grouped: str, source: str, where: str, time: str, from_ns: int, to_ns: int, values: Sequence[object]
    ) -> None:
        # The greatest integer stands for no end; nothing is created in that nanosecond.
        self._selects.append(
            f"SELECT {grouped} AS member, {_SUMS} FROM {source} WHERE {where} AND {time} >= ? AND {time} < ?"
            " GROUP BY member"
        )
        self.values += [*values, from_ns, to_ns]

    def _condition(self) -> tuple[str, list[object]]:
        return " AND ".join(["1", *(f"{name} = ?" for name in self._fixed)]), [*self._fixed.values()]


def _up(ns: int, span_ns: int) -> int:
    return ns if ns in {_LEAST, _GREATEST} else -(-ns // span_ns) * span_ns


def _down(ns: int, span_ns: int) -> int:
    return ns if ns in {_LEAST, _GREATEST} else ns // span_ns * span_ns
