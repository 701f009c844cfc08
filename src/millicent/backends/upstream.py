"""Calls to a server elsewhere: their time limits, and what goes wrong, as our errors.

Only the operator's `base_url` is called: redirects are not followed, certificates are checked, no proxy is taken from
the environment. Nothing here knows a dialect.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime

from millicent.backends.config import UpstreamConfig
from millicent.backends.http import (
    Answer,
    BrokenOff,
    Connection,
    ConnectionTimeout,
    NotHttp,
    Origin,
    Pool,
    Unreachable,
    Untrusted,
    head_of,
)
from millicent.core.clock import NS_PER_S, Clock
from millicent.core.errors import MillicentError, UpstreamError, UpstreamTimeout, one_line
from millicent.core.traces import CURRENT
from millicent.wire.server_sent_events import Event, EventReader
from millicent.wire.upstream_errors import complaint_in, error_of

MAX_BODY_BYTES = 64 << 20
_MAX_ERROR_BYTES = 64 << 10
_MAX_STREAM_BYTES = 512 << 20
_MAX_RETRY_AFTER_S = 86_400
# After the last event, this long for the end of the body to arrive, so that the connection can be used again.
_TRAILING_S = 1.0


# What goes wrong on the way; a header that can't be sent is a ValueError.
FAULTS = (BrokenOff, ConnectionTimeout, NotHttp, Unreachable, Untrusted, ValueError)
# Heads that are kept.
_HEADS = 256


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
        """Raises ValueError for an address that is none; configurations are checked for that."""
        self.who = who
        self.base_url = base_url.rstrip("/")
        self.config = config
        self._clock = clock
        self._origin = Origin(self.base_url)
        given = {"Accept-Encoding": "identity", "User-Agent": "millicent", "Accept": "*/*", **(headers or {})}
        self._headers = {"host": self._origin.authority, **{name.lower(): value for name, value in given.items()}}
        self._heads: dict[str, bytes] = {}  # by path, of which a configuration has a few
        self._secrets = tuple(secrets)
        self.pool = Pool(self._origin, config.max_connections, config.connect_timeout_s)

    async def close(self) -> None:
        await self.pool.close()

    def post(self, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> Exchange:
        """A call, not yet sent. `path` begins with a slash and is added to the base address."""
        return Exchange(self, path, body, headers)

    def head(self, path: str, headers: Mapping[str, str] | None) -> bytes:
        """Of a call with JSON. Raises ValueError where a header can't be sent."""
        if not headers and (known := self._heads.get(path)) is not None:
            return known
        more = {name.lower(): value for name, value in (headers or {}).items()}
        made = head_of("POST", self._origin.path + path, {**self._headers, "content-type": "application/json", **more})
        if not headers and len(self._heads) < _HEADS:
            self._heads[path] = made
        return made

    async def get(self, path: str, *, limit_s: float, max_bytes: int = 4 << 20) -> bytes:
        """What the same server has at `path`, for watching it. Raises UpstreamError."""
        try:
            async with asyncio.timeout(limit_s):
                connection = self.pool.take() or await self.pool.connect()
                whole = False
                try:
                    answer = connection.send(head_of("GET", path, self._headers), b"")
                    await answer.head()
                    if answer.status != 200:
                        raise error_of(self.who, answer.status, None)
                    body = await _read(answer, max_bytes, self.who)
                    whole = True
                    return body
                finally:
                    connection.release(0.0) if whole else connection.abort()
        except (*FAULTS, TimeoutError) as error:
            raise self.failure(error) from None

    def failure(self, error: Exception) -> MillicentError:
        """What went wrong on the way, as ours."""
        match error:
            case ConnectionTimeout():
                return self.timeout("take a connection", self.config.connect_timeout_s, "connect_timeout_s")
            case TimeoutError():
                return UpstreamTimeout(f"{self.who} took too long to answer: retry, or look after it.")
            case Untrusted():
                return UpstreamError(
                    f"{self.who} can't prove who it is ({one_line(str(error))}): correct base_url or its certificate.",
                    code="upstream_untrusted",
                    retryable=False,
                )
            case Unreachable(reason=reason):
                said = one_line(str(reason.strerror or reason))
                return UpstreamError(
                    f"{self.who} can't be reached ({said}): is it running?", code="upstream_unreachable"
                )
            case BrokenOff():
                return UpstreamError(f"{self.who} broke off its answer: retry.", code="upstream_broke_off")
            case NotHttp():
                return UpstreamError(
                    f"{self.who} answered what is not HTTP ({one_line(str(error))}).", code="upstream_garbled"
                )
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


