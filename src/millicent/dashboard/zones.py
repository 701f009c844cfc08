"""The time zone that a page's times are shown in: UTC unless its address says otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta

from millicent.core.clock import NS_PER_S
from millicent.core.zones import find_zone

# Offered in the list; any other IANA name may be written.
CHOICES = (
    "UTC",
    "Europe/London",
    "Europe/Berlin",
    "Europe/Moscow",
    "Africa/Lagos",
    "Asia/Dubai",
    "Asia/Kolkata",
    "Asia/Singapore",
    "Asia/Shanghai",
    "Asia/Tokyo",
    "Australia/Sydney",
    "America/Sao_Paulo",
    "America/New_York",
    "America/Chicago",
    "America/Denver",
    "America/Los_Angeles",
)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Rendering a page is one call, and its many small parts all show times: the zone is handed to them beside the values.
_zone: ContextVar[str] = ContextVar("zone", default="UTC")


@contextmanager
def shown_in(zone: str) -> Iterator[None]:
    """Times are shown by the clocks of `zone` meanwhile."""
    token = _zone.set(zone)
    try:
        yield
    finally:
        _zone.reset(token)


def name() -> str:
    """The zone that times are shown in now."""
    return _zone.get()


def when(utc_ns: int) -> str:
    return _local(utc_ns).strftime("%Y-%m-%d %H:%M:%S %Z")


def when_short(utc_ns: int, now_ns: int) -> str:
    """The time of day; with the date too when that isn't today's."""
    time, now = _local(utc_ns), _local(now_ns)
    return time.strftime("%H:%M:%S") if time.date() == now.date() else time.strftime("%b %d, %H:%M:%S")


def when_hour(utc_ns: int) -> str:
    return _local(utc_ns).strftime("%Y-%m-%d %H:00")


def utc_ns(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(microseconds=1) * 1000


def _local(utc_ns: int) -> datetime:
    return datetime.fromtimestamp(utc_ns // NS_PER_S, find_zone(_zone.get()))
