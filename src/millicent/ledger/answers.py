"""What requests are like: of many receipts, only what says where they ran, what they used and how long they took."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

import msgspec

from millicent.core.usage import Provenance, Usage


class Answer(msgspec.Struct, frozen=True):
    """One answer that went well. `serving_ns` is None where nobody knows; `fit` is the step-time model's version."""

    created_at_ns: int
    model: str
    placement: str | None
    usage: Usage
    total_ns: int | None
    serving_ns: int | None
    fit: str | None


_COLUMNS = "created_at_ns, model, placement, usage, total_ns, serving_ns, accelerator_provenance, step_time_version"
_usage = msgspec.json.Decoder(Usage)


def newest_answers(connection: sqlite3.Connection, where: str, values: Sequence[object], limit: int) -> list[Answer]:
    """Those that the model which was asked for gave at once, oldest first; none from the response cache."""
    sql = (
        f"SELECT {_COLUMNS} FROM receipts WHERE status = 'succeeded' AND {where}"  # noqa: S608 - our own text
        " AND NOT EXISTS (SELECT 1 FROM attempts WHERE receipt = receipts.id AND role != 'inference')"
        " AND backend IS NOT 'response_cache' ORDER BY created_at_ns DESC, id DESC LIMIT ?"
    )
    return [
        Answer(at_ns, model, placement, _usage.decode(usage), total_ns, None if known == _UNKNOWN else serving_ns, fit)
        for at_ns, model, placement, usage, total_ns, serving_ns, known, fit in reversed(
            connection.execute(sql, (*values, limit)).fetchall()
        )
    ]


_UNKNOWN = Provenance.UNKNOWN.value
