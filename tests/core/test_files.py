import fcntl
import os
from pathlib import Path

import pytest

from millicent.core.files import flush, private_folder, whole_file

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


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(path)
    with whole_file(link) as file:
        file.write_text("one")
    assert (path.read_text(), link.is_symlink()) == ("one", True)

    def broken_off() -> None:
        with whole_file(path) as file:
            file.write_text("tw")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        broken_off()
    assert path.read_text() == "one"
    with whole_file(Path(os.devnull)) as file:
        assert file == Path(os.devnull)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "link"]


def test_into_folders_that_had_to_be_made_nobody_else_may_look(tmp_path: Path) -> None:
    """The home was made for its logs, and its ledger was everybody's to read."""
    tmp_path.chmod(0o755)
    private_folder(tmp_path / "home" / "logs")
    private_folder(tmp_path / "home" / "logs")
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path, tmp_path / "home", tmp_path / "home" / "logs")]
    assert modes == [0o755, 0o700, 0o700]
