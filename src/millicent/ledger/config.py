"""`[ledger]`: how hard receipts are kept."""

from __future__ import annotations

from typing import Literal

import msgspec


class LedgerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """With `durability = "power"` a receipt survives a power cut before its answer ends; `"process"` survives only the
    end of the process, and saves a disk flush per commit."""

    durability: Literal["power", "process"] = "power"
