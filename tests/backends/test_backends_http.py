"""Our own HTTP towards servers elsewhere: connections are kept and bounded, and nothing a server sends is taken for
more than it is."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from millicent.backends.config import UpstreamConfig
from millicent.backends.http import (
    Answer,
    BrokenOff,
    Connection,
    ConnectionTimeout,
    NotHttp,
    Origin,
    Pool,
    Unreachable,
    Untrusted,
    head_of,
)
from millicent.backends.upstream import Upstream
from millicent.core.clock import ManualClock
from support.fake_upstream import Call, FakeUpstream, Handler, fake_upstream
from support.waiting import until_it

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

# For localhost, from 2020 to 2120, signed by itself.
KEY = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgtNq5TleJHcVycLb+
md2cYr1R/tPuOxt+CgGnRHofC56hRANCAARBNNebBxTh84KbAd8Mp9kAsaM3x/Rq
EWREIbv0jt5oxSx++PNNRXavxHW2ls0cZXK8/DW9gP9SIGMXG4zQ7V37
-----END PRIVATE KEY-----
"""
CERTIFICATE = """-----BEGIN CERTIFICATE-----
MIIBYjCCAQegAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhv
c3QwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM
CWxvY2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABEE015sHFOHzgpsB
3wyn2QCxozfH9GoRZEQhu/SO3mjFLH74801Fdq/EdbaWzRxlcrz8Nb2A/1IgYxcb
jNDtXfujSDBGMBQGA1UdEQQNMAuCCWxvY2FsaG9zdDAPBgNVHRMBAf8EBTADAQH/
MB0GA1UdDgQWBBRGPDmxCZh4B2EeStewg+++y7gpiDAKBggqhkjOPQQDAgNJADBG
AiEAtn2iJURu3Dl6+BisZ4dwpcDelapvXJuQBGfZvdM0fOwCIQCZPCH/p9gd6QN3
ZU71JqfZUZsxviOaxMjOjx4wfyjEfQ==
-----END CERTIFICATE-----
"""


def sending(data: bytes, *, closing: bool = False) -> Handler:
    async def handler(call: Call) -> None:
        await call.send(data)
        if closing:
            call.writer.close()

    return handler


def with_server(handler: Handler, body: Callable[[Pool, FakeUpstream], Awaitable[None]], limit: int = 4) -> None:
    async def run() -> None:
        async with asyncio.timeout(60), fake_upstream(handler) as fake:
            pool = Pool(Origin(fake.url), limit, 60)
            try:
                await body(pool, fake)
            finally:
                await pool.close()

    asyncio.run(run())


async def connected(pool: Pool) -> Connection:
    return pool.take() or await pool.connect()


async def begun(pool: Pool) -> tuple[Connection, Answer]:
    connection = await connected(pool)
    answer = connection.send(head_of("POST", "/v1/x", {"host": "there"}), b"{}")
    await answer.head()
    return connection, answer


async def whole(answer: Answer) -> bytes:
    parts = []
    while piece := await answer.read():
        parts.append(piece)
    return b"".join(parts)


async def asked(pool: Pool) -> bytes:
    """One call to its end, after which the connection is given back."""
    connection, answer = await begun(pool)
    content = await whole(answer)
    connection.release(60)
    return content


@pytest.mark.parametrize(
    ("url", "host", "port", "authority", "path"),
    [
        ("https://api.example.com/v1/", "api.example.com", 443, "api.example.com", "/v1"),
        ("http://127.0.0.1:8000", "127.0.0.1", 8000, "127.0.0.1:8000", ""),
        ("http://[::1]:9/a/b", "::1", 9, "[::1]:9", "/a/b"),
        ("https://bücher.example", "xn--bcher-kva.example", 443, "xn--bcher-kva.example", ""),
    ],
)
def test_an_address_is_taken_apart(url: str, host: str, port: int, authority: str, path: str) -> None:
    origin = Origin(url)
    assert (origin.host, origin.port, origin.authority, origin.path) == (host, port, authority, path)


@pytest.mark.parametrize("url", ["ftp://x/", "api.example.com/v1", "http:///v1", "http://x:port/"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"address|[Pp]ort"):
        Origin(url)


@pytest.mark.parametrize("header", [("x-a", "b\r\nx-c: d"), ("x a", "b"), ("x-a", "b\0"), ("", "b"), ("x-a\n", "b")])
def test_a_header_cannot_smuggle_in_another(header: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="can't be sent"):
        head_of("POST", "/", dict([header]))


def test_a_path_is_quoted_once() -> None:
    assert head_of("GET", "/a b%20c?d=\r\né", {}) == b"GET /a%20b%20c?d=%0D%0A%C3%A9 HTTP/1.1\r\n"


def test_calls_one_after_the_other_share_a_connection() -> None:
    async def body(pool: Pool, fake: FakeUpstream) -> None:
        assert [await asked(pool) for _ in range(3)] == [b"ok"] * 3
        assert fake.connections == 1

    with_server(sending(OK), body)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        OK + OK,
        OK + b"HTTP/1.1 200 OK\r\nContent-",
        OK + b"\x00",
    ],
)
def test_a_connection_that_may_not_or_must_not_be_kept_is_not_used_again(answer: bytes) -> None:
    async def body(pool: Pool, fake: FakeUpstream) -> None:
        assert [await asked(pool) for _ in range(2)] == [b"ok"] * 2
        assert fake.connections == 2

    with_server(sending(answer), body)


