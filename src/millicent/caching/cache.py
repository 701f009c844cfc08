"""The response cache: what is found for a request, who runs when several ask the same at once, and what is kept."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Collection
from enum import StrEnum
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

import msgspec

from millicent.caching.canonical import DIGEST_BYTES, request_digest
from millicent.caching.config import CacheConfig
from millicent.caching.rules import Directives, why_not
from millicent.caching.secret import installation_secret
from millicent.caching.store import FILE_NAME, AnswerStore, CachedAnswer, Entry, Standing
from millicent.core.chunks import FinishReason
from millicent.core.clock import NS_PER_S, Clock
from millicent.core.errors import ConfigError, Unavailable
from millicent.core.holdouts import Arm
from millicent.core.receipts import Receipt, Status
from millicent.core.request import Request

log = logging.getLogger(__name__)

T = TypeVar("T")

# How many requests that ask the same someone waits for, one after another, before running alone.
_MOST_LEADERS = 2
# Answers that wait to be written.
_MOST_UNWRITTEN = 256
_WHOLE = (FinishReason.STOP, FinishReason.TOOL_CALLS)


class Outcome(StrEnum):
    """What the cache did for a request, as its receipt and `X-Millicent-Cache` say. A stream that waits for another
    request's answer says so until it knows."""

    HIT = "hit"
    MISS = "miss"
    WAIT = "wait"
    BYPASS = "bypass"


class Flight:
    """A request that runs, for whoever asks the same meanwhile. It lands once: with an answer, or without."""

    def __init__(self) -> None:
        self.landed = asyncio.Event()
        self.answer: CachedAnswer | None = None
        self.failed = False


class Lookup:
    """One request's way through the cache. Its `outcome` changes while it waits; `answer` is set exactly on a hit.

    `leads` is the flight in which others wait for it, `follows` that in which it waits for another. `arm`: where some
    requests are to go without the cache, which of the two this is.
    """

    def __init__(self, request: Request, outcome: Outcome, why: str | None = None) -> None:
        self.request = request
        self.outcome = outcome
        self.why = why
        self.key = b""
        self.ttl_s = 0
        self.answer: CachedAnswer | None = None
        self.leads: Flight | None = None
        self.follows: Flight | None = None
        self.failures = 0  # of those it waited for
        self.writes = False
        self.arm: Arm | None = None


