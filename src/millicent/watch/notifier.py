"""Posts what is to be told. Messages wait in the ledger until they arrive: a gateway claims one at a time for a minute,
so that several don't send it twice; one that dies between sending and writing that down sends it again."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import sqlite3
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import DefaultResolver

from millicent.core.clock import NS_PER_HOUR, NS_PER_S, Clock
from millicent.core.errors import LedgerUnavailable
from millicent.watch import store

log = logging.getLogger(__name__)

T = TypeVar("T")
_TIMEOUT_S = 10
_LEASE_NS = 60 * NS_PER_S
_FIRST_RETRY_NS = 15 * NS_PER_S
_LAST_RETRY_NS = NS_PER_HOUR
_GIVE_UP_NS = 24 * NS_PER_HOUR
_LOOK_EVERY_S = 15


@dataclass(frozen=True)
class Webhook:
    """`url` is a secret: it is never told or logged."""

    url: str
    private_targets: bool


class Writes(Protocol):
    """What is asked of the ledger: `SqliteLedger.write`."""

    def write(self, operation: Callable[[sqlite3.Connection], T]) -> Awaitable[T]: ...


class Notifier:
    """`run` until cancelled; `deliver` sends what is due. `wake` is for when there is something new."""

    def __init__(self, webhooks: Mapping[str, Webhook], *, ledger: Writes, clock: Clock) -> None:
        self._webhooks = webhooks
        self._ledger = ledger
        self._clock = clock
        self._new = asyncio.Event()

    def wake(self) -> None:
        self._new.set()

    async def run(self) -> None:
        while True:
            try:
                await self.deliver()
            except LedgerUnavailable as error:
                log.warning("alerts can't be sent: %s", error)
            try:
                async with asyncio.timeout(_LOOK_EVERY_S):
                    await self._new.wait()
            except TimeoutError:
                continue
            self._new.clear()

    async def deliver(self) -> int:
        """How many arrived."""
        arrived = 0
        while True:
            claim = partial(
                store.claim_message, rules=list(self._webhooks), now_ns=self._clock.now_ns(), lease_ns=_LEASE_NS
            )
            message = await self._ledger.write(claim)
            if message is None:
                return arrived
            error = await _post(self._webhooks[message.rule], message.body)
            arrived += error is None
            now_ns = self._clock.now_ns()
            again_at_ns = None
            if error is not None:
                delay_ns = min(_LAST_RETRY_NS, _FIRST_RETRY_NS << min(message.tries - 1, 16))
                again_at_ns = now_ns + delay_ns if now_ns - message.created_at_ns < _GIVE_UP_NS else None
                log.warning(
                    "an alert of rule %s was not taken: %s; %s",
                    message.rule,
                    error,
                    "it is given up" if again_at_ns is None else f"tried again in {delay_ns // NS_PER_S} s",
                )
            await self._ledger.write(
                partial(
                    store.finish_message, message_id=message.id, error=error, again_at_ns=again_at_ns, now_ns=now_ns
                )
            )


async def _post(webhook: Webhook, body: str) -> str | None:
    """Why it didn't arrive, without the address; None where it did."""
    host = urlsplit(webhook.url).hostname or ""
    if not webhook.private_targets and _is_private(host):
        return "its address is on this machine or in a private network: set private_targets = true to allow that"
    resolver = DefaultResolver() if webhook.private_targets else _PublicOnly()
    connector = aiohttp.TCPConnector(resolver=resolver, limit=1)
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
            session.post(
                webhook.url, data=body, headers={"Content-Type": "application/json"}, allow_redirects=False
            ) as response,
        ):
            return None if response.status < 300 else f"the answer was {response.status}"
    except TimeoutError:
        return f"no answer within {_TIMEOUT_S} s"
    except aiohttp.ClientConnectorError as error:
        return error.strerror or type(error).__name__
    except (aiohttp.ClientError, OSError) as error:
        return type(error).__name__
    finally:
        await resolver.close()


def _is_private(host: str) -> bool:
    """Of an address in numbers; a name is judged by what it leads to."""
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return False


class _PublicOnly(AbstractResolver):
    """Names lead to public addresses only, also when they change."""

    def __init__(self) -> None:
        self._inner = DefaultResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        if any(_is_private(each["host"]) for each in found):
            raise OSError(None, "its name leads to this machine or a private network: set private_targets = true")
        return found

    async def close(self) -> None:
        await self._inner.close()
