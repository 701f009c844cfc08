"""The HTTP application: which address does what."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from millicent.control.access import Caller, KeyRing, Writes
from millicent.control.idempotency import Idempotency
from millicent.control.limits import RateLimiter
from millicent.control.stored_responses import StoredResponses
from millicent.core.clock import NS_PER_HOUR, NS_PER_S, Clock, hour_start_ns, parse_time_ns
from millicent.core.errors import Forbidden, InvalidRequest, MillicentError, ModelNotFound, NotFound
from millicent.core.identifiers import Ids
from millicent.ledger.queries import LedgerQueries, ReceiptFilter
from millicent.pipeline.pipeline import Pipeline
from millicent.server.admin import Admin
from millicent.server.authentication import Authentication, caller_of, is_page
from millicent.server.bodies import read_body
from millicent.server.config import ServerConfig
from millicent.server.families import family_of, is_anthropic
from millicent.server.guard import Guard
from millicent.server.inference import DIALECTS, OLLAMA_CHAT, OLLAMA_GENERATE, RESPONSES, InferenceEndpoint
from millicent.server.keys import KeyChanges
from millicent.server.late import LateEntries
from millicent.server.ollama_loading import Loader, LoadingEndpoint
from millicent.server.sessions import Sessions
from millicent.server.shortcut import Shortcut
from millicent.server.sign_in import SignIn, SignInPage
from millicent.server.stored_responses import ResponseRoutes, StoringEndpoint
from millicent.server.tokens import Tokenizers, Tokens
from millicent.wire import anthropic_common, anthropic_messages, ollama_requests
from millicent.wire import quotes as quotes_wire
from millicent.wire import receipts as receipts_wire
from millicent.wire.decoding import read_limit

log = logging.getLogger(__name__)

T = TypeVar("T")
MissingPage = Callable[[str], Response]
"""What a browser is shown at an address where nothing is."""
_MAX_PAGE = 1000
_FILTERS = ("key", "team", "user", "feature", "tier", "conversation", "run", "model", "status")


class EngineReport(msgspec.Struct, frozen=True):
    """One engine, as `/ready` shows it. `state` is starting, ready, restarting, failed or stopped."""

    device: str
    pid: int | None
    models: dict[str, str]
    state: str
    message: str | None = None


class UpstreamReport(msgspec.Struct, frozen=True):
    """One placement that is called over HTTP, as `/ready` shows it."""

    placement: str
    server: str
    base_url: str
    models: tuple[str, ...]


class Health(Protocol):
    """What `/ready` rests on."""

    def upstreams(self) -> Sequence[UpstreamReport]: ...

    def engines(self) -> Sequence[EngineReport]: ...

    def trouble(self) -> str | None:
        """Why requests can't be answered now, or None."""
        ...


