"""Small things that fetching and storing share."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

_READ_BYTES = 1 << 20


class Progress(Protocol):
    def __call__(self, done_bytes: int, total_bytes: int | None) -> None:
        """Called now and then while a model downloads; `total_bytes` is None while it isn't known."""
        ...


def sha256_of(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
