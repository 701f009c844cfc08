"""Routes of the economics' reports, and of what they need to be told: revenue, and costs from elsewhere."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from millicent.core.clock import Clock
from millicent.core.entries import Entry, Kind
from millicent.core.errors import InvalidRequest
from millicent.core.periods import parse_period
from millicent.ledger.queries import LedgerQueries
from millicent.server.authentication import caller_of
from millicent.server.bodies import read_body
from millicent.wire import receipts as receipts_wire
from millicent.wire.decoding import read_limit
from millicent.wire.entries import decode_entries, entry_body

_KINDS: dict[str, Kind] = {"/v1/revenue": "revenue", "/v1/costs": "cost"}


class Reports(Protocol):
    """What answers `/v1/NAME` from its query."""

    def answer(self, name: str, query: Mapping[str, str]) -> dict[str, Any]: ...


class Writes(Protocol):
    def write(self, operation: Callable[[sqlite3.Connection], int]) -> Awaitable[int]: ...


def economics_routes(
    reports: Reports,
    names: Iterable[str],
    *,
    add: Callable[[sqlite3.Connection, Iterable[Entry]], int],
    ledger: Writes,
    queries: LedgerQueries,
    clock: Clock,
) -> list[BaseRoute]:
    """`add` writes entries. Reports are for keys that read everything; entries are posted by admins."""

    async def report(request: Request) -> Response:
        _demand_reader(request)
        name = request.url.path.rpartition("/")[2]
        return _json(await asyncio.to_thread(reports.answer, name, dict(request.query_params)))

    async def listed(request: Request) -> Response:
        _demand_reader(request)
        query = dict(request.query_params)
        limit = read_limit(query, 50, 1000)
        text, after = query.pop("period", None), query.pop("after", None)
        query.pop("limit", None)
        if query:
            raise InvalidRequest(
                f"Unknown parameter `{min(query)[:40]}`: this address takes after, limit, period.", param=min(query)
            )
        times = (-(2**63), 2**63 - 1)
        if text is not None:
            period = parse_period(text)
            times = (period.from_ns, period.to_ns)
        ask = partial(queries.entries, _KINDS[request.url.path], *times, limit + 1, after)
        found = await asyncio.to_thread(ask)
        following = found[limit - 1].id if len(found) > limit else None
        return _json(receipts_wire.list_body([entry_body(each) for each in found[:limit]], following))

    async def posted(request: Request) -> Response:
        caller = caller_of(request.scope)
        caller.demand(caller.administers, "post revenue or costs")
        body = await read_body(request.scope, request.receive, max_mb=1, timeout_s=10)
        entries, several = decode_entries(body, _KINDS[request.url.path], clock.now_ns())
        await ledger.write(lambda connection: add(connection, entries))
        bodies = [entry_body(each) for each in entries]
        return _json(receipts_wire.list_body(bodies, None) if several else bodies[0], status=201)

    return [
        *(Route(f"/v1/{name}", report) for name in names),
        *(Route(path, listed) for path in _KINDS),
        *(Route(path, posted, methods=["POST"]) for path in _KINDS),
    ]


def _demand_reader(request: Request) -> None:
    caller = caller_of(request.scope)
    caller.demand(caller.reads_all, "read what others cost and pay")


def _json(body: object, status: int = 200) -> Response:
    return Response(receipts_wire.encode(body), status_code=status, media_type="application/json")
