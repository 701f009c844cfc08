"""Which day and hour a time is, by the clocks of a place."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from functools import cache
from typing import Literal

from millicent.core.clock import NS_PER_S
from millicent.core.zones import find_zone

_DAY_S = 86_400


def labels(by: Literal["month", "day", "hour"], zone: str) -> Callable[[int], str]:
    """What to call the month, day or hour of UTC nanoseconds: `2026-01`, `2026-01-31`, `2026-01-31T09:00:00+01:00`.

    Asked for many times in a row, it looks each up once. Raises InvalidRequest for a zone that nobody knows.
    """
    clocks = find_zone(zone)
    per_s = 3600 if by == "hour" else _DAY_S

    @cache
    def offset_s(at_s: int) -> int:
        offset = datetime.fromtimestamp(at_s, clocks).utcoffset()
        return 0 if offset is None else int(offset.total_seconds())

    @cache
    def name(local_s: int, ahead_s: int) -> str:
        moment = datetime.fromtimestamp(local_s - ahead_s, timezone(timedelta(seconds=ahead_s)))
        if by != "hour":
            return moment.strftime("%Y-%m" if by == "month" else "%Y-%m-%d")
        return moment.strftime("%Y-%m-%dT%H:00:00") + moment.isoformat()[19:].replace("+00:00", "Z")

    def label(at_ns: int) -> str:
        at_s = at_ns // NS_PER_S
        start_s = at_s - at_s % _DAY_S
        ahead_s = offset_s(start_s)
        if ahead_s != offset_s(start_s + _DAY_S):
            # The clocks are changed on this day.
            ahead_s = offset_s(at_s)
        local_s = at_s + ahead_s
        return name(local_s - local_s % per_s, ahead_s)

    return label
