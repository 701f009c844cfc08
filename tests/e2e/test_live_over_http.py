"""The live stream of a real gateway: who leaves is noticed, and who stays doesn't keep it from stopping."""

from __future__ import annotations

import http.client
from collections.abc import Iterator

import psutil
import pytest

from support.fake_upstream import Call, FakeUpstream, fake_upstream_in_a_thread, said
from support.live import LiveServer, live_server
from support.waiting import until

CONFIG = """
[server]
shutdown_grace_s = 600

[placements.elsewhere]
kind = "api"
provider = "openai"
base_url = "{url}"

[models.small]
placement = "elsewhere"
model = "gpt-4o-mini"

[alerts.ops]
watch = ["budget"]
"""


async def answer(call: Call) -> None:
    await call.stream([said("Tōkyō.")])


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    with fake_upstream_in_a_thread(answer) as fake:
        yield fake


@pytest.fixture
def server(upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("live"), [], CONFIG.format(url=upstream.url)) as live:
        yield live


def listen(server: LiveServer) -> http.client.HTTPConnection:
    """A page that has read its history."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    connection.request("GET", "/live/events")
    response = connection.getresponse()
    assert response.status == 200
    assert response.readline() == b"event: history\n"
    connection.response = response  # type: ignore[attr-defined] # kept open with it
    return connection


def leave(connection: http.client.HTTPConnection) -> None:
    connection.response.close()  # type: ignore[attr-defined]
    connection.close()


def test_listeners_come_and_go_and_the_gateway_stops_though_one_stays(server: LiveServer) -> None:
    assert server.process is not None
    gateway = psutil.Process(server.process.pid)
    leave(listen(server))
    for page in ("/live", "/alerts"):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        connection.request("GET", page)
        assert connection.getresponse().status == 200
        connection.close()
    before = gateway.num_fds()
    for _ in range(3):
        for connection in [listen(server) for _ in range(30)]:
            leave(connection)
    until(lambda: gateway.num_fds() <= before + 5, "connections that were closed are still held")
    stays = listen(server)
    assert server.stop() == 0
    leave(stays)
