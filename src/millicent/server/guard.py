"""Who may talk to this server: Host and Origin are checked, so that no web page can reach it through a browser."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from functools import lru_cache
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from millicent.core.errors import Forbidden
from millicent.server.config import ServerConfig
from millicent.server.families import family_of
from millicent.server.headers import headers_of
from millicent.server.responses import send_error

_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def is_loopback(host: str) -> bool:
    """Whether binding to `host` keeps the server on this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Refuses, with 403, a Host that isn't one of ours and an Origin that is neither ours nor allowed."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._hosts = _LOCAL_NAMES | {config.host} | set(config.allowed_hosts)
        self._origins = frozenset(config.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._objection(scope, headers_of(scope))):
            await send_error(send, family_of(scope), error)
            return
        await self._app(scope, receive, send)

    def _objection(self, scope: Scope, headers: Mapping[str, str]) -> Forbidden | None:
        host = headers.get("host", "")
        if len(headers) < len(scope["headers"]) and [name for name, _ in scope["headers"]].count(b"host") > 1:
            return Forbidden("The request names several hosts: send one `Host`.", code="host_not_allowed")
        if _name(f"//{host}") not in self._hosts:
            return Forbidden(
                f"Host `{host[:100]}` is not one of this server's names: use 127.0.0.1, or add it to [server] "
                "allowed_hosts.",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is None or origin in self._origins or _authority(origin) == host:
            return None
        return Forbidden(
            f"Origin `{origin[:100]}` may not call this server: add it to [server] allowed_origins.",
            code="origin_not_allowed",
        )


@lru_cache(maxsize=64)
def _name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _authority(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None
