"""Which gateways live: each holds a file lock for its life, which the operating system drops with the process.

The lock belongs to the open file, so a child that inherits the descriptor keeps its gateway alive; Python opens files
so that children started by `exec` don't.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from millicent.core.errors import LedgerUnavailable
from millicent.core.files import private_folder


class GatewayLock:
    """Held from construction to `release`. Raises LedgerUnavailable when another process holds it."""

    def __init__(self, home: Path, gateway: str) -> None:
        self._path = _path(home, gateway)
        private_folder(self._path.parent)
        held = _try_lock(self._path)
        if held is None:
            raise LedgerUnavailable(f"gateway {gateway} is running already (lock {self._path}): end that process first")
        self._descriptor: int | None = held

    def release(self) -> None:
        """Forget the gateway: what it has left open in the ledger can be recovered from now on."""
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None


def is_live(home: Path, gateway: str) -> bool:
    path = _path(home, gateway)
    if not path.exists():
        return False
    held = _try_lock(path, create=False)
    if held is None:
        return path.exists()
    os.close(held)
    return False


def _path(home: Path, gateway: str) -> Path:
    return home / "gateways" / f"{gateway}.lock"


def _try_lock(path: Path, *, create: bool = True) -> int | None:
    """A descriptor that holds the lock on the file now at `path`, or None where another holds it."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o600)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its holder may have removed the file between our open and our lock; then another may hold a new one.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        os.close(descriptor)