class ResponseCache:
    """`secret` is the installation's; `deployed` says what answers besides the request: with other models behind the
    same names, nothing that was kept is found. `policies` are names behind which a model is chosen for each request,
    also by its feature: what one feature was answered isn't given to another there."""

    def __init__(
        self,
        config: CacheConfig,
        store: AnswerStore,
        clock: Clock,
        *,
        secret: bytes,
        deployed: bytes,
        policies: Collection[str] = (),
    ) -> None:
        self._config = config
        self._store = store
        self._clock = clock
        self._secret = secret
        self._deployed = deployed
        self._policies = frozenset(policies)
        self._flights: dict[bytes, Flight] = {}
        self._fresh: dict[bytes, Entry] = {}  # until they are written
        self._writing: asyncio.Task[None] | None = None
        self._failing = False

    def look(
        self, request: Request, allowed: frozenset[str] | None, cache_control: str | None, arm: Arm | None = None
    ) -> Lookup | None:
        """What there is for it; None where the cache is off for it. A lookup that `leads` must `land`.

        `allowed` are the placements that its feature may run on: what others may run on isn't given to it. Who is to go
        without the cache is neither given anything nor kept.
        """
        config = self._config.of(request.attribution.feature)
        if not config.enabled:
            return None
        why = why_not(request, sampled=config.sampled)
        directives = Directives.of(cache_control)
        if why is None and not directives.writes:
            why = "no_store"
        if why is not None:
            return Lookup(request, Outcome.BYPASS, why)
        lookup = Lookup(request, Outcome.MISS)
        lookup.key, lookup.ttl_s, lookup.writes = self._key(request, config, allowed), config.ttl_s, True
        if not directives.reads:
            lookup.outcome, lookup.why = Outcome.BYPASS, "no_cache"
            return lookup
        lookup.arm = arm
        if arm is not None and arm.without:
            lookup.outcome, lookup.why, lookup.writes = Outcome.BYPASS, "held_out", False
            return lookup
        found, oldest_s = self._found(lookup.key), config.ttl_s
        if directives.max_age_s is not None:
            oldest_s = min(oldest_s, directives.max_age_s)
        if found is not None and self._clock.now_ns() - found.created_at_ns <= oldest_s * NS_PER_S:
            lookup.outcome, lookup.answer = Outcome.HIT, found
        elif not directives.only_kept:
            self._board(lookup)
        return lookup

    def _board(self, lookup: Lookup) -> None:
        """Wait for who runs the same, or be the one that others wait for. Who streams within a latency target waits for
        nobody: it would see nothing until the other is done."""
        request = lookup.request
        flight = self._flights.get(lookup.key)
        if flight is None:
            lookup.outcome = Outcome.MISS
            lookup.follows, lookup.leads = None, Flight()
            self._flights[lookup.key] = lookup.leads
        elif lookup.failures < _MOST_LEADERS and not (request.stream and request.latency_target_ms is not None):
            lookup.outcome, lookup.follows = Outcome.WAIT, flight
        else:
            lookup.outcome, lookup.follows = Outcome.MISS, None

    def arrived(self, lookup: Lookup) -> None:
        """The flight that it follows has landed: its answer is given, or it takes off itself, or waits for another."""
        assert lookup.follows is not None
        flight, lookup.follows = lookup.follows, None
        lookup.failures += flight.failed
        if flight.answer is not None:
            lookup.outcome, lookup.answer = Outcome.HIT, flight.answer
        else:
            self._board(lookup)

    def leave(self, lookup: Lookup) -> None:
        """It waits no longer, and isn't given anything."""
        lookup.outcome, lookup.follows = Outcome.MISS, None

    def land(self, lookup: Lookup, answer: CachedAnswer | None, *, failed: bool) -> None:
        """It has run: who waits is told, and the answer is kept. `failed`: it ended by itself, without an answer."""
        if answer is not None and lookup.writes:
            self._keep(lookup, answer)
        flight, lookup.leads = lookup.leads, None
        if flight is not None:
            del self._flights[lookup.key]
            flight.answer, flight.failed = answer, failed
            flight.landed.set()

    async def maintain(self) -> None:
        """Take out what has expired."""
        await self._try(lambda: self._store.expire(self._clock.now_ns()))

    async def purge(self, *, user: str | None = None, model: str | None = None) -> int:
        """Forget what is kept: all, one user's, one model's; how many. Raises Unavailable."""
        return await self._asked(lambda: self._store.purge(user=user, model=model))

    async def standing(self) -> Standing:
        """Raises Unavailable."""
        return await self._asked(lambda: self._store.standing(self._clock.now_ns()))

    async def close(self) -> None:
        """Once nothing runs any more."""
        await self._written()
        await self._try(self._store.close)

    def _key(self, request: Request, config: CacheConfig, allowed: frozenset[str] | None) -> bytes:
        """Whose, of what, where. Callers without a key are one tenant."""
        tenant = None if config.scope == "shared" else (request.attribution.key or "",)
        feature = request.attribution.feature if request.model in self._policies else None
        told = msgspec.msgpack.encode((tenant, feature, self._deployed, None if allowed is None else sorted(allowed)))
        hashed = request.hashed
        digest = request_digest(request, self._secret) if hashed is None else hashed.digest
        return blake2b(told + digest, key=self._secret, digest_size=DIGEST_BYTES).digest()

    def _found(self, key: bytes) -> CachedAnswer | None:
        now_ns = self._clock.now_ns()
        fresh = self._fresh.get(key)
        if fresh is not None:
            return fresh.answer if fresh.expires_at_ns > now_ns else None
        try:
            return self._store.find(key, now_ns)
        except (sqlite3.Error, msgspec.MsgspecError) as error:
            self._complain(error)
            return None

    def _keep(self, lookup: Lookup, answer: CachedAnswer) -> None:
        """Found at once, written soon; not kept where writing lags too far behind."""
        if len(self._fresh) >= _MOST_UNWRITTEN:
            return
        given = lookup.request.attribution
        expires_at_ns = answer.created_at_ns + lookup.ttl_s * NS_PER_S
        entry = Entry(lookup.key, answer, expires_at_ns, given.key, given.user, lookup.request.model)
        self._fresh[entry.key] = entry
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())

    async def _write(self) -> None:
        try:
            while self._fresh:
                entries = list(self._fresh.values())
                await self._try(partial(self._store.keep, entries, self._clock.now_ns()))
                for entry in entries:
                    if self._fresh[entry.key] is entry:
                        del self._fresh[entry.key]
        finally:
            self._writing = None

    async def _written(self) -> None:
        if self._writing is not None:
            await asyncio.wait([self._writing])

    async def _asked(self, work: Callable[[], T]) -> T:
        """Of all that was kept until now."""
        await self._written()
        try:
            return await self._call(work)
        except sqlite3.Error as error:
            raise Unavailable(
                f"The response cache can't be read or written ({error}): see the disk, or retry."
            ) from error

    async def _call(self, work: Callable[[], T]) -> T:
        """Off the event loop, where there is a disk to wait for."""
        return await asyncio.to_thread(work) if self._store.on_disk else work()

    async def _try(self, work: Callable[[], object]) -> None:
        """No request fails for its cache."""
        try:
            await self._call(work)
            self._failing = False
        except sqlite3.Error as error:
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        if not self._failing:
            log.warning("the response cache can't be read or written, and answers as if it were empty: %s", error)
        self._failing = True


def open_cache(
    config: CacheConfig, home: Path, clock: Clock, *, deployed: bytes, policies: Collection[str] = ()
) -> ResponseCache | None:
    """None where nobody uses it; then it leaves nothing in `home` either. Raises ConfigError."""
    if not config.is_used:
        return None
    path = home / FILE_NAME if config.store == "disk" else None
    try:
        store = AnswerStore(path, max_bytes=config.max_mb << 20, max_entries=config.max_entries)
    except (sqlite3.Error, OSError) as error:
        raise ConfigError(f'{path}: {error}: make it writable, or set [cache] store = "memory".') from error
    secret = installation_secret(home)
    return ResponseCache(config, store, clock, secret=secret, deployed=deployed, policies=policies)


def worth_keeping(request: Request, receipt: Receipt, answer: CachedAnswer, *, cut: bool) -> bool:
    """A whole answer, that ended well and says something. One that reached the length it was asked to have is whole;
    one that money cut (`cut`, or a caller's maximum cost that may have) isn't."""
    whole = _WHOLE if cut or request.max_cost is not None else (*_WHOLE, FinishReason.LENGTH)
    says = any(text.text or text.calls for text in answer.texts)
    return receipt.status is Status.SUCCEEDED and says and all(reason in whole for reason in answer.reasons)
