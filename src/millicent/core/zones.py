"""Time zones by name."""

from __future__ import annotations

from datetime import UTC, tzinfo
from functools import lru_cache
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from millicent.core.errors import InvalidRequest


@lru_cache(maxsize=64)
def find_zone(name: str, param: str = "timezone") -> tzinfo:
    """Raises InvalidRequest, blaming `param`, for a zone that nobody knows."""
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise InvalidRequest(
            f"no time zone {name!r} is known here: write one like Europe/Berlin (on a system without any, install "
            "the package tzdata)",
            param=param,
        ) from None
