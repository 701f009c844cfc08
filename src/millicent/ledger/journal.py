"""Keeping the write-ahead log short without having commits wait: pages are copied to the ledger's file beside them."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing, suppress
from pathlib import Path

from millicent.ledger.config import LedgerConfig
from millicent.ledger.schema import open_writer

# Writes after which pages are copied: some ten megabytes of log.
_WRITES = 2_000
# Pages of log at which a commit waits once, so that the log begins anew: it never does while there is always another
# commit before the copying is through. 128 MiB.
_TOO_LONG = 32_768


class Journal:
    """The writer tells of what it wrote; a thread with a connection of its own copies pages now and then.

    What fails here fails for the writer too, which says so, or is done again the next time.
    """

    def __init__(self, path: Path, config: LedgerConfig) -> None:
        self._path = path
        self._config = config
        self._writes = 0
        self._too_long = False
        self._thread: threading.Thread | None = None

    def grew(self, writes: int, connection: sqlite3.Connection | None) -> None:
        """Called by the writer after each commit, with its connection."""
        self._writes += writes
        if self._too_long and connection is not None:
            self._too_long = False
            with suppress(sqlite3.Error):
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        if self._writes >= _WRITES and (self._thread is None or not self._thread.is_alive()):
            self._writes = 0
            self._thread = threading.Thread(target=self._copy, name="ledger-journal", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _copy(self) -> None:
        with suppress(sqlite3.Error), closing(open_writer(self._path, self._config)) as connection:
            _, pages, _ = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            self._too_long = pages > _TOO_LONG
