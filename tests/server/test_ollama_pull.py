"""Fetching a model through Ollama's address: how far it is, then how it ended."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from millicent.core.clock import ManualClock
from millicent.core.errors import ModelError
from millicent.server import ollama as server
from millicent.server.config import ServerConfig


def pulled(
    monkeypatch: pytest.MonkeyPatch, fetch: Any, name: str, offered: list[Any] | None = None
) -> list[dict[str, Any]]:
    """The lines; `offered` gets what could be asked by the time the last of them came."""
    monkeypatch.setattr(server, "pull", fetch)
    unused: Any = None
    kept: list[Any] = [] if offered is None else offered
    addresses = server.Ollama(
        pipeline=unused, health=unused, makes_vectors=unused, cache=Path("/nowhere"), clock=ManualClock(),
        offer=kept.append, config=ServerConfig(),
    )  # fmt: skip

    async def read() -> list[dict[str, Any]]:
        return [json.loads(line) async for line in addresses._pulling(name)]

    return asyncio.run(read())


def test_progress_is_told_and_then_success(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Path]] = []
    offered: list[Any] = []

    def fetch(name: str, cache: Path, progress: Any) -> str:
        asked.append((name, cache))
        progress(5, None)
        time.sleep(1.5 * server._PROGRESS_INTERVAL_S)
        progress(10, 10)
        return "what was fetched"

    lines = pulled(monkeypatch, fetch, "small:latest", offered)
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
