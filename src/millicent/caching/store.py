"""Where kept answers lie: an SQLite file of their own, or memory. Bounded, expiring, and purged for good.

Reading takes some microseconds and happens on the event loop. What is written may be lost with the power, never with
the process: it is a cache. Several gateways may share the file, and the command line purges it beside them.
"""

from __future__ import annotations

import sqlite3
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import msgspec

from millicent.core.chunks import FinishReason, Text
from millicent.core.clock import iso_utc
from millicent.core.money import Money
from millicent.core.usage import Usage

FILE_NAME = "cache.db"
# Another layout of the table, or of what is in it: such a file is begun anew.
_VERSION = 1
# An answer that would take more than this part of all the room isn't kept.
LARGEST_PART = 16
# What an entry takes beside its answer: its key, its names, its place in the indices.
_OVERHEAD_BYTES = 300

_SCHEMA = """
    BEGIN IMMEDIATE;
    CREATE TABLE IF NOT EXISTS answers (
        key BLOB PRIMARY KEY, tenant TEXT, user TEXT, model TEXT NOT NULL, receipt TEXT NOT NULL,
        created_at_ns INTEGER NOT NULL, expires_at_ns INTEGER NOT NULL, used_at_ns INTEGER NOT NULL,
        hits INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL, answer BLOB NOT NULL
    ) STRICT;
    CREATE INDEX IF NOT EXISTS answers_expiring ON answers (expires_at_ns);
    CREATE INDEX IF NOT EXISTS answers_used ON answers (used_at_ns);
    CREATE INDEX IF NOT EXISTS answers_user ON answers (user) WHERE user IS NOT NULL;
    CREATE TABLE IF NOT EXISTS size (entries INTEGER NOT NULL, bytes INTEGER NOT NULL) STRICT;
    INSERT INTO size SELECT 0, 0 WHERE NOT EXISTS (SELECT 1 FROM size);
    CREATE TRIGGER IF NOT EXISTS answer_kept AFTER INSERT ON answers BEGIN
        UPDATE size SET entries = entries + 1, bytes = bytes + new.bytes;
    END;
    CREATE TRIGGER IF NOT EXISTS answer_gone AFTER DELETE ON answers BEGIN
        UPDATE size SET entries = entries - 1, bytes = bytes - old.bytes;
    END;
    COMMIT;
"""


class CachedAnswer(msgspec.Struct, frozen=True):
    """An answer without a dialect, and what its receipt (`receipt`) said of it: what a hit gives, and saves."""

    receipt: str
    created_at_ns: int
    texts: tuple[Text, ...]
    reasons: tuple[FinishReason, ...]
    usage: Usage
    finish_reason: str | None = None
    served_model: str | None = None
    list_price: Money | None = None
    saved_by_routing: Money | None = None


class Entry(msgspec.Struct, frozen=True):
    """An answer under its key, with whose request it was: what it can be purged by."""

    key: bytes
    answer: CachedAnswer
    expires_at_ns: int
    tenant: str | None
    user: str | None
    model: str


class Standing(msgspec.Struct, frozen=True):
    """What is kept. `hits` are those of the entries that are still there; times are UTC nanoseconds."""

    entries: int
    bytes: int
    hits: int
    oldest_at_ns: int | None
    expires_at_ns: int | None

    def body(self) -> dict[str, object]:
        """As JSON shows it."""
        return {
            "entries": self.entries,
            "bytes": self.bytes,
            "hits": self.hits,
            "oldest_at": None if self.oldest_at_ns is None else iso_utc(self.oldest_at_ns),
            "next_expires_at": None if self.expires_at_ns is None else iso_utc(self.expires_at_ns),
        }


