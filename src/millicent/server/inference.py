"""The routes that make text, parametrised by dialect."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.types import Send

from millicent.core.errors import MillicentError
from millicent.core.identifiers import Ids
from millicent.core.receipts import Receipt
from millicent.core.request import Request
from millicent.pipeline.answer import Answer
from millicent.pipeline.pipeline import Pipeline
from millicent.server.config import ServerConfig
from millicent.server.endpoint import Endpoint, cost_header
from millicent.server.responses import send_error, send_json
from millicent.wire import openai_chat, openai_common, openai_completions
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


class InferenceEndpoint(Endpoint[StreamShape]):
    """Writes the answer whole or as a stream."""

    def __init__(self, dialect: Dialect, pipeline: Pipeline, ids: Ids, config: ServerConfig) -> None:
        super().__init__(dialect.decode, pipeline, ids, config)
        self._dialect = dialect

    async def answer(self, send: Send, request: Request, answer: Answer, shape: StreamShape) -> None:
        if request.stream:
            await self._stream(send, answer, shape)
        else:
            await self._whole(send, answer)

    async def _whole(self, send: Send, answer: Answer) -> None:
        text: list[str] = []
        headers = {"x-millicent-receipt": answer.receipt_id}
        try:
            while (piece := await answer.take()) is not None:
                text.append(piece)
        except MillicentError as error:
            await send_error(send, error, headers=headers | cost_header(answer))
            return
        receipt = answer.settled
        assert receipt is not None
        body = openai_common.encode(self._dialect.answer_body(receipt, "".join(text)))
        await send_json(send, body, headers=headers | cost_header(answer))

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


async def _send_part(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})
