"""What requests with a lever cost, and those that were held out from it: the two sides of a comparison."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

import msgspec

from millicent.core.holdouts import ARM, SAVED_AS, SHARE, WITHOUT, Held


class Drawn(msgspec.Struct, frozen=True):
    """What was drawn together, at one share: a conversation, a run or one request. `requests` are its priced receipts
    and `nanousd` what they cost; `unpriced` are beside them. `reckoned_nanousd` is what the receipts of the priced say
    that the lever saved."""

    share: str
    without: bool
    requests: int
    nanousd: int
    unpriced: int
    reckoned_nanousd: int


def drawn(connection: sqlite3.Connection, lever: Held, where: str, values: Sequence[object]) -> list[Drawn]:
    """Closed receipts of requests that the lever was for, while a part went without."""
    arm = f"json_extract(policy, '$.{ARM.format(lever)}')"
    priced = "FILTER (WHERE nanousd IS NOT NULL)"
    sql = (
        f"SELECT share, arm = '{WITHOUT}', count(nanousd), coalesce(sum(nanousd), 0), count(*) - count(nanousd),"  # noqa: S608 - our own text
        f" coalesce(sum(reckoned) {priced}, 0) FROM (SELECT {arm} AS arm,"
        f" json_extract(policy, '$.{SHARE}') AS share, json_extract(saved, '$.{SAVED_AS[lever]}') AS reckoned,"
        " coalesce(nullif(conversation, ''), nullif(run, '')) AS together, key, id,"
        " (SELECT iif(count(*) = count(amount_nanousd), sum(amount_nanousd), NULL) FROM lines AS l"
        " WHERE l.receipt = receipts.id AND l.book = 'actual') AS nanousd"
        f" FROM receipts WHERE status IS NOT NULL AND {where} AND {arm} IS NOT NULL)"
        " GROUP BY share, arm, together, iif(together IS NULL, id, key)"
    )
    return [
        Drawn(share, bool(without), requests, nanousd, unpriced, reckoned)
        for share, without, requests, nanousd, unpriced, reckoned in connection.execute(sql, values)
    ]
