"""Which receipts match, newest first, without reading the many that don't.

A filter that few match would have the whole ledger read, and an index for each filter would make every receipt dearer
to write. So the newest are looked through first, which is enough where many match; where it isn't, the rollups say on
which days, and in which quarter-hours of those, there is any, and only these are looked through.
"""

# ruff: noqa: S608 - every name in the SQL is ours; values are parameters

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence

from millicent.core.clock import NS_PER_S
from millicent.ledger import rollups
from millicent.ledger.rollups import CUBES

Place = tuple[int, str]
"""When a receipt was created, and its identifier: the order of pages."""

# Columns with an index, of what is named in them.
_INDEXED = frozenset({"key", "team", "user", "feature", "tier", "conversation", "run"})
_LOOKED_THROUGH = 2_000
_NEWEST_FIRST = "ORDER BY created_at_ns DESC, id DESC LIMIT ?"


def newest(
    connection: sqlite3.Connection,
    fixed: Mapping[str, str],
    condition: str,
    values: Sequence[object],
    from_ns: int,
    to_ns: int,
    limit: int,
) -> list[Place]:
    """Of the receipts created in [from_ns, to_ns) that meet the condition; in it, `fixed` columns have a value, ''
    for none."""

    def matching(tables: str, condition: str, *more: object) -> list[Place]:
        sql = f"SELECT created_at_ns, id FROM {tables} WHERE {condition} {_NEWEST_FIRST}"
        return connection.execute(sql, (*more, limit)).fetchall()

    if fixed.get("status") == "running":
        return matching("receipts INDEXED BY receipts_open", condition, *values)
    spans = _spans(connection, fixed, from_ns, to_ns)
    if spans is None:
        return matching("receipts", condition, *values)
    within = "created_at_ns >= ? AND created_at_ns < ?"
    newest = f"(SELECT * FROM receipts WHERE {within} {_NEWEST_FIRST})"
    found = matching(newest, condition, from_ns, to_ns, _LOOKED_THROUGH, *values)
    if len(found) == limit:
        return found
    also = f"{condition} AND {within}"
    # What isn't in the rollups: open receipts, those not folded yet, and an older version's.
    places = {
        *matching("receipts INDEXED BY receipts_open", f"status IS NULL AND {condition}", *values),
        *matching("unrolled CROSS JOIN receipts ON receipts.id = unrolled.receipt", condition, *values),
    }
    inside = 0
    for start_ns, end_ns in spans:
        of_span = matching("receipts", also, *values, start_ns, end_ns)
        places.update(of_span)
        inside += len(of_span)
        if inside >= limit:
            break
    else:
        places.update(matching("receipts", also, *values, from_ns, rollups.raw_before_ns(connection)))
    return sorted(places, reverse=True)[:limit]


def _spans(
    connection: sqlite3.Connection, fixed: Mapping[str, str], from_ns: int, to_ns: int
) -> Iterator[tuple[int, int]] | None:
    """The finest spans that have any of these, newest first; None where an index answers, or no cube can."""
    if not fixed or any(fixed.get(name) for name in ("conversation", "run")):
        return None
    [first, *others] = fixed
    if not others and first in _INDEXED and fixed[first]:
        return None
    name = next((name for name, cube in CUBES.items() if {*fixed} <= {*cube.dimensions}), None)
    if name is None:
        return None
    (oldest_ns,) = connection.execute("SELECT min(created_at_ns) FROM receipts").fetchone()
    if oldest_ns is None:
        return iter(())
    return _walk(connection, name, CUBES[name].spans_s, fixed, max(from_ns, oldest_ns), to_ns)


def _walk(
    connection: sqlite3.Connection,
    cube: str,
    spans_s: Sequence[int],
    fixed: Mapping[str, str],
    from_ns: int,
    to_ns: int,
) -> Iterator[tuple[int, int]]:
    *finer_s, span_s = spans_s
    span_ns = span_s * NS_PER_S
    wanted = " AND ".join(f"g.{name} = ?" for name in fixed)
    within = (from_ns - span_ns, to_ns)
    # What is pending is in no span yet: quarter-hours of their own, of which there are few.
    starts = connection.execute(
        "SELECT start_ns FROM ("
        " SELECT start_ns, requests FROM rollup_groups AS g CROSS JOIN rollups ON grouped = g.id"
        f" WHERE g.cube = ? AND {wanted} AND span_s = ? AND start_ns > ? AND start_ns < ?"
        f" UNION ALL SELECT quarter_ns - quarter_ns % {span_ns} AS start_ns, requests FROM rollups_pending AS g"
        f" WHERE {wanted} AND start_ns > ? AND start_ns < ?"
        ") GROUP BY start_ns HAVING sum(requests) > 0 ORDER BY start_ns DESC",
        (cube, *fixed.values(), span_s, *within, *fixed.values(), *within),
    ).fetchall()
    for (start_ns,) in starts:
        part = max(start_ns, from_ns), min(start_ns + span_ns, to_ns)
        if finer_s:
            yield from _walk(connection, cube, finer_s, fixed, *part)
        else:
            yield part
