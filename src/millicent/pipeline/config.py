"""`[limits]`: how much is taken on at once."""

from __future__ import annotations

from typing import Annotated

import msgspec

from millicent.control.config import Rates


class LimitsConfig(Rates, frozen=True, forbid_unknown_fields=True):
    """Above `max_concurrent` requests at once, new ones get 429 with `Retry-After`. The rates hold for each key that
    doesn't have its own, and for all anonymous calls together: per minute, with a minute's worth at once.
    """

    max_concurrent: Annotated[int, msgspec.Meta(ge=1)] = 256
