"""Clients that leave: whatever is under way for them is told."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
import uvicorn
from uvicorn.server import ServerState

from millicent.server.bodies import read_body
from millicent.server.http import HttpProtocol
from millicent.server.leaving import Leaving, leaving_of

SECONDS = 60


def test_who_watches_is_told_once_and_who_has_ended_is_not() -> None:
    told: list[str] = []
    leaving = Leaving(lambda: None)
    watching, ended = (lambda: told.append("watching")), (lambda: told.append("ended"))
    leaving.watch(watching)
    leaving.watch(ended)
    leaving.unwatch(ended)
    leaving.left()
    leaving.left()
    assert told == ["watching"]


def test_who_begins_to_watch_when_the_client_has_left_is_told_at_once() -> None:
    told: list[str] = []
    leaving = Leaving(lambda: None)
    leaving.left()
    leaving.watch(lambda: told.append("late"))
    assert told == ["late"]


def test_where_nobody_can_tell_nobody_leaves() -> None:
    leaving_of({"type": "http"}).watch(lambda: pytest.fail("nobody has left"))


def request(body: bytes = b"") -> bytes:
    return b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


async def told_when_the_client_leaves(sent: bytes) -> int:
    """How long a body the request had that was told; it is never answered."""
    loop = asyncio.get_running_loop()
    told, watching = loop.create_future(), asyncio.Event()

    async def never_answers(scope: Any, receive: Any, _: Any) -> None:
        body = await read_body(scope, receive, max_mb=32, timeout_s=SECONDS)
        leaving_of(scope).watch(lambda: told.set_result(len(body)))
        watching.set()
        await told

    config = uvicorn.Config(cast("Any", never_answers), ws="none", log_config=None)
    config.load()
    server = await loop.create_server(lambda: HttpProtocol(config, ServerState(), {}), "127.0.0.1", 0)
    async with asyncio.timeout(SECONDS):
        _, writer = await asyncio.open_connection("127.0.0.1", server.sockets[0].getsockname()[1])
        writer.write(sent)
        await watching.wait()
        writer.close()
        length: int = await told
    server.close()
    return length


@pytest.mark.parametrize(
    ("sent", "length"),
    [
        (request(), 0),
        (request(b"x" * (1 << 20)), 1 << 20),
        (request(b"first") + request(b"another"), 5),  # the latter waits for the former's answer
    ],
)
def test_a_request_is_told_that_its_client_has_left(sent: bytes, length: int) -> None:
    assert asyncio.run(told_when_the_client_leaves(sent)) == length


class Paused(asyncio.Transport):
    paused = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        """There is nothing to close."""

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


def test_of_a_connection_that_was_read_enough_from_it_is_still_noticed_that_it_ends() -> None:
    async def paused() -> tuple[bool, bool]:
        watched, seen = asyncio.Event(), asyncio.Event()

        async def app(scope: Any, receive: Any, _: Any) -> None:
            await read_body(scope, receive, max_mb=32, timeout_s=SECONDS)
            before.append(transport.paused)
            leaving_of(scope).watch(lambda: None)
            watched.set()
            await seen.wait()

        config = uvicorn.Config(cast("Any", app), ws="none", log_config=None)
        config.load()
        before: list[bool] = []
        transport, protocol = Paused(), HttpProtocol(config, ServerState(), {})
        protocol.connection_made(transport)
        body = request(b"x" * (1 << 17))
        head = body.index(b"xxx")
        protocol.data_received(body[:head])
        await asyncio.sleep(0)  # until the body is waited for
        protocol.data_received(body[head:])
        await asyncio.wait_for(watched.wait(), SECONDS)
        after = transport.paused
        seen.set()
        protocol.connection_lost(None)
        await asyncio.gather(*protocol.tasks)
        return before[0], after

    assert asyncio.run(paused()) == (True, False)
