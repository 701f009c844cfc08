"""What is on the disk when the power goes."""

from __future__ import annotations

import contextlib
import fcntl
import os
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
