"""Ollama's addresses beside those that run models: what there is, what is loaded, and fetching more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from millicent import __version__
from millicent.core.clock import Clock, iso_utc
from millicent.core.errors import InvalidRequest, MillicentError
from millicent.hub import InstalledModel, Progress, list_installed, pull
from millicent.pipeline.pipeline import Pipeline
from millicent.server.application import Health
from millicent.server.authentication import caller_of
from millicent.server.bodies import read_body
from millicent.server.config import ServerConfig
from millicent.server.ollama_loading import served_model
from millicent.wire import ollama_common
from millicent.wire.decoding import decode_body
from millicent.wire.receipts import encode

_PROGRESS_INTERVAL_S = 0.2


class Named(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`name` is what `model` was called. Models come over TLS, or from the package index: `insecure` asks for less."""

    model: str = ""
    name: str = ""
    stream: bool | None = None
    insecure: bool | None = None
    verbose: bool | None = None


_named = msgspec.json.Decoder(Named)


class Ollama:
    """`makes_vectors` tells which models embed. Pulled models lie in `cache`; `offer` lets one be asked, and is None
    where no model runs on this machine."""

    def __init__(
        self,
        *,
        pipeline: Pipeline,
        health: Health,
        makes_vectors: Callable[[str], bool],
        cache: Path,
        offer: Callable[[InstalledModel], None] | None,
        clock: Clock,
        config: ServerConfig,
    ) -> None:
        self._pipeline = pipeline
        self._health = health
        self._makes_vectors = makes_vectors
        self._cache = cache
        self._offer = offer
        self._fetching: set[asyncio.Task[None]] = set()
        self._config = config
        self._started_at = iso_utc(clock.now_ns())
        self.routes: list[BaseRoute] = [
            Route("/api/version", self._version),
            Route("/api/tags", self._tags),
            Route("/api/ps", self._loaded),
            Route("/api/show", self._show, methods=["POST"]),
            Route("/api/pull", self._pull, methods=["POST"]),
        ]

    async def _version(self, _: Request) -> Response:
        return _json({"version": __version__})

    async def _tags(self, request: Request) -> Response:
        caller = caller_of(request.scope)
        sizes = await self._sizes()
        models = [model for model in self._pipeline.models() if caller.may_use(model)]
        return _json({"models": [self._entry(model, sizes) for model in models]})

    async def _loaded(self, request: Request) -> Response:
        caller = caller_of(request.scope)
        sizes = await self._sizes()
        loaded = [
            (model, engine.device)
            for engine in self._health.engines()
            for model, state in engine.models.items()
            if state == "loaded" and caller.may_use(model)
        ]
        return _json({"models": [self._entry(model, sizes) | {"device": device} for model, device in loaded]})

    async def _show(self, request: Request) -> Response:
        asked = await self._asked(request)
        model = served_model(asked.model, self._pipeline, caller_of(request.scope))
        return _json(
            {
                "modified_at": self._started_at,
                "details": {"family": model.partition(":")[0]},
                "model_info": {},
                "capabilities": ["embedding"] if self._makes_vectors(model) else ["completion", "tools"],
            }
        )

    async def _pull(self, request: Request) -> Response:
        caller = caller_of(request.scope)
        caller.demand(caller.administers, "fetch models")
        asked = await self._asked(request)
        if self._offer is None:
            raise InvalidRequest(
                "No model runs on this machine here, so that one that is fetched could not be asked: start the server "
                "with one.",
                param="model",
            )
        if asked.stream is not False:
            return StreamingResponse(self._pulling(asked.model), media_type="application/x-ndjson")
        await self._fetch(asked.model)
        return _json({"status": "success"})

    async def _fetch(self, name: str, progress: Progress | None = None) -> None:
        """It is there, and can be asked."""
        assert self._offer is not None
        self._offer(await asyncio.to_thread(pull, name.removesuffix(":latest"), self._cache, progress))

    async def _pulling(self, model: str) -> AsyncIterator[bytes]:
        """How far it is, now and then; then `success`, or what went wrong. It goes on if nobody reads."""
        told: list[tuple[int, int | None]] = []
        work = asyncio.create_task(self._fetch(model, lambda done, total: told.append((done, total))))
        self._fetching.add(work)
        work.add_done_callback(self._fetching.discard)
        yield ollama_common.line({"status": "pulling manifest"})
        while not work.done():
            await asyncio.wait({work}, timeout=_PROGRESS_INTERVAL_S)
            if count := len(told):
                done_bytes, total_bytes = told[count - 1]
                del told[:count]  # and nothing that came since
                total = {} if total_bytes is None else {"total": total_bytes}
                yield ollama_common.line({"status": f"pulling {model}"} | total | {"completed": done_bytes})
        try:
            work.result()
        except MillicentError as error:
            yield ollama_common.line(ollama_common.error_body(error))
        else:
            yield ollama_common.line({"status": "success"})

    async def _asked(self, request: Request) -> Named:
        limits = self._config
        body = await read_body(
            request.scope, request.receive, max_mb=limits.max_body_mb, timeout_s=limits.body_timeout_s
        )
        asked = decode_body(body, _named, Named.__struct_fields__)
        return msgspec.structs.replace(asked, model=asked.model or asked.name)

    async def _sizes(self) -> dict[str, int]:
        installed = await asyncio.to_thread(list_installed, self._cache)
        return {model.name: model.bytes for model in installed}

    def _entry(self, model: str, sizes: dict[str, int]) -> dict[str, Any]:
        """Sizes are known of what was fetched by name."""
        entry: dict[str, Any] = {"name": model, "model": model, "modified_at": self._started_at}
        return entry | ({"size": sizes[model]} if model in sizes else {})


def _json(body: object) -> Response:
    return Response(encode(body), media_type="application/json")
