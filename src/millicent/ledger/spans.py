"""The spans of time (UTC) that sums are kept by, and how a range of time is made of them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence

from millicent.core.clock import NS_PER_S

QUARTER_S, HOUR_S, DAY_S, WIDE_S, MONTH_S = 900, 3600, 86_400, 8 * 86_400, 32 * 86_400
QUARTER_NS, DAY_NS = QUARTER_S * NS_PER_S, DAY_S * NS_PER_S
# The times that stand for no beginning and no end.
LEAST, GREATEST = -(2**63), 2**63 - 1


def up(ns: int, span_s: int) -> int:
    """The first start of such a span that isn't before this time."""
    return ns if ns in {LEAST, GREATEST} else -(-ns // (span_s * NS_PER_S)) * span_s * NS_PER_S


def down(ns: int, span_s: int) -> int:
    """The start of such a span in which this time lies."""
    return ns if ns in {LEAST, GREATEST} else ns // (span_s * NS_PER_S) * span_s * NS_PER_S


def pieces(spans_s: Sequence[int], from_ns: int, to_ns: int) -> Iterator[tuple[int, int, int]]:
    """The widest whole spans in this time, finer ones at its ends: each with its own part. The time's bounds must be
    those of the finest."""
    fine_s, *coarser_s = spans_s
    first, last = (up(from_ns, coarser_s[0]), down(to_ns, coarser_s[0])) if coarser_s else (to_ns, to_ns)
    if first >= last:
        first = last = to_ns
    if from_ns < first:
        yield fine_s, from_ns, first
    if first < last:
        yield from pieces(coarser_s, first, last)
    if last < to_ns:
        yield fine_s, last, to_ns


def newest_from_ns(connection: sqlite3.Connection, before_ns: int, most: int) -> int:
    """Since when the newest `most` of the receipts created before this were; no beginning where there are no more."""
    found = connection.execute(
        "SELECT created_at_ns FROM receipts WHERE created_at_ns < ? ORDER BY created_at_ns DESC LIMIT 1 OFFSET ?",
        (before_ns, most - 1),
    ).fetchone()
    return LEAST if found is None else int(found[0])
