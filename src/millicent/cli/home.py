"""What commands work on: the home's configuration and its ledger, whether or not a server runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import sqlite3

    from millicent.config import Config
    from millicent.ledger.queries import LedgerQueries

T = TypeVar("T")


def settings() -> Config:
    """Raises ConfigError."""
    from millicent import config

    return config.load(config.home() / config.FILE_NAME)


def ledger_path() -> Path:
    from millicent.config import home

    return home() / "ledger.db"


def open_ledger() -> LedgerQueries:
    """To read. Raises NotFound where there is none yet."""
    from millicent.core.errors import NotFound
    from millicent.ledger.queries import LedgerQueries

    path = ledger_path()
    if not path.exists():
        raise NotFound(f"no ledger at {path} yet: answer a request first, or set MILLICENT_HOME to where it is.")
    return LedgerQueries(path)


def write_ledger(operation: Callable[[sqlite3.Connection], T]) -> T:
    """In one transaction; the ledger is made where there is none, and brought up to this version."""
    from millicent.core.clock import SystemClock
    from millicent.ledger.schema import write_once

    return write_once(ledger_path(), settings().ledger, SystemClock(), operation)
