"""What goes on now, pushed to whoever looks: server-sent events, every two seconds, of the last minute.

One sample is made for all listeners, and none while nobody listens. Receipts are summed up in slots of two seconds, of
which five minutes are kept. A listener that reads slowly gets the newest sample when it is ready, and none in between;
one that takes nothing for half a minute is let go.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from millicent.core.budgets import Balance, Budget
from millicent.core.clock import NS_PER_MS, NS_PER_S, Clock, iso_utc
from millicent.core.errors import LedgerUnavailable
from millicent.core.money import Money
from millicent.core.receipts import Receipt, Status
from millicent.core.usage import Leaf
from millicent.watch.metrics import Gateway

log = logging.getLogger(__name__)

EVERY_S = 2
KEPT = 150
_SLOT_NS = EVERY_S * NS_PER_S
_WINDOW = 30
_MOST_LISTENERS = 128
# Who takes nothing for so long is let go.
_PATIENCE_S = 30
# Of each slot, so many latencies are looked at.
_MOST_TIMES = 200
_BUDGETS_EVERY = 5
_MOST_BUDGETS = 8

# Name: what it is called and its unit.
FIGURES: dict[str, tuple[str, str]] = {
    "cost_usd_per_hour": ("Cost", "USD per hour"),
    "requests_per_s": ("Requests", "per second"),
    "output_tokens_per_s": ("Output tokens", "per second"),
    "input_tokens_per_s": ("Input tokens", "per second"),
    "latency_p50_ms": ("Latency, median", "ms"),
    "latency_p95_ms": ("Latency, 95th percentile", "ms"),
    "failed_percent": ("Failed", "%"),
    "cached_percent": ("Input from the cache", "%"),
    "running": ("Running", "requests"),
    "waiting": ("Waiting", "requests"),
    "mean_batch": ("Batch", "sequences per step"),
}
Figures = dict[str, float | None]


class Health(Protocol):
    """What `/ready` rests on."""

    def engines(self) -> Sequence[Any]:
        """With `device`, `state` and `message`."""
        ...

    def trouble(self) -> str | None: ...


class _Slot(msgspec.Struct):
    """Receipts that were settled within two seconds."""

    number: int
    requests: int = 0
    failed: int = 0
    nanousd: int = 0
    read: int = 0
    cached: int = 0
    written: int = 0
    batch_sum: int = 0
    steps: int = 0
    times_ns: list[int] = []


class Live:
    """`settled` is to be told of every receipt; `routes` are where to listen. After `close` every stream has ended."""

    def __init__(
        self,
        gateway: Gateway,
        health: Health,
        budgets: Callable[[int], Sequence[tuple[Budget, Sequence[Balance]]]],
        clock: Clock,
    ) -> None:
        self._gateway = gateway
        self._health = health
        self._budgets = budgets
        self._clock = clock
        self._slots: deque[_Slot] = deque(maxlen=KEPT + _WINDOW)
        self._sampler: asyncio.Task[None] | None = None
        self._sampled = asyncio.Condition()
        self._newest = b""
        self._number = 0
        self._closed = False
        self.listeners = 0
        self.routes = [Route("/live/events", self._listen)]

    def settled(self, receipt: Receipt) -> None:
        slot = self._slot(self._clock.now_ns() // _SLOT_NS)
        slot.requests += 1
        slot.failed += receipt.status in {Status.FAILED, Status.INTERRUPTED}
        total = receipt.total
        slot.nanousd += 0 if total is None else total.nanousd
        slot.read += receipt.usage.input_tokens or 0
        slot.cached += receipt.usage.tokens(Leaf.INPUT_CACHE_READ) or 0
        slot.written += receipt.usage.output_tokens or 0
        slot.batch_sum += receipt.accelerator.batch_sum
        slot.steps += receipt.accelerator.steps
        if receipt.timing.total_ns is not None and len(slot.times_ns) < _MOST_TIMES:
            slot.times_ns.append(receipt.timing.total_ns)

    def _slot(self, number: int) -> _Slot:
        if not self._slots or self._slots[-1].number < number:
            self._slots.append(_Slot(number))
        return self._slots[-1]

    async def close(self) -> None:
        self._closed = True
        async with self._sampled:
            self._sampled.notify_all()
        if self._sampler is not None:
            self._sampler.cancel()
            await asyncio.gather(self._sampler, return_exceptions=True)

    def now(self) -> dict[str, Any]:
        """The sample as it stands, without budgets: for a page that is opened."""
        return self._sample([])

    def history(self) -> list[Figures]:
        """The figures of the last five minutes as far as receipts tell them, one per slot, oldest first."""
        last = self._clock.now_ns() // _SLOT_NS
        by_number = {slot.number: slot for slot in self._slots}
        return [self._figures(by_number, number) for number in range(last - KEPT + 1, last + 1)]

    async def _listen(self, _: Request) -> Response:
        if self.listeners >= _MOST_LISTENERS or self._closed:
            told = {
                "message": f"{_MOST_LISTENERS} pages are open: close one, or try again later.",
                "type": "server_error",
            }
            return JSONResponse({"error": told}, 503, {"Retry-After": "30"})
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return _Stream(self._events(), media_type="text/event-stream", headers=headers)

    async def _events(self) -> AsyncIterator[bytes]:
        self.listeners += 1
        try:
            if self._sampler is None:
                self._sampler = asyncio.create_task(self._keep_sampling())
            yield _event("history", {"figures": self.history()})
            seen = self._number
            while not self._closed:
                async with self._sampled:
                    while self._number == seen and not self._closed:
                        await self._sampled.wait()
                seen = self._number
                yield self._newest
        finally:
            self.listeners -= 1
            if self.listeners == 0 and self._sampler is not None:
                self._sampler.cancel()
                self._sampler = None

    async def _keep_sampling(self) -> None:
        budgets: list[dict[str, Any]] = []
        for number in itertools.count():
            if number % _BUDGETS_EVERY == 0:
                try:
                    budgets = await asyncio.to_thread(self._standing)
                except LedgerUnavailable as error:
                    log.warning("budgets are not shown live: %s", error)
            self._newest = _event("sample", self._sample(budgets))
            self._number += 1
            async with self._sampled:
                self._sampled.notify_all()
            await asyncio.sleep(EVERY_S)

    def _sample(self, budgets: Sequence[dict[str, Any]]) -> dict[str, Any]:
        now_ns = self._clock.now_ns()
        under_way = self._gateway.load()
        begun = sum(has_begun for _, has_begun in under_way)
        figures = self._figures({slot.number: slot for slot in self._slots}, now_ns // _SLOT_NS)
        figures |= {"running": float(begun), "waiting": float(len(under_way) - begun)}
        return {
            "at": iso_utc(now_ns),
            "figures": figures,
            "trouble": self._health.trouble(),
            "engines": [{"device": each.device, "state": each.state} for each in self._health.engines()],
            "deployments": [
                {"model": each.model, "placement": each.placement or "", "available": each.state != "open"}
                for each in self._gateway.deployments()
            ],
            "budgets": budgets,
        }

    def _figures(self, slots: Mapping[int, _Slot], last: int) -> Figures:
        """Of the minute that ends with this slot. None is unknown: of no request nobody knows the latency."""
        found = [slot for number in range(last - _WINDOW + 1, last + 1) if (slot := slots.get(number)) is not None]
        seconds = _WINDOW * EVERY_S
        requests, steps, read = (sum(getattr(slot, name) for slot in found) for name in ("requests", "steps", "read"))
        times = sorted(time_ns for slot in found for time_ns in slot.times_ns)
        nanousd = sum(slot.nanousd for slot in found)
        return {
            # For looking at; what is billed is in the ledger.
            "cost_usd_per_hour": float(Money(nanousd * 3600 // seconds).usd),
            "requests_per_s": requests / seconds,
            "output_tokens_per_s": sum(slot.written for slot in found) / seconds,
            "input_tokens_per_s": read / seconds,
            "latency_p50_ms": times[len(times) // 2] / NS_PER_MS if times else None,
            "latency_p95_ms": times[len(times) * 95 // 100] / NS_PER_MS if times else None,
            "failed_percent": 100 * sum(slot.failed for slot in found) / requests if requests else None,
            "cached_percent": 100 * sum(slot.cached for slot in found) / read if read else None,
            "running": None,
            "waiting": None,
            "mean_batch": sum(slot.batch_sum for slot in found) / steps if steps else None,
        }

    def _standing(self) -> list[dict[str, Any]]:
        """The budgets of which most is used."""
        found = []
        for budget, balances in self._budgets(self._clock.now_ns()):
            for balance in balances:
                used = (balance.spent + balance.held).nanousd
                percent = 100 * used // budget.limit.nanousd if budget.limit.nanousd else 100
                name = f"{budget.name}, {budget.per} {balance.subject or 'none'}" if budget.per else budget.name
                found.append(
                    {
                        "name": name,
                        "used": (balance.spent + balance.held).human(),
                        "limit": budget.limit.human(),
                        "percent": percent,
                    }
                )
        return sorted(found, key=lambda each: -int(str(each["percent"])))[:_MOST_BUDGETS]


class _Stream(StreamingResponse):
    """Ends for a reader that is stuck, too: it would keep the place of one who reads."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(_PATIENCE_S):
                await send(message)

        try:
            with contextlib.suppress(TimeoutError, ClientDisconnect):
                await super().__call__(scope, receive, send_in_time)
        finally:
            await self.body_iterator.aclose()  # type: ignore[attr-defined] # a generator


def _event(name: str, body: object) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), msgspec.json.encode(body))
