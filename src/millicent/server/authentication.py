"""Whose request it is, and whether that caller may ask for this address at all."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote

from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from millicent.control.access import Caller, KeyRing
from millicent.core.errors import MillicentError, Unauthorized
from millicent.server.families import family_of
from millicent.server.headers import headers_of
from millicent.server.responses import send_error
from millicent.server.sessions import Sessions, with_sessions

SIGN_IN = "/sign-in"

# They say nothing about anybody, and a load balancer or a browser without a key needs them.
_OPEN = frozenset({"/health", "/ready", SIGN_IN, "/sign-out"})
_OPEN_BELOW = "/static/"
_API = ("/v1/", "/v2/", "/api/", "/tokenize", "/detokenize")
_READING = frozenset({"GET", "HEAD"})
_CALLER = "millicent.caller"


class Authentication:
    """Puts the caller into the scope, or answers 401 or 403; a browser without a session is sent to sign in."""

    def __init__(self, app: ASGIApp, keys: KeyRing, sessions: Sessions) -> None:
        self._app = app
        self._keys = keys
        self._sessions = sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        with_sessions(scope, self._sessions)
        if scope["type"] != "http" or path in _OPEN or path.startswith(_OPEN_BELOW):
            await self._app(scope, receive, send)
            return
        headers = headers_of(scope)
        try:
            caller = await self._caller(headers)
            _permit(caller, scope["method"], path)
        except Unauthorized as error:
            if is_page(scope):
                await RedirectResponse(f"{SIGN_IN}?next={quote(path)}", 303)(scope, receive, send)
            else:
                await send_error(send, family_of(scope), error, headers={"www-authenticate": "Bearer"})
        except MillicentError as error:
            await send_error(send, family_of(scope), error)
        else:
            scope[_CALLER] = caller
            await self._app(scope, receive, send)

    async def _caller(self, headers: Mapping[str, str]) -> Caller:
        token = bearer(headers)
        session = self._sessions.key_of(headers.get("cookie", "")) if token is None else None
        return await (self._keys.identify(token) if session is None else self._keys.resume(session))


def caller_of(scope: Scope) -> Caller:
    """Who sent this request; set by Authentication."""
    caller = scope[_CALLER]
    assert isinstance(caller, Caller)
    return caller


def bearer(headers: Mapping[str, str]) -> str | None:
    """The key that was sent, as OpenAI's clients do it or as Anthropic's do."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key")


def _permit(caller: Caller, method: str, path: str) -> None:
    if path.startswith("/admin"):
        caller.demand(caller.administers, "administer this server")
    elif path.startswith(("/v1/accounts", "/v1/plan")) or not path.startswith(_API):
        caller.demand(caller.reads_all, "read accounts and pages")
    elif method not in _READING:
        caller.demand(caller.runs_models, "run models")


def is_page(scope: Scope) -> bool:
    """Whether a browser asks for a page."""
    html = "text/html" in headers_of(scope).get("accept", "")
    return scope["method"] == "GET" and html and not scope["path"].startswith((*_API, "/admin"))
