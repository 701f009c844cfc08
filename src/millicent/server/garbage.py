"""Python's collector of cycles, as a server of many small requests needs it."""

from __future__ import annotations

import gc

# Objects that are made and not given back before the collector looks at the young ones: some hundreds of requests'. By
# default it is 700, and every few requests everything that is under way would be looked through.
_YOUNG = 50_000


def settle_collector() -> None:
    """To be called when everything is there that stays until the end: it is never looked through again. What a request
    makes goes by reference counts, cycles of exceptions aside."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, 20, 20)
