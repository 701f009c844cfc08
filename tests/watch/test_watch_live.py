"""What is pushed, to whom, and that nothing is left of those who went."""

from __future__ import annotations

import asyncio
import gc
import json
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from starlette.applications import Starlette
from starlette.types import Message

from millicent.core.budgets import Balance, Budget
from millicent.core.clock import NS_PER_S, ManualClock
from millicent.core.money import Money
from millicent.core.receipts import Status
from millicent.watch.live import EVERY_S, FIGURES, KEPT, Live
from support import receipts
from support.virtual_time import LoopClock, run
from support.watched_gateway import Engines, StandInGateway


class Listener:
    """One page's connection, over ASGI. A slow one takes only what `read` asks for."""

    def __init__(self, app: Starlette) -> None:
        self._sent: asyncio.Queue[Message] = asyncio.Queue(1)
        self._gone = asyncio.Event()
        self._asked = False
        scope = {"type": "http", "asgi": {"version": "3.0"}, "method": "GET", "path": "/live/events", "headers": [],
                 "query_string": b"", "scheme": "http", "server": ("127.0.0.1", 80), "root_path": ""}  # fmt: skip
        self.task = asyncio.create_task(app(scope, self._receive, self._sent.put))

    async def _receive(self) -> Message:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def status(self) -> int:
        return int((await self._sent.get())["status"])

    async def read(self) -> tuple[str, Any]:
        """The next event's name and what it says."""
        body = (await self._sent.get())["body"].decode()
        name, data = body.strip().split("\n")
        return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))

    async def leave(self) -> None:
        self._gone.set()
        await self.task


def make(clock: ManualClock, balances: list[tuple[Budget, list[Balance]]] | None = None) -> tuple[Live, Starlette]:
    live = Live(StandInGateway(), Engines(), lambda _: balances or [], clock)
    return live, Starlette(routes=live.routes)


@asynccontextmanager
async def listening(app: Starlette) -> AsyncIterator[Listener]:
    listener = Listener(app)
    assert await listener.status() == 200
    yield listener
    await listener.leave()


def test_the_last_minute_is_told_in_figures_with_their_units() -> None:
    clock = ManualClock()
    live, app = make(clock, [(Budget(name="team", limit=Money(100)), [Balance("", 0, Money(60), Money(15))])])
    for _ in range(6):
        live.settled(receipts.settled())
    live.settled(msgspec.structs.replace(receipts.unknown(), status=Status.FAILED))

    async def scenario() -> tuple[Any, Any]:
        async with listening(app) as listener:
            return await listener.read(), await listener.read()

    (first, past), (second, sample) = asyncio.run(scenario())
    assert (first, second) == ("history", "sample")
    assert len(past["figures"]) == KEPT
    assert past["figures"][-1]["requests_per_s"] == 7 / 60
    figures = sample["figures"]
    assert figures.keys() == FIGURES.keys()
    assert figures["cost_usd_per_hour"] == 0.009
    assert figures["output_tokens_per_s"] == 18 / 60
    assert (figures["latency_p50_ms"], figures["running"], figures["waiting"]) == (500, 2, 1)
    assert round(figures["failed_percent"], 2) == 14.29
    assert figures["mean_batch"] == 1.5
    assert sample["budgets"] == [
        {"name": "team", "used": "0.0075 millicents", "limit": "0.01 millicents", "percent": 75}
    ]
    assert sample["deployments"][1] == {"model": "tiny", "placement": "far", "available": False}


def test_of_no_request_nobody_knows_the_latency() -> None:
    live, _ = make(ManualClock())
    figures = live.now()["figures"]
    assert figures["requests_per_s"] == 0
    assert {figures[name] for name in ("latency_p50_ms", "failed_percent", "cached_percent", "mean_batch")} == {None}


