"""Sums of receipts per quarter-hour, day and 32 days, by what reports group by.

Closing a receipt, or adding to a closed one, notes it in `unrolled` (triggers do, in the same transaction); folding
adds many receipts at a time to `rollups_pending`, which holds the running quarter-hour by every dimension, and moves
what is over to the cubes; `sums_sql` reads the cubes and what is pending, and makes up for what isn't folded. Each cube
keeps the dimensions that are asked for together, so that a year of many users doesn't make every report read every user
of every quarter-hour.
"""

# ruff: noqa: S608 - every name in the SQL is ours; values are parameters

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from millicent.core.clock import NS_PER_S, iso_utc
from millicent.core.receipts import Role
from millicent.ledger import tallies
from millicent.ledger.spans import (
    DAY_S,
    GREATEST,
    LEAST,
    MONTH_S,
    QUARTER_NS,
    QUARTER_S,
    down,
    newest_from_ns,
    pieces,
    up,
)

DIMENSIONS = ("feature", "user", "team", "model", "key", "tier", "status", "placement")
# The book that stands; the only one that is rolled up.
ACTUAL = "actual"

ROLE_MEASURES = {role: f"{role}_nanousd" for role in Role}


def verdict_sql(before: str = "") -> str:
    """Whether receipt `r` is useful: the latest verdict by feedback beats the one on the output. In the order in which
    it came: the system clock may have been set in between."""
    return (
        f"coalesce((SELECT f.useful FROM feedback AS f WHERE f.receipt = r.id AND f.useful IS NOT NULL {before}"
        " ORDER BY f.ordinal DESC LIMIT 1), r.useful)"
    )


_ALL_PRICED = "count(l.receipt) = count(l.amount_nanousd)"
_MAY_HAVE_COST = (
    "r.status != 'refused' AND (r.status = 'interrupted' OR r.input_tokens IS NOT 0 OR r.output_tokens IS NOT 0"
    " OR r.serving_ns != 0)"
)
# What one closed receipt `r`, joined to its lines `l`, adds to each sum. It is unpriced when one of its lines is, or
# when it has none although something may have run; then nothing of it is in the cost. It is priced when it has lines,
# all of them with an amount. Roles have every amount there is.
_FIGURES = {
    "requests": "1",
    "input_tokens": "ifnull(r.input_tokens, 0)",
    "output_tokens": "ifnull(r.output_tokens, 0)",
    "serving_ns": "r.serving_ns",
    "cost_nanousd": f"iif({_ALL_PRICED}, ifnull(sum(l.amount_nanousd), 0), 0)",
    "unpriced": f"iif(count(l.receipt) > 0, NOT {_ALL_PRICED}, {_MAY_HAVE_COST})",
    "assumed": f"{_ALL_PRICED} AND ifnull(max(l.provenance = 'assumed'), 0)",
    "unknown_usage": "r.input_tokens IS NULL OR r.output_tokens IS NULL",
    "priced": f"count(l.receipt) > 0 AND {_ALL_PRICED}",
    "rated": "{verdict} IS NOT NULL",
    "useful": "ifnull({verdict}, 0)",
    "unpriced_lines": "count(l.receipt) - count(l.amount_nanousd)",
    **{name: f"ifnull(sum(iif(l.role = '{role}', l.amount_nanousd, 0)), 0)" for role, name in ROLE_MEASURES.items()},
}
MEASURES = tuple(_FIGURES)


class Cube(NamedTuple):
    dimensions: tuple[str, ...]
    spans_s: tuple[int, ...]


# From the smallest: the first that has what is asked for answers.
CUBES: dict[str, Cube] = {
    "time": Cube(("status",), (QUARTER_S, DAY_S, MONTH_S)),
    "place": Cube(("model", "placement", "status"), (QUARTER_S, DAY_S, MONTH_S)),
    "feature": Cube(("feature", "status"), (QUARTER_S, DAY_S, MONTH_S)),
    "user": Cube(("user", "status"), (QUARTER_S, DAY_S, MONTH_S)),
    "work": Cube(("feature", "team", "model", "key", "tier", "status", "placement"), (QUARTER_S, DAY_S, MONTH_S)),
    # In a quarter-hour there would be as many sums as receipts: the ends of a range are added up from those.
    "product": Cube(("feature", "user", "status"), (DAY_S,)),
}
# Every dimension, of receipts whose detail was deleted.
ARCHIVE = "archive"
# Those of which a value is on the fewest receipts, fewest first.
_SELECTIVE = ("run", "conversation", "user")
# Receipts of an older version that one checkpoint takes in: some tens of milliseconds.
_BACKFILL = 2_000
# Receipts folded at a time where nobody waits for anything else.
_MANY = 4_096
# Sums that wait for the end of their quarter-hour; a report reads all of them.
_MOST_PENDING = 4_096

