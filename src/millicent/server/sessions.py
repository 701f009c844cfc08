"""Signed-in browsers. A session names a key and ends with it, after half a day, or with this process."""

from __future__ import annotations

import hmac
import secrets
from http.cookies import CookieError, SimpleCookie

from millicent.core.clock import NS_PER_S, Clock

COOKIE = "millicent_session"
LIFETIME_S = 12 * 3600


class Sessions:
    """Signs with a secret that exists only in this process's memory, so that nothing on disk can make a session."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._secret = secrets.token_bytes(32)

    def sign(self, key_id: str) -> str:
        """A cookie's value for the holder of this key."""
        told = f"{key_id}.{self._now_s() + LIFETIME_S}"
        return f"{told}.{self._signature(told)}"

    def key_of(self, cookies: str) -> str | None:
        """The key of the session in a `Cookie` header; None where there is none that is good."""
        if COOKIE not in cookies:
            return None
        try:
            morsel = SimpleCookie(cookies).get(COOKIE)
        except CookieError:
            return None
        told, _, signature = ("" if morsel is None else morsel.value).rpartition(".")
        key_id, _, expires_s = told.partition(".")
        if not hmac.compare_digest(self._signature(told).encode(), signature.encode()):
            return None
        return key_id if int(expires_s) > self._now_s() else None

    def _signature(self, told: str) -> str:
        return hmac.new(self._secret, told.encode(), "sha256").hexdigest()

    def _now_s(self) -> int:
        return self._clock.now_ns() // NS_PER_S
