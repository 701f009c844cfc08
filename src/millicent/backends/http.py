"""HTTP/1.1 towards one server: connections that are kept, and answers that are read as they come.

Only what calls of models need: no redirects, cookies, proxies, pipelining or upgrades. What a server may take of memory
is bounded, whatever it sends; what it sends after an answer ends the connection.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import zlib
from collections import deque
from collections.abc import Mapping
from typing import cast
from urllib.parse import quote, urlsplit

import httptools

# Of an answer that nobody reads just now, so much is kept; what the socket then holds, the server keeps.
_BUFFERED_BYTES = 64 << 10
# A head, or what frames the pieces of a body, without a byte of the body itself.
_MOST_FRAMING_BYTES = 64 << 10
_INFLATED_AT_ONCE_BYTES = 1 << 20
_KEEP_ALIVE_S = 15.0
# Another of a name's addresses is tried beside the one before (RFC 8305).
_NEXT_ADDRESS_S = 0.25
# Of the event loop, until an aborted connection is gone, TLS and all.
_TURNS_TO_CLOSE = 4

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


class Unreachable(Exception):
    """No connection could be made; `reason` is the system's."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class Untrusted(Exception):
    """The server couldn't prove who it is."""


class ConnectionTimeout(Exception):
    """No connection came about in time."""


class BrokenOff(Exception):
    """The connection ended before the answer did."""


class NotHttp(Exception):
    """What came is no answer as HTTP has them."""


class Origin:
    """Where a base address points. Raises ValueError for what is none."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError(f"{url} is no address: write it as https://host/v1")
        self.tls = parts.scheme == "https"
        self.host = parts.hostname if parts.hostname.isascii() else parts.hostname.encode("idna").decode()
        self.port = parts.port or (443 if self.tls else 80)
        name = f"[{self.host}]" if ":" in self.host else self.host
        self.authority = name if parts.port is None else f"{name}:{self.port}"
        self.path = parts.path.rstrip("/")


def head_of(method: str, target: str, headers: Mapping[str, str]) -> bytes:
    """A request's head up to its length. Raises ValueError for what would be more than one header, or none."""
    lines = [f"{method} {quote(target, safe=_SAFE)} HTTP/1.1\r\n"]
    for name, value in headers.items():
        if not _TOKEN.fullmatch(name) or _CONTROL.search(value):
            raise ValueError(f"header {name!r} can't be sent: it or its value holds what no header may")
        lines.append(f"{name}: {value}\r\n")
    return "".join(lines).encode("latin-1")


# What stands in addresses as it is; a percent sign begins what is quoted already.
_SAFE = "/%:@!$&'()*+,;=?~-._"