_COLUMNS = ", ".join((*DIMENSIONS, *MEASURES))
_PLACE = ", ".join(("quarter_ns", *DIMENSIONS))
_ENTRY = ", ".join(("quarter_ns", *DIMENSIONS, *MEASURES))
_ROLLED = "rollup_groups CROSS JOIN rollups ON grouped = rollup_groups.id"


def fold(connection: sqlite3.Connection) -> None:
    """Bring the cubes up to date with every closed receipt, but for those of an older version."""
    post_all(connection)
    while _spread(connection, GREATEST, _MANY):
        pass


def post_all(connection: sqlite3.Connection) -> None:
    """Add every closed receipt to what is pending, so that its detail isn't needed any more."""
    while _post(connection, _MANY):
        pass


def fold_some(connection: sqlite3.Connection, most: int) -> bool:
    """So many receipts, the more at once the less for each, and so many sums on to the cubes where that is due.
    Whether there was anything to do."""
    posted = _post(connection, most)
    spread = _spread(connection, _due_before_ns(connection), most)
    return posted or spread


def _post(connection: sqlite3.Connection, most: int) -> bool:
    """Add receipts to what is pending; whether there were any."""
    (last,) = connection.execute(
        "SELECT max(receipt) FROM (SELECT receipt FROM unrolled ORDER BY receipt LIMIT ?)", (most,)
    ).fetchone()
    if last is None:
        return False
    connection.execute(
        f"INSERT INTO rollups_pending ({_ENTRY}) SELECT {_PLACE}, {_sums(MEASURES)} FROM ({_unrolled(up_to=True)})"
        f" WHERE 1 GROUP BY {_PLACE} ON CONFLICT DO UPDATE SET {_grown('rollups_pending')}",
        {"last": last},
    )
    tallies.fold(connection, last)
    connection.execute("DELETE FROM unrolled WHERE receipt <= ?", (last,))
    return True


def _due_before_ns(connection: sqlite3.Connection) -> int:
    """Of the quarter-hours that are pending, those before the newest are over; of too many sums, all are due."""
    full = connection.execute("SELECT 1 FROM rollups_pending LIMIT 1 OFFSET ?", (_MOST_PENDING,)).fetchone()
    (newest_ns,) = connection.execute("SELECT max(quarter_ns) FROM rollups_pending").fetchone()
    return GREATEST if full or newest_ns is None else int(newest_ns)


def _spread(connection: sqlite3.Connection, before_ns: int, most: int) -> bool:
    """Move so many pending sums, oldest first, of quarter-hours before this to the cubes, and tallies to their spans;
    whether there were any."""
    _make_posted(connection)
    moved = connection.execute(
        f"INSERT INTO posted SELECT {_ENTRY} FROM rollups_pending WHERE quarter_ns < ? ORDER BY {_PLACE} LIMIT ?",
        (before_ns, most),
    )
    if moved.rowcount:
        last = f"(SELECT {_PLACE} FROM posted ORDER BY rowid DESC LIMIT 1)"
        connection.execute(f"DELETE FROM rollups_pending WHERE ({_PLACE}) <= {last}")
        _add_posted(connection, CUBES)
    return tallies.spread(connection, before_ns, most) or moved.rowcount > 0


def backfill(connection: sqlite3.Connection, most: int = _BACKFILL) -> None:
    """Take in the newest receipts that are in no rollup; those still open are noted when they close."""
    before_ns = raw_before_ns(connection)
    if before_ns == LEAST:
        return
    from_ns = newest_from_ns(connection, before_ns, most)
    _add(connection, _created(), (from_ns, before_ns), CUBES)
    connection.execute("UPDATE rollup_progress SET raw_before_ns = ?", (from_ns,))


def archive(connection: sqlite3.Connection, from_ns: int, to_ns: int) -> None:
    """Keep the sums, by every dimension, of the closed receipts created in [from_ns, to_ns): they will be deleted.
    Everything must be posted."""
    _add(connection, _created(), (from_ns, to_ns), {ARCHIVE: Cube(DIMENSIONS, (QUARTER_S,))})


