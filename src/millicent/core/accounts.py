"""Device time, accounted for: `serving + overhead + lost + idle + down == wall x accelerators`, per UTC hour.

A session is one gateway's watch over one device. Its clock runs from `started_at_ns` to `seen_at_ns`. Hours hold
absolute sums for this session, so writing the same state twice changes nothing. Serving time isn't stored here:
it is the sum of the shares posted to receipts (`HourShare`), so that accounts and receipts cannot disagree. Idle
is what is left over.
"""

from __future__ import annotations

from decimal import Decimal

import msgspec

from millicent.core.money import Money
from millicent.core.receipts import Accelerator, Energy, HourShare
from millicent.core.usage import Provenance, Usage


class HourTime(msgspec.Struct, frozen=True):
    """One session's time in the UTC hour that starts at `hour_ns`, in accelerator-nanoseconds except `wall_ns`."""

    hour_ns: int
    wall_ns: int = 0
    overhead_ns: int = 0
    lost_ns: int = 0
    down_ns: int = 0


class DeviceSession(msgspec.Struct, frozen=True):
    """What one gateway knows of one device. `hours` holds those that may have changed since they were last written.

    `busy` says whether work was running at `seen_at_ns`: after a crash, what followed is lost rather than down.
    """

    id: str
    gateway: str
    device: str
    placement: str
    accelerators: int
    usd_per_hour: Decimal | None
    rate_provenance: Provenance
    started_at_ns: int
    seen_at_ns: int
    busy: bool
    closed: bool
    hours: tuple[HourTime, ...] = ()


class Reading(msgspec.Struct, frozen=True):
    """What the meter knows of one receipt so far. `first_step_ns`: monotonic start of the first step that worked on
    it.
    `uncharged_ns` went beyond what it may cost, and is the operator's overhead."""

    receipt: str
    usage: Usage
    accelerator: Accelerator
    shares: tuple[HourShare, ...] = ()
    first_step_ns: int | None = None
    energy: Energy = Energy()
    uncharged_ns: int = 0


class Checkpoint(msgspec.Struct, frozen=True):
    """Everything that is running, at one instant: what recovery closes from after a crash."""

    at_ns: int
    sessions: tuple[DeviceSession, ...]
    running: tuple[Reading, ...]


class Account(msgspec.Struct, frozen=True):
    """One device, placement and UTC hour, over all sessions. The equality above holds to the nanosecond."""

    device: str
    placement: str
    hour_ns: int
    accelerators: int
    wall_ns: int
    serving_ns: int
    overhead_ns: int
    lost_ns: int
    idle_ns: int
    down_ns: int
    usd_per_hour: Decimal | None
    rate_provenance: Provenance
    cost: Money | None

    @property
    def unused_cost(self) -> Money | None:
        """The part of `cost` in which nothing was done: of committed capacity, what was paid for and left unused."""
        if self.cost is None:
            return None
        used_ns = self.serving_ns + self.overhead_ns + self.lost_ns
        return self.cost.split([used_ns, self.idle_ns + self.down_ns])[1] if self.wall_ns else Money(0)
