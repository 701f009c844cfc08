"""Uvicorn's HTTP protocol, writing less often: a write to a socket costs as much as the rest of a small answer; and
telling when a request's body is here."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from millicent.server.bodies import ARRIVED

# What waits is kept in memory, and says nothing to whoever writes too fast.
_MOST_WAITING_BYTES = 64 << 10


class HttpProtocol(HttpToolsProtocol):
    """What is written in one turn of the event loop goes out as one piece: a head with its body, a stream's last words
    with its end."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast("asyncio.Transport", GatheredWrites(transport, asyncio.get_running_loop())))

    def on_message_complete(self) -> None:
        super().on_message_complete()
        cast("dict[str, Any]", self.scope)[ARRIVED] = True


class GatheredWrites:
    """A transport whose writes wait for the end of the event loop's turn. In all else it is the one it was given."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0

    def write(self, data: bytes) -> None:
        if not self._waiting:
            self._loop.call_soon(self._flush)
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        if self._waiting_bytes > _MOST_WAITING_BYTES:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def _flush(self) -> None:
        if self._waiting:
            data = b"".join(self._waiting)
            self._waiting.clear()
            self._waiting_bytes = 0
            self._transport.write(data)