def raw_before_ns(connection: sqlite3.Connection) -> int:
    """Receipts created before this are not in the rollups yet."""
    (before_ns,) = connection.execute("SELECT raw_before_ns FROM rollup_progress").fetchone()
    return int(before_ns)


def is_complete(connection: sqlite3.Connection) -> bool:
    return raw_before_ns(connection) == LEAST


def problems(connection: sqlite3.Connection) -> list[str]:
    """Where the rollups, with what isn't folded yet, differ from the receipts; one line each. Reads every receipt."""
    found = []
    dimensions = ", ".join(DIMENSIONS)
    connection.execute(
        f"CREATE TEMP TABLE entries AS SELECT quarter_ns, {dimensions}, {_sums(MEASURES)} FROM ({_created()})"
        f" GROUP BY quarter_ns, {dimensions}",
        (raw_before_ns(connection), GREATEST),
    )
    connection.execute(
        f"INSERT INTO entries SELECT start_ns, {_COLUMNS} FROM {_ROLLED} WHERE cube = ?",
        (ARCHIVE,),
    )
    # What the cubes lack on purpose is taken off both.
    for lacking in (f"({_unrolled()})", "rollups_pending"):
        connection.execute(f"INSERT INTO entries SELECT quarter_ns, {dimensions}, {_negated()} FROM {lacking}")
    for cube, (kept, (finest_s, *coarser_s)) in CUBES.items():
        names = ", ".join(kept)
        entries = f"SELECT {_start('quarter_ns', finest_s)} AS at_ns, {names}, {', '.join(MEASURES)} FROM entries"
        rolled = f"SELECT start_ns, {names}, {_negated()} FROM {_ROLLED} WHERE cube = ? AND span_s = ?"
        wrong = connection.execute(_unequal(entries, rolled, names), (cube, finest_s))
        found += [f"the rollup by {names} of {iso_utc(at_ns)} isn't the sum of receipts" for (at_ns,) in wrong]
        for coarse_s in coarser_s:
            of_span = f"FROM {_ROLLED} WHERE cube = ? AND span_s = ?"
            fine = f"SELECT {_start('start_ns', coarse_s)} AS at_ns, grouped, {', '.join(MEASURES)} {of_span}"
            coarse = f"SELECT start_ns, grouped, {_negated()} {of_span}"
            wrong = connection.execute(_unequal(fine, coarse, "grouped"), (cube, finest_s, cube, coarse_s))
            found += [
                f"the rollup by {names} of {coarse_s // DAY_S} days from {iso_utc(at_ns)} isn't the sum of its parts"
                for (at_ns,) in wrong
            ]
    connection.execute("DROP TABLE entries")
    return found


def _unequal(one: str, negated: str, names: str) -> str:
    """SQL for the times at which the sums of both aren't nothing."""
    off = " OR ".join(f"sum({name}) != 0" for name in MEASURES)
    both = f"SELECT at_ns FROM ({one} UNION ALL {negated}) GROUP BY at_ns, {names} HAVING {off}"
    return f"SELECT DISTINCT at_ns FROM ({both})"


def sums_sql(
    connection: sqlite3.Connection,
    by: str | None,
    fixed: dict[str, str],
    from_ns: int,
    to_ns: int,
    measures: Sequence[str],
    *,
    coarsest_s: int = MONTH_S,
) -> tuple[str, list[object]]:
    """SQL for the sums by one dimension, or by time where `by` is None, and its parameters. The first measure must be
    `requests`; times are starts of spans up to `coarsest_s`, and those of one span must be added up to be whole.

    `fixed` holds the columns that must have a value, '' for none. Rollups answer where a cube has all of them; the
    receipts themselves do for the rest, and for the ends of a range that cut a span. Deleted receipts count at the
    start of the quarter-hour in which they were created.
    """
    needed = {*fixed, *([by] if by else [])}
    parts = _Parts(by, fixed, measures)
    for cube, (kept, spans_s) in CUBES.items():
        usable_s = [span_s for span_s in spans_s if span_s <= coarsest_s]
        if needed <= {*kept} and usable_s:
            raw_until_ns = min(max(from_ns, up(raw_before_ns(connection), usable_s[0])), to_ns)
            parts.detail(from_ns, raw_until_ns)
            parts.rolled(cube, usable_s, raw_until_ns, to_ns)
            break
    else:
        parts.detail(from_ns, to_ns)
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


