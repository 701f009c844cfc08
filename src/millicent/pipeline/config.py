"""`[limits]`: how much is taken on at once."""

from __future__ import annotations

from typing import Annotated

import msgspec


class LimitsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Above `max_concurrent` requests at once, new ones get 429 with `Retry-After`."""

    max_concurrent: Annotated[int, msgspec.Meta(ge=1)] = 256
