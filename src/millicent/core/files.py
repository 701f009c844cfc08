"""Files that are there whole or not at all, and what is on the disk when the power goes."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


def flush(path: Path) -> None:
    """Wait until a file's content, or a directory's entries, would survive the loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(fcntl, "F_FULLFSYNC"):
            # On macOS an fsync leaves data in the drive's cache. Some file systems know nothing stronger.
            with contextlib.suppress(OSError):
                fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    finally:
        os.close(descriptor)


def private_folder(path: Path) -> None:
    """It is there, with all above it; into what had to be made nobody else may look."""
    if not path.is_dir():
        private_folder(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)


@contextlib.contextmanager
def whole_file(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """Where to write what is to be at `path`: it gets there when the block ends well, and is gone if it doesn't. It has
    the rights of the file that was there, else `mode`. What is no ordinary file (a pipe, say) is written itself."""
    if path.exists() and not path.is_file():
        yield path
        return
    target = path.resolve()  # a link stays one
    beside = target.with_name(f".{target.name[:200]}.{os.getpid()}.partial")
    try:
        beside.touch(target.stat().st_mode & 0o777 if target.exists() else mode)
        yield beside
        flush(beside)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
