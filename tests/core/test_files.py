import fcntl
import os
from pathlib import Path

import pytest

from millicent.core.files import flush

MACOS_FULL_SYNC = 51


@pytest.mark.parametrize("refused", [False, True])
def test_a_flush_on_macos_asks_the_drive_itself_and_makes_do_where_the_file_system_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    asked: list[object] = []

    def control(descriptor: int, command: int) -> int:
        asked.append((os.path.samestat(os.fstat(descriptor), tmp_path.stat()), command))
        if refused:
            raise OSError(45, "Operation not supported")
        return 0

    def synchronize(descriptor: int) -> None:
        asked.append((os.path.samestat(os.fstat(descriptor), tmp_path.stat()), "fsync"))

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", MACOS_FULL_SYNC, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", synchronize)
    flush(tmp_path)
    assert asked == [(True, "fsync"), (True, MACOS_FULL_SYNC)]


def test_a_flush_closes_what_it_opened_also_when_the_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []

    def fail(descriptor: int) -> None:
        opened.append(descriptor)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        flush(tmp_path)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])
