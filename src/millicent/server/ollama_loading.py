"""Ollama's way to load and unload a model: a request to generate that says nothing."""

from __future__ import annotations

from typing import Any, Protocol

from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from millicent.control.access import Caller
from millicent.core.errors import MillicentError, ModelNotFound
from millicent.pipeline.pipeline import Pipeline
from millicent.server.authentication import caller_of
from millicent.server.bodies import read_body
from millicent.server.headers import headers_of
from millicent.server.inference import InferenceEndpoint
from millicent.server.responses import send_error, send_json
from millicent.wire import ollama_answers, ollama_common, ollama_requests
from millicent.wire.receipts import encode


class Loader(Protocol):
    """Who has the models of this machine."""

    def models(self) -> tuple[str, ...]: ...

    async def load(self, name: str) -> None:
        """Until it is loaded. Raises Unavailable where it can't be."""
        ...

    async def unload(self, name: str) -> None:
        """Now, or once nothing runs on it any more."""
        ...


class LoadingEndpoint(InferenceEndpoint):
    """`POST /api/chat` and `/api/generate`. What isn't a load goes on as everywhere. A load is nobody's request: no
    receipt, no cost. A model that runs elsewhere, and a policy's name, are loaded as far as anybody here can say.

    `loader` None: no model runs here.
    """

    def __init__(self, kind: str, loader: Loader | None, *parts: Any) -> None:
        super().__init__(*parts)
        self._kind = kind
        self._loader = loader

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = caller_of(scope)
        try:
            body = await read_body(
                scope, receive, max_mb=self._config.max_body_mb, timeout_s=self._config.body_timeout_s
            )
            load = ollama_requests.read_load(self._kind, body, headers_of(scope))
            told = None if load is None else await self._done(load, caller)
        except ClientDisconnect:
            return
        except MillicentError as error:
            await send_error(send, ollama_common.FAMILY, error, headers=self._rate_headers(caller))
            return
        if load is None or told is None:
            await super().__call__(scope, _again(body, receive), send)
        elif load.stream:
            await send_json(send, ollama_common.line(told), media_type=ollama_common.FAMILY.stream_type)
        else:
            await send_json(send, encode(told))

    async def _done(self, load: ollama_requests.Load, caller: Caller) -> dict[str, Any]:
        model = served_model(load.model, self._pipeline, caller)
        if load.unloads:
            caller.demand(caller.administers, "unload models, which takes an admin key")
        if self._loader is not None and model in self._loader.models():
            await (self._loader.unload if load.unloads else self._loader.load)(model)
        return ollama_answers.load_body(load, model, self._clock.now_ns())


def served_model(name: str, pipeline: Pipeline, caller: Caller) -> str:
    """The model that Ollama's clients mean. Raises Forbidden, and ModelNotFound."""
    known = pipeline.models()
    model = ollama_common.served_name(name, known)
    caller.check_model(model)
    if model not in known:
        raise ModelNotFound(
            f"Model `{model[:100]}` is not served here: this server has {', '.join(known) or 'none'}.", param="model"
        )
    return model


def _again(body: bytes, receive: Receive) -> Receive:
    """A body that was read, to be read once more."""
    read = False

    async def receive_again() -> Message:
        nonlocal read
        if read:
            return await receive()
        read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again
