"""`/tokenize` and `/detokenize`: nothing is run, charged or written down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from millicent.core.identifiers import Ids
from millicent.core.request import Request
from millicent.server.authentication import caller_of
from millicent.server.bodies import read_body
from millicent.server.config import ServerConfig
from millicent.wire import openai_common
from millicent.wire import tokens as wire


class Tokenizers(Protocol):
    """Who has the models' tokenizers. Raises InvalidRequest and ModelNotFound."""

    def models(self) -> tuple[str, ...]: ...

    async def encode(self, request: Request, *, surrounded: bool) -> tuple[tuple[int, ...], tuple[bytes, ...], int]:
        """The prompt's tokens, each one's own text, and how many the model can read."""
        ...

    async def decode(self, model: str, tokens: Sequence[int]) -> str: ...


class Tokens:
    """`tokenizers` None: no model runs here."""

    def __init__(self, tokenizers: Tokenizers | None, config: ServerConfig, ids: Ids) -> None:
        self._tokenizers = tokenizers
        self._config = config
        self._ids = ids
        self.routes: list[BaseRoute] = [
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/detokenize", self._detokenize, methods=["POST"]),
        ]

    async def _tokenize(self, http: HttpRequest) -> Response:
        asked = wire.decode(await self._body(http), http.headers, self._ids.new("rcpt"), self._first())
        tokenizers = self._of(http, asked.request.model)
        found = await tokenizers.encode(asked.request, surrounded=asked.surrounded)
        return _json(asked.body(wire.Encoding(*found)))

    async def _detokenize(self, http: HttpRequest) -> Response:
        asked = wire.decode_tokens(await self._body(http))
        model = asked.model or self._first()
        return _json(wire.text_body(await self._of(http, model).decode(model, asked.tokens)))

    def _first(self) -> str:
        """The model that is meant where none is named."""
        known = () if self._tokenizers is None else self._tokenizers.models()
        return known[0] if known else "none"

    def _of(self, http: HttpRequest, model: str) -> Tokenizers:
        caller_of(http.scope).check_model(model)
        if self._tokenizers is None or model not in self._tokenizers.models():
            raise wire.no_tokenizer(model)
        return self._tokenizers

    async def _body(self, http: HttpRequest) -> bytes:
        limit, patience = self._config.max_body_mb, self._config.body_timeout_s
        return await read_body(http.scope, http.receive, max_mb=limit, timeout_s=patience)


def _json(body: object) -> Response:
    return Response(openai_common.encode(body), media_type="application/json")