class AnswerStore:
    """At most `max_bytes` and `max_entries`. `path` None keeps everything in memory. Raises sqlite3.Error, as every
    method does, where the file can't be read or written.

    `find` belongs to one thread; the others may be called from any, on disk. In memory all belong to that one thread.
    """

    def __init__(self, path: Path | None, *, max_bytes: int, max_entries: int) -> None:
        self.on_disk = path is not None
        self._max_bytes = max_bytes
        self._max_entries = max_entries
        self._lock = threading.Lock()
        self._used: dict[bytes, tuple[int, int]] = {}  # key: when it was used last, and how often, not written yet
        self._using = threading.Lock()
        self._writer = _open(path)
        self._reader = self._writer if path is None else _reader(path)
        if path is None:
            # For those who don't call close: an open connection that is forgotten warns.
            weakref.finalize(self, self._writer.close)

    def close(self) -> None:
        """Writes what was used, for what is kept the longest."""
        try:
            with self._writing() as connection:
                self._note_used(connection)
        finally:
            for connection in {self._reader, self._writer}:
                connection.close()

    def find(self, key: bytes, now_ns: int) -> CachedAnswer | None:
        found = self._reader.execute(
            "SELECT answer FROM answers WHERE key = ? AND expires_at_ns > ?", (key, now_ns)
        ).fetchone()
        if found is None:
            return None
        with self._using:
            _, hits = self._used.get(key, (0, 0))
            self._used[key] = (now_ns, hits + 1)
        return msgspec.msgpack.decode(found[0], type=CachedAnswer)

    def keep(self, entries: Sequence[Entry], now_ns: int) -> None:
        """Each in place of what was kept under its key. One that takes too much of the room isn't kept."""
        with self._writing() as connection:
            self._note_used(connection)
            connection.execute("DELETE FROM answers WHERE expires_at_ns <= ?", (now_ns,))
            for entry in entries:
                answer = entry.answer
                encoded = msgspec.msgpack.encode(answer)
                size = len(encoded) + _OVERHEAD_BYTES
                connection.execute("DELETE FROM answers WHERE key = ?", (entry.key,))
                if size <= self._max_bytes // LARGEST_PART:
                    connection.execute(
                        "INSERT INTO answers (key, tenant, user, model, receipt, created_at_ns, expires_at_ns,"
                        " used_at_ns, bytes, answer) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                        (
                            *(entry.key, entry.tenant, entry.user, entry.model, answer.receipt),
                            *(answer.created_at_ns, entry.expires_at_ns, now_ns, size, encoded),
                        ),
                    )
            self._make_room(connection)

    def expire(self, now_ns: int) -> None:
        """Take out what nobody will be given any more, and write down what was used."""
        with self._writing() as connection:
            self._note_used(connection)
            connection.execute("DELETE FROM answers WHERE expires_at_ns <= ?", (now_ns,))

    def purge(self, *, user: str | None = None, model: str | None = None) -> int:
        """Everything, or what one user's requests, or one model's, have left; how many. Gone from the file too."""
        with self._writing() as connection:
            purged = connection.execute(
                "DELETE FROM answers WHERE (:user IS NULL OR user = :user) AND (:model IS NULL OR model = :model)",
                {"user": user, "model": model},
            ).rowcount
        with self._lock:
            self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return purged

    def standing(self, now_ns: int) -> Standing:
        """Of what can still be given."""
        with self._writing() as connection:
            self._note_used(connection)
            connection.execute("DELETE FROM answers WHERE expires_at_ns <= ?", (now_ns,))
            entries, size = connection.execute("SELECT entries, bytes FROM size").fetchone()
            hits, oldest, expires = connection.execute(
                "SELECT coalesce(sum(hits), 0), min(created_at_ns), min(expires_at_ns) FROM answers"
            ).fetchone()
        return Standing(entries, size, hits, oldest, expires)

    def _note_used(self, connection: sqlite3.Connection) -> None:
        with self._using:
            used, self._used = self._used, {}
        connection.executemany(
            "UPDATE answers SET used_at_ns = ?, hits = hits + ? WHERE key = ?",
            [(at_ns, hits, key) for key, (at_ns, hits) in used.items()],
        )

    def _make_room(self, connection: sqlite3.Connection) -> None:
        """A sixteenth more than needed each time, so that it is needed seldom."""
        while True:
            entries, size = connection.execute("SELECT entries, bytes FROM size").fetchone()
            if entries <= self._max_entries and size <= self._max_bytes:
                return
            going = max(1, entries - self._max_entries, entries // LARGEST_PART)
            connection.execute(
                "DELETE FROM answers WHERE key IN (SELECT key FROM answers ORDER BY used_at_ns, key LIMIT ?)", (going,)
            )

    def _writing(self) -> _Transaction:
        return _Transaction(self._lock, self._writer)


class _Transaction:
    """One at a time; undone whole when something goes wrong."""

    def __init__(self, lock: threading.Lock, connection: sqlite3.Connection) -> None:
        self._lock = lock
        self._connection = connection

    def __enter__(self) -> sqlite3.Connection:
        self._lock.acquire()
        try:
            self._connection.execute("BEGIN IMMEDIATE")
        except BaseException:
            self._lock.release()
            raise
        return self._connection

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._connection.execute("COMMIT" if kind is None else "ROLLBACK")
        finally:
            self._lock.release()


def _open(path: Path | None) -> sqlite3.Connection:
    """Where it is of another version, or damaged, it is begun anew: it is only a cache."""
    if path is not None:
        path.touch(mode=0o600)
    try:
        return _opened(path)
    except sqlite3.DatabaseError as error:
        if path is None or isinstance(error, sqlite3.OperationalError):
            raise
        for each in (path, *(path.with_name(f"{path.name}-{kind}") for kind in ("wal", "shm"))):
            each.unlink(missing_ok=True)
        path.touch(mode=0o600)
        return _opened(path)


def _opened(path: Path | None) -> sqlite3.Connection:
    connection = sqlite3.connect(
        ":memory:" if path is None else path, isolation_level=None, timeout=5, check_same_thread=False
    )
    try:
        _refuse_other_version(connection)
        connection.execute("PRAGMA journal_mode = WAL").fetchall()
        # No sync but when the journal is taken in: what the power takes along was a copy.
        connection.execute("PRAGMA synchronous = NORMAL")
        # What is purged or has expired is gone from the file too.
        connection.execute("PRAGMA secure_delete = ON").fetchall()
        connection.executescript(_SCHEMA)
        connection.execute(f"PRAGMA user_version = {_VERSION}")
    except BaseException:
        connection.close()
        raise
    return connection


def _reader(path: Path) -> sqlite3.Connection:
    """Closed from another thread than the one that reads."""
    return sqlite3.connect(path, isolation_level=None, timeout=1, check_same_thread=False)


def _refuse_other_version(connection: sqlite3.Connection) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version not in {0, _VERSION}:
        raise sqlite3.DatabaseError(f"version {version}")
