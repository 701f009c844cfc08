"""Weeks in a minute: an event loop whose time passes only while everything waits for it, and then at once."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from typing import Any

from millicent.core.clock import NS_PER_S


class _Selector(selectors.DefaultSelector):
    """Where the loop would wait for time, its clock is set forward instead. What really takes time, the ledger's
    thread, is waited for while the clock stands."""

    loop: SkippingLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or self.loop.working:
            return super().select(timeout if timeout == 0 else None)
        self.loop.now_s += max(0.0, timeout)
        return super().select(0)


class SkippingLoop(asyncio.SelectorEventLoop):
    """`working` counts what another thread is doing for it: set it through `Working`."""

    def __init__(self) -> None:
        selector = _Selector()
        self.now_s = 0.0
        self.working = 0
        super().__init__(selector)
        selector.loop = self

    def time(self) -> float:
        return self.now_s


class LoopClock:
    """core.clock.Clock by a skipping loop's time, which begins at `start_ns`, UTC."""

    def __init__(self, loop: SkippingLoop, start_ns: int) -> None:
        self._loop = loop
        self._start_ns = start_ns

    def monotonic_ns(self) -> int:
        return round(self._loop.now_s * NS_PER_S)

    def now_ns(self) -> int:
        return self._start_ns + self.monotonic_ns()

    def utc_ns(self, monotonic_ns: int) -> int:
        return self._start_ns + monotonic_ns


class Working:
    """A room whose methods wait for a thread: time stands still meanwhile."""

    def __init__(self, loop: SkippingLoop, room: object) -> None:
        self._loop = loop
        self._room = room

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method = getattr(self._room, name)

        async def waited(*args: object, **named: object) -> object:
            self._loop.working += 1
            try:
                return await method(*args, **named)
            finally:
                self._loop.working -= 1

        return waited
