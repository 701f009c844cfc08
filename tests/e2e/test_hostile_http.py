"""What is sent to a live server's socket: each gets one answer in its dialect's shape, and the server goes on."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
from collections.abc import Iterator
from http.client import HTTPMessage, parse_headers
from typing import Any

import pytest

from support.fake_upstream import Call as UpstreamCall
from support.fake_upstream import fake_upstream_in_a_thread, said
from support.live import LiveServer, live_server

BODY = json.dumps({"model": "far", "messages": [{"role": "user", "content": "x"}]}).encode()
CHUNKED = b"%x;name=value\r\n%b\r\n0\r\nX-Millicent-User: eve\r\n\r\n" % (len(BODY), BODY)
OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    async def answer(call: UpstreamCall) -> None:
        await call.stream([said("ok")])

    with fake_upstream_in_a_thread(answer) as upstream:
        config = (
            '[server]\nallowed_origins = ["https://ours.example"]\n'
            '[placements.there]\nkind = "rented"\nusd_per_hour = 1\n'
            f'server = "compatible"\nbase_url = "{upstream.url}"\n[models.far]\nplacement = "there"\n'
        )
        with live_server(tmp_path_factory.mktemp("hostile_http") / "home", [], config) as live:
            yield live


def asked(
    more: bytes = b"", body: bytes = BODY, path: bytes = b"/v1/chat/completions", method: bytes = b"POST"
) -> bytes:
    """With a length, unless `more` says how long it is."""
    if b"Length:" not in more and b"Transfer-Encoding:" not in more:
        more += b"Content-Length: %d\r\n" % len(body)
    return b"%b %b HTTP/1.1\r\nHost: localhost\r\n%b\r\n%b" % (method, path, more, body)


class Connection:
    def __init__(self, server: LiveServer) -> None:
        self._socket = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        self._answers = self._socket.makefile("rb")

    def send(self, data: bytes) -> None:
        with contextlib.suppress(ConnectionError):  # it may have been refused before all of it was there
            self._socket.sendall(data)

    def answer(self, *, whole: bool = True) -> tuple[int, Any, HTTPMessage]:
        """The next one: its status, its body if it has one, and its headers."""
        status = int(self._answers.readline().split()[1])
        headers = parse_headers(self._answers)
        body = self._answers.read(int(headers["content-length"])) if whole else b""
        return status, json.loads(body) if body[:1] == b"{" else None, headers

    def ended(self) -> bool:
        return self._answers.read(1) == b""

    def close(self) -> None:
        self._answers.close()
        self._socket.close()


@pytest.fixture
def connection(server: LiveServer) -> Iterator[Connection]:
    made = Connection(server)
    yield made
    made.close()
    assert server.get("/health") == (200, {"alive": True})
    assert "Traceback" not in server.output


@pytest.mark.parametrize(
    "data",
    [
        asked(b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", CHUNKED),
        asked(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n", CHUNKED),
        asked(b"Transfer-Encoding: xchunked\r\n", CHUNKED),
        asked(b"Content-Length: %d\r\nContent-Length: %d\r\n" % (len(BODY), len(BODY))),
        asked(b"Content-Length: %d\r\nContent-Length: 3\r\n" % len(BODY)),
        asked(b"Content-Length: -5\r\n"), asked(b"Content-Length: +5\r\n"), asked(b"Content-Length: 0x10\r\n"),
        asked(b"Content-Length: 99999999999999999999999\r\n"), asked(b"Content-Length: 5, 5\r\n"),
        asked(b"Content-Length : 5\r\n"), asked(b"X: a\x00b\r\n"), asked(b"X: a\r\n b\r\n"),
        asked(b"Transfer-Encoding: chunked\r\n", b"zz\r\nabc\r\n0\r\n\r\n"),
        asked(b"Transfer-Encoding: chunked\r\n", b"-1\r\nabc\r\n0\r\n\r\n"),
        asked(b"Transfer-Encoding: chunked\r\n", b"ffffffffffffffffff\r\nabc\r\n0\r\n\r\n"),
        asked(b"Transfer-Encoding: chunked\r\n", b"3\r\nabcdef\r\n0\r\n\r\n"),
        asked().replace(b"\r\n", b"\n"), asked(path=b"/v1/\xff"), asked(path=b"/v1/\x00"),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300),
        b"CONNECT there:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)  # fmt: skip
def test_what_is_not_http_is_refused_once_and_the_connection_closed(connection: Connection, data: bytes) -> None:
    connection.send(data)
    status, body, headers = connection.answer()
    assert (status, body["error"]["code"]) == (400, "invalid_http")
    assert headers["connection"] == "close"
    assert connection.ended()


def test_what_is_not_http_is_told_in_the_shape_of_the_address(connection: Connection) -> None:
    connection.send(asked(b"Content-Length: -5\r\n", path=b"/v1/messages"))
    assert connection.answer()[1]["type"] == "error"


@pytest.mark.parametrize("data", [asked(b"X: %b\r\n" % (b"a" * 200_000)), asked(path=b"/v1/" + b"a" * 200_000)])
def test_a_head_has_a_greatest_size(connection: Connection, data: bytes) -> None:
    connection.send(data)
    status, body, _ = connection.answer()
    assert (status, body["error"]["code"]) == (431, "head_too_large")


@pytest.mark.parametrize("upgrade", [OFFER, b"Connection: Upgrade\r\nUpgrade: websocket\r\n"])
@pytest.mark.parametrize("cut", [20, 150, 240])
def test_an_offer_to_go_on_in_another_protocol_loses_no_body(connection: Connection, upgrade: bytes, cut: int) -> None:
    data = asked(upgrade)
    connection.send(data[:cut])
    connection.send(data[cut:] + asked())
    for _ in range(2):
        status, body, _ = connection.answer()
        assert (status, body["choices"][0]["message"]["content"]) == (200, "ok")


def test_requests_that_come_at_once_are_answered_in_order(connection: Connection) -> None:
    connection.send(
        asked() + asked(body=b"{}") + asked(b"Transfer-Encoding: chunked\r\n", CHUNKED) + asked(path=b"/no")
    )
    assert [connection.answer()[0] for _ in range(4)] == [200, 400, 200, 404]


def test_headers_behind_a_body_are_no_headers(connection: Connection, server: LiveServer) -> None:
    connection.send(asked(b"Transfer-Encoding: chunked\r\n", CHUNKED))
    status, _, headers = connection.answer()
    assert status == 200
    assert server.settled(headers["x-millicent-receipt"])["attribution"]["user"] is None


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (asked(b"Content-Encoding: gzip\r\n", gzip.compress(BODY)), 400, "unsupported_encoding"),
        (asked(b"Transfer-Encoding: gzip, chunked\r\n", CHUNKED), 400, "unsupported_encoding"),
        (asked(body=BODY.decode().encode("utf-16")), 400, "invalid_json"),
        (asked(body=BODY * 2), 400, "invalid_json"),
        (asked(body=b"[" * 100_000), 400, "invalid_type"),
        (asked(b"Host: evil.example\r\n"), 403, "host_not_allowed"),
        (asked().replace(b"Host: localhost\r\n", b""), 403, "host_not_allowed"),
        (asked(b"Origin: https://evil.example\r\n"), 403, "origin_not_allowed"),
        (asked(path=b"//v1/chat/completions"), 404, "not_found"),
        (asked(path=b"/v1/../v1/models", method=b"GET"), 404, "not_found"),
        (asked(path=b"/v1/%ff%00", method=b"GET"), 404, "not_found"),
        (asked(method=b"PUT"), 405, "method_not_allowed"),
        (asked(method=b"OPTIONS", body=b""), 405, "method_not_allowed"),
        (asked(path=b"/v1/receipts?limit=" + b"9" * 5000, method=b"GET"), 400, "invalid_value"),
        (asked(path=b"/v1/receipts?limit=%D9%A1", method=b"GET"), 400, "invalid_value"),
        (asked(path=b"/v1/receipts?to=9999-12-31", method=b"GET"), 400, "invalid_value"),
        (asked(b"X-Millicent-Max-Cost-USD: 1e999999999\r\n"), 400, "invalid_value"),
        (asked(b"X-Millicent-Latency-Target-Ms: %b\r\n" % (b"9" * 6000)), 400, "invalid_value"),
        (asked(b"Idempotency-Key: %b\r\n" % (b"k" * 30_000)), 400, "invalid_value"),
    ],
)  # fmt: skip
def test_a_refusal_leaves_the_connection_usable(connection: Connection, data: bytes, status: int, code: str) -> None:
    connection.send(data)
    got, body, _ = connection.answer()
    assert (got, body["error"]["code"]) == (status, code)
    connection.send(asked())
    assert connection.answer()[0] == 200


@pytest.mark.parametrize(
    "data",
    [
        asked(b"Authorization: Bearer \xff\xfe\r\n"), asked(b"Cookie: millicent_session=\xff.a.b; a\r\n"),
        asked(b'Cookie: millicent_session="a.b.c.d"\r\n'), asked(b"traceparent: 00-zz-\xff-01\r\n"),
        asked(b"Cache-Control: max-age=99999999999999999999999999, \xff\r\n"), asked(b"Idempotency-Key: \xff\xfe\r\n"),
        asked(b"Origin: https://ours.example\r\n"), asked(b"Content-Type: text/plain\r\n"),
        asked(path=b"http://localhost/v1/chat/completions"), asked(path=b"/v1/%63hat/completions"),
    ],
)  # fmt: skip
def test_what_is_odd_but_harmless_is_answered(connection: Connection, data: bytes) -> None:
    connection.send(data)
    assert connection.answer()[0] == 200


def test_an_allowed_page_is_answered_before_it_asks(connection: Connection) -> None:
    ask = b"Origin: https://%b.example\r\nAccess-Control-Request-Method: POST\r\nContent-Length: 0\r\n"
    connection.send(asked(ask % b"ours", b"", method=b"OPTIONS"))
    status, _, headers = connection.answer()
    assert (status, headers["access-control-allow-origin"]) == (200, "https://ours.example")


def test_a_head_without_a_body_is_answered_without_one(connection: Connection) -> None:
    connection.send(asked(path=b"/v1/models", method=b"HEAD", body=b"") + asked())
    status, _, headers = connection.answer(whole=False)
    assert (status, int(headers["content-length"]) > 0) == (200, True)
    assert connection.answer()[0] == 200
