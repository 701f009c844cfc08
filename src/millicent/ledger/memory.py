"""The ledger without a disk: for tests, the demo and the simulator."""

from __future__ import annotations

import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from millicent.core.accounts import Checkpoint
from millicent.core.clock import ManualClock
from millicent.core.errors import LedgerUnavailable
from millicent.core.fits import StepTimeFit
from millicent.core.idempotency import Claim
from millicent.core.money import Money
from millicent.core.receipts import Feedback, HourShare, Line, Receipt
from millicent.ledger import late, rollups
from millicent.ledger.budgets import extend
from millicent.ledger.queries import LedgerQueries
from millicent.ledger.schema import migrate
from millicent.ledger.store import add_lines, begin_attempt, close_receipt, open_receipt, write_checkpoint

T = TypeVar("T")


class MemoryLedger:
    """Keeps its tables in memory; `queries` reads them. Set `problem` to a line to make every write fail with it.

    It has no crash to recover from and nothing to wait for; what is stored and answered is the same as on disk.
    """

    def __init__(self, gateway: str = "gateway") -> None:
        self.problem: str | None = None
        self._gateway = gateway
        self._connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self._lock = threading.RLock()
        self._connection.execute("PRAGMA foreign_keys = ON")
        migrate(self._connection, ManualClock())
        self.queries: LedgerQueries = _MemoryQueries(self._connection, self._lock)
        # For those who don't call stop: an open connection that is forgotten warns.
        weakref.finalize(self.queries, self._connection.close)

    async def start(self) -> None:
        """Nothing to open."""

    async def stop(self) -> None:
        """Forget everything."""
        self._connection.close()

    async def open(self, receipt: Receipt, claim: Claim | None = None) -> bool:
        return await self.write(lambda connection: open_receipt(connection, receipt, self._gateway, claim))

    async def extend(self, receipt_id: str, hold: Money) -> bool:
        return await self.write(lambda connection: extend(connection, receipt_id, hold))

    async def begin(self, receipt: Receipt) -> bool:
        return await self.write(lambda connection: begin_attempt(connection, receipt))

    async def close(self, receipt: Receipt, shares: tuple[HourShare, ...], answer: str | None = None) -> None:
        await self.write(lambda connection: close_receipt(connection, receipt, shares, self._gateway, answer))

    async def checkpoint(self, checkpoint: Checkpoint) -> None:
        await self.write(lambda connection: write_checkpoint(connection, checkpoint))
        await self.write(rollups.fold)

    async def post_lines(self, receipt_id: str, lines: tuple[Line, ...]) -> None:
        await self.write(lambda connection: late.post_lines(connection, receipt_id, lines))

    async def add_feedback(self, feedback: tuple[Feedback, ...]) -> None:
        await self.write(lambda connection: late.add_feedback(connection, feedback))

    async def save_fits(self, fits: tuple[StepTimeFit, ...]) -> None:
        await self.write(lambda connection: late.save_fits(connection, fits))

    async def latest_fits(self, device: str, configuration: str) -> list[StepTimeFit]:
        return await self.write(lambda connection: late.latest_fits(connection, device, configuration))

    async def add_lines(self, entries: Mapping[str, tuple[Line, ...]]) -> None:
        await self.write(lambda connection: add_lines(connection, entries))

    async def recover(self) -> int:
        """A gateway that is gone took its memory along: there is never anything to settle."""
        return 0

    async def maintain(self) -> None:
        """Nothing outlives anything here."""

    def healthy(self) -> str | None:
        return self.problem

    async def write(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        if self.problem is not None:
            raise LedgerUnavailable(self.problem)
        with self._lock:
            self._connection.execute("BEGIN")
            try:
                result = operation(self._connection)
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")
        return result


class _MemoryQueries(LedgerQueries):
    def __init__(self, connection: sqlite3.Connection, lock: threading.RLock) -> None:
        self._connection = connection
        self._lock = lock

    @contextmanager
    def _snapshot(self) -> Iterator[sqlite3.Connection | None]:
        with self._lock:
            yield self._connection

    def _is_live(self, gateway: str) -> bool:
        del gateway
        return True
