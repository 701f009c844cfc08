"""Copies of the ledger, whole and of one instant, taken and put back while gateways write."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from millicent.core.clock import Clock
from millicent.core.errors import ConfigError, NotFound
from millicent.core.files import flush, private_folder
from millicent.ledger.config import LedgerConfig
from millicent.ledger.schema import migrate, open_writer, unavailable


def back_up(ledger: Path, copy: Path) -> None:
    """Copy the ledger to a new file, which appears when it is whole and checked. Writers don't wait for it.

    Raises NotFound without a ledger, ConfigError when the file is there already, LedgerUnavailable.
    """
    if not ledger.exists():
        raise NotFound(f"no ledger at {ledger}: set MILLICENT_HOME to where it is.")
    if copy.exists():
        raise ConfigError(f"{copy} is there already, and a backup never overwrites: name another file.")
    partial = copy.with_name(copy.name + ".partial")
    _remove(partial)
    try:
        with closing(sqlite3.connect(ledger)) as source, closing(sqlite3.connect(partial)) as target:
            source.execute("PRAGMA query_only = ON")
            source.backup(target)
            _check(target, copy)
            # One file, without a journal beside it.
            target.execute("PRAGMA journal_mode = DELETE")
        flush(partial)
        partial.rename(copy)
        flush(copy.parent)
    except (sqlite3.Error, OSError) as error:
        raise unavailable(copy, error) from error
    finally:
        _remove(partial)


def restore(ledger: Path, copy: Path, kept: Path, config: LedgerConfig, clock: Clock) -> bool:
    """Put a backup in the ledger's place, in one transaction, brought up to this version; whether there was a ledger,
    which is then backed up to `kept` first.

    A gateway that runs goes on: what it settles from now on is written whole. Raises NotFound, LedgerUnavailable.
    """
    if not copy.exists():
        raise NotFound(f"no backup at {copy}: name the file that `millicent ledger backup` wrote.")
    existed = ledger.exists()
    if existed:
        back_up(ledger, kept)
    upgraded = ledger.with_name(f"{ledger.name}.restoring")
    try:
        private_folder(ledger.parent)
        _remove(upgraded)
        with closing(sqlite3.connect(f"{copy.resolve().as_uri()}?mode=ro", uri=True)) as source:
            _check(source, copy)
            with closing(sqlite3.connect(upgraded, isolation_level=None)) as target:
                source.backup(target)
                migrate(target, clock)
        with closing(sqlite3.connect(upgraded)) as source, closing(open_writer(ledger, config)) as target:
            source.backup(target)
    except (sqlite3.Error, OSError) as error:
        raise unavailable(copy, error) from error
    finally:
        _remove(upgraded)
    return existed


def _remove(database: Path) -> None:
    """With what SQLite keeps beside it."""
    for suffix in ("", "-wal", "-shm", "-journal"):
        database.with_name(database.name + suffix).unlink(missing_ok=True)


def _check(connection: sqlite3.Connection, path: Path) -> None:
    """Raises LedgerUnavailable unless it is a ledger, and sound."""
    (found,) = connection.execute("PRAGMA quick_check").fetchone()
    if found != "ok":
        raise unavailable(path, sqlite3.DatabaseError(f"it is damaged ({found})"))
    if connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'receipts'").fetchone() is None:
        raise ConfigError(
            f"{path} is an SQLite file but no ledger: name the file that `millicent ledger backup` wrote."
        )
