"""`/admin/cache`: what the response cache keeps, and forgetting it. Authentication lets only admins through."""

from __future__ import annotations

from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from millicent.core.errors import InvalidRequest
from millicent.wire import receipts as receipts_wire


class Standing(Protocol):
    """What is kept."""

    def body(self) -> dict[str, object]: ...


class Keeps(Protocol):
    """What is asked of the response cache."""

    async def standing(self) -> Standing: ...

    async def purge(self, *, user: str | None = None, model: str | None = None) -> int: ...


class CacheAdmin:
    """`cache` None where it is off: then nothing is kept."""

    def __init__(self, cache: Keeps | None) -> None:
        self._cache = cache
        self.routes: list[BaseRoute] = [
            Route("/admin/cache", self._show),
            Route("/admin/cache", self._purge, methods=["DELETE"]),
        ]

    async def _show(self, _: Request) -> Response:
        if self._cache is None:
            return _json({"object": "cache", "enabled": False})
        found = await self._cache.standing()
        return _json({"object": "cache", "enabled": True, **found.body()})

    async def _purge(self, request: Request) -> Response:
        for name in request.query_params:
            if name not in {"user", "model"}:
                raise InvalidRequest(f"Unknown parameter `{name[:40]}`: this address takes model, user.", param=name)
        user, model = (request.query_params.get(name) for name in ("user", "model"))
        purged = 0 if self._cache is None else await self._cache.purge(user=user, model=model)
        return _json({"object": "purge", "user": user, "model": model, "purged": purged})


def _json(body: object) -> Response:
    return Response(receipts_wire.encode(body), media_type="application/json")
