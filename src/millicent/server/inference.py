"""The routes that run models: one ASGI endpoint, parametrised by dialect."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from millicent.core.clock import Clock
from millicent.core.errors import MillicentError
from millicent.core.identifiers import Ids
from millicent.core.receipts import Receipt
from millicent.core.request import Request
from millicent.pipeline.answer import Answer
from millicent.pipeline.pipeline import Pipeline
from millicent.server.bodies import read_body
from millicent.server.config import ServerConfig
from millicent.server.responses import send_error, send_json
from millicent.wire import openai_chat, openai_common, openai_completions
from millicent.wire.late import read_lines
from millicent.wire.openai_common import StreamShape

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class StreamWriter(Protocol):
    def start(self, receipt: Receipt) -> bytes: ...
    def text(self, receipt: Receipt, text: str) -> bytes: ...
    def end(self, receipt: Receipt) -> bytes: ...


@dataclass(frozen=True)
class Dialect:
    """One dialect's both ways."""

    decode: Callable[[bytes, Mapping[str, str], str], tuple[Request, StreamShape]]
    answer_body: Callable[[Receipt, str], dict[str, Any]]
    stream: Callable[[StreamShape], StreamWriter]


CHAT = Dialect(openai_chat.decode, openai_chat.answer_body, openai_chat.Stream)
COMPLETIONS = Dialect(openai_completions.decode, openai_completions.answer_body, openai_completions.Stream)


class InferenceEndpoint:
    """Reads, decodes, admits, and writes the answer whole or as a stream. A client that goes stops the work."""

    def __init__(self, dialect: Dialect, pipeline: Pipeline, ids: Ids, clock: Clock, config: ServerConfig) -> None:
        self._dialect = dialect
        self._pipeline = pipeline
        self._ids = ids
        self._clock = clock
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await read_body(
                scope, receive, max_mb=self._config.max_body_mb, timeout_s=self._config.body_timeout_s
            )
            receipt_id = self._ids.new("rcpt")
            headers = Headers(scope=scope)
            request, shape = self._dialect.decode(body, headers, receipt_id)
            costs = read_lines(headers, self._clock.now_ns())
            request = msgspec.structs.replace(request, outside_costs=costs) if costs else request
            answer = await self._pipeline.admit(request)
        except ClientDisconnect:
            return
        except MillicentError as error:
            await send_error(send, error)
            return
        watch = asyncio.create_task(_cancel_on_disconnect(receive, answer))
        try:
            if request.stream:
                await self._stream(send, answer, shape)
            else:
                await self._whole(send, answer)
        finally:
            answer.cancel()
            watch.cancel()

    async def _whole(self, send: Send, answer: Answer) -> None:
        text: list[str] = []
        headers = {"x-millicent-receipt": answer.receipt_id}
        try:
            while (piece := await answer.take()) is not None:
                text.append(piece)
        except MillicentError as error:
            await send_error(send, error, headers=headers | _cost_header(answer))
            return
        receipt = answer.settled
        assert receipt is not None
        body = openai_common.encode(self._dialect.answer_body(receipt, "".join(text)))
        await send_json(send, body, headers=headers | _cost_header(answer))

    async def _stream(self, send: Send, answer: Answer, shape: StreamShape) -> None:
        writer = self._dialect.stream(shape)
        receipt_header = (b"x-millicent-receipt", answer.receipt_id.encode())
        await send({"type": "http.response.start", "status": 200, "headers": [*_STREAM_HEADERS, receipt_header]})

        def so_far() -> Receipt:
            return self._pipeline.running(answer) if shape.running_usage else answer.opened

        await _send_part(send, writer.start(so_far()))
        try:
            while (text := await self._take_or_beat(send, answer)) is not None:
                await _send_part(send, writer.text(so_far(), text))
            assert answer.settled is not None
            last = writer.end(answer.settled)
        except MillicentError as error:
            last = openai_common.event(openai_common.error_body(error))
        await send({"type": "http.response.body", "body": last})

    async def _take_or_beat(self, send: Send, answer: Answer) -> str | None:
        while True:
            try:
                async with asyncio.timeout(self._config.heartbeat_s):
                    return await answer.take()
            except TimeoutError:
                await _send_part(send, openai_common.HEARTBEAT)


def _cost_header(answer: Answer) -> dict[str, str]:
    total = answer.settled.total if answer.settled is not None else None
    return {} if total is None else {"x-millicent-cost-usd": str(total)}


async def _send_part(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _cancel_on_disconnect(receive: Receive, answer: Answer) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    answer.cancel()
