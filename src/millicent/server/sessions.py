"""Signed-in browsers. A session names a key and ends with it, when it is signed out, after half a day, or with this
process."""

from __future__ import annotations

import hmac
import secrets
from http.cookies import CookieError, SimpleCookie

from starlette.types import Scope

from millicent.core.clock import NS_PER_S, Clock

COOKIE = "millicent_session"
LIFETIME_S = 12 * 3600
_SESSIONS = "millicent.sessions"


class Sessions:
    """Signs with a secret that exists only in this process's memory, so that nothing on disk can make a session. Each
    signing in is a session of its own, which nobody can have fixed before."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._secret = secrets.token_bytes(32)
        self._ended: dict[str, int] = {}  # sessions signed out, until they would have ended anyway

    def sign(self, key_id: str) -> str:
        """A cookie's value for the holder of this key."""
        told = f"{key_id}.{secrets.token_urlsafe(9)}.{self._now_s() + LIFETIME_S}"
        return f"{told}.{self._signature(told)}"

    def key_of(self, cookies: str) -> str | None:
        """The key of the session in a `Cookie` header; None where there is none that is good."""
        value = self._value(cookies)
        told, _, signature = value.rpartition(".")
        if not told or not hmac.compare_digest(self._signature(told).encode(), signature.encode()):
            return None
        key_id, _, expires_s = told.split(".")
        return key_id if int(expires_s) > self._now_s() and told not in self._ended else None

    def end(self, cookies: str) -> None:
        """That session is good no longer, wherever its cookie was copied to."""
        if self.key_of(cookies) is None:
            return
        now_s = self._now_s()
        told = self._value(cookies).rpartition(".")[0]
        self._ended = {session: until_s for session, until_s in self._ended.items() if until_s > now_s}
        self._ended[told] = int(told.rpartition(".")[2])

    def form_token(self, cookies: str) -> str:
        """What a form must send back: it belongs to this session, or to nobody's where there is none."""
        session = self._value(cookies) if self.key_of(cookies) is not None else ""
        return self._signature(f"form {session}")

    def _value(self, cookies: str) -> str:
        if COOKIE not in cookies:
            return ""
        try:
            morsel = SimpleCookie(cookies).get(COOKIE)
        except CookieError:
            return ""
        return "" if morsel is None else morsel.value

    def _signature(self, told: str) -> str:
        return hmac.new(self._secret, told.encode(), "sha256").hexdigest()

    def _now_s(self) -> int:
        return self._clock.now_ns() // NS_PER_S


def with_sessions(scope: Scope, sessions: Sessions) -> None:
    scope[_SESSIONS] = sessions


def sessions_of(scope: Scope) -> Sessions:
    """Those of the server that this request came to; set by Authentication."""
    sessions = scope[_SESSIONS]
    assert isinstance(sessions, Sessions)
    return sessions
