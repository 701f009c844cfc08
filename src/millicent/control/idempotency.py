"""`Idempotency-Key`: one bill, the same answer, for 24 hours after it; while the first request still runs, too, and
after a restart. The ledger holds the claims, so every gateway that shares it keeps the promise."""

from __future__ import annotations

import asyncio
import hashlib

import msgspec

from millicent.control.access import Asks
from millicent.core.clock import NS_PER_S, Clock
from millicent.core.errors import Conflict, InvalidRequest
from millicent.core.idempotency import Claim
from millicent.core.request import Request
from millicent.ledger.claims import RACE, Claimed, find_claim, purge_answers

__all__ = ["RACE", "Claimed", "Idempotency", "claim_of", "purge_answers"]

_POLL_S = 0.05
_WAIT_LIMIT_NS = 600 * NS_PER_S


def claim_of(key: str, owner: str | None, request: Request, shape: object) -> Claim:
    """`shape` is what else decides the answer's bytes. Raises InvalidRequest for a key that can't be one."""
    if not 1 <= len(key) <= 255 or not key.isprintable():
        raise InvalidRequest(
            "`Idempotency-Key` needs 1 to 255 printable characters: a UUID, say.", param="idempotency-key"
        )
    told = msgspec.msgpack.encode((msgspec.structs.replace(request, id=""), shape))
    return Claim(owner or "", key, hashlib.sha256(told).digest())


class Idempotency:
    def __init__(self, queries: Asks, clock: Clock) -> None:
        self._queries = queries
        self._clock = clock

    async def find(self, claim: Claim) -> Claimed | None:
        """What stands under this claim now, answered or still running. None: the key is free.

        Raises Conflict where the key was used for a different request.
        """
        found = await asyncio.to_thread(
            self._queries.ask,
            lambda connection: find_claim(connection, claim.owner, claim.key, self._clock.now_ns()),
        )
        if found is not None and found.request_hash != claim.request_hash:
            raise Conflict(
                f"This `Idempotency-Key` was used for a different request (receipt {found.receipt}): "
                "send a new key with a new request.",
                param="idempotency-key",
            )
        return found

    async def earlier(self, claim: Claim) -> Claimed | None:
        """The answer that this request got before; waits while it is being made. None, and Conflict, as `find`."""
        give_up_ns = self._clock.monotonic_ns() + _WAIT_LIMIT_NS
        while True:
            found = await self.find(claim)
            if found is None or found.answer is not None:
                return found
            if self._clock.monotonic_ns() > give_up_ns:
                raise Conflict(
                    f"The first request with this `Idempotency-Key` (receipt {found.receipt}) is still running: retry.",
                    param="idempotency-key",
                    code="idempotency_running",
                    retry_after_s=5,
                )
            await asyncio.sleep(_POLL_S)
