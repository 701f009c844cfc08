"""Who is calling: a token becomes a caller. Keys made or revoked elsewhere are known here within half a second."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import msgspec

from millicent.control.config import Rates
from millicent.control.keys import ApiKey, Scope, read_keys, read_version, split_token
from millicent.core.clock import NS_PER_MS, Clock
from millicent.core.errors import Forbidden, Unauthorized
from millicent.core.request import Attribution

T = TypeVar("T")

_KNOWN_FOR_NS = 500 * NS_PER_MS


class Asks(Protocol):
    """What is asked of the ledger: `LedgerQueries.ask`."""

    def ask(self, question: Callable[[sqlite3.Connection], T]) -> T | None: ...


class Writes(Protocol):
    """What is asked of the ledger: `SqliteLedger.write`."""

    def write(self, operation: Callable[[sqlite3.Connection], T]) -> Awaitable[T]: ...


class Caller(msgspec.Struct, frozen=True):
    """Whoever sends a request. `key` None is anonymous: on this machine, while there are no keys, and allowed all."""

    key: ApiKey | None = None

    @property
    def id(self) -> str | None:
        return None if self.key is None else self.key.id

    @property
    def reads_all(self) -> bool:
        """Others' receipts, accounts, and the pages."""
        return self.key is None or self.key.scope is not Scope.CLIENT

    @property
    def runs_models(self) -> bool:
        return self.key is None or self.key.scope is not Scope.VIEWER

    @property
    def administers(self) -> bool:
        return self.key is None or self.key.scope is Scope.ADMIN

    def attribute(self, given: Attribution) -> Attribution:
        return given if self.key is None else self.key.attribute(given)

    def check_model(self, model: str) -> None:
        if self.key is not None:
            self.key.check_model(model)

    def check_priority(self, priority: int, best_of: Callable[[str | None], int]) -> None:
        """Raises Forbidden for a request that wants to go before others when its key doesn't let it."""
        if not self.administers and priority < (best := best_of(self.id)):
            raise Forbidden(
                f"This key's best `priority` is {best}, and the request says {priority}: send {best} or more, or have "
                "its admin raise it.",
                param="priority",
                code="priority_not_allowed",
            )

    def may_use(self, model: str) -> bool:
        return self.key is None or self.key.models is None or model in self.key.models

    def demand(self, allowed: bool, what: str) -> None:
        """Raises Forbidden, saying what this key may not do."""
        if not allowed:
            assert self.key is not None
            raise Forbidden(f"A {self.key.scope} key may not {what}: use one with another scope.", code="scope")


class KeyRing:
    """The keys there are. `open_without_keys`: only this machine can call, so that anonymous calls are allowed until
    there is a key; one that was revoked or has expired still counts."""

    def __init__(self, queries: Asks, clock: Clock, *, open_without_keys: bool) -> None:
        self._queries = queries
        self._clock = clock
        self._open_without_keys = open_without_keys
        self._keys: dict[str, ApiKey] = {}
        self._version = -1
        self._asked_at_ns: int | None = None

    async def refresh(self) -> None:
        """Read the keys again if one has changed."""
        self._asked_at_ns = self._clock.monotonic_ns()
        news = await asyncio.to_thread(self._queries.ask, self._news)
        if news is not None:
            version, keys = news
            self._version, self._keys = version, {key.id: key for key in keys}

    async def identify(self, token: str | None) -> Caller:
        """Raises Unauthorized for a token that isn't good, and for none where one is needed."""
        await self._keep_current()
        if not self._keys and self._open_without_keys:
            return Caller()
        if token is None:
            raise Unauthorized("This server needs an API key: send it as `Authorization: Bearer mk_...`.")
        parts = split_token(token)
        key = self._keys.get(parts[0]) if parts else None
        now_ns = self._clock.now_ns()
        if parts is None or key is None or not key.accepts(parts[1], now_ns):
            raise Unauthorized("The API key isn't one of this server's: check it, or have one made by its admin.")
        return self._active(key, now_ns)

    async def resume(self, key_id: str) -> Caller:
        """The caller that a session belongs to. Raises Unauthorized once its key is no longer good."""
        await self._keep_current()
        key = self._keys.get(key_id)
        if key is None:
            raise Unauthorized("This session's key is gone: sign in again.")
        return self._active(key, self._clock.now_ns())

    def rates(self, key_id: str | None) -> Rates:
        """What is set on the key itself."""
        key = self._keys.get(key_id) if key_id is not None else None
        return Rates() if key is None else key.rates

    async def _keep_current(self) -> None:
        if self._asked_at_ns is None or self._clock.monotonic_ns() - self._asked_at_ns >= _KNOWN_FOR_NS:
            await self.refresh()

    @staticmethod
    def _active(key: ApiKey, now_ns: int) -> Caller:
        state = key.state(now_ns)
        if state != "active":
            raise Unauthorized(f"The API key {key.id} is {state}: use another.", code=f"{state}_api_key")
        return Caller(key)

    def _news(self, connection: sqlite3.Connection) -> tuple[int, list[ApiKey]] | None:
        version = read_version(connection)
        return None if version == self._version else (version, read_keys(connection))
