"""The installation's secret, with which digests of what was asked are keyed: whoever has the ledger without it cannot
try out guesses."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from millicent.core.errors import ConfigError
from millicent.core.files import flush, private_folder

FILE_NAME = "digest.key"
SECRET_BYTES = 32


def installation_secret(home: Path) -> bytes:
    """Of the folder `home`; made, for this user's eyes only, where there is none yet. Several gateways that start at
    once get the same. Raises ConfigError where it cannot be read or made."""
    path = home / FILE_NAME
    try:
        if not path.exists():
            _make(path)
        secret = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: give this user permission to read and write it.") from error
    if len(secret) != SECRET_BYTES:
        raise ConfigError(
            f"{path}: has {len(secret)} bytes instead of {SECRET_BYTES}: restore it from a backup, or delete it: a new "
            "one is made then, with which nothing is found that was cached before."
        )
    return secret


def _make(path: Path) -> None:
    """Whole or not at all: written beside, then linked into place unless another was quicker."""
    private_folder(path.parent)
    beside = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(SECRET_BYTES))
        flush(beside)
        os.link(beside, path)
    except FileExistsError:
        return
    finally:
        beside.unlink(missing_ok=True)
