"""What every route that runs models does: read, decode, admit, and stop the work when the client goes."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from millicent.core.errors import MillicentError
from millicent.core.identifiers import Ids
from millicent.core.request import Request
from millicent.pipeline.answer import Answer
from millicent.pipeline.pipeline import Pipeline
from millicent.server.bodies import read_body
from millicent.server.config import ServerConfig
from millicent.server.responses import send_error

ShapeT = TypeVar("ShapeT")


class Endpoint(ABC, Generic[ShapeT]):
    """An ASGI application. `decode` turns a body, its headers and a receipt's identifier into a request, and into how
    the caller wants the answer written."""

    def __init__(
        self,
        decode: Callable[[bytes, Mapping[str, str], str], tuple[Request, ShapeT]],
        pipeline: Pipeline,
        ids: Ids,
        config: ServerConfig,
    ) -> None:
        self._decode = decode
        self._pipeline = pipeline
        self._ids = ids
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await read_body(
                scope, receive, max_mb=self._config.max_body_mb, timeout_s=self._config.body_timeout_s
            )
            request, shape = self._decode(body, Headers(scope=scope), self._ids.new("rcpt"))
            answer = await self._pipeline.admit(request)
        except ClientDisconnect:
            return
        except MillicentError as error:
            await send_error(send, error)
            return
        watch = asyncio.create_task(_cancel_on_disconnect(receive, answer))
        try:
            await self.answer(send, request, answer, shape)
        finally:
            answer.cancel()
            watch.cancel()

    @abstractmethod
    async def answer(self, send: Send, request: Request, answer: Answer, shape: ShapeT) -> None:
        """Write it, to its end."""


def cost_header(answer: Answer) -> dict[str, str]:
    total = answer.settled.total if answer.settled is not None else None
    return {} if total is None else {"x-millicent-cost-usd": str(total)}


async def _cancel_on_disconnect(receive: Receive, answer: Answer) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    answer.cancel()
