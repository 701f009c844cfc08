"""Answers that are stored for their owner alone: a key, or whoever calls without one while there are none."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from millicent.control.access import Asks, Writes
from millicent.core.clock import NS_PER_HOUR, Clock
from millicent.ledger import stored_responses as ledger
from millicent.ledger.stored_responses import StoredResponse, purge

__all__ = ["StoredResponse", "StoredResponses", "purge"]

T = TypeVar("T")


class StoredResponses:
    def __init__(self, writes: Writes, queries: Asks, clock: Clock, kept_hours: int, max_mb: int) -> None:
        self._writes = writes
        self._queries = queries
        self._clock = clock
        self._kept_ns = kept_hours * NS_PER_HOUR
        self._max_bytes = max_mb * 2**20

    async def keep(self, response: StoredResponse) -> None:
        """Durable when this returns."""
        until_ns = self._clock.now_ns() + self._kept_ns
        await self._writes.write(
            partial(ledger.keep, response=response, expires_at_ns=until_ns, max_bytes=self._max_bytes)
        )

    async def find(self, owner: str, name: str) -> StoredResponse | None:
        now_ns = self._clock.now_ns()
        return await self._ask(lambda connection: ledger.find(connection, owner, name, now_ns))

    async def conversation(self, owner: str, name: str) -> list[StoredResponse]:
        """The answer and all that it goes on from, oldest first. Empty where one of them isn't there any more."""
        now_ns = self._clock.now_ns()
        return await self._ask(lambda connection: ledger.conversation(connection, owner, name, now_ns)) or []

    async def delete(self, owner: str, name: str) -> bool:
        """Whether it was there."""
        return await self._writes.write(
            partial(ledger.delete, owner=owner, response_id=name, now_ns=self._clock.now_ns())
        )

    async def _ask(self, question: Callable[[sqlite3.Connection], T]) -> T | None:
        return await asyncio.to_thread(self._queries.ask, question)