def _entries(
    tables: str,
    condition: str,
    measures: Iterable[str],
    *,
    among_lines: str = "",
    among_feedback: str = "",
    also: Sequence[str] = (),
    grouped: str = "r.created_at_ns, r.id",
) -> str:
    """One row per closed receipt `r`: its quarter-hour, every dimension, those asked for also, and the measures."""
    named = ", ".join(f"ifnull(r.{name}, '') AS {name}" for name in (*DIMENSIONS, *also))
    verdict = verdict_sql(among_feedback)
    figures = ", ".join(f"{_FIGURES[name].format(verdict=verdict)} AS {name}" for name in measures)
    return (
        f"SELECT r.created_at_ns - r.created_at_ns % {QUARTER_NS} AS quarter_ns, {named}, {figures} FROM {tables}"
        f" LEFT JOIN lines AS l ON l.receipt = r.id AND l.book = '{ACTUAL}' {among_lines}"
        f" WHERE r.status IS NOT NULL AND {condition} GROUP BY {grouped}"
    )


def _created(measures: Iterable[str] = MEASURES, condition: str = "1", also: Sequence[str] = ()) -> str:
    """The receipts created from the first parameter to before the second."""
    return _entries(
        "receipts AS r", f"r.created_at_ns >= ? AND r.created_at_ns < ? AND {condition}", measures, also=also
    )


def _unrolled(measures: Sequence[str] = MEASURES, up_to: bool = False) -> str:
    """What the rollups lack: what receipts are now, less what was taken in of them. `up_to` limits both by receipt."""
    tables = "unrolled AS u CROSS JOIN receipts AS r ON r.id = u.receipt"
    limit = "u.receipt <= :last" if up_to else "1"
    # In the order of `unrolled`, so that nothing need be sorted.
    now = _entries(tables, limit, measures, grouped="u.receipt")
    before = _entries(
        tables,
        f"u.lines IS NOT NULL AND {limit}",
        measures,
        among_lines="AND l.ordinal < u.lines",
        among_feedback="AND f.ordinal < u.feedback",
        grouped="u.receipt",
    )
    return f"SELECT * FROM ({now}) UNION ALL SELECT {_PLACE}, {_negated(measures)} FROM ({before})"


def _add(connection: sqlite3.Connection, entries: str, values: Sequence[object], cubes: dict[str, Cube]) -> None:
    """Add the entries to the cubes, in all their spans."""
    _make_posted(connection)
    connection.execute(
        f"INSERT INTO posted SELECT {_PLACE}, {_sums(MEASURES)} FROM ({entries}) GROUP BY {_PLACE}", values
    )
    _add_posted(connection, cubes)


def _make_posted(connection: sqlite3.Connection) -> None:
    """Once: a new table would have every statement of this connection compiled again."""
    connection.execute(f"CREATE TEMP TABLE IF NOT EXISTS posted ({_ENTRY})")


def _add_posted(connection: sqlite3.Connection, cubes: dict[str, Cube]) -> None:
    """To the cubes, in all their spans."""
    for cube, (kept, spans_s) in cubes.items():
        dimensions = ", ".join(kept)
        connection.execute(
            f"INSERT INTO rollup_groups (cube, {dimensions}) SELECT DISTINCT ?, {dimensions} FROM posted AS p"
            f" WHERE NOT EXISTS (SELECT 1 FROM rollup_groups AS g WHERE g.cube = ? AND {_same_group(kept)})",
            (cube, cube),
        )
        for span_s in spans_s:
            connection.execute(
                f"INSERT INTO rollups SELECT g.id, {span_s}, {_start('p.quarter_ns', span_s)} AS start_ns,"
                f" {_sums(MEASURES)} FROM posted AS p CROSS JOIN rollup_groups AS g ON g.cube = ?"
                f" AND {_same_group(kept)} WHERE 1 GROUP BY g.id, start_ns"
                f" ON CONFLICT DO UPDATE SET {_grown('rollups')}",
                (cube,),
            )
    connection.execute("DELETE FROM posted")


def _grown(table: str) -> str:
    return ", ".join(f"{name} = {table}.{name} + excluded.{name}" for name in MEASURES)


def _start(time: str, span_s: int) -> str:
    """When the span begins in which this time lies."""
    return f"{time} - {time} % {span_s * NS_PER_S}"