class Server:
    """The routes and what they need. `asgi` is the whole application, guard included."""

    def __init__(
        self,
        *,
        config: ServerConfig,
        pipeline: Pipeline,
        queries: LedgerQueries,
        health: Health,
        clock: Clock,
        ids: Ids,
        late: LateEntries,
        ledger: Writes,
        keys: KeyRing,
        limiter: RateLimiter,
        sign_in_page: SignInPage,
        missing_page: MissingPage | None = None,
        tokenizers: Tokenizers | None = None,
        loader: Loader | None = None,
        pages: Sequence[BaseRoute] = (),
    ) -> None:
        self._config = config
        self._ids = ids
        self._pipeline = pipeline
        self._queries = queries
        self._health = health
        self._clock = clock
        self._started_s = clock.now_ns() // NS_PER_S
        routes: list[BaseRoute] = [
            Route("/health", self._alive),
            Route("/ready", self._ready),
            Route("/v1/models", self._models),
            Route("/v1/models/{model:path}", self._model),
            Route("/v1/receipts", self._receipts),
            Route("/v1/receipts/{receipt_id}", self._receipt),
            Route("/v1/accounts", self._accounts),
            *late.routes,
            *Tokens(tokenizers, config, ids).routes,
            Route("/v1/quote", self._quote, methods=["POST"]),
            Route("/v1/messages/count_tokens", self._count_tokens, methods=["POST"]),
        ]
        idempotency = Idempotency(queries, clock)
        parts = (pipeline, limiter, idempotency, queries, late, ids, clock, config)
        endpoints = {path: InferenceEndpoint(dialect, *parts) for path, dialect in DIALECTS.items()}
        endpoints["/api/chat"] = LoadingEndpoint(ollama_requests.CHAT, loader, OLLAMA_CHAT, *parts)
        endpoints["/api/generate"] = LoadingEndpoint(ollama_requests.GENERATE, loader, OLLAMA_GENERATE, *parts)
        if config.stored_responses_hours:
            stored = StoredResponses(ledger, queries, clock, config.stored_responses_hours, config.stored_responses_mb)
            endpoints["/v1/responses"] = StoringEndpoint(stored, RESPONSES, *parts)
            routes += ResponseRoutes(stored).routes
        # They are routes too, for whoever asks with another method.
        routes += [Route(path, endpoint, methods=["POST"]) for path, endpoint in endpoints.items()]
        sessions = Sessions(clock)
        key_changes = KeyChanges(ledger=ledger, queries=queries, ring=keys, clock=clock, ids=ids)
        routes += Admin(ledger=ledger, queries=queries, keys=key_changes, clock=clock).routes
        routes += SignIn(keys, sessions, sign_in_page).routes
        middleware = [
            Middleware(Guard, config=config),
            Middleware(Authentication, keys=keys, sessions=sessions),
            Middleware(Shortcut, endpoints=endpoints),
        ]
        if config.allowed_origins:
            middleware.insert(0, _cors(config))
        self.asgi: ASGIApp = Starlette(
            routes=[*routes, *pages],
            middleware=middleware,
            exception_handlers={
                MillicentError: _on_error,
                HTTPException: partial(_on_http_error, missing_page),
                Exception: _on_bug,
            },
        )

    async def _alive(self, _: Request) -> Response:
        return _json({"alive": True})

    async def _ready(self, _: Request) -> Response:
        trouble = self._health.trouble()
        engines = [msgspec.to_builtins(engine) for engine in self._health.engines()]
        body: dict[str, Any] = {"ready": trouble is None, "pid": _pid(), "engines": engines}
        if upstreams := self._health.upstreams():
            body["upstreams"] = [msgspec.to_builtins(upstream) for upstream in upstreams]
        body["deployments"] = [msgspec.to_builtins(each) for each in self._pipeline.deployments()]
        if trouble is not None:
            body["reason"] = trouble
        return _json(body, status=200 if trouble is None else 503)

    async def _models(self, request: Request) -> Response:
        caller = caller_of(request.scope)
        known = [model for model in self._pipeline.models() if caller.may_use(model)]
        if is_anthropic(request.scope):
            return _json(anthropic_common.model_list(known, self._started_s, request.query_params))
        return _json({"object": "list", "data": [self._model_body(model) for model in known]})

    async def _model(self, request: Request) -> Response:
        model = request.path_params["model"]
        if model not in self._pipeline.models():
            known = ", ".join(self._pipeline.models()) or "none"
            raise ModelNotFound(f"Model `{model[:100]}` is not served here: this server has {known}.", param="model")
        if is_anthropic(request.scope):
            return _json(anthropic_common.model_body(model, self._started_s))
        return _json(self._model_body(model))

    def _model_body(self, model: str) -> dict[str, Any]:
        return {"id": model, "object": "model", "created": self._started_s, "owned_by": "millicent"}

    async def _receipts(self, request: Request) -> Response:
        query = request.query_params
        _refuse_unknown(query.keys(), {*_FILTERS, "limit", "after", "from", "to"})
        where = ReceiptFilter(
            **{name: query[name] for name in _FILTERS if name in query},
            from_ns=_time(query.get("from"), "from"),
            to_ns=_time(query.get("to"), "to"),
        )
        where = _own(where, caller_of(request.scope))
        limit = read_limit(query, 50, _MAX_PAGE)
        page = await _off_loop(lambda: self._queries.receipts(where, limit=limit, after=query.get("after")))
        return _json(receipts_wire.list_body([receipts_wire.receipt_body(one) for one in page.receipts], page.next))

    async def _receipt(self, request: Request) -> Response:
        receipt_id = request.path_params["receipt_id"]
        receipt = await _off_loop(lambda: self._queries.receipt(receipt_id))
        caller = caller_of(request.scope)
        if receipt is None or not (caller.reads_all or receipt.attribution.key == caller.id):
            raise NotFound(f"There is no receipt `{receipt_id[:100]}`: check the `X-Millicent-Receipt` header.")
        return _json(receipts_wire.receipt_body(receipt))

    async def _quote(self, request: Request) -> Response:
        body = await read_body(
            request.scope, request.receive, max_mb=self._config.max_body_mb, timeout_s=self._config.body_timeout_s
        )
        asked, models = quotes_wire.decode(body, request.headers, self._ids.new("rcpt"))
        caller = caller_of(request.scope)
        for model in models:
            caller.check_model(model)
        asked = msgspec.structs.replace(asked, attribution=caller.attribute(asked.attribution))
        quotes = await self._pipeline.quotes(asked, models)
        return _json(receipts_wire.list_body([receipts_wire.quote_body(quote) for quote in quotes], None))

    async def _count_tokens(self, request: Request) -> Response:
        body = await read_body(
            request.scope, request.receive, max_mb=self._config.max_body_mb, timeout_s=self._config.body_timeout_s
        )
        asked = anthropic_messages.decode_count(body, request.headers, self._ids.new("rcpt"))
        caller = caller_of(request.scope)
        caller.check_model(asked.model)
        return _json({"input_tokens": await self._pipeline.count(asked)})

    async def _accounts(self, request: Request) -> Response:
        query = request.query_params
        _refuse_unknown(query.keys(), {"from", "to"})
        now_ns = self._clock.now_ns()
        from_ns = _time(query.get("from"), "from")
        to_ns = _time(query.get("to"), "to")
        await self._pipeline.checkpoint()
        start_ns = hour_start_ns(now_ns) - 23 * NS_PER_HOUR if from_ns is None else from_ns
        stop_ns = now_ns + NS_PER_HOUR if to_ns is None else to_ns
        accounts = await _off_loop(lambda: self._queries.accounts(start_ns, stop_ns))
        return _json(receipts_wire.list_body([receipts_wire.account_body(one) for one in accounts], None))


