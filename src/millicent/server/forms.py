"""Forms on pages: what each must send back, so that no page from elsewhere can send one in a visitor's name.

Origin and Host are checked for every request (see guard), and a session's cookie never leaves with a request from
elsewhere; a form's token holds where a browser or a proxy gets these wrong.
"""

from __future__ import annotations

import hmac
from typing import NamedTuple

from starlette.types import Scope

from millicent.control.access import Caller
from millicent.server.authentication import caller_of
from millicent.server.headers import headers_of
from millicent.server.sessions import sessions_of


class PageVisitor(NamedTuple):
    """Who looks at a page. `key` is the one that they signed in with, None where there are no keys."""

    caller: Caller
    form_token: str

    @property
    def key(self) -> str | None:
        return self.caller.id

    @property
    def administers(self) -> bool:
        return self.caller.administers


def visitor_of(scope: Scope) -> PageVisitor:
    return PageVisitor(caller_of(scope), form_token(scope))


def form_token(scope: Scope) -> str:
    return sessions_of(scope).form_token(headers_of(scope).get("cookie", ""))


def is_ours(scope: Scope, given: str) -> bool:
    """Whether a form that was sent with this request was made for its session."""
    return hmac.compare_digest(given.encode(), form_token(scope).encode())
