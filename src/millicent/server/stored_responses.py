"""OpenAI's Responses with a memory: a request can go on from an answer that was stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from millicent.control.access import Caller
from millicent.control.stored_responses import StoredResponse, StoredResponses
from millicent.core.errors import InvalidRequest
from millicent.core.receipts import Receipt
from millicent.core.request import Request
from millicent.server.authentication import caller_of
from millicent.server.inference import InferenceEndpoint, StreamWriter
from millicent.wire import openai_response_answers, openai_responses
from millicent.wire import openai_stored_responses as wire
from millicent.wire.decoding import read_limit
from millicent.wire.receipts import encode


class StoringEndpoint(InferenceEndpoint):
    """`POST /v1/responses` where answers are stored."""

    def __init__(self, stored: StoredResponses, *parts: Any) -> None:
        super().__init__(*parts)
        self._stored = stored

    async def _decode(self, body: bytes, headers: Mapping[str, str], caller: Caller) -> tuple[Request, Any]:
        wanted = wire.wanted(body)
        earlier = None if wanted is None else await self._recall(wanted, _owner(caller))
        return openai_responses.decode(body, headers, self._ids.new("rcpt"), earlier, stores=True)

    async def _recall(self, wanted: wire.Wanted, owner: str) -> wire.Earlier:
        """Raises InvalidRequest where the response to go on from isn't there."""
        conversation = [] if wanted.previous is None else await self._stored.conversation(owner, wanted.previous)
        if wanted.previous is not None and not conversation:
            raise wire.previous_not_found(wanted.previous)
        known = {turn.id for turn in conversation}
        others = [await self._stored.find(owner, each) for each in wanted.responses if each not in known]
        return wire.earlier([_turn(each) for each in conversation], [_turn(each) for each in others if each])

    async def _answered(self, receipt: Receipt, shape: Any, said: dict[str, Any] | StreamWriter) -> None:
        body = said.response if isinstance(said, openai_response_answers.Stream) else said
        if shape.input is None or not isinstance(body, dict):
            return
        told = receipt.attribution
        await self._stored.keep(
            StoredResponse(body["id"], told.key or "", told.user, shape.previous, shape.input, encode(body).decode())
        )


class ResponseRoutes:
    """What OpenAI's clients ask of stored responses."""

    def __init__(self, stored: StoredResponses) -> None:
        self._stored = stored
        self.routes: list[BaseRoute] = [
            Route("/v1/responses/{id}", self._show),
            Route("/v1/responses/{id}", self._delete, methods=["DELETE"]),
            Route("/v1/responses/{id}/input_items", self._input_items),
        ]

    async def _show(self, request: HttpRequest) -> Response:
        if request.query_params.get("stream", "false") != "false":
            raise InvalidRequest("`stream`: a stored response is given whole; leave it out.", param="stream")
        found = await self._stored.find(_owner(caller_of(request.scope)), request.path_params["id"])
        if found is None:
            raise wire.not_found(request.path_params["id"])
        return Response(found.body, media_type="application/json")

    async def _delete(self, request: HttpRequest) -> Response:
        name = request.path_params["id"]
        if not await self._stored.delete(_owner(caller_of(request.scope)), name):
            raise wire.not_found(name)
        return Response(encode(wire.deleted_body(name)), media_type="application/json")

    async def _input_items(self, request: HttpRequest) -> Response:
        query, name = request.query_params, request.path_params["id"]
        limit, order = read_limit(query, 20, 100), query.get("order", "desc")
        if order not in {"asc", "desc"}:
            raise InvalidRequest(f"Invalid `order`: `{order[:40]}`; send `asc` or `desc`.", param="order")
        conversation = await self._stored.conversation(_owner(caller_of(request.scope)), name)
        if not conversation:
            raise wire.not_found(name)
        items = wire.input_items([_turn(each) for each in conversation])
        page = wire.list_body(items, limit, query.get("after"), order)
        return Response(encode(page), media_type="application/json")


def _owner(caller: Caller) -> str:
    return caller.id or ""


def _turn(found: StoredResponse) -> wire.Turn:
    return wire.Turn(found.id, found.input, found.body)
