"""The ledger in one SQLite file."""

from __future__ import annotations

import asyncio
import sqlite3
from functools import partial
from pathlib import Path
from typing import cast

from millicent.core.accounts import Checkpoint
from millicent.core.clock import Clock
from millicent.core.receipts import HourShare, Receipt
from millicent.ledger.config import LedgerConfig
from millicent.ledger.locks import GatewayLock, is_live
from millicent.ledger.maintenance import delete_expired
from millicent.ledger.recovery import recover, unsettled_gateways
from millicent.ledger.rollups import DAY_NS
from millicent.ledger.schema import unavailable
from millicent.ledger.store import close_receipt, open_receipt, write_checkpoint
from millicent.ledger.writer import Writer


class SqliteLedger:
    """Implements core.protocols.Ledger. `gateway` names this process and is its own: no two running share one."""

    def __init__(self, path: Path, config: LedgerConfig, clock: Clock, gateway: str) -> None:
        self._path = path
        self._config = config
        self._clock = clock
        self._gateway = gateway
        self._writer = Writer(path, config, clock)
        self._lock: GatewayLock | None = None

    async def start(self) -> None:
        """Open, migrate, and settle what dead gateways left. Raises LedgerUnavailable."""
        try:
            self._lock = await asyncio.to_thread(GatewayLock, self._path.parent, self._gateway)
        except OSError as error:
            raise unavailable(self._path, error) from error
        try:
            await self._writer.start()
            await self._writer.submit(partial(recover, gateway=self._gateway, now_ns=self._clock.now_ns()))
            await self.recover()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Write what is queued and let go. Safe to repeat."""
        await self._writer.stop()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    async def open(self, receipt: Receipt) -> None:
        await self._writer.submit(partial(open_receipt, receipt=receipt, gateway=self._gateway))

    async def close(self, receipt: Receipt, shares: tuple[HourShare, ...]) -> None:
        await self._writer.submit(partial(close_receipt, receipt=receipt, shares=shares, gateway=self._gateway))

    async def checkpoint(self, checkpoint: Checkpoint) -> None:
        await self._writer.submit(partial(write_checkpoint, checkpoint=checkpoint))

    async def recover(self) -> int:
        """Settle what gateways that no longer live left open; how many receipts that closed. Call it now and then."""
        return cast("int", await self._writer.submit(self._recover_dead))

    async def maintain(self) -> None:
        """Settle what dead gateways left, and delete some of the detail that has outlived `retain_days`."""
        await self.recover()
        if self._config.retain_days is not None:
            before_ns = self._clock.now_ns() - self._config.retain_days * DAY_NS
            await self._writer.submit(partial(delete_expired, before_ns=before_ns))

    async def device_seen_ns(self, device: str) -> int:
        """UTC nanoseconds up to which this device is accounted for, 0 if never: a new session must not start before."""
        return cast("int", await self._writer.submit(partial(_device_seen_ns, device=device)))

    def healthy(self) -> str | None:
        """None when writing works, else one line that says why not."""
        return self._writer.problem

    def _recover_dead(self, connection: sqlite3.Connection) -> int:
        home, now_ns = self._path.parent, self._clock.now_ns()
        return sum(
            recover(connection, gateway, now_ns)
            for gateway in unsettled_gateways(connection)
            if gateway != self._gateway and not is_live(home, gateway)
        )


def _device_seen_ns(connection: sqlite3.Connection, device: str) -> int:
    (seen_at_ns,) = connection.execute(
        "SELECT coalesce(max(seen_at_ns), 0) FROM device_sessions WHERE device = ?", (device,)
    ).fetchone()
    return int(seen_at_ns)
