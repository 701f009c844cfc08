"""An event loop whose time passes only while everything waits, and then at once: hours of pauses take no time."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from typing import Any

from millicent.core.clock import NS_PER_S

_START_NS = 1_767_225_600 * NS_PER_S


class _Selector(selectors.SelectSelector):
    """Where the loop would wait, its clock is set forward instead."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise AssertionError("everything waits, and nothing will ever happen")
        self.loop.now_s += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        selector = _Selector()
        self.now_s = 1000.0
        super().__init__(selector)
        selector.loop = self

    def time(self) -> float:
        return self.now_s


class LoopClock:
    """core.clock.Clock by the running loop's time."""

    def monotonic_ns(self) -> int:
        return round(asyncio.get_running_loop().time() * NS_PER_S)

    def now_ns(self) -> int:
        return _START_NS + self.monotonic_ns()

    def utc_ns(self, monotonic_ns: int) -> int:
        return _START_NS + monotonic_ns


def run(story: Callable[[], Awaitable[Any]]) -> None:
    async def whole() -> None:
        async with asyncio.timeout(30 * 24 * 3600):
            await story()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(whole())
