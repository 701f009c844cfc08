"""Signing in to the pages with a key, in a browser."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from millicent.control.access import KeyRing
from millicent.core.errors import Forbidden, MillicentError
from millicent.server.authentication import SIGN_IN
from millicent.server.bodies import read_body
from millicent.server.forms import form_token, is_ours
from millicent.server.headers import headers_of
from millicent.server.sessions import COOKIE, LIFETIME_S, Sessions

# The page to sign in on: where to go afterwards, what was wrong with the last try, whether one is signed in, and what
# its forms must send back.
SignInPage = Callable[[str, MillicentError | None, bool, str], Response]


class SignIn:
    def __init__(self, keys: KeyRing, sessions: Sessions, page: SignInPage) -> None:
        self._keys = keys
        self._sessions = sessions
        self._page = page
        self.routes: list[BaseRoute] = [
            Route(SIGN_IN, self._show),
            Route(SIGN_IN, self._sign_in, methods=["POST"]),
            Route("/sign-out", self._sign_out, methods=["POST"]),
        ]

    async def _show(self, request: Request) -> Response:
        return self._answer(request, _own_path(request.query_params.get("next")), None)

    def _answer(self, request: Request, following: str, problem: MillicentError | None) -> Response:
        signed_in = self._sessions.key_of(request.headers.get("cookie", "")) is not None
        return self._page(following, problem, signed_in, form_token(request.scope))

    async def _sign_in(self, request: Request) -> Response:
        form = await _form(request)
        following = _own_path(form.get("next"))
        try:
            _check(request, form)
            caller = await self._keys.identify(form.get("key", "").strip())
            caller.demand(caller.reads_all, "read the pages")
        except MillicentError as error:
            return self._answer(request, following, error)
        response = RedirectResponse(following, 303)
        if caller.id is not None:  # without keys there is nothing to remember
            response.set_cookie(
                COOKIE,
                self._sessions.sign(caller.id),
                max_age=LIFETIME_S,
                httponly=True,
                samesite="strict",
                secure=request.url.scheme == "https",
            )
        return response

    async def _sign_out(self, request: Request) -> Response:
        try:
            _check(request, await _form(request))
        except MillicentError as error:
            return self._answer(request, "/", error)
        self._sessions.end(headers_of(request.scope).get("cookie", ""))
        response = RedirectResponse(SIGN_IN, 303)
        response.delete_cookie(COOKIE, httponly=True, samesite="strict")
        return response


async def _form(request: Request) -> dict[str, str]:
    body = await read_body(request.scope, request.receive, max_mb=1, timeout_s=10)
    return {name: values[0] for name, values in parse_qs(body.decode("utf-8", "replace")).items()}


def _check(request: Request, form: dict[str, str]) -> None:
    """Raises Forbidden for a form that another page sent."""
    if not is_ours(request.scope, form.get("form_token", "")):
        raise Forbidden("This form is out of date: send it again from this page.")


def _own_path(path: str | None) -> str:
    """Only paths of this server: nobody is sent elsewhere after signing in."""
    if path is None or not path.startswith("/") or path.startswith(("//", "/\\")):
        return "/"
    return path