class Answer:
    """What a server answers to one request. `headers` by lower-case name; of those that come twice, the first."""

    def __init__(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.complete = False
        self._connection = connection
        self._loop = loop
        self._pieces: list[bytes] = []
        self._size = 0
        self._inflater: zlib._Decompress | None = None
        self._error: Exception | None = None
        self._waiting: asyncio.Future[None] | None = None

    async def head(self) -> None:
        """Wait for status and headers. Raises what went wrong."""
        while not self.status:
            await self._news()

    async def read(self) -> bytes:
        """What has come, as soon as there is something; nothing at the end. Raises what went wrong, once what came
        before that was read."""
        while True:
            if self._pieces:
                if piece := self._taken():
                    return piece
            elif self.complete:
                if self._inflater is not None and not self._inflater.eof:
                    raise BrokenOff
                return b""
            else:
                await self._news()

    @property
    def ended(self) -> bool:
        """It is whole, and was read."""
        return self.complete and not self._pieces

    def begin(self, status: int, headers: dict[str, str]) -> None:
        coding = headers.get("content-encoding", "identity").strip().lower()
        if coding in {"gzip", "x-gzip", "deflate"}:
            self._inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)  # either of the two
        elif coding not in {"identity", ""}:
            self.fail(NotHttp(f"compressed as {coding}, which nobody asked for"))
            return
        self.status = status
        self.headers = headers
        self._wake()

    def feed(self, piece: bytes) -> bool:
        """Whether so much waits to be read that no more should come."""
        self._pieces.append(piece)
        self._size += len(piece)
        self._wake()
        return self._size > _BUFFERED_BYTES

    def finish(self) -> None:
        self.complete = self._error is None
        self._wake()

    def fail(self, error: Exception, *, now: bool = False) -> None:
        """The first error counts, and none after the end; `now` drops what came before it and wasn't read."""
        if now:
            self._pieces.clear()
            self.complete = False
        if self._error is None and not self.complete:
            self._error = error
            self._wake()

    def _taken(self) -> bytes:
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._size = 0
        if self._inflater is not None:
            try:
                data = self._inflater.decompress(data, _INFLATED_AT_ONCE_BYTES)
            except zlib.error as error:
                raise NotHttp(f"compressed wrongly: {error}") from None
            if self._inflater.unconsumed_tail:
                self._pieces.append(self._inflater.unconsumed_tail)
                self._size = len(self._inflater.unconsumed_tail)
        if not self._size:
            self._connection.resume()
        return data

    async def _news(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiting = self._loop.create_future()
        try:
            await self._waiting
        finally:
            self._waiting = None

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


class Connection(asyncio.Protocol):
    """One request at a time, and its answer."""

    def __init__(self, pool: Pool, loop: asyncio.AbstractEventLoop) -> None:
        self.closed = False
        self.taken = True  # by somebody who counts towards the pool's limit
        self.idle_since_s = 0.0
        self._pool = pool
        self._loop = loop
        self._pieces: list[bytes] = []
        self.on_body = self._pieces.append  # called by httptools: a stream's pieces come by the thousand
        self._parser = httptools.HttpResponseParser(self)
        self._answer: Answer | None = None
        self._headers: dict[str, str] = {}
        self._framing_bytes = 0
        self._keeps = False
        self._until_closed = False
        self._paused = False
        self._letting_go: asyncio.TimerHandle | None = None

    def send(self, head: bytes, body: bytes) -> Answer:
        """Send a request, and return its answer, of which nothing is there yet."""
        self._answer = Answer(self, self._loop)
        self._framing_bytes = 0
        self._keeps = self._until_closed = False
        self._transport.write(b"%bContent-Length: %d\r\n\r\n%b" % (head, len(body), body))
        return self._answer

    def release(self, within_s: float) -> None:
        """The answer has been read as far as anybody wants: keep the connection if the rest comes in that time."""
        if self._answer is None or self._answer.complete or self.closed:
            self._leave()
        else:
            self.resume()
            self._letting_go = self._loop.call_later(within_s, self.abort)

    def abort(self) -> None:
        """End it now, whatever is under way."""
        if self._answer is not None:
            self._answer.fail(BrokenOff())
        self.closed = True
        self._transport.abort()
        self._leave()

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            self._transport.resume_reading()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._answer is None:  # nobody has asked
            self.abort()
            return
        self._framing_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail(NotHttp("it wants to go on in another protocol"))
        except httptools.HttpParserError as error:
            self._fail(NotHttp(str(error) or type(error).__name__))
        self._hand_over()
        if self._framing_bytes > _MOST_FRAMING_BYTES:
            self._fail(NotHttp(f"more than {_MOST_FRAMING_BYTES >> 10} KB that are no part of the answer"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._answer is not None:
            if self._until_closed and exc is None:
                self._answer.finish()
            else:
                self._answer.fail(BrokenOff())
        if self._letting_go is not None:
            self._leave()
        self._pool.forget(self)

    # httptools calls these

    def on_message_begin(self) -> None:
        if self._answer is not None and self._answer.complete:
            self._keeps = False  # a second answer to one question

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))

    def on_headers_complete(self) -> None:
        status, headers, self._headers = self._parser.get_status_code(), self._headers, {}
        if status < 200 or self._answer is None or self._answer.status:
            return
        self._keeps = self._parser.should_keep_alive()
        if "content-length" not in headers and status not in {204, 304}:
            self._until_closed = not headers.get("transfer-encoding", "").lower().endswith("chunked")
        self._answer.begin(status, headers)

    def on_message_complete(self) -> None:
        self._hand_over()
        answer = self._answer
        if answer is None or not answer.status or answer.complete:
            return  # after a word in advance, such as 103 Early Hints, or a second answer
        answer.finish()
        if self._letting_go is not None:
            self._leave()

    def _hand_over(self) -> None:
        """What came of the body, in one piece."""
        if not self._pieces:
            return
        self._framing_bytes = 0
        body = b"".join(self._pieces)
        self._pieces.clear()
        answer = self._answer
        if answer is None or answer.complete or self._letting_go is not None:
            return
        if answer.feed(body) and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def _fail(self, error: NotHttp) -> None:
        self._keeps = False
        if self._answer is not None:
            self._answer.fail(error)
        self.closed = True
        self._transport.abort()

    def _leave(self) -> None:
        """Back to the pool, once."""
        if self._letting_go is not None:
            self._letting_go.cancel()
            self._letting_go = None
        answer, self._answer = self._answer, None
        if not self.taken:
            return
        self.taken = False
        if not self.closed:
            whole = answer is None or (answer.complete and self._keeps)
            if whole and not self._transport.get_write_buffer_size():
                self.resume()
            else:
                self.closed = True
                self._transport.abort()
        self._pool.give_back(self)


class Pool:
    """Connections to one server, at most `limit` in use; who wants one more waits in line. Use from one event loop."""

    def __init__(self, origin: Origin, limit: int, connect_timeout_s: float) -> None:
        self._origin = origin
        self._limit = limit
        self._connect_timeout_s = connect_timeout_s
        self._tls: ssl.SSLContext | None = None
        self._used = 0
        self._idle: list[Connection] = []  # the last used comes last, and is used first
        self._all: set[Connection] = set()
        self._line: deque[asyncio.Future[None]] = deque()
        self._sweeping: asyncio.TimerHandle | None = None

    def take(self) -> Connection | None:
        """One that is there already; None where one must be made, or waited for: `connect` does."""
        if self._used < self._limit and (found := self._fresh()) is not None:
            self._used += 1
            return found
        return None

    async def connect(self) -> Connection:
        """Raises Unreachable, Untrusted and ConnectionTimeout."""
        if self._used < self._limit:
            self._used += 1
        else:
            await self._turn()
        try:
            return self._fresh() or await self._made()
        except BaseException:
            self._pass_on()
            raise

    def give_back(self, connection: Connection) -> None:
        if not connection.closed:
            loop = asyncio.get_running_loop()
            connection.idle_since_s = loop.time()
            self._idle.append(connection)
            if self._sweeping is None:
                self._sweeping = loop.call_later(_KEEP_ALIVE_S, self._sweep)
        self._pass_on()

    def forget(self, connection: Connection) -> None:
        self._all.discard(connection)

    async def close(self) -> None:
        """All of them, at once."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None
        self._idle.clear()
        for connection in list(self._all):
            connection.abort()
        for _ in range(_TURNS_TO_CLOSE):
            await asyncio.sleep(0)

    def _fresh(self) -> Connection | None:
        oldest_s = asyncio.get_running_loop().time() - _KEEP_ALIVE_S
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed and connection.idle_since_s > oldest_s:
                connection.taken = True
                return connection
            connection.abort()
        return None

    async def _turn(self) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        """The next in line may use one in place of who is done."""
        while self._line:
            turn = self._line.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._used -= 1

    async def _made(self) -> Connection:
        loop, origin = asyncio.get_running_loop(), self._origin
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                found = await self._socket()
                try:
                    _, made = await loop.create_connection(
                        lambda: Connection(self, loop),
                        sock=found,
                        ssl=self._context() if origin.tls else None,
                        server_hostname=origin.host.rstrip(".") if origin.tls else None,
                    )
                except BaseException:
                    found.close()
                    raise
        except TimeoutError:
            raise ConnectionTimeout from None
        except ssl.SSLError as error:
            raise Untrusted(str(error)) from None
        except OSError as error:
            raise Unreachable(error) from None
        if not made.closed:
            self._all.add(made)
        return made

    async def _socket(self) -> socket.socket:
        """Connected to the first of its addresses that answers."""
        import aiohappyeyeballs

        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(self._origin.host, self._origin.port, type=socket.SOCK_STREAM)
        return await aiohappyeyeballs.start_connection(
            found, happy_eyeballs_delay=_NEXT_ADDRESS_S, interleave=1, loop=loop
        )

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
            self._tls.set_alpn_protocols(["http/1.1"])
        return self._tls

    def _sweep(self) -> None:
        """Close what nobody used for long."""
        loop = asyncio.get_running_loop()
        oldest_s = loop.time() - _KEEP_ALIVE_S
        kept = []
        for connection in self._idle:
            if connection.closed or connection.idle_since_s <= oldest_s:
                connection.abort()
            else:
                kept.append(connection)
        self._idle = kept
        self._sweeping = loop.call_later(_KEEP_ALIVE_S, self._sweep) if kept else None
