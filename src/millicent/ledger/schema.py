"""The ledger's file: how it is opened, and how its tables come to be."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

from millicent.core.clock import Clock
from millicent.core.errors import LedgerUnavailable
from millicent.core.files import private_folder
from millicent.ledger.config import LedgerConfig

T = TypeVar("T")

_OLDEST = (3, 37, 0)  # strict tables

# Kept compiled: each table has one for each way in which its rows lack values (`rows.write_many`).
_STATEMENTS = 256

_ADVICE = {
    sqlite3.SQLITE_FULL: "the disk is full: free some space",
    sqlite3.SQLITE_READONLY: "it is read-only: give this user write permission",
    sqlite3.SQLITE_PERM: "access is denied: give this user write permission",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened: check that its folder exists and is writable",
    sqlite3.SQLITE_BUSY: "another process holds its lock: end that process, or wait for it",
    sqlite3.SQLITE_LOCKED: "another process holds its lock: end that process, or wait for it",
    sqlite3.SQLITE_IOERR: "the disk failed to read or write: check its space and its health",
    sqlite3.SQLITE_CORRUPT: "the file is damaged: restore it from a backup, then run `millicent doctor`",
    sqlite3.SQLITE_NOTADB: "the file is not a ledger: restore it from a backup, or move it away",
}


def unavailable(path: Path | str, error: Exception) -> LedgerUnavailable:
    """The one line a person needs when SQLite, or the file system below it, says no."""
    primary = getattr(error, "sqlite_errorcode", 0) & 0xFF
    advice = _ADVICE.get(primary, "run `millicent doctor`")
    return LedgerUnavailable(f"ledger {path}: {error}; {advice}")


def open_writer(path: Path | str, config: LedgerConfig) -> sqlite3.Connection:
    """A connection that may write, for one thread at a time. Transactions are opened by hand."""
    if sqlite3.sqlite_version_info < _OLDEST:
        needed = ".".join(map(str, _OLDEST))
        raise LedgerUnavailable(f"SQLite is {sqlite3.sqlite_version} and {needed} is needed: use a newer Python build")
    connection = sqlite3.connect(
        path,
        timeout=config.busy_timeout_ms / 1000,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=_STATEMENTS,
    )
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(synchronous(config))
        # On macOS an fsync leaves data in the drive's cache; this asks for the real thing. No effect elsewhere.
        connection.execute(f"PRAGMA fullfsync = {int(config.durability == 'power')}")
        connection.execute("PRAGMA foreign_keys = ON")
        # Room for what recent receipts touch, in kibibytes: so much memory grows while a ledger is young.
        connection.execute("PRAGMA cache_size = -32768")
        # For those who write without a gateway's Journal.
        connection.execute("PRAGMA wal_autocheckpoint = 8000")
        # What is purged is gone from the file too, not only from its tables.
        connection.execute("PRAGMA secure_delete = ON")
    except BaseException:
        connection.close()
        raise
    return connection


def synchronous(config: LedgerConfig) -> str:
    """What makes a commit survive what `durability` promises."""
    return f"PRAGMA synchronous = {'FULL' if config.durability == 'power' else 'NORMAL'}"


def write_once(path: Path, config: LedgerConfig, clock: Clock, operation: Callable[[sqlite3.Connection], T]) -> T:
    """One operation in a transaction of its own, beside a gateway that runs or without one: for the command line."""
    try:
        private_folder(path.parent)
        with closing(open_writer(path, config)) as connection:
            migrate(connection, clock)
            connection.execute("BEGIN IMMEDIATE")
            result = operation(connection)
            connection.execute("COMMIT")
    except (sqlite3.Error, OSError) as error:
        raise unavailable(path, error) from error
    return result


def migrate(connection: sqlite3.Connection, clock: Clock) -> None:
    """Bring the tables up to date: each migration and its record are one transaction. Safe beside another gateway.

    Raises LedgerUnavailable when the file was written by a newer version.
    """
    migrations = _migrations()
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS migrations"
            " (number INTEGER PRIMARY KEY, name TEXT NOT NULL, applied_at_ns INTEGER NOT NULL) STRICT"
        )
        applied = {number for (number,) in connection.execute("SELECT number FROM migrations")}
        _refuse_newer(max(applied, default=0), max(migrations))
        for number, (name, sql) in migrations.items():
            if number not in applied:
                for statement in _statements(sql):
                    connection.execute(statement)
                connection.execute("INSERT INTO migrations VALUES (?, ?, ?)", (number, name, clock.now_ns()))
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _refuse_newer(latest: int, known: int) -> None:
    if latest > known:
        raise LedgerUnavailable(
            f"the ledger is at version {latest} and this Millicent knows {known}: upgrade Millicent"
        )


def refuse_other_version(connection: sqlite3.Connection) -> None:
    """For readers, who may not migrate. Raises LedgerUnavailable when the tables aren't those of this version."""
    (latest,) = connection.execute("SELECT coalesce(max(number), 0) FROM migrations").fetchone()
    known = _latest()
    _refuse_newer(latest, known)
    if latest < known:
        raise LedgerUnavailable(
            f"the ledger is at version {latest} and this Millicent needs {known}: run `millicent ledger upgrade`, or "
            "start the server, which does it"
        )


@cache
def _latest() -> int:
    return max(_migrations())


def _migrations() -> dict[int, tuple[str, str]]:
    """`(file name, SQL)` by number, in order."""
    folder = files("millicent.ledger") / "migrations"
    found = sorted((entry.name, entry.read_text("utf-8")) for entry in folder.iterdir() if entry.name.endswith(".sql"))
    return {int(name.partition("_")[0]): (name, sql) for name, sql in found}


def _statements(sql: str) -> Iterator[str]:
    """The script's statements; a trigger's inner semicolons don't end it."""
    pending = ""
    for line in sql.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            yield pending
            pending = ""
    assert not pending.strip(), f"a migration ends in the middle of a statement: {pending[-80:]}"
