"""A shell's limit on open files is no limit on clients."""

from __future__ import annotations

import contextlib
import resource
import socket
from pathlib import Path

import pytest

from millicent import app
from support.live import LiveServer

FILES = 128
CONFIG = """
[placements.there]
kind = "rented"
usd_per_hour = 1
base_url = "http://127.0.0.1:9"

[models.far]
placement = "there"
"""


def test_more_clients_stay_connected_than_the_shell_allows_files(tmp_path: Path) -> None:
    live = LiveServer(tmp_path / "home", [], CONFIG)
    ours = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, ours[1]))
    try:
        live.start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, ours)
    try:
        with contextlib.ExitStack() as connections:
            for _ in range(FILES):
                connections.enter_context(socket.create_connection(("127.0.0.1", live.port), timeout=60))
            assert live.get("/health") == (200, {"alive": True})
        assert "Too many open files" not in live.output
    finally:
        live.stop()


@pytest.mark.parametrize(
    ("soft", "hard", "asked_for"),
    [
        (256, resource.RLIM_INFINITY, 10_240),  # macOS, which refuses a soft limit without end
        (1024, 4096, 4096),
        (20_000, 30_000, 20_000),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None),
    ],
)
def test_as_many_files_are_asked_for_as_may_be_had_and_never_fewer_than_there_are(
    soft: int, hard: int, asked_for: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    app._allow_many_files()
    assert asked == ([] if asked_for is None else [(asked_for, hard)])
