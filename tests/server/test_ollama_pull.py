"""Fetching a model through Ollama's address: how far it is, then how it ended."""

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from millicent.core.clock import ManualClock
from millicent.core.errors import ModelError
from millicent.server import ollama as server
from millicent.server.config import ServerConfig


def pulled(
    monkeypatch: pytest.MonkeyPatch, fetch: Any, name: str, hear: Callable[[dict[str, Any]], None] = lambda _: None,
    offered: list[Any] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """The lines; `offered` gets what could be asked by the time the last of them came."""
    monkeypatch.setattr(server, "pull", fetch)
    monkeypatch.setattr(server, "_PROGRESS_INTERVAL_S", 0.01)
    unused: Any = None
    kept: list[Any] = [] if offered is None else offered
    addresses = server.Ollama(
        pipeline=unused, health=unused, makes_vectors=unused, cache=Path("/nowhere"), clock=ManualClock(),
        offer=kept.append, config=ServerConfig(),
    )  # fmt: skip

    async def read() -> list[dict[str, Any]]:
        lines = []
        async for line in addresses._pulling(name):
            lines.append(json.loads(line))
            hear(lines[-1])
        return lines

    return asyncio.run(read())


def test_progress_is_told_and_then_success(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Path]] = []
    offered: list[Any] = []
    heard = threading.Event()

    def fetch(name: str, cache: Path, progress: Any) -> str:
        asked.append((name, cache))
        progress(5, None)
        assert heard.wait(60)
        progress(10, 10)
        return "what was fetched"

    lines = pulled(
        monkeypatch, fetch, "small:latest", lambda line: heard.set() if "completed" in line else None, offered
    )
    assert offered == ["what was fetched"]
    assert asked == [("small", Path("/nowhere"))]
    assert lines[0] == {"status": "pulling manifest"}
    assert {"status": "pulling small:latest", "completed": 5} in lines
    assert {"status": "pulling small:latest", "completed": 10, "total": 10} in lines
    assert lines[-1] == {"status": "success"}


def test_what_goes_wrong_is_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: Any) -> None:
        raise ModelError("small: cannot be downloaded; try again")

    lines = pulled(monkeypatch, fetch, "small")
    assert lines[-1]["error"] == "small: cannot be downloaded; try again"
