"""Single receipts' figures, of a span of time, at most so many: for what no rollup holds."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any

# The fields of `queries.Sample`, in order.
_COLUMNS = (
    "r.created_at_ns, r.feature, r.key, r.user, r.model, r.status IN ('failed', 'interrupted') AS failed, r.total_ns,"
    " r.input_tokens, r.output_tokens, json_extract(r.usage, '$.leaves.input_cache_read.tokens') AS cached,"
    " json_extract(r.policy, '$.latency_target_met') AS met"
)


def sample_rows(
    connection: sqlite3.Connection, condition: str, values: Sequence[object], requests: int, most: int
) -> Iterator[tuple[Any, ...]]:
    """All of them where there are at most `most`, else every so-manyth; `requests` is how many there are, about."""
    every = max(1, -(-requests // most))
    sql = (
        f"SELECT {_COLUMNS} FROM receipts AS r WHERE status IS NOT NULL AND {condition} AND r.rowid % ? = 0"  # noqa: S608 - our own names
        " ORDER BY created_at_ns LIMIT ?"
    )
    for *figures, failed, total_ns, read, written, cached, met in connection.execute(sql, (*values, every, 2 * most)):
        yield (*figures, bool(failed), total_ns, read, written, cached, None if met is None else met == "true")
