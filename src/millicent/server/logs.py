"""Where the gateway writes what it does."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
from collections.abc import Iterator
from pathlib import Path

from millicent.core.files import private_folder

_LOG_BYTES = 10 << 20
_LOG_FILES = 3


class _OneLine(logging.Formatter):
    """What callers and servers elsewhere chose begins no line that looks like ours, and moves no cursor."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n    ".join(map(_escaped, super().format(record).split("\n")))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's
        record.message = _escaped(record.message)
        return super().formatMessage(record)


def _escaped(text: str) -> str:
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


@contextlib.contextmanager
def logging_to(home: Path) -> Iterator[None]:
    """Everything from INFO up to a file that is rotated; warnings to the terminal too."""
    folder = home / "logs"
    private_folder(folder)
    file = logging.handlers.RotatingFileHandler(
        folder / "millicent.log", maxBytes=_LOG_BYTES, backupCount=_LOG_FILES, encoding="utf-8"
    )
    terminal = logging.StreamHandler()
    terminal.setLevel(logging.WARNING)
    formatter = _OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s")
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    for handler in (file, terminal):
        handler.setFormatter(formatter)
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in (file, terminal):
            root.removeHandler(handler)
            handler.close()
