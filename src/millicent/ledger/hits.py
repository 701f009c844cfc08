"""What the response cache did: how much of what it was asked for it could give, and what that saved."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

import msgspec

from millicent.core.money import Money
from millicent.core.receipts import RESPONSE_CACHE


class CacheUse(msgspec.Struct, frozen=True):
    """Of one model's closed receipts, `requests` in all: those that the cache answered, those that it couldn't, and
    those that it was passed by for. `saved` (estimated) is of the `counted` hits, whose list price is known;
    `tokens` of output is what hits gave, and nobody had to make again."""

    model: str
    requests: int
    hits: int
    misses: int
    bypassed: int
    tokens: int
    counted: int
    saved: Money


def cache_use(connection: sqlite3.Connection, where: str, values: Sequence[object]) -> list[CacheUse]:
    """Of models for which the cache was on; those that were hit most first."""
    outcome, saved = f"json_extract(policy, '$.{RESPONSE_CACHE}')", f"json_extract(saved, '$.{RESPONSE_CACHE}')"
    sql = (
        f"SELECT model, count(*), coalesce(sum({outcome} = 'hit'), 0) AS hits, coalesce(sum({outcome} = 'miss'), 0),"  # noqa: S608 - our own text
        f" coalesce(sum({outcome} = 'bypass'), 0), coalesce(sum(output_tokens) FILTER (WHERE {outcome} = 'hit'), 0),"
        f" count({saved}), coalesce(sum({saved}), 0) FROM receipts AS r WHERE status IS NOT NULL AND {where}"
        f" GROUP BY model HAVING count({outcome}) ORDER BY hits DESC, model"
    )
    return [
        CacheUse(model, requests, hits, misses, bypassed, tokens, counted, Money(nanousd))
        for model, requests, hits, misses, bypassed, tokens, counted, nanousd in connection.execute(sql, values)
    ]
