"""`[ledger]`: how receipts are kept."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec


class LedgerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`durability` is what a committed receipt survives: loss of `power`, or only the end of the `process`.

    `max_pending` bounds what waits for the disk; beyond it requests are refused. `busy_timeout_ms` is how long
    another process may hold the ledger's write lock before that counts as unavailable. `retain_days` is how long the
    detail of a receipt is kept after the request began; its sums stay in every report. Left out, it is kept forever.
    """

    durability: Literal["power", "process"] = "power"
    max_pending: Annotated[int, msgspec.Meta(ge=1)] = 10_000
    busy_timeout_ms: Annotated[int, msgspec.Meta(ge=0, le=60_000)] = 2_000
    retain_days: Annotated[int, msgspec.Meta(ge=1)] | None = None