def _same_group(kept: Iterable[str]) -> str:
    """The dimensions that the cube leaves out are '', so that the unique index finds the group."""
    return " AND ".join(f"g.{name} = " + (f"p.{name}" if name in kept else "''") for name in DIMENSIONS)


class _Parts:
    """Sums over pieces of time, joined into one statement: what each piece adds to each group."""

    def __init__(self, by: str | None, fixed: dict[str, str], measures: Sequence[str]) -> None:
        self._by = by
        self._fixed = fixed
        self._measures = measures
        self._selects: list[str] = []
        self.values: list[object] = []

    @property
    def sql(self) -> str:
        nothing = f"SELECT 0 AS member, {', '.join(f'0 AS {name}' for name in self._measures)} WHERE 0"
        parts = " UNION ALL ".join([nothing, *self._selects])
        # A group whose receipts were all taken away, by a purge, has rows of nothing. A time may have what is added to
        # another time's receipts: a late line's quarter-hour lies in a day that is rolled up.
        some = "HAVING sum(requests) != 0" if self._by else ""
        return f"SELECT member, {_sums(self._measures)} FROM ({parts}) GROUP BY member {some}"

    def rolled(self, cube: str, spans_s: Sequence[int], from_ns: int, to_ns: int) -> None:
        """The widest whole spans, finer ones at their ends, and receipts where not even the finest fits."""
        first, last = up(from_ns, spans_s[0]), down(to_ns, spans_s[0])
        if first >= last:
            self.detail(from_ns, to_ns)
            return
        self.detail(from_ns, first)
        for piece in pieces(spans_s, first, last):
            self._rollups(cube, *piece)
        self._added(first, last, "rollups_pending")
        self._added(first, last, f"({_unrolled(self._measures)})")
        self.detail(last, to_ns)

    def detail(self, from_ns: int, to_ns: int) -> None:
        """Receipts one by one, and those whose detail was deleted."""
        if from_ns >= to_ns:
            return
        parts, values = ["1"], []
        best = next((name for name in _SELECTIVE if self._fixed.get(name)), None)
        for name, value in self._fixed.items():
            # A plus keeps SQLite from the index of a column that many receipts share.
            column = f"r.{name}" if best in {None, name} else f"+r.{name}"
            parts.append(f"{column} = ?" if value else f"({column} IS NULL OR {column} = '')")
            values += [value] if value else []
        also = [self._by] if self._by and self._by not in DIMENSIONS else []
        entries = _created(self._measures, " AND ".join(parts), also)
        self._select(self._by or "quarter_ns", f"({entries})", "1", [from_ns, to_ns, *values])
        if {*self._fixed} <= {*DIMENSIONS}:
            self._rollups(ARCHIVE, QUARTER_S, from_ns, to_ns)

    def _added(self, from_ns: int, to_ns: int, source: str) -> None:
        """What no cube has yet."""
        condition, values = self._condition()
        where = f"{condition} AND quarter_ns >= ? AND quarter_ns < ?"
        self._select(self._by or "quarter_ns", source, where, [*values, from_ns, to_ns])

    def _rollups(self, cube: str, span_s: int, from_ns: int, to_ns: int) -> None:
        if from_ns >= to_ns:
            return
        condition, values = self._condition()
        where = f"cube = ? AND span_s = {span_s} AND {condition} AND start_ns >= ? AND start_ns < ?"
        # Of a deleted receipt's run or conversation nothing is known.
        grouped = "start_ns" if self._by is None else self._by if self._by in DIMENSIONS else "''"
        self._select(grouped, _ROLLED, where, [cube, *values, from_ns, to_ns])

    def _select(self, grouped: str, source: str, where: str, values: Iterable[object]) -> None:
        # The greatest integer stands for no end; nothing is created in that nanosecond.
        self._selects.append(
            f"SELECT {grouped} AS member, {_sums(self._measures)} FROM {source} WHERE {where} GROUP BY member"
        )
        self.values += values

    def _condition(self) -> tuple[str, list[object]]:
        return " AND ".join(["1", *(f"{name} = ?" for name in self._fixed)]), [*self._fixed.values()]


def _sums(measures: Iterable[str]) -> str:
    return ", ".join(f"sum({name}) AS {name}" for name in measures)


def _negated(measures: Iterable[str] = MEASURES) -> str:
    return ", ".join(f"-{name} AS {name}" for name in measures)
