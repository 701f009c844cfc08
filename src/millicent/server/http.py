"""Uvicorn's HTTP protocol, with bounds on what it doesn't bound, and writing less often: a write to a socket costs as
much as the rest of a small answer. It tells when a request's body is here.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from millicent.core.errors import InvalidRequest, MillicentError
from millicent.server.bodies import ARRIVED
from millicent.server.families import family_of
from millicent.server.leaving import Leaving
from millicent.wire.receipts import encode

# What waits is kept in memory, and says nothing to whoever writes too fast.
_MOST_WAITING_BYTES = 64 << 10

_MOST_HEAD_BYTES = 64 << 10
# For the rest of a head, or of a body that was answered before it was here.
_PATIENCE_S = 30.0
# Of another protocol that nobody goes on in. Java's clients offer HTTP/2 with every first request.
_OFFERS = frozenset({b"connection", b"upgrade", b"http2-settings"})


class HttpProtocol(HttpToolsProtocol):
    """What is written in one turn of the event loop goes out as one piece: a head with its body, a stream's last words
    with its end. An offer to go on in another protocol is passed over. What makes no sense is told in the family's
    shape."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast("asyncio.Transport", GatheredWrites(transport, asyncio.get_running_loop())))
        self.url = b""
        self.headers = []
        self._heading = True  # before or within a head
        self._head_bytes = 0
        self._hurry: asyncio.TimerHandle | None = None
        self._leaving = Leaving(self.flow.resume_reading)
        self._keep_up()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._leaving.left()
        self._relax()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._begin_again(data[offer.args[0] :])
            return
        except httptools.HttpParserError:
            self.send_400_response("is not HTTP/1.1")
            return
        if self._heading:
            self._head_bytes += len(data)
            self._keep_up()
            if self._head_bytes > _MOST_HEAD_BYTES:
                self._refuse_head()
        elif self.cycle.response_complete and self.cycle.more_body:
            self._keep_up()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._leaving.put(cast("dict[str, Any]", self.scope))
        self._heading = True
        self._head_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._heading:  # others stand behind a body
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._heading = False
        self._relax()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._relax()
        super().on_message_complete()
        cast("dict[str, Any]", self.scope)[ARRIVED] = True

    def send_400_response(self, msg: str) -> None:
        message = f"The request {msg}: correct the client, or whatever stands between."
        self._refuse(InvalidRequest(message, code="invalid_http"), 400)

    def _begin_again(self, rest: bytes) -> None:
        """The same request, without the offer."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            self.send_400_response("is for a proxy, which this is not")
            return
        head = [method, b" ", self.url, b" HTTP/1.1\r\n"]
        for name, value in self.headers:
            if name not in _OFFERS:
                head += [name, b": ", value, b"\r\n"]
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"".join([*head, b"\r\n", rest]))

    def _refuse_head(self) -> None:
        message = f"The request's head is over {_MOST_HEAD_BYTES >> 10} KB: send less in headers and address."
        self._refuse(InvalidRequest(message, code="head_too_large"), 431)

    def _refuse(self, error: MillicentError, status: int) -> None:
        """The connection's last words; none where they would stand in the middle of an answer."""
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            path = self.url.partition(b"?")[0].decode("latin-1")
            body = encode(family_of({"path": path, "headers": self.headers}).error_body(error, None))
            told = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b"
            self.transport.write(STATUS_LINE[status] + told % (len(body), body))
        self.transport.close()

    def _keep_up(self) -> None:
        if self._hurry is None:
            self._hurry = self.loop.call_later(_PATIENCE_S, self.transport.close)

    def _relax(self) -> None:
        if self._hurry is not None:
            self._hurry.cancel()
            self._hurry = None


class GatheredWrites:
    """A transport whose writes wait for the end of the event loop's turn. In all else it is the one it was given."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self.is_closing = transport.is_closing  # which is asked several times for each request
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
            if not self._transport.is_closing():  # the client may have gone within this turn
                self._transport.write(data)
