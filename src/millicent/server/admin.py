"""`/admin`: keys, budgets, kept answers. Authentication lets only admins through."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from millicent.control.access import Asks, Writes
from millicent.control.budgets import drop_budget, set_budget, standing
from millicent.control.config import BudgetConfig, Rates
from millicent.control.idempotency import purge_answers
from millicent.control.keys import Scope
from millicent.control.showing import key_body
from millicent.control.stored_responses import purge as purge_responses
from millicent.core.clock import NS_PER_S, Clock, parse_time_ns
from millicent.core.errors import ConfigError, InvalidRequest
from millicent.server.bodies import read_body
from millicent.server.keys import KeyChanges
from millicent.wire import control as wire
from millicent.wire import receipts as receipts_wire

T = TypeVar("T")


class Admin:
    """A change is durable before it is answered, and holds here from then on."""

    def __init__(self, *, ledger: Writes, queries: Asks, keys: KeyChanges, clock: Clock) -> None:
        self._ledger = ledger
        self._queries = queries
        self._keys = keys
        self._clock = clock
        self.routes: list[BaseRoute] = [
            Route("/admin/keys", self._list_keys),
            Route("/admin/keys", self._create_key, methods=["POST"]),
            Route("/admin/keys/{id}", self._revoke_key, methods=["DELETE"]),
            Route("/admin/keys/{id}/rotate", self._rotate_key, methods=["POST"]),
            Route("/admin/budgets", self._list_budgets),
            Route("/admin/budgets", self._set_budget, methods=["POST"]),
            Route("/admin/budgets/{name}", self._drop_budget, methods=["DELETE"]),
            Route("/admin/answers", self._purge_answers, methods=["DELETE"]),
        ]

    async def _list_keys(self, _: Request) -> Response:
        keys = await asyncio.to_thread(self._keys.all)
        return _json(receipts_wire.list_body([key_body(key, self._clock.now_ns()) for key in keys], None))

    async def _create_key(self, request: Request) -> Response:
        asked = wire.decode_key(await _body(request))
        key, token = await self._keys.create(**_key_fields(asked))
        return _json(key_body(key, self._clock.now_ns()) | {"token": token}, status=201)

    async def _rotate_key(self, request: Request) -> Response:
        overlap_ns = wire.decode_rotation(await _body(request)).overlap_s * NS_PER_S
        key, token = await self._keys.rotate(request.path_params["id"], overlap_ns)
        return _json(key_body(key, self._clock.now_ns()) | {"token": token})

    async def _revoke_key(self, request: Request) -> Response:
        key = await self._keys.revoke(request.path_params["id"])
        return _json(key_body(key, self._clock.now_ns()))

    async def _list_budgets(self, _: Request) -> Response:
        now_ns = self._clock.now_ns()
        found = await self._read(lambda connection: standing(connection, now_ns))
        return _json(
            receipts_wire.list_body([wire.budget_body(budget, balances, now_ns) for budget, balances in found], None)
        )

    async def _set_budget(self, request: Request) -> Response:
        asked = wire.decode_budget(await _body(request))
        config = BudgetConfig(
            limit_usd=asked.limit_usd,
            every=asked.every,
            per=asked.per,
            only=asked.only,
            tier=asked.tier,
            hard=asked.hard,
        )
        try:
            budget = config.budget(asked.name, "api")
        except ConfigError as error:
            raise InvalidRequest(f"{error.message}.") from None
        await self._ledger.write(partial(set_budget, budget=budget))
        return _json(wire.budget_body(budget, [], self._clock.now_ns()), status=201)

    async def _drop_budget(self, request: Request) -> Response:
        name = request.path_params["name"]
        await self._ledger.write(partial(drop_budget, name=name))
        return _json({"name": name, "object": "budget", "deleted": True})

    async def _purge_answers(self, request: Request) -> Response:
        user = request.query_params.get("user")
        purged = await self._ledger.write(partial(_forget_answers, user=user))
        return _json({"object": "purge", "user": user, "purged": purged})

    async def _read(self, question: Callable[[sqlite3.Connection], list[T]]) -> list[T]:
        return await asyncio.to_thread(self._queries.ask, question) or []


def _forget_answers(connection: sqlite3.Connection, user: str | None) -> int:
    """Those kept for idempotency, and stored responses; how many."""
    return purge_answers(connection, user=user) + purge_responses(connection, user=user)


def _key_fields(asked: wire.KeyBody) -> dict[str, object]:
    """Raises InvalidRequest naming the field."""
    expires_at_ns = None
    if asked.expires_at is not None:
        try:
            expires_at_ns = parse_time_ns(asked.expires_at)
        except ValueError:
            raise InvalidRequest(
                f"Invalid `expires_at`: `{asked.expires_at[:40]}`; send a time such as 2026-01-31T12:00:00Z.",
                param="expires_at",
            ) from None
    rates = Rates(
        asked.requests_per_minute, asked.tokens_per_minute, asked.usd_per_minute, asked.concurrent, asked.priority
    )
    try:
        rates.check("key:")
    except ConfigError as error:
        raise InvalidRequest(f"{error.message}.", param="usd_per_minute") from None
    return {
        "name": asked.name,
        "scope": Scope(asked.scope),
        "expires_at_ns": expires_at_ns,
        "user": asked.user,
        "team": asked.team,
        "feature": asked.feature,
        "tier": asked.tier,
        "models": None if asked.models is None else tuple(asked.models),
        "rates": rates,
    }


async def _body(request: Request) -> bytes:
    return await read_body(request.scope, request.receive, max_mb=1, timeout_s=10)


def _json(body: object, status: int = 200) -> Response:
    return Response(receipts_wire.encode(body), status_code=status, media_type="application/json")