class Exchange:
    """One call, from sending to the last byte. Raises what goes wrong, as MillicentError; `close` in any case.

    `interrupt` ends it from outside: whatever waits in it then raises the error given.
    """

    def __init__(self, upstream: Upstream, path: str, body: bytes, headers: Mapping[str, str] | None) -> None:
        self._upstream = upstream
        self._path = path
        self._body = body
        trace = CURRENT.get()
        self._headers = headers if trace is None else {**(headers or {}), **trace.call_headers()}
        self._loop = asyncio.get_running_loop()
        self._connection: Connection | None = None
        self._answer: Answer | None = None
        self._connecting: asyncio.Task[Connection] | None = None
        self._why: MillicentError | None = None
        self._begun_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._progressed_at: float | None = None
        self._reader = EventReader()
        self._streamed_bytes = 0
        self.worked = False  # whether the server may have begun to work on it

    def header(self, name: str) -> str | None:
        """One of the answer's; None where it isn't there, or no answer is."""
        return None if self._answer is None else self._answer.headers.get(name)

    @property
    def content_type(self) -> str:
        return (self.header("content-type") or "nothing known").partition(";")[0].strip().lower()

    async def open(self) -> None:
        """Send it, and wait for the answer's head. Raises what an error's status stands for."""
        if self._why is not None:
            raise self._why
        upstream = self._upstream
        config, self._begun_at = upstream.config, self._loop.time()
        # As early as either limit may be reached, so that the first token need not set it anew.
        self._watch_for(min(config.first_token_timeout_s, config.between_tokens_timeout_s, config.timeout_s))
        try:
            head = upstream.head(self._path, self._headers)
            self._connection = upstream.pool.take() or await self._connected()
            self.worked = True
            answer = self._answer = self._connection.send(head, self._body)
            await answer.head()
        except FAULTS as error:
            raise upstream.failure(error) from None
        if answer.status != 200:
            self.worked = False
            try:
                content = await _read(answer, _MAX_ERROR_BYTES, "")
            except FAULTS:
                content = b""  # the status alone says enough
            raise upstream.refused(answer.status, answer.headers, content)

    async def body(self) -> bytes:
        """All of it."""
        assert self._answer is not None
        try:
            content = await _read(self._answer, MAX_BODY_BYTES, self._upstream.who)
        except FAULTS as error:
            raise self._upstream.failure(error) from None
        self.progressed()
        return content

    async def events(self) -> list[Event]:
        """The next server-sent events, those that came together; none when the body has ended."""
        assert self._answer is not None
        try:
            while piece := await self._answer.read():
                self._streamed_bytes += len(piece)
                if self._streamed_bytes > _MAX_STREAM_BYTES:
                    raise self._upstream.garbled(f"sent more than {_MAX_STREAM_BYTES >> 20} MB")
                if events := self._reader.feed(piece):
                    return events
            return self._reader.finish()
        except FAULTS as error:
            raise self._upstream.failure(error) from None
        except UpstreamError as error:
            if error.code == "upstream_garbled" and not error.message.startswith(self._upstream.who):
                raise self._upstream.garbled(f"made no sense: {error.message}") from None
            raise

    def progressed(self) -> None:
        """A token came: the limit between tokens begins anew."""
        self._progressed_at = self._loop.time()

    def interrupt(self, why: MillicentError) -> None:
        """End it now. Safe at any time; the first reason counts."""
        if self._why is not None:
            return
        self._why = why
        if self._answer is not None:
            self._answer.fail(why, now=True)
        elif self._connecting is not None:
            self._connecting.cancel()
        if self._connection is not None:
            self._connection.abort()

    def close(self, *, whole: bool = False) -> None:
        """`whole`: the answer was read to its end, so the connection is kept."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        # From now on it may be another call's.
        connection, self._connection = self._connection, None
        if connection is None:
            if self._connecting is not None:
                self._connecting.cancel()
        elif whole and self._why is None:
            connection.release(_TRAILING_S)
        else:
            connection.abort()

    async def _connected(self) -> Connection:
        """A new connection, or one that another call is done with."""
        self._connecting = asyncio.ensure_future(self._upstream.pool.connect())
        try:
            connection = await self._connecting
        except asyncio.CancelledError:
            if self._why is None:
                raise
            raise self._why from None
        if self._why is not None:  # it came about at the same moment
            connection.release(0.0)
            raise self._why
        return connection

    def _watch_for(self, seconds: float) -> None:
        """One timer looks now and then, rather than each token setting its own."""
        self._timer = self._loop.call_later(seconds, self._look)

    def _look(self) -> None:
        upstream, config, now = self._upstream, self._upstream.config, self._loop.time()
        if self._progressed_at is None:
            at, what, setting = self._begun_at, "begin to answer", "first_token_timeout_s"
        else:
            at, what, setting = self._progressed_at, "go on with its answer", "between_tokens_timeout_s"
        if self._begun_at + config.timeout_s < at + getattr(config, setting):
            at, what, setting = self._begun_at, "finish", "timeout_s"
        limit_s: float = getattr(config, setting)
        if now >= at + limit_s:
            self.interrupt(upstream.timeout(what, limit_s, setting))
        else:
            self._watch_for(at + limit_s - now)


async def _read(answer: Answer, most_bytes: int, who: str) -> bytes:
    """The whole body. Raises UpstreamError where it is longer; an error's (no `who`) is cut instead."""
    parts, size = [], 0
    while piece := await answer.read():
        parts.append(piece)
        size += len(piece)
        if size > most_bytes:
            if not who:
                break
            raise UpstreamError(f"{who} sent more than {most_bytes >> 20} MB.", code="upstream_garbled")
    return b"".join(parts)


def retry_after_s(headers: Mapping[str, str], now_ns: int) -> int | None:
    """Seconds to wait, rounded up, from `retry-after-ms` or `Retry-After`, which has seconds or a date; None where
    neither says."""
    with contextlib.suppress(ValueError, OverflowError):
        if (ms := headers.get("retry-after-ms")) is not None:
            return _bounded(float(ms) / 1000)
    said = headers.get("retry-after")
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
