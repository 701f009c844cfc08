"""Calls to a server elsewhere over HTTP: its connections, its time limits, and what goes wrong, as our errors.

Only the operator's `base_url` is called: redirects are not followed, certificates are checked, no proxy is taken from
the environment. Nothing here knows a dialect.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import TypeVar

import aiohttp

from millicent.backends.config import UpstreamConfig
from millicent.core.chunks import Chunk, End, Text, merge_texts
from millicent.core.clock import NS_PER_S, Clock
from millicent.core.errors import MillicentError, UpstreamError, UpstreamTimeout
from millicent.wire.server_sent_events import Event, EventReader
from millicent.wire.upstream_errors import complaint_in, error_of, one_line

MAX_BODY_BYTES = 64 << 20
_MAX_ERROR_BYTES = 64 << 10
_MAX_STREAM_BYTES = 512 << 20
_MAX_RETRY_AFTER_S = 86_400
# After the last event, this long for the end of the body to arrive, so that the connection can be used again.
_TRAILING_S = 1.0
_KEEP_ALIVE_S = 15.0

T = TypeVar("T")


class Upstream:
    """One placement's server. Use from one event loop; `close` when done.

    `who` is what messages call it; `headers` go with every call, and hold `secrets`, which no message shows.
    """

    def __init__(
        self,
        who: str,
        base_url: str,
        config: UpstreamConfig,
        clock: Clock,
        *,
        headers: Mapping[str, str] | None = None,
        secrets: Sequence[str] = (),
    ) -> None:
        self.who = who
        self.base_url = base_url.rstrip("/")
        self.config = config
        self._clock = clock
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "millicent", **(headers or {})}
        self._secrets = tuple(secrets)
        self._session: aiohttp.ClientSession | None = None
        self._trailing: set[asyncio.Task[None]] = set()

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=self.config.max_connections, keepalive_timeout=_KEEP_ALIVE_S)
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.config.connect_timeout_s),
                trust_env=False,
            )
        return self._session

    async def close(self) -> None:
        for task in self._trailing:
            task.cancel()
        await asyncio.gather(*self._trailing, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
            self._session = None

    def post(self, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> Exchange:
        """A call, not yet sent. `path` begins with a slash and is added to the base address."""
        return Exchange(self, path, body, {"Content-Type": "application/json", **(headers or {})})

    async def get(self, url: str, *, limit_s: float, max_bytes: int = 4 << 20) -> bytes:
        """What lies at `url`, for watching the server. Raises UpstreamError."""
        try:
            async with asyncio.timeout(limit_s), self.session.get(url, allow_redirects=False) as response:
                if response.status != 200:
                    raise error_of(self.who, response.status, None)
                return await _read(response, max_bytes, self.who)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self.failure(error) from None

    def failure(self, error: BaseException) -> MillicentError:
        """What went wrong on the way, as ours."""
        if isinstance(error, aiohttp.ConnectionTimeoutError):
            return self.timeout("take a connection", self.config.connect_timeout_s, "connect_timeout_s")
        if isinstance(error, TimeoutError):
            return UpstreamTimeout(f"{self.who} took too long to answer: retry, or look after it.")
        if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError):
            return UpstreamError(
                f"{self.who} can't prove who it is ({one_line(str(error))}): correct base_url or its certificate.",
                code="upstream_untrusted",
                retryable=False,
            )
        if isinstance(error, aiohttp.InvalidURL):
            return UpstreamError(f"{self.who}: its base_url is no address: correct it.", retryable=False)
        if isinstance(error, aiohttp.ClientConnectorError):
            reason = one_line(str(error.os_error.strerror or error.os_error))
            return UpstreamError(f"{self.who} can't be reached ({reason}): is it running?", code="upstream_unreachable")
        if isinstance(error, aiohttp.ClientPayloadError | aiohttp.ServerDisconnectedError | ConnectionError):
            return UpstreamError(f"{self.who} broke off its answer: retry.", code="upstream_broke_off")
        if isinstance(error, aiohttp.ClientResponseError):
            what = one_line(error.message or "bad HTTP")
            return UpstreamError(f"{self.who} answered what is not HTTP ({what}).", code="upstream_garbled")
        return UpstreamError(f"{self.who} failed ({one_line(f'{type(error).__name__}: {error}')}): retry.")

    def timeout(self, what: str, limit_s: float, setting: str) -> UpstreamTimeout:
        return UpstreamTimeout(
            f"{self.who} didn't {what} within {limit_s:g} s ({setting}): retry, or raise that limit."
        )

    def refused(self, status: int, headers: Mapping[str, str], body: bytes) -> MillicentError:
        """An answer with an error's status."""
        after_s = retry_after_s(headers, self._clock.now_ns())
        return error_of(self.who, status, complaint_in(body), retry_after_s=after_s, secrets=self._secrets)

    def complained(self, body: bytes | object) -> MillicentError | None:
        """The error in a body or an event that came under a good status; None where there is none."""
        complaint = complaint_in(body)
        return None if complaint is None else error_of(self.who, 200, complaint, secrets=self._secrets)

    def garbled(self, what: str) -> UpstreamError:
        return UpstreamError(f"{self.who} {what}: retry, or look after it.", code="upstream_garbled")

    def let_trail(self, response: aiohttp.ClientResponse) -> None:
        """Read what little is left, so that the connection can serve another call."""

        async def trail() -> None:
            with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                async with asyncio.timeout(_TRAILING_S):
                    await response.content.read(_MAX_ERROR_BYTES)
            response.release()

        task = asyncio.create_task(trail())
        self._trailing.add(task)
        task.add_done_callback(self._trailing.discard)