def test_what_comes_unasked_ends_an_idle_connection() -> None:
    late: list[asyncio.Task[None]] = []

    async def handler(call: Call) -> None:
        async def more() -> None:
            await asyncio.sleep(0.02)
            await call.send(OK)

        await call.send(OK)
        late.append(asyncio.create_task(more()))

    async def body(pool: Pool, fake: FakeUpstream) -> None:
        await asked(pool)
        await late[0]
        [connection] = pool._idle
        await until_it(lambda: connection.closed)
        assert pool.take() is None

    with_server(handler, body)


def test_an_answer_without_a_length_lasts_until_the_connection_ends() -> None:
    async def body(pool: Pool, fake: FakeUpstream) -> None:
        assert [await asked(pool) for _ in range(2)] == [b"all of it"] * 2
        assert fake.connections == 2

    with_server(sending(b"HTTP/1.1 200 OK\r\n\r\nall of it", closing=True), body)


def test_words_in_advance_are_passed_over() -> None:
    early = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"

    async def body(pool: Pool, fake: FakeUpstream) -> None:
        connection, answer = await begun(pool)
        assert (answer.status, await whole(answer), "link" in answer.headers) == (200, b"ok", False)
        connection.release(60)

    with_server(sending(early * 3 + OK), body)


def test_trailers_change_no_header() -> None:
    told = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Late: 1\r\n\r\n"

    async def body(pool: Pool, fake: FakeUpstream) -> None:
        connection, answer = await begun(pool)
        assert (await whole(answer), sorted(answer.headers)) == (b"ok", ["transfer-encoding"])
        connection.release(60)

    with_server(sending(told), body)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"SSH-2.0-OpenSSH_9\r\n", "."),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n", "another protocol"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * (80 << 10), "64 KB"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * (20 << 10), "64 KB"),
        (b"HTTP/1.1 102 Wait\r\n\r\n" * (8 << 10), "64 KB"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Length: 2\r\n\r\nok", "compressed as br"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok", "."),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", "."),
    ],
)  # fmt: skip
def test_what_is_not_http_is_told_apart(data: bytes, says: str) -> None:
    async def body(pool: Pool, fake: FakeUpstream) -> None:
        with pytest.raises(NotHttp, match=says):
            await asked(pool)

    with_server(sending(data), body)


@pytest.mark.parametrize("framing", [b"zz\r\nok\r\n", b"2\r\nokay", b"1;" + b"x" * (80 << 10)])
def test_a_body_that_is_framed_wrongly_is_not_http(framing: bytes) -> None:
    async def body(pool: Pool, fake: FakeUpstream) -> None:
        connection, answer = await begun(pool)
        with pytest.raises(NotHttp):
            await whole(answer)
        connection.abort()

    with_server(sending(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + framing), body)