def _own(where: ReceiptFilter, caller: Caller) -> ReceiptFilter:
    """A client's key reads its own receipts."""
    if caller.reads_all:
        return where
    if where.key not in {None, caller.id}:
        raise Forbidden("This key reads only its own receipts: leave out `key`.", param="key", code="scope")
    return msgspec.structs.replace(where, key=caller.id)


def _pid() -> int:
    import os

    return os.getpid()


async def _off_loop(question: Callable[[], T]) -> T:
    return await asyncio.to_thread(question)


def _json(body: object, status: int = 200) -> Response:
    return Response(receipts_wire.encode(body), status_code=status, media_type="application/json")


def _time(text: str | None, name: str) -> int | None:
    if text is None:
        return None
    try:
        return parse_time_ns(text)
    except ValueError:
        raise InvalidRequest(
            f"Invalid `{name}`: `{text[:40]}`; send a time such as 2026-01-31T12:00:00Z or a date.", param=name
        ) from None


def _refuse_unknown(names: object, known: set[str]) -> None:
    for name in names:  # type: ignore[attr-defined]
        if name not in known:
            raise InvalidRequest(
                f"Unknown parameter `{name}`: this address takes {', '.join(sorted(known))}.",
                param=name,
                code="unknown_parameter",
            )


_OUR_HEADERS = ("X-Millicent-Receipt", "X-Millicent-Cost-USD", "X-Millicent-Cache")
_RATE_HEADERS = [
    name
    for part in ("Limit", "Remaining", "Reset")
    for what in ("Requests", "Tokens")
    for name in (f"X-RateLimit-{part}-{what}", f"Anthropic-RateLimit-{what}-{part}")
]


def _cors(config: ServerConfig) -> Middleware:
    return Middleware(
        CORSMiddleware,
        allow_origins=list(config.allowed_origins),
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=[
            "X-Millicent-Receipt",
            "X-Millicent-Cost-USD",
            "X-Millicent-Cache",
            "Request-Id",
            "Retry-After",
            *_RATE_HEADERS,
        ],
    )


Handler = Callable[[Request, Exception], Awaitable[Response]]


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, MillicentError)
    headers = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
    return Response(
        receipts_wire.encode(family_of(request.scope).error_body(error, None)),
        status_code=error.status,
        headers=headers,
        media_type="application/json",
    )


async def _on_http_error(missing_page: MissingPage | None, request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if missing_page is not None and error.status_code == 404 and is_page(request.scope):
        return missing_page(request.url.path)
    if error.status_code == 404:
        named: MillicentError = NotFound(f"There is nothing at `{request.url.path[:100]}`: see docs/api.md.")
    elif error.status_code == 405:
        named = InvalidRequest(
            f"`{request.url.path[:100]}` doesn't take {request.method}: see docs/api.md.", code="method_not_allowed"
        )
    else:
        named = InvalidRequest(str(error.detail))
    response = await _on_error(request, named)
    response.status_code = error.status_code
    response.headers.update(error.headers or {})
    return response


async def _on_bug(request: Request, error: Exception) -> Response:
    log.error("%s %s failed in a way it should not", request.method, request.url.path, exc_info=error)
    return await _on_error(request, MillicentError("The server failed: retry, and report this if it happens again."))
