"""What levers did, and what they left: how much was routed, and what was paid for that nobody had any use of."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

import msgspec

from millicent.core.money import Money

# A prompt that is repeated counts from this many tokens on: providers cache none that are shorter.
LEAST_REPEATED_TOKENS = 1024
# A feature's prompts grow when those of the later half of the time are longer by this much; with fewer than this in
# each half, nobody can tell.
GROWTH_PERCENT = 20
LEAST_GROWING = 20


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


class Waste(msgspec.Struct, frozen=True):
    """One kind of waste in one feature. `tokens` are those that were paid for; `cost` of the receipts whose cost is
    known, `unpriced` counts the others."""

    kind: str
    feature: str | None
    requests: int
    tokens: int
    cost: Money
    unpriced: int


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


_CHOSEN = """
    WITH chosen AS MATERIALIZED (
        SELECT r.*, coalesce(json_extract(usage, '$.leaves.input_cache_read.tokens'), 0) AS cached,
            (SELECT iif(count(*) = count(amount_nanousd), sum(amount_nanousd), NULL) FROM lines AS l
                WHERE l.receipt = r.id AND l.book = 'actual') AS cost,
            (SELECT sum(amount_nanousd) FROM lines AS l
                WHERE l.receipt = r.id AND l.book = 'actual' AND l.meter = 'input') AS fresh_cost,
            (SELECT sum(CAST(quantity AS INTEGER)) FROM lines AS l
                WHERE l.receipt = r.id AND l.book = 'actual' AND l.meter = 'input') AS fresh
        FROM receipts AS r WHERE status IS NOT NULL AND backend IS NOT 'response_cache' AND {where}
    ), turns AS (
        SELECT *, min(input_tokens, lag(input_tokens + output_tokens) OVER (
            PARTITION BY conversation, model ORDER BY created_at_ns, id)) - cached AS again
        FROM chosen WHERE conversation IS NOT NULL
    ), middle AS (
        SELECT feature AS f, (min(created_at_ns) / 2 + max(created_at_ns) / 2) AS at_ns FROM chosen GROUP BY feature
    ), halves AS (
        SELECT feature, count(*) FILTER (WHERE created_at_ns >= at_ns) AS late,
            count(*) FILTER (WHERE created_at_ns < at_ns) AS early,
            avg(input_tokens) FILTER (WHERE created_at_ns >= at_ns) AS late_mean,
            avg(input_tokens) FILTER (WHERE created_at_ns < at_ns) AS early_mean,
            sum(fresh_cost) FILTER (WHERE created_at_ns >= at_ns) AS late_cost,
            count(*) FILTER (WHERE created_at_ns >= at_ns AND fresh_cost IS NULL) AS unpriced
        FROM chosen JOIN middle ON f IS feature WHERE input_tokens IS NOT NULL GROUP BY feature
    )
    SELECT 'cut', feature, count(*), sum(output_tokens), sum(cost), sum(cost IS NULL) FROM chosen
    WHERE status = 'succeeded' AND finish_reason = 'length' GROUP BY feature
    UNION ALL
    SELECT 'unread', feature, count(*), sum(output_tokens), sum(cost), sum(cost IS NULL) FROM chosen
    WHERE status = 'cancelled' GROUP BY feature
    UNION ALL
    SELECT 'repeated', feature, count(*), sum(again), sum(fresh_cost * min(again, fresh) / fresh),
        sum(fresh_cost IS NULL) FROM turns
    WHERE again >= :least_repeated GROUP BY feature
    UNION ALL
    SELECT 'growing', feature, late, CAST(late * (late_mean - early_mean) AS INTEGER),
        CAST(late_cost * (1 - early_mean / late_mean) AS INTEGER), unpriced FROM halves
    WHERE early >= :least_growing AND late >= :least_growing AND late_mean * 100 >= early_mean * (100 + :growth)
"""


def waste(connection: sqlite3.Connection, where: str, values: Sequence[object]) -> list[Waste]:
    """Dearest first. Kinds: `cut`, outputs that their limit ended; `unread`, whose caller had left; `repeated`, prompts
    of a conversation that began as its turn before had ended, and weren't read from a cache, at most at the full price
    of fresh input; `growing`, what the later half's longer prompts of a feature cost more."""
    text = _CHOSEN.format(where=where)
    for name, value in (
        (":least_repeated", LEAST_REPEATED_TOKENS),
        (":least_growing", LEAST_GROWING),
        (":growth", GROWTH_PERCENT),
    ):
        text = text.replace(name, str(value))
    found = [
        Waste(kind, feature, requests, tokens or 0, Money(nanousd or 0), unpriced or 0)
        for kind, feature, requests, tokens, nanousd, unpriced in connection.execute(text, values)
    ]
    return sorted(found, key=lambda each: (-each.cost.nanousd, -each.tokens, each.kind, each.feature or ""))