def test_what_came_before_the_end_of_a_connection_is_read_first() -> None:
    async def body(pool: Pool, fake: FakeUpstream) -> None:
        connection, answer = await begun(pool)
        await asyncio.sleep(0.05)
        assert await answer.read() == b"ok"
        with pytest.raises(BrokenOff):
            await answer.read()
        connection.abort()

    with_server(sending(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nok", closing=True), body)


def test_a_slow_reader_slows_the_server_down() -> None:
    sent = 0

    async def handler(call: Call) -> None:
        nonlocal sent
        await call.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(1024):
            await call.send(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
            sent += 1 << 16
        await call.send(b"0\r\n\r\n")

    async def body(pool: Pool, fake: FakeUpstream) -> None:
        connection, answer = await begun(pool)
        before = -1
        while sent != before:  # until the sockets' own buffers are full
            before = sent
            await asyncio.sleep(0.1)
        assert sent < 32 << 20
        assert len(await whole(answer)) == 64 << 20
        connection.release(60)

    with_server(handler, body)


def test_compressed_pieces_are_inflated_a_megabyte_at_a_time() -> None:
    bomb = gzip.compress(bytes(64 << 20))
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb)

    async def body(pool: Pool, fake: FakeUpstream) -> None:
        connection, answer = await begun(pool)
        sizes = []
        while piece := await answer.read():
            sizes.append(len(piece))
        assert (sum(sizes), max(sizes)) == (64 << 20, 1 << 20)
        connection.release(60)

    with_server(sending(head + bomb), body)


@pytest.mark.parametrize(("cut", "error"), [(-4, BrokenOff), (0, NotHttp)])
def test_what_is_compressed_wrongly_is_no_answer(cut: int, error: type[Exception]) -> None:
    data = gzip.compress(b"some answer")[:cut] or b"no gzip at all"
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(data)

    async def body(pool: Pool, fake: FakeUpstream) -> None:
        connection, answer = await begun(pool)
        with pytest.raises(error):
            await whole(answer)
        connection.abort()

    with_server(sending(head + data), body)


def test_who_waits_in_line_and_leaves_takes_no_place_along() -> None:
    async def body(pool: Pool, fake: FakeUpstream) -> None:
        first = await connected(pool)
        line = [asyncio.create_task(pool.connect()) for _ in range(3)]
        await asyncio.sleep(0)
        line[0].cancel()
        first.release(60)  # it is the second's turn, who leaves in that very moment
        line[1].cancel()
        third = await line[2]
        assert third is first
        third.release(60)
        assert await asked(pool) == b"ok"
        assert fake.connections == 1

    with_server(sending(OK), body, limit=1)


def test_a_connection_that_could_not_be_made_leaves_its_place_to_others() -> None:
    async def run() -> None:
        async with fake_upstream(sending(OK)) as fake:
            origin = Origin(fake.url)
        pool = Pool(origin, 1, 60)
        for _ in range(3):
            with pytest.raises(Unreachable):
                await pool.connect()

    asyncio.run(run())


def test_the_rest_of_an_answer_has_a_moment_to_arrive() -> None:
    answered = 0

    async def handler(call: Call) -> None:
        await call.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n")
        nonlocal answered
        answered += 1
        if answered < 3:
            await asyncio.sleep(0.02)
            await call.send(b"0\r\n\r\n")
        else:
            await call.until_gone()

    async def body(pool: Pool, fake: FakeUpstream) -> None:
        for _ in range(2):
            connection, answer = await begun(pool)
            assert await answer.read() == b"ok"
            connection.release(60)
        assert fake.connections == 1
        connection, answer = await begun(pool)
        connection.release(0.02)
        await fake.calls[2].gone.wait()
        assert pool.take() is None

    with_server(handler, body, limit=1)


def test_a_call_that_has_ended_cannot_end_the_next_one_on_its_connection() -> None:
    async def run() -> None:
        async with asyncio.timeout(60), fake_upstream(sending(OK)) as fake:
            upstream = Upstream("Somebody", fake.url, UpstreamConfig(max_connections=1), ManualClock())
            first, second = upstream.post("/x", b"{}"), upstream.post("/x", b"{}")
            await first.open()
            assert await first.body() == b"ok"
            first.close(whole=True)
            await second.open()
            first.interrupt(BrokenOff())  # type: ignore[arg-type] # whatever it is
            first.close()
            assert await second.body() == b"ok"
            second.close(whole=True)
            assert fake.connections == 1
            await upstream.close()

    asyncio.run(run())


def test_closing_ends_what_is_under_way() -> None:
    async def handler(call: Call) -> None:
        await call.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
        await call.until_gone()

    async def body(pool: Pool, fake: FakeUpstream) -> None:
        connection, answer = await begun(pool)
        reading = asyncio.create_task(answer.read())
        await asyncio.sleep(0)
        await pool.close()
        with pytest.raises(BrokenOff):
            await reading
        await fake.calls[0].gone.wait()
        connection.abort()

    with_server(handler, body)


def accepting(listener: socket.socket, context: ssl.SSLContext) -> None:
    """In a thread: one connection, until its other side leaves; each piece it sends is answered."""
    connection, _ = listener.accept()
    with connection, contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True) as tls:
        while tls.recv(1 << 16):
            tls.sendall(OK)


def test_a_connection_that_takes_too_long_is_given_up() -> None:
    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:  # which accepts nobody
            pool = Pool(Origin(f"https://127.0.0.1:{listener.getsockname()[1]}"), 1, 0.05)
            with pytest.raises(ConnectionTimeout):
                await pool.connect()

    asyncio.run(asyncio.wait_for(run(), 60))


@pytest.mark.parametrize("trusted", [True, False])
def test_a_server_must_prove_who_it_is(trusted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key.pem").write_text(KEY)
    (tmp_path / "certificate.pem").write_text(CERTIFICATE)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate.pem", tmp_path / "key.pem")
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))

    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            serving = asyncio.create_task(asyncio.to_thread(accepting, listener, context))
            pool = Pool(Origin(f"https://localhost:{listener.getsockname()[1]}"), 1, 60)
            if trusted:
                assert [await asked(pool) for _ in range(3)] == [b"ok"] * 3
            else:
                with pytest.raises(Untrusted, match="self-signed"):
                    await pool.connect()
            await pool.close()
            await serving

    asyncio.run(asyncio.wait_for(run(), 60))
