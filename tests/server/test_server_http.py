"""What the gateway does to be quick, and what that must not change."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from uvicorn import Config
from uvicorn.server import ServerState

from millicent.core.errors import InvalidRequest
from millicent.server.bodies import read_body
from millicent.server.headers import headers_of
from millicent.server.http import GatheredWrites, HttpProtocol
from millicent.server.shortcut import Shortcut


class Recorded:
    def __init__(self) -> None:
        self.said: list[bytes | str] = []

    def write(self, data: bytes) -> None:
        self.said.append(data)

    def close(self) -> None:
        self.said.append("closed")

    def is_closing(self) -> bool:
        return "closed" in self.said

    def get_extra_info(self, _: str) -> None:
        return None


def gathered(transport: Recorded) -> GatheredWrites:
    return GatheredWrites(cast("asyncio.Transport", transport), asyncio.get_running_loop())


def test_what_is_written_in_one_turn_goes_out_in_one_piece_and_in_order() -> None:
    async def turns() -> list[bytes | str]:
        transport = Recorded()
        writes = gathered(transport)
        writes.write(b"head ")
        writes.write(b"body")
        assert transport.said == []
        await asyncio.sleep(0)
        writes.write(b"more")
        await asyncio.sleep(0)
        return transport.said

    assert asyncio.run(turns()) == [b"head body", b"more"]


def test_closing_writes_what_waits_first() -> None:
    async def turns() -> tuple[list[bytes | str], bool]:
        transport = Recorded()
        writes = gathered(transport)
        writes.write(b"last")
        writes.close()
        await asyncio.sleep(0)
        return transport.said, writes.is_closing()

    assert asyncio.run(turns()) == ([b"last", "closed"], True)


def test_a_client_that_left_within_the_turn_is_written_nothing() -> None:
    async def turns() -> list[bytes | str]:
        transport = Recorded()
        gathered(transport).write(b"last")
        transport.close()
        await asyncio.sleep(0)
        return transport.said

    assert asyncio.run(turns()) == ["closed"]


def test_what_waits_is_bounded_so_that_a_slow_reader_is_noticed() -> None:
    async def turns() -> list[bytes | str]:
        transport = Recorded()
        writes = gathered(transport)
        for _ in range(5):
            writes.write(b"x" * 40_000)
        return list(transport.said)

    said = asyncio.run(turns())
    assert [len(piece) for piece in said] == [80_000, 80_000]


async def read_over_http(pieces: list[bytes]) -> bytes:
    """The body as an endpoint reads it that waits no time at all for one that isn't here."""
    read: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def app(scope: Any, receive: Any, _: Any) -> None:
        try:
            read.set_result(await read_body(scope, receive, max_mb=1, timeout_s=0))
        except InvalidRequest as error:
            read.set_exception(error)

    config = Config(app, http=HttpProtocol, lifespan="off", log_config=None)
    config.load()
    protocol = HttpProtocol(config, ServerState(), {})
    protocol.connection_made(cast("asyncio.Transport", Recorded()))
    for piece in pieces:
        protocol.data_received(piece)
    try:
        return await read
    finally:
        protocol.connection_lost(None)
        await asyncio.gather(*protocol.tasks)


HEAD = b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 4\r\n\r\n"


@pytest.mark.parametrize("pieces", [[HEAD + b"body"], [HEAD, b"bo", b"dy"]])
def test_a_body_that_is_here_needs_no_timer(pieces: list[bytes]) -> None:
    assert asyncio.run(read_over_http(pieces)) == b"body"


def test_a_body_that_is_not_whole_is_waited_for_only_so_long() -> None:
    with pytest.raises(InvalidRequest, match="did not arrive within 0 s"):
        asyncio.run(read_over_http([HEAD, b"bo"]))


def test_the_shortcut_is_for_posts_to_whole_paths_only() -> None:
    def app(name: str) -> Any:
        async def run(scope: Any, receive: Any, send: Any) -> None:
            await send(name)

        return run

    async def went(method: str, path: str) -> list[str]:
        said: list[str] = []

        async def send(name: Any) -> None:
            said.append(name)

        shortcut = Shortcut(app("routes"), {"/v1/chat/completions": app("endpoint")})
        await shortcut({"type": "http", "method": method, "path": path}, cast("Any", None), send)
        return said

    assert asyncio.run(went("POST", "/v1/chat/completions")) == ["endpoint"]
    assert asyncio.run(went("GET", "/v1/chat/completions")) == ["routes"]
    assert asyncio.run(went("POST", "/v1/chat/completions/")) == ["routes"]


def test_of_headers_that_come_twice_the_first_counts() -> None:
    scope = {"type": "http", "headers": [(b"host", b"a"), (b"x-api-key", b"first"), (b"x-api-key", b"second")]}
    assert headers_of(scope) == {"host": "a", "x-api-key": "first"}
    assert headers_of(scope) is headers_of(scope)