class Exchange:
    """One call, from sending to the last byte. Raises what goes wrong, as MillicentError; `close` in any case.

    `interrupt` ends it from outside: whatever waits in it then raises the error given.
    """

    def __init__(self, upstream: Upstream, path: str, body: bytes, headers: Mapping[str, str]) -> None:
        self._upstream = upstream
        self._path = path
        self._body = body
        self._headers = headers
        self._loop = asyncio.get_running_loop()
        self._response: aiohttp.ClientResponse | None = None
        self._waiting: asyncio.Future[aiohttp.ClientResponse] | None = None
        self._why: MillicentError | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._first_timer: asyncio.TimerHandle | None = None
        self._progressed_at: float | None = None
        self.worked = False  # whether the server may have begun to work on it

    def header(self, name: str) -> str | None:
        """One of the answer's; None where it isn't there, or no answer is."""
        return None if self._response is None else self._response.headers.get(name)

    @property
    def content_type(self) -> str:
        assert self._response is not None
        return self._response.content_type

    async def open(self) -> None:
        """Send it, and wait for the answer's head. Raises what an error's status stands for."""
        if self._why is not None:
            raise self._why
        upstream, config = self._upstream, self._upstream.config
        first = upstream.timeout("begin to answer", config.first_token_timeout_s, "first_token_timeout_s")
        whole = upstream.timeout("finish", config.timeout_s, "timeout_s")
        self._first_timer = self._loop.call_later(config.first_token_timeout_s, self.interrupt, first)
        self._timers = [self._first_timer, self._loop.call_later(config.timeout_s, self.interrupt, whole)]
        request = upstream.session.post(
            upstream.base_url + self._path, data=self._body, headers=self._headers, allow_redirects=False
        )
        self._waiting = asyncio.ensure_future(request)
        self.worked = True
        response = self._response = await self._guarded(self._waiting)
        if response.status != 200:
            self.worked = False
            try:
                content = await self._guarded(_read(response, _MAX_ERROR_BYTES, ""))
            except MillicentError:
                if self._why is not None:
                    raise
                content = b""  # the status alone says enough
            raise upstream.refused(response.status, response.headers, content)

    async def body(self) -> bytes:
        """All of it."""
        assert self._response is not None
        content = await self._guarded(_read(self._response, MAX_BODY_BYTES, self._upstream.who))
        self.progressed()
        return content

    async def events(self) -> AsyncIterator[list[Event]]:
        """Server-sent events, until the body ends; those that came together, together."""
        assert self._response is not None
        reader, size = EventReader(), 0
        content = self._response.content
        try:
            while piece := await self._guarded(content.readany()):
                size += len(piece)
                if events := reader.feed(piece):
                    yield events
                if size > _MAX_STREAM_BYTES:
                    raise self._upstream.garbled(f"sent more than {_MAX_STREAM_BYTES >> 20} MB")
            if events := reader.finish():
                yield events
        except UpstreamError as error:
            if error.code == "upstream_garbled" and not error.message.startswith(self._upstream.who):
                raise self._upstream.garbled(f"made no sense: {error.message}") from None
            raise

    def progressed(self) -> None:
        """A token came: the limit between tokens begins anew."""
        if self._progressed_at is None and self._first_timer is not None:
            self._first_timer.cancel()
            self._watch(self._upstream.config.between_tokens_timeout_s)
        self._progressed_at = self._loop.time()

    def interrupt(self, why: MillicentError) -> None:
        """End it now. Safe at any time; the first reason counts."""
        if self._why is not None:
            return
        self._why = why
        if self._response is not None:
            self._response.close()
        elif self._waiting is not None:
            self._waiting.cancel()

    def close(self, *, whole: bool = False) -> None:
        """`whole`: the answer was read to its end, so the connection is kept."""
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        if self._response is None:
            if self._waiting is not None:
                self._waiting.cancel()
        elif not whole or self._why is not None:
            self._response.close()
        elif self._response.content.at_eof():
            self._response.release()
        else:
            self._upstream.let_trail(self._response)

    def _watch(self, after_s: float) -> None:
        self._timers.append(self._loop.call_later(after_s, self._look))

    def _look(self) -> None:
        """Has anything come lately? One timer looks, rather than each token setting its own."""
        limit_s = self._upstream.config.between_tokens_timeout_s
        self._timers = [timer for timer in self._timers if not timer.cancelled() and timer.when() > self._loop.time()]
        left_s = (self._progressed_at or 0) + limit_s - self._loop.time()
        if left_s > 0:
            self._watch(left_s)
        else:
            self.interrupt(self._upstream.timeout("go on with its answer", limit_s, "between_tokens_timeout_s"))

    async def _guarded(self, waiting: Awaitable[T]) -> T:
        try:
            return await waiting
        except asyncio.CancelledError:
            if self._why is None:
                raise
            raise self._why from None
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            if self._why is not None:
                raise self._why from None
            if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError | aiohttp.InvalidURL):
                self.worked = False
            raise self._upstream.failure(error) from None


