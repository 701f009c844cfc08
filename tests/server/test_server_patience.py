"""Clients that are slow on purpose: a connection is closed in the end, however little it sends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import uvicorn
from uvicorn.server import ServerState

from millicent.server import http
from millicent.server.http import HttpProtocol

HEAD = b"POST /slow HTTP/1.1\r\nHost: localhost\r\n"
WHOLE = HEAD + b"Content-Length: 0\r\n\r\n"
SECONDS = 60


async def answers_early(_: Any, __: Any, send: Any) -> None:
    """Without having read the body."""
    await send({"type": "http.response.start", "status": 404, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    loop = asyncio.get_running_loop()
    config = uvicorn.Config(cast("Any", answers_early), ws="none", log_config=None, timeout_keep_alive=SECONDS)
    config.load()
    server = await loop.create_server(lambda: HttpProtocol(config, ServerState(), {}), "127.0.0.1", 0)
    async with asyncio.timeout(SECONDS):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.sockets[0].getsockname()[1])
        try:
            yield reader, writer
        finally:
            writer.close()
            server.close()


class Unconnected(asyncio.Transport):
    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def is_closing(self) -> bool:
        return False

    def write(self, _: Any) -> None:
        """Nobody reads it."""

    def close(self) -> None:
        """There is nothing to close."""

    def pause_reading(self) -> None:
        """Nothing is read."""

    def resume_reading(self) -> None:
        """Nothing is read."""


async def trickle(writer: asyncio.StreamWriter) -> None:
    while not writer.is_closing():
        writer.write(b"x")
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("begun", "answers", "trickling"),
    [
        (b"", 0, False), (HEAD[:20], 0, False), (HEAD, 0, False), (HEAD[:20], 0, True), (HEAD + b"X: ", 0, True),
        (WHOLE + HEAD, 1, False), (WHOLE + HEAD + b"X: ", 1, True),
        (HEAD + b"Content-Length: 9999999\r\n\r\n", 1, True),  # answered before it was here
    ],
)  # fmt: skip
def test_what_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch, begun: bytes, answers: int, trickling: bool) -> None:
    monkeypatch.setattr(http, "_PATIENCE_S", 0.2)

    async def told() -> bytes:
        got = b""
        async with connected() as (reader, writer):
            writer.write(begun)
            more = asyncio.create_task(trickle(writer)) if trickling else None
            with contextlib.suppress(ConnectionError):
                while piece := await reader.read(4096):
                    got += piece
            if more is not None:
                more.cancel()
        return got

    # Fewer where a slow machine took longer than that to begin.
    assert asyncio.run(told()).count(b"HTTP/1.1 404") <= answers


def test_only_who_has_not_asked_yet_is_hurried() -> None:
    async def hurried() -> list[bool]:
        config = uvicorn.Config(cast("Any", answers_early), ws="none", log_config=None)
        config.load()
        protocol = HttpProtocol(config, ServerState(), {})
        protocol.connection_made(cast("Any", Unconnected()))
        found = []
        for data in (b"", HEAD, b"Content-Length: 5\r\n\r\n", b"abc", b"de", HEAD[:9], WHOLE[9:]):
            if data:
                protocol.data_received(data)
            found.append(protocol._hurry is not None)
        protocol.connection_lost(None)
        return found

    assert asyncio.run(hurried()) == [True, True, False, False, False, True, False]
