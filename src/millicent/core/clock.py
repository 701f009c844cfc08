"""Time, passed in. The only module that reads the system clock.

One anchor ties UTC to the monotonic clock, so that elapsed time is always monotonic; when the system clock is set, or
the machine has slept, the anchor follows. On Linux and macOS the monotonic clock is one for all processes, so a time
measured in the engine process can be placed in UTC by the gateway.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, tzinfo
from typing import Protocol

NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000
NS_PER_HOUR = 3600 * NS_PER_S


class Clock(Protocol):
    def now_ns(self) -> int:
        """UTC nanoseconds since the epoch."""
        ...

    def monotonic_ns(self) -> int:
        """Nanoseconds that never go back; comparable between processes of this machine."""
        ...

    def utc_ns(self, monotonic_ns: int) -> int:
        """UTC nanoseconds of a monotonic time, as the clock stands now: that of 0 changes when the clock is set."""
        ...


# What the two clocks differ by when one is read after the other, and what is not worth a new anchor.
_STEP_NS = NS_PER_S


class SystemClock:
    """The machine's clock. The anchor holds until the clock is a second off it: then it was set."""

    def __init__(self) -> None:
        self._anchor_ns = time.time_ns() - time.monotonic_ns()

    def now_ns(self) -> int:
        monotonic_ns = time.monotonic_ns()
        return self._anchored(monotonic_ns) + monotonic_ns

    def monotonic_ns(self) -> int:
        return time.monotonic_ns()

    def utc_ns(self, monotonic_ns: int) -> int:
        return self._anchored(time.monotonic_ns()) + monotonic_ns

    def _anchored(self, monotonic_ns: int) -> int:
        """The anchor, given what the monotonic clock says now."""
        anchor_ns = time.time_ns() - monotonic_ns
        if abs(anchor_ns - self._anchor_ns) >= _STEP_NS:
            self._anchor_ns = anchor_ns
        return self._anchor_ns


class ManualClock:
    """A clock that moves only when told to: for tests, the demo and the simulator."""

    def __init__(self, start_ns: int = 1_767_225_600 * NS_PER_S, monotonic_ns: int = 0) -> None:
        self._anchor_ns = start_ns - monotonic_ns
        self._monotonic_ns = monotonic_ns

    def now_ns(self) -> int:
        return self._anchor_ns + self._monotonic_ns

    def monotonic_ns(self) -> int:
        return self._monotonic_ns

    def utc_ns(self, monotonic_ns: int) -> int:
        return self._anchor_ns + monotonic_ns

    def advance(self, ns: int) -> None:
        if ns < 0:
            raise ValueError(f"a clock cannot go back; asked to advance by {ns} ns")
        self._monotonic_ns += ns

    def set(self, ns: int) -> None:
        """As when somebody sets the system clock, forward or back by `ns`: the monotonic clock knows nothing of it."""
        self._anchor_ns += ns


def hour_start_ns(utc_ns: int) -> int:
    """The start of the UTC hour that holds `utc_ns`."""
    return utc_ns - utc_ns % NS_PER_HOUR


def hours_between(start_ns: int, end_ns: int) -> list[tuple[int, int]]:
    """The interval cut at UTC hours: `(hour start, nanoseconds inside that hour)`, in order; they sum to the whole."""
    pieces = []
    while start_ns < end_ns:
        hour_ns = hour_start_ns(start_ns)
        stop_ns = min(end_ns, hour_ns + NS_PER_HOUR)
        pieces.append((hour_ns, stop_ns - start_ns))
        start_ns = stop_ns
    return pieces


def iso_utc(utc_ns: int) -> str:
    """RFC 3339 with microseconds, as our JSON shows times: `2026-01-01T00:00:00.000000Z`."""
    seconds, rest_ns = divmod(utc_ns, NS_PER_S)
    whole = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{whole}.{rest_ns // 1000:06d}Z"


def parse_time_ns(text: str, zone: tzinfo = UTC) -> int:
    """UTC nanoseconds of an ISO 8601 time or date; one that names no zone is by the clocks of this one. Raises
    ValueError, also for what no 64 bits hold: before 1678 and after 2261."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=zone)
    if not 1678 <= moment.year <= 2261:
        raise ValueError(f"{text} is beyond the years that are kept")
    elapsed = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (elapsed.days * 86_400 + elapsed.seconds) * NS_PER_S + elapsed.microseconds * 1000
