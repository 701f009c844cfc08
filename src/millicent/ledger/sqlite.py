"""The ledger in one SQLite file."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

from millicent.core.accounts import Checkpoint
from millicent.core.clock import Clock
from millicent.core.fits import StepTimeFit
from millicent.core.idempotency import Claim
from millicent.core.money import Money
from millicent.core.receipts import Feedback, HourShare, Line, Receipt
from millicent.ledger import late
from millicent.ledger.budgets import extend
from millicent.ledger.config import LedgerConfig
from millicent.ledger.locks import GatewayLock, is_live
from millicent.ledger.maintenance import delete_expired
from millicent.ledger.recovery import recover, unsettled_gateways
from millicent.ledger.rollups import fold_some
from millicent.ledger.schema import unavailable
from millicent.ledger.spans import DAY_NS
from millicent.ledger.store import (
    Closing,
    Opening,
    add_lines,
    begin_attempt,
    close_receipts,
    open_receipts,
    write_checkpoint,
)
from millicent.ledger.writer import Kind, Writer

T = TypeVar("T")


def _each(connection: sqlite3.Connection, operations: Sequence[Callable[[sqlite3.Connection], object]]) -> list[object]:
    return [operation(connection) for operation in operations]


# What closing frees, opening may use.
_CLOSING = Kind(close_receipts, rank=0)
_OPENING = Kind(open_receipts, rank=1)
_EACH = Kind(_each)


class SqliteLedger:
    """Implements core.protocols.Ledger. `gateway` names this process and is its own: no two running share one."""

    def __init__(self, path: Path, config: LedgerConfig, clock: Clock, gateway: str) -> None:
        self._path = path
        self._config = config
        self._clock = clock
        self._gateway = gateway
        self._writer = Writer(path, config, clock, tidy=fold_some)
        self._lock: GatewayLock | None = None

    async def start(self) -> None:
        """Open, migrate, and settle what dead gateways left. Raises LedgerUnavailable."""
        try:
            self._lock = await asyncio.to_thread(GatewayLock, self._path.parent, self._gateway)
        except OSError as error:
            raise unavailable(self._path, error) from error
        try:
            await self._writer.start()
            await self.write(partial(recover, gateway=self._gateway, now_ns=self._clock.now_ns()))
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

    async def open(self, receipt: Receipt, claim: Claim | None = None) -> bool:
        return cast("bool", await self._writer.submit(_OPENING, Opening(receipt, self._gateway, claim)))

    async def extend(self, receipt_id: str, hold: Money) -> bool:
        return await self.write(partial(extend, receipt_id=receipt_id, hold=hold))

    async def begin(self, receipt: Receipt) -> bool:
        return await self.write(partial(begin_attempt, receipt=receipt))

    async def close(self, receipt: Receipt, shares: tuple[HourShare, ...], answer: str | None = None) -> None:
        await self._writer.submit(_CLOSING, Closing(receipt, shares, self._gateway, answer))

    async def write(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        """One operation of a room that keeps tables of its own here; returns its result once that is durable."""
        return cast("T", await self._writer.submit(_EACH, operation))

    async def checkpoint(self, checkpoint: Checkpoint) -> None:
        await self.write(partial(write_checkpoint, checkpoint=checkpoint))

    async def post_lines(self, receipt_id: str, lines: tuple[Line, ...]) -> None:
        await self.write(partial(late.post_lines, receipt_id=receipt_id, lines=lines))

    async def add_feedback(self, feedback: tuple[Feedback, ...]) -> None:
        await self.write(partial(late.add_feedback, feedback=feedback))

    async def save_fits(self, fits: tuple[StepTimeFit, ...]) -> None:
        await self.write(partial(late.save_fits, fits=fits))

    async def latest_fits(self, device: str, configuration: str) -> list[StepTimeFit]:
        """The newest fit of each model on this device, as it is configured now."""
        return await self.write(partial(late.latest_fits, device=device, configuration=configuration))

    async def add_lines(self, entries: Mapping[str, tuple[Line, ...]]) -> None:
        """Lines of another book for closed receipts, by receipt; those that have it already are left alone."""
        await self.write(partial(add_lines, entries=entries))

    async def recover(self) -> int:
        """Settle what gateways that no longer live left open; how many receipts that closed. Call it now and then."""
        return await self.write(self._recover_dead)

    async def maintain(self) -> None:
        """Settle what dead gateways left, and delete some of the detail that has outlived `retain_days`."""
        await self.recover()
        if self._config.retain_days is not None:
            before_ns = self._clock.now_ns() - self._config.retain_days * DAY_NS
            await self.write(partial(delete_expired, before_ns=before_ns))

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
