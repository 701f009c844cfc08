"""One thread that writes: everything queued since the last commit shares the next one."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from millicent.core.clock import Clock
from millicent.core.errors import LedgerUnavailable
from millicent.core.files import private_folder
from millicent.ledger.config import LedgerConfig
from millicent.ledger.journal import Journal
from millicent.ledger.schema import migrate, open_writer, synchronous, unavailable


class Kind(NamedTuple):
    """A kind of write. `run` does it for several callers at once, results in their order; when it raises, or its data
    is refused, it is undone and called again for one at a time. Neighbours with a rank are put in order of ranks."""

    run: Callable[[sqlite3.Connection, Sequence[Any]], Sequence[object]]
    rank: int | None = None


# While the ledger cannot be written, try again this often, so that it heals without a request having to fail first.
_RETRY_S = 0.5
# What was written is tidied in pieces: they cost less for each write the larger they are, and who comes meanwhile waits
# for one. A small piece, of about two milliseconds, is due after so many writes, or when nothing was written for a
# while; where somebody always waits, a large one is once so many writes are owed.
_PIECE = 64
_PIECE_DUE = 2 * _PIECE
_LARGE_PIECE = 512
_LARGE_PIECE_DUE = 4 * _LARGE_PIECE
_QUIET_S = 0.5


@dataclass(slots=True)
class _Queued:
    kind: Kind
    item: object
    future: asyncio.Future[object]
    result: object = None
    error: Exception | None = None


class Writer:
    """Runs what was submitted in order, in one transaction: neighbours of one kind together, in a savepoint.

    Between commits `tidy` is called now and then, in transactions of its own that wait for no disk: it is told how much
    to do, and says whether there was anything.

    What fails by itself is undone alone. What stops the whole transaction (disk full, read-only, locked,
    damaged) fails all of it, undone, as LedgerUnavailable; the connection is then opened afresh.
    """

    def __init__(
        self, path: Path, config: LedgerConfig, clock: Clock, tidy: Callable[[sqlite3.Connection, int], bool]
    ) -> None:
        self._path = path
        self._config = config
        self._clock = clock
        self._tidy = tidy
        self._owed = _PIECE_DUE  # writes that weren't tidied, about
        self._journal = Journal(path, config)
        self._connection: sqlite3.Connection | None = None
        self._fresh: list[_Queued] = []  # of this turn of the event loop
        self._queue: list[_Queued] = []
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._problem: str | None = f"ledger {path}: not started"

    @property
    def problem(self) -> str | None:
        """Why nothing can be written just now, or None."""
        return self._problem

    async def start(self) -> None:
        """Open and migrate. Raises LedgerUnavailable."""
        self._loop = asyncio.get_running_loop()
        try:
            self._connection = await asyncio.to_thread(self._connect)
        except LedgerUnavailable as error:
            self._problem = error.message
            raise
        self._problem = None
        self._thread = threading.Thread(target=self._run, name="ledger-writer", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Write what is queued, then close. Later operations are refused. Safe to repeat."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._hand_over()
        with self._wake:
            self._problem = f"ledger {self._path}: stopped"
            self._loop = None
            self._wake.notify()
        await asyncio.to_thread(thread.join)

    async def submit(self, kind: Kind, item: object) -> object:
        """Returns the item's result once it is durable."""
        loop = self._loop
        if loop is None:
            raise LedgerUnavailable(self._problem or f"ledger {self._path}: not started")
        waiting = len(self._queue) + len(self._fresh)
        if waiting >= self._config.max_pending:
            raise LedgerUnavailable(
                f"ledger {self._path}: {waiting} writes wait for the disk; retry, or use a faster disk"
            )
        if not self._fresh:
            # The thread is woken when this turn of the loop is over: it needs the interpreter, which the loop holds.
            loop.call_soon(self._hand_over)
        queued = _Queued(kind, item, loop.create_future())
        self._fresh.append(queued)
        return await queued.future

    def _hand_over(self) -> None:
        with self._wake:
            self._queue += self._fresh
            self._wake.notify()
        self._fresh.clear()

    def _run(self) -> None:
        try:
            while True:
                batch, stopped = self._next()
                if batch:
                    self._write(batch, self._commit)
                    self._owed += len(batch)
                    if self._owed >= _LARGE_PIECE_DUE:
                        self._write([], partial(self._clean, most=_LARGE_PIECE))
                elif self._owed:
                    self._write([], partial(self._clean, most=_PIECE))
                elif stopped:
                    return
                else:
                    self._write([], self._commit)
        finally:
            self._journal.stop()
            self._disconnect()

    def _next(self) -> tuple[list[_Queued], bool]:
        """What is queued, as soon as there is something to do, and whether it is the last."""
        with self._wake:
            while not self._queue and self._loop is not None and self._owed < _PIECE_DUE:
                quiet_s = _QUIET_S if self._owed else None
                if not self._wake.wait(quiet_s if self._problem is None else _RETRY_S):
                    break
            batch, self._queue = self._queue, []
            return batch, self._loop is None

    def _write(self, batch: list[_Queued], commit: Callable[[sqlite3.Connection, list[_Queued]], None]) -> None:
        """Commit the batch, or undo it whole; then tell those who wait."""
        try:
            if self._connection is None:
                self._connection = self._connect()
            commit(self._connection, batch)
        except Exception as error:  # noqa: BLE001 - told to everyone who waits; this thread must not end
            problem = error if isinstance(error, LedgerUnavailable) else unavailable(self._path, error)
            self._disconnect()
            for queued in batch:
                queued.error = LedgerUnavailable(problem.message)
            self._note(problem.message)
        else:
            self._note(None)
        if batch:
            # A loop that has closed has nobody left who waits.
            with suppress(RuntimeError):
                batch[0].future.get_loop().call_soon_threadsafe(_resolve, batch)
            self._journal.grew(len(batch), self._connection)

    def _note(self, problem: str | None) -> None:
        with self._wake:
            if self._loop is not None:
                self._problem = problem

    def _commit(self, connection: sqlite3.Connection, batch: list[_Queued]) -> None:
        """An empty batch probes whether writing works."""
        connection.execute("BEGIN IMMEDIATE")
        if not batch:
            # A write of the same value still goes through the journal to the disk.
            connection.execute("UPDATE migrations SET number = number WHERE number = 1")
        for group in _groups(batch):
            _run_group(connection, group)
        connection.execute("COMMIT")

    def _clean(self, connection: sqlite3.Connection, _: list[_Queued], *, most: int) -> None:
        """Without a sync: should it be lost, what it tidied is as it was. The next commit makes it durable."""
        owed, self._owed = self._owed, 0  # should it fail, the next write owes something again
        connection.execute("PRAGMA synchronous = NORMAL")
        try:
            connection.execute("BEGIN IMMEDIATE")
            if self._tidy(connection, most):
                self._owed = max(1, owed - 2 * most)
            connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            connection.execute(synchronous(self._config))

    def _connect(self) -> sqlite3.Connection:
        connection = None
        try:
            private_folder(self._path.parent)
            connection = open_writer(self._path, self._config)
            # The journal does that, and no commit waits for it.
            connection.execute("PRAGMA wal_autocheckpoint = 0")
            migrate(connection, self._clock)
        except BaseException as error:
            if connection is not None:
                connection.close()
            if isinstance(error, sqlite3.Error | OSError):
                raise unavailable(self._path, error) from error
            raise
        return connection

    def _disconnect(self) -> None:
        """Closing undoes a transaction that is open."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()


# Faults of one operation's data: its neighbours are sound.
_OF_THE_OPERATION = (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.ProgrammingError, sqlite3.InterfaceError)


def _groups(batch: list[_Queued]) -> Iterator[list[_Queued]]:
    for _, neighbours in groupby(batch, key=lambda queued: queued.kind.rank is not None):
        # A stable sort: those without a rank stay as they are.
        for _, group in groupby(sorted(neighbours, key=lambda queued: queued.kind.rank or 0), attrgetter("kind")):
            yield [*group]


def _run_group(connection: sqlite3.Connection, group: list[_Queued]) -> None:
    connection.execute("SAVEPOINT operation")
    try:
        results = group[0].kind.run(connection, [queued.item for queued in group])
    except Exception as error:
        if isinstance(error, sqlite3.Error) and not isinstance(error, _OF_THE_OPERATION):
            raise
        connection.execute("ROLLBACK TO operation")
        if len(group) == 1:
            group[0].error = error
        else:
            for queued in group:
                _run_group(connection, [queued])
    else:
        for queued, result in zip(group, results, strict=True):
            queued.result = result
    connection.execute("RELEASE operation")


def _resolve(batch: list[_Queued]) -> None:
    """On the event loop. A future whose waiter was cancelled is done already."""
    for queued in batch:
        if queued.future.done():
            continue
        if queued.error is not None:
            queued.future.set_exception(queued.error)
        else:
            queued.future.set_result(queued.result)
