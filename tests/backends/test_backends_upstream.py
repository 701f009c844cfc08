"""Servers elsewhere that misbehave: each way gives one clear error in time, and says what was used until then."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from millicent.backends.config import UpstreamConfig
from millicent.backends.openai_compatible import OpenAIBackend
from millicent.core.chunks import Chunk, End, FinishReason, Text
from millicent.core.clock import ManualClock
from millicent.core.errors import InvalidRequest, MillicentError, RateLimited, UpstreamError, UpstreamTimeout
from millicent.core.request import Limits, Message, Request
from millicent.core.usage import Count, Leaf, Provenance
from millicent.text import load_tokenizer
from support.fake_upstream import USAGE, Call, FakeUpstream, Handler, chunk, events, fake_upstream, said, split
from support.tiny_models import TinyLlama, write_tiny_model

KEY = "sk-secret-1234567890"
ASKED = Request("rcpt_1", "openai.chat", "small", messages=(Message("user", "What is the capital of Japan?"),))
FULL = UpstreamConfig()


def backend_at(url: str, config: UpstreamConfig = FULL, server: Any = "openai") -> OpenAIBackend:
    config = msgspec.structs.replace(config, base_url=url, api_key_env="TEST_UPSTREAM_KEY")
    return OpenAIBackend("there", server, config, {"small": "gpt-4o-mini"}, ManualClock())


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_UPSTREAM_KEY", KEY)


async def asked(url: str, config: UpstreamConfig = FULL, request: Request = ASKED) -> tuple[list[Chunk], End]:
    backend = backend_at(url, config)
    try:
        *chunks, end = [chunk async for chunk in (await backend.prepare(request)).start()]
    finally:
        await backend.close()
    assert isinstance(end, End)
    return chunks, end


def answered(
    handler: Handler, config: UpstreamConfig = FULL, request: Request = ASKED
) -> tuple[str, End, FakeUpstream]:
    """The text, the end, and the server as it was left."""

    async def run() -> tuple[str, End, FakeUpstream]:
        async with asyncio.timeout(60), fake_upstream(handler) as fake:
            chunks, end = await asked(fake.url, config, request)
            return "".join(each.text for each in chunks if isinstance(each, Text)), end, fake

    return asyncio.run(run())


def complaint(end: End, kind: type[MillicentError] = UpstreamError) -> MillicentError:
    assert end.reason is FinishReason.ERROR
    assert type(end.error) is kind
    assert end.error.message.startswith("OpenAI (placement `there`) ")
    assert "\n" not in end.error.message
    assert KEY not in end.error.message
    return end.error


def streaming(data: bytes, size: int | None = None, *, end: bool = True) -> Handler:
    async def handler(call: Call) -> None:
        await call.stream([data] if size is None else split(data, size), end=end)
        if not end:
            call.writer.close()

    return handler


def whole(body: bytes, status: str = "200 OK", kind: str = "application/json", more: str = "") -> Handler:
    async def handler(call: Call) -> None:
        await call.whole(body, kind, status, more)

    return handler


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64])
def test_a_stream_is_the_same_however_it_is_cut(size: int) -> None:
    text, end, _ = answered(streaming(said("Tōkyō", " 東京", " 🗼"), size))
    assert text == "Tōkyō 東京 🗼"
    assert (end.reason, end.served_model, end.upstream_id) == ("stop", "gpt-4o-mini-2024-07-18", "chatcmpl-9")
    assert {leaf.value: count.tokens for leaf, count in end.usage.leaves.items()} == {
        "input_fresh": 11, "input_cache_read": 8, "output_text": 6, "output_reasoning": 4,
    }  # fmt: skip


def test_an_answer_that_comes_whole_is_understood() -> None:
    body = chunk(None, usage=USAGE) | {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Tōkyō"}, "finish_reason": "length"}],
    }
    text, end, _ = answered(whole(json.dumps(body).encode()))
    assert (text, end.reason, end.usage.output_tokens) == ("Tōkyō", "length", 10)


def test_an_answer_that_is_compressed_all_the_same_is_read() -> None:
    async def handler(call: Call) -> None:
        assert call.headers["accept-encoding"] == "identity"
        await call.stream([gzip.compress(said("Tōkyō"))], more="Content-Encoding: gzip\r\n")

    assert answered(handler)[0] == "Tōkyō"


def test_a_connection_is_used_again_and_no_more_than_allowed_are_open() -> None:
    async def run() -> int:
        async with fake_upstream(streaming(said("a"))) as fake:
            backend = backend_at(fake.url, UpstreamConfig(max_connections=2))
            for _ in range(3):
                await asyncio.gather(*(drained(backend) for _ in range(4)))
                await asyncio.sleep(0.01)
            await backend.close()
            return fake.connections

    assert asyncio.run(run()) <= 2


async def drained(backend: OpenAIBackend) -> End:
    *_, end = [chunk async for chunk in (await backend.prepare(ASKED)).start()]
    assert isinstance(end, End)
    assert end.error is None
    return end


def test_without_usage_it_is_estimated_and_never_zero() -> None:
    _, end, _ = answered(streaming(said("Tōkyō is the", " capital of Japan.", usage=None)))
    known = {leaf.value: (count.tokens, count.provenance) for leaf, count in end.usage.leaves.items()}
    assert known == {"input_fresh": (12, Provenance.ESTIMATED), "output_text": (8, Provenance.ESTIMATED)}


def test_without_usage_it_is_counted_where_there_is_a_tokenizer(tmp_path: Path) -> None:
    tiny = write_tiny_model(tmp_path / "tiny", TinyLlama())

    async def run() -> End:
        async with fake_upstream(streaming(said("Tōkyō is the", " capital of Japan.", usage=None))) as fake:
            config = UpstreamConfig(base_url=fake.url)
            models, clock = {"small": "gpt-4o-mini"}, ManualClock()
            backend = OpenAIBackend("there", "vllm", config, models, clock, tokenizers={"small": tiny})
            call = await backend.prepare(ASKED)
            *_, end = [chunk async for chunk in call.start()]
            await backend.close()
            assert isinstance(end, End)
            assert end.usage.leaves[Leaf.INPUT_FRESH].tokens == call.input_tokens
            return end

    tokenizer = load_tokenizer(tiny, ManualClock())
    end = asyncio.run(run())
    assert end.usage.leaves[Leaf.OUTPUT_TEXT] == Count(
        len(tokenizer.encode("Tōkyō is the capital of Japan.")) - len(tokenizer.encode("")), Provenance.COUNTED
    )


def test_a_zero_that_is_reported_is_a_zero() -> None:
    _, end, _ = answered(streaming(said("a", usage={"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3})))
    assert end.usage.leaves[Leaf.OUTPUT_TEXT] == (msgspec.structs.replace(end.usage.leaves[Leaf.INPUT_FRESH], tokens=0))


def test_usage_on_a_chunk_with_choices_counts() -> None:
    _, end, _ = answered(streaming(events(chunk({"content": "a"}), chunk({}, "stop", usage=USAGE))))
    assert end.usage.input_tokens == 19


ERRORS: list[tuple[str, bytes, type[MillicentError], str, bool]] = [
    ("400 Bad Request", b'{"error": {"message": "no such field"}}', InvalidRequest, "no such field", False),
    ("422 Unprocessable Entity", b'{"detail": [{"msg": "bad"}]}', InvalidRequest, "bad", False),
    ("401 Unauthorized", b'{"error": {"message": "No key: sk-secret-12"}}', UpstreamError, "api_key_env", False),
    ("403 Forbidden", b"", UpstreamError, "api_key_env", False),
    ("404 Not Found", b'{"error": {"message": "no such model"}}', UpstreamError, "no such model", False),
    ("408 Request Timeout", b"", UpstreamTimeout, "408", True),
    ("429 Too Many Requests", b'{"error": {"message": "slow down"}}', RateLimited, "slow down", True),
    ("500 Internal Server Error", b"<html>oops</html>", UpstreamError, "HTTP 500", True),
    ("502 Bad Gateway", b"", UpstreamError, "HTTP 502", True),
    ("503 Service Unavailable", b'{"error": "loading", "error_type": "x"}', UpstreamError, "loading", True),
    ("529 Overloaded", b'{"type": "error", "error": {"message": "busy"}}', UpstreamError, "busy", True),
]  # fmt: skip


@pytest.mark.parametrize(("status", "body", "kind", "says", "retryable"), ERRORS)
def test_an_error_there_is_told_in_our_terms(
    status: str, body: bytes, kind: type[MillicentError], says: str, retryable: bool
) -> None:
    _, end, _ = answered(whole(body, status))
    error = complaint(end, kind)
    assert says in error.message
    assert error.retryable is retryable
    assert "sk-secret-12" not in error.message
    assert end.usage.leaves == {}


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("Retry-After: 7", 7),
        ("Retry-After: 1.2", 2),
        ("Retry-After: Thu, 01 Jan 2026 00:00:30 GMT", 30),
        ("Retry-After: Wed, 31 Dec 2025 00:00:00 GMT", 0),
        ("retry-after-ms: 1500", 2),
        ("Retry-After: soon", None),
        ("Retry-After: nan", None),
        ("X: y", None),
    ],
)
def test_retry_after_is_read_in_both_forms(header: str, seconds: int | None) -> None:
    _, end, _ = answered(whole(b"{}", "429 Too Many Requests", more=f"{header}\r\n"))
    assert complaint(end, RateLimited).retry_after_s == seconds


@pytest.mark.parametrize(
    "body",
    [
        b'{"error": {"message": "m", "code": "context_length_exceeded"}}',
        b'{"error": {"message": "This model\'s maximum context length is 8192 tokens", "type": "BadRequestError"}}',
        b'{"error": {"code": 400, "message": "m", "type": "exceed_context_size_error"}}',
    ],
)
def test_a_context_that_is_too_long_has_its_own_code(body: bytes) -> None:
    _, end, _ = answered(whole(body, "400 Bad Request"))
    assert complaint(end, InvalidRequest).code == "context_length_exceeded"


async def _hang(call: Call) -> None:
    await call.until_gone()


async def _hang_in_the_middle(call: Call) -> None:
    await call.stream([events(chunk({"content": "a"}), done=False)], end=False)
    await call.until_gone()


async def _only_comments(call: Call) -> None:
    await call.stream([b": waiting\n\n"], end=False)
    for _ in range(100):
        await call.send(b"b\r\n: waiting\n\n\r\n")
        await asyncio.sleep(0.05)


async def _drop(call: Call) -> None:
    call.writer.close()


async def _drop_in_the_middle(call: Call) -> None:
    await call.stream([events(chunk({"content": "a"}), done=False)], end=False)
    call.writer.close()


async def _lie_about_length(call: Call) -> None:
    await call.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n{}")
    call.writer.close()


async def _redirect(call: Call) -> None:
    await call.send(b"HTTP/1.1 307 x\r\nLocation: http://127.0.0.1:1/v1\r\nContent-Length: 0\r\n\r\n")


async def _no_http(call: Call) -> None:
    await call.send(b"\x00\x01 what is this\r\n\r\n")
    call.writer.close()


async def _long_line(call: Call) -> None:
    await call.stream([], end=False)
    for _ in range(40):
        await call.send(b"80000\r\n" + b"x" * 0x80000 + b"\r\n")


MISBEHAVIOUR: list[tuple[Handler, type[MillicentError], str, str]] = [
    (_hang, UpstreamTimeout, "within 0.3 s (first_token_timeout_s)", ""),
    (_hang_in_the_middle, UpstreamTimeout, "within 0.3 s (between_tokens_timeout_s)", "a"),
    (_only_comments, UpstreamTimeout, "within 0.3 s (first_token_timeout_s)", ""),
    (_drop, UpstreamError, "broke off", ""),
    (_drop_in_the_middle, UpstreamError, "broke off", "a"),
    (_lie_about_length, UpstreamError, "broke off", ""),
    (_redirect, UpstreamError, "redirects elsewhere", ""),
    (_no_http, UpstreamError, "not HTTP", ""),
    (_long_line, UpstreamError, "more than 16777216 bytes", ""),
    (whole(b"<html>Welcome</html>", kind="text/html"), UpstreamError, "answered with text/html", ""),
    (whole(b'{"error": {"message": "quota", "code": "rate_limit_exceeded"}}'), RateLimited, "quota", ""),
    (whole(b"{}"), UpstreamError, "without an answer", ""),
    (whole(b"{"), UpstreamError, "no answer", ""),
    (streaming(b"data: {not json}\n\n"), UpstreamError, "no answer", ""),
    (streaming(b'data: {"choices": [{"index": 0, "delta": {"content": "a'), UpstreamError, "no answer", ""),
    (streaming(b'data: {"choices": 7}\n\n'), UpstreamError, "no answer", ""),
    (streaming(b'data: {"choices": [{"delta": {"content": "\xff"}}]}\n\n'), UpstreamError, "no answer", ""),
    (streaming(events(chunk({"content": "a"}), done=False)), UpstreamError, "in the middle", "a"),
    (streaming(b""), UpstreamError, "without an answer", ""),
    (streaming(events(chunk({"content": "a"}), {"error": {"message": "oh", "code": 502}})), UpstreamError, "oh", "a"),
    (streaming(events(chunk({"content": "a"}), chunk({}, "error"))), UpstreamError, "gave up", "a"),
    (streaming(events({"error": {"message": "too fast", "type": "rate_limit_error"}})), RateLimited, "too fast", ""),
]  # fmt: skip


@pytest.mark.parametrize(("handler", "kind", "says", "text"), MISBEHAVIOUR)
def test_misbehaviour_is_one_clear_error_and_what_came_is_kept(
    handler: Handler, kind: type[MillicentError], says: str, text: str
) -> None:
    # Limits only where they are what is looked at, so that a slow machine changes nothing.
    hangs: dict[Handler, UpstreamConfig] = {
        _hang: UpstreamConfig(first_token_timeout_s=0.3),
        _only_comments: UpstreamConfig(first_token_timeout_s=0.3),
        _hang_in_the_middle: UpstreamConfig(between_tokens_timeout_s=0.3),
    }
    came, end, _ = answered(handler, hangs.get(handler, FULL))
    assert says in complaint(end, kind).message
    assert came == text
    if text:
        assert end.usage.leaves[Leaf.OUTPUT_TEXT].tokens == 1


def test_nobody_there_can_be_tried_again_and_has_cost_nothing() -> None:
    async def run() -> End:
        async with fake_upstream(_drop) as fake:
            url = fake.url
        return (await asked(url))[1]

    end = asyncio.run(run())
    assert "can't be reached" in complaint(end).message
    assert end.usage.leaves == {}


def test_all_of_it_has_a_time_limit_too() -> None:
    async def drip(call: Call) -> None:
        await call.stream([], end=False)
        while True:
            piece = events(chunk({"content": "a"}), done=False)
            await call.send(b"%x\r\n%s\r\n" % (len(piece), piece))
            await asyncio.sleep(0.05)

    text, end, _ = answered(drip, UpstreamConfig(timeout_s=0.4))
    assert "within 0.4 s (timeout_s)" in complaint(end, UpstreamTimeout).message
    assert set(text) <= {"a"}


def test_what_goes_wrong_after_the_answer_does_not_undo_it() -> None:
    async def handler(call: Call) -> None:
        await call.stream([events(chunk({"content": "a"}), chunk({}, "stop"), done=False)], end=False)
        call.writer.close()

    text, end, _ = answered(handler)
    assert (text, end.reason, end.error) == ("a", "stop", None)


Cancelling = Callable[[Any, FakeUpstream], Awaitable[End]]


async def _before_it_begins(run: Any, fake: FakeUpstream) -> End:
    run.cancel()
    [end] = [chunk async for chunk in run]
    assert fake.calls == []
    assert isinstance(end, End)
    return end


async def _before_the_head(run: Any, fake: FakeUpstream) -> End:
    asyncio.get_running_loop().call_later(0.05, run.cancel)
    [end] = [chunk async for chunk in run]
    assert isinstance(end, End)
    return end


async def _in_the_middle(run: Any, fake: FakeUpstream) -> End:
    ends = []
    async for each in run:
        if isinstance(each, End):
            ends.append(each)
        run.cancel()
        run.cancel()
    [end] = ends
    assert end.usage.leaves[Leaf.OUTPUT_TEXT].tokens == 1
    return end


@pytest.mark.parametrize(
    ("handler", "cancelling"),
    [(_hang, _before_it_begins), (_hang, _before_the_head), (_hang_in_the_middle, _in_the_middle)],
)
def test_cancelling_leaves_the_upstream_at_once(handler: Handler, cancelling: Cancelling) -> None:
    async def run() -> None:
        async with asyncio.timeout(60), fake_upstream(handler) as fake:
            backend = backend_at(fake.url)
            end = await cancelling((await backend.prepare(ASKED)).start(), fake)
            assert (end.reason, end.error) == (FinishReason.CANCELLED, None)
            for call in fake.calls:
                await call.gone.wait()
            await backend.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("base", "version", "path"),
    [
        ("", "2024-10-21", "/openai/deployments/gpt-4o-mini/chat/completions?api-version=2024-10-21"),
        ("", None, "/openai/v1/chat/completions"),
        ("/openai/v1", None, "/openai/v1/chat/completions"),
    ],
)
def test_azure_has_its_own_addresses_and_header(base: str, version: str | None, path: str) -> None:
    async def run() -> Call:
        async with fake_upstream(streaming(said("a"))) as fake:
            url = fake.url.removesuffix("/v1") + base
            await drained(backend := backend_at(url, UpstreamConfig(api_version=version), "azure"))
            await backend.close()
            return fake.calls[0]

    call = asyncio.run(run())
    assert (call.path, call.headers["api-key"]) == (path, KEY)
    assert "authorization" not in call.headers


def test_a_header_from_the_environment_goes_along_and_is_in_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_HEADER", "very-private")

    async def echo(call: Call) -> None:
        body = {"error": {"message": f"what is {call.headers['x-private']}?"}}
        await call.whole(json.dumps(body).encode(), status="400 Bad Request")

    _, end, _ = answered(echo, UpstreamConfig(headers_env={"X-Private": "TEST_HEADER"}))
    assert complaint(end, InvalidRequest).message.endswith("what is ***?")


def test_limits_and_keys_go_along() -> None:
    request = msgspec.structs.replace(ASKED, limits=Limits(max_tokens=7, stop=("\n",)))
    _, _, fake = answered(streaming(said("a")), request=request)
    [call] = fake.calls
    assert call.headers["authorization"] == f"Bearer {KEY}"
    assert (call.json["max_completion_tokens"], call.json["stop"]) == (7, ["\n"])
