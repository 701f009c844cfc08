"""Changes of keys, for `/admin` and the pages alike. A change is durable before it is answered, and holds here from
then on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from millicent.control.access import Asks, KeyRing, Writes
from millicent.control.keys import ApiKey, insert_key, new_key, read_keys, revoke_key, rotate_key
from millicent.core.clock import Clock
from millicent.core.errors import NotFound
from millicent.core.identifiers import Ids


class KeyChanges:
    def __init__(self, *, ledger: Writes, queries: Asks, ring: KeyRing, clock: Clock, ids: Ids) -> None:
        self._ledger = ledger
        self._queries = queries
        self._ring = ring
        self._clock = clock
        self._ids = ids

    def all(self) -> Sequence[ApiKey]:
        return self._queries.ask(read_keys) or []

    async def create(self, **fields: object) -> tuple[ApiKey, str]:
        """The key, and its token, which is never told again."""
        key, token = new_key(self._ids, self._clock, **fields)
        await self._ledger.write(partial(insert_key, key=key))
        await self._ring.refresh()
        return key, token

    async def rotate(self, key_id: str, overlap_ns: int) -> tuple[ApiKey, str]:
        """The key, and its new token; the old one is good for `overlap_ns` more."""
        now_ns = self._clock.now_ns()
        token = await self._ledger.write(partial(rotate_key, key_id=key_id, now_ns=now_ns, overlap_ns=overlap_ns))
        await self._ring.refresh()
        return await self._key(key_id), token

    async def revoke(self, key_id: str) -> ApiKey:
        await self._ledger.write(partial(revoke_key, key_id=key_id, now_ns=self._clock.now_ns()))
        await self._ring.refresh()
        return await self._key(key_id)

    async def _key(self, key_id: str) -> ApiKey:
        for key in await asyncio.to_thread(self.all):
            if key.id == key_id:
                return key
        raise NotFound(f"There is no key `{key_id[:60]}`.")