def test_what_was_settled_over_a_minute_ago_is_not_now() -> None:
    clock = ManualClock()
    live, _ = make(clock)
    live.settled(receipts.settled())
    clock.advance(61 * NS_PER_S)
    assert live.now()["figures"]["requests_per_s"] == 0
    assert any(figures["requests_per_s"] for figures in live.history())


def test_two_hundred_that_come_and_go_leave_no_task_and_no_memory() -> None:
    async def scenario() -> tuple[int, int]:
        live, app = make(ManualClock())
        alive: weakref.WeakSet[Listener] = weakref.WeakSet()
        for _ in range(5):
            listeners = [Listener(app) for _ in range(40)]
            alive.update(listeners)
            for listener in listeners:
                assert await listener.status() == 200
                await listener.read()
            assert live.listeners == 40
            await asyncio.gather(*(listener.leave() for listener in listeners))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert live.listeners == 0
        del listeners, listener
        gc.collect()
        return len(asyncio.all_tasks()), len(alive)

    assert asyncio.run(scenario()) == (1, 0)


def test_more_than_there_is_room_for_are_told_to_come_back() -> None:
    async def scenario() -> None:
        live, app = make(ManualClock())
        listeners = [Listener(app) for _ in range(128)]
        for listener in listeners:
            assert await listener.status() == 200
            await listener.read()
        refused = Listener(app)
        assert await refused.status() == 503
        await live.close()
        for listener in listeners:
            await listener.leave()

    asyncio.run(scenario())


def test_a_hundred_pages_share_one_sample() -> None:
    class Counted(StandInGateway):
        looked_at = 0

        def load(self) -> list[tuple[str, bool]]:
            self.looked_at += 1
            return super().load()

    async def scenario() -> None:
        gateway = Counted()
        live = Live(gateway, Engines(), lambda _: [], ManualClock())
        app = Starlette(routes=live.routes)
        listeners = [Listener(app) for _ in range(100)]
        for listener in listeners:
            assert await listener.status() == 200
        told = [[await listener.read() for listener in listeners] for _ in range(2)]
        assert [{name for name, _ in events} for events in told] == [{"history"}, {"sample"}]
        assert gateway.looked_at == 1
        await live.close()
        for listener in listeners:
            await listener.leave()

    asyncio.run(scenario())


def test_a_page_that_stays_open_leaves_nothing_behind_and_one_that_is_stuck_is_let_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def at_once(question: Callable[[], Any]) -> Any:
        return question()

    async def scenario() -> None:
        clock = LoopClock()
        live = Live(StandInGateway(), Engines(), lambda _: [], clock)
        app = Starlette(routes=live.routes)
        reads, stuck = Listener(app), Listener(app)
        assert await stuck.status() == 200  # and takes nothing more
        assert await reads.status() == 200
        assert (await reads.read())[0] == "history"
        sizes = []
        for number in range(3600 // EVERY_S):
            live.settled(receipts.settled())
            assert (await reads.read())[0] == "sample"
            if number == 60:
                assert live.listeners == 1
            if number > KEPT + 30 and number % 300 == 0:
                sizes.append((len(live._slots), len(live._newest), len(asyncio.all_tasks())))
        assert len(set(sizes)) == 1
        assert stuck.task.done()
        await reads.leave()
        assert live.listeners == 0

    monkeypatch.setattr(asyncio, "to_thread", at_once)
    run(scenario)


def test_a_slow_reader_gets_the_newest_and_holds_up_nobody() -> None:
    async def scenario() -> None:
        live, app = make(ManualClock())
        async with listening(app) as slow, listening(app) as quick:
            assert (await slow.read())[0] == (await quick.read())[0] == "history"
            assert (await quick.read())[0] == "sample"
            assert live.listeners == 2
            assert (await slow.read())[0] == "sample"

    asyncio.run(scenario())


def test_memory_is_the_same_after_a_day() -> None:
    clock = ManualClock()
    live, _ = make(clock)
    for _ in range(20_000):
        live.settled(receipts.settled())
        clock.advance(4 * NS_PER_S)
    assert len(live._slots) <= KEPT + 30