async def _read(response: aiohttp.ClientResponse, most_bytes: int, who: str) -> bytes:
    """The whole body. Raises UpstreamError where it is longer; an error's (no `who`) is cut instead."""
    parts, size = [], 0
    while piece := await response.content.readany():
        parts.append(piece)
        size += len(piece)
        if size > most_bytes:
            if not who:
                response.close()
                break
            raise UpstreamError(f"{who} sent more than {most_bytes >> 20} MB.", code="upstream_garbled")
    return b"".join(parts)


class UpstreamRun(ABC):
    """One answer, read at the reader's pace: nothing is read ahead of it. A dialect's own says what its chunks are,
    and what its end tells."""

    def __init__(self, upstream: Upstream, exchange: Exchange) -> None:
        self._upstream = upstream
        self._exchange = exchange
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True
        self._exchange.interrupt(MillicentError("cancelled"))

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        whole = False
        try:
            await self._exchange.open()
            async for chunk in self._chunks():
                yield chunk
            whole = True
            end = self._end(None)
        except MillicentError as error:
            end = self._end(error)
        finally:
            self._exchange.close(whole=whole)
        yield end

    @abstractmethod
    def _chunks(self) -> AsyncIterator[Chunk]:
        """Until the answer is whole. Raises what went wrong."""

    @abstractmethod
    def _end(self, error: MillicentError | None) -> End: ...


def merged(
    events: Sequence[Event], take: Callable[[bytes], Iterator[Text]]
) -> tuple[tuple[Text, ...], MillicentError | None]:
    """What events that came together say, in as few pieces as can be; and what went wrong after that."""
    texts: list[Text] = []
    try:
        for event in events:
            texts += take(event.data)
    except MillicentError as error:
        return merge_texts(texts, in_order=True), error
    return merge_texts(texts, in_order=True), None


def retry_after_s(headers: Mapping[str, str], now_ns: int) -> int | None:
    """Seconds to wait, rounded up, from `retry-after-ms` or `Retry-After`, which has seconds or a date; None where
    neither says."""
    with contextlib.suppress(ValueError, OverflowError):
        if (ms := headers.get("retry-after-ms")) is not None:
            return _bounded(float(ms) / 1000)
    said = headers.get("Retry-After")
    if said is None:
        return None
    try:
        return _bounded(float(said))
    except (ValueError, OverflowError):
        pass
    try:
        at = parsedate_to_datetime(said)
        return _bounded(at.timestamp() - now_ns / NS_PER_S)
    except (ValueError, TypeError, OverflowError):
        return None


def _bounded(seconds: float) -> int:
    """Raises ValueError for what is no time."""
    if math.isnan(seconds):
        raise ValueError("not a number of seconds")
    return math.ceil(min(max(seconds, 0.0), _MAX_RETRY_AFTER_S))
