"""What levers did: how much was routed."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

import msgspec

from millicent.core.money import Money


class Coverage(msgspec.Struct, frozen=True):
    """One policy's closed receipts, of `requests` in all. `cheaper` were answered by another model than the strongest;
    `escalated` were asked of a stronger one after all. `saved` (estimated) is of the `counted` ones, whose
    alternative's price is known."""

    policy: str
    routed: int
    cheaper: int
    escalated: int
    counted: int
    saved: Money
    requests: int


def coverage(connection: sqlite3.Connection, where: str, values: Sequence[object]) -> list[Coverage]:
    """Those that were routed most first."""
    told = "json_extract(policy, '$.{}')".format
    answered = f"coalesce({told('answered_by')} != {told('strongest')}, 0)"
    saved = "json_extract(saved, '$.routing')"
    closed = f"status IS NOT NULL AND {where}"
    requests = connection.execute(f"SELECT count(*) FROM receipts AS r WHERE {closed}", values).fetchone()[0]  # noqa: S608 - our own text
    sql = (
        f"SELECT {told('routing')}, count(*), sum({answered}), count({told('escalated')}), count({saved}),"  # noqa: S608 - our own text
        f" coalesce(sum({saved}), 0) FROM receipts AS r WHERE {closed} AND {told('routing')} IS NOT NULL"
        " GROUP BY 1 ORDER BY 2 DESC, 1"
    )
    return [
        Coverage(policy, routed, cheaper, escalated, counted, Money(nanousd), requests)
        for policy, routed, cheaper, escalated, counted, nanousd in connection.execute(sql, values)
    ]
