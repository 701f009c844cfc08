"""Anthropic as a backend, against a fake that writes what its documentation says, cut anywhere."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest

from millicent.backends.anthropic import AnthropicBackend
from millicent.backends.config import UpstreamConfig
from millicent.core.chunks import Chunk, End, FinishReason, Text
from millicent.core.clock import ManualClock
from millicent.core.errors import InvalidRequest, MillicentError, RateLimited, UpstreamError
from millicent.core.request import Extra, ImagePart, Message, Request, TextPart
from millicent.core.usage import Leaf, Provenance
from support import fake_anthropic as fake
from support.fake_upstream import Call, FakeUpstream, Handler, fake_upstream, split

KEY = "sk-ant-secret-1234567890"
ASKED = Request("rcpt_1", "anthropic.messages", "sonnet", messages=(Message("user", "Where?"),))
ANSWER = fake.answer([*fake.thought(0, "hm", "s"), *fake.text(1, "Tō", "kyō")])


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_ANTHROPIC_KEY", KEY)


def backend_at(url: str) -> AnthropicBackend:
    config = UpstreamConfig(base_url=url, api_key_env="TEST_ANTHROPIC_KEY")
    return AnthropicBackend("there", config, {"sonnet": "claude-sonnet-4-20250514"}, ManualClock())


def answered(
    handler: Handler, request: Request = ASKED, *, cancel: bool = False
) -> tuple[list[Text], End, FakeUpstream]:
    async def run() -> tuple[list[Text], End, FakeUpstream]:
        async with asyncio.timeout(20), fake_upstream(handler) as upstream:
            backend = backend_at(upstream.url)
            found: list[Chunk] = []
            try:
                going = (await backend.prepare(request)).start()
                async for chunk in going:
                    found.append(chunk)
                    if cancel:
                        going.cancel()
            finally:
                await backend.close()
            *texts, end = found
            assert isinstance(end, End)
            return [text for text in texts if isinstance(text, Text)], end, upstream

    return asyncio.run(run())


def streaming(data: bytes, size: int | None = None, *, end: bool = True) -> Handler:
    async def handler(call: Call) -> None:
        await call.stream([data] if size is None else split(data, size), end=end)
        if not end:
            call.writer.close()

    return handler


@pytest.mark.parametrize("size", [None, 1, 7])
def test_an_answer_is_read_wherever_it_is_cut(size: int | None) -> None:
    texts, end, upstream = answered(streaming(ANSWER, size))
    assert "".join(text.text for text in texts) == "Tōkyō"
    assert ("".join(text.reasoning for text in texts), "".join(text.signature for text in texts)) == ("hm", "s")
    assert (end.reason, end.error, end.upstream_id) == (FinishReason.STOP, None, "msg_01")
    assert end.usage.leaves[Leaf.INPUT_CACHE_WRITE_1H].tokens == 13
    (call,) = upstream.calls
    assert call.path == "/v1/messages"
    assert (call.headers["x-api-key"], call.headers["anthropic-version"]) == (KEY, "2023-06-01")
    assert call.json["model"] == "claude-sonnet-4-20250514"


def test_a_server_that_answers_whole_is_understood() -> None:
    async def handler(call: Call) -> None:
        content = [{"type": "text", "text": "Tokyo"}]
        await call.whole(json.dumps(fake.message(content, fake.USAGE | fake.ENDED, stop_reason="max_tokens")).encode())

    texts, end, _ = answered(handler)
    assert ("".join(text.text for text in texts), end.reason) == ("Tokyo", FinishReason.LENGTH)


def counted(handler: Handler) -> tuple[int, FakeUpstream]:
    async def run() -> tuple[int, FakeUpstream]:
        async with asyncio.timeout(20), fake_upstream(handler) as upstream:
            backend = backend_at(upstream.url)
            try:
                messages = (Message("system", "Be brief."), Message("user", "Where?"))
                asked = msgspec.structs.replace(ASKED, messages=messages)
                return await (await backend.prepare(asked)).count_input(), upstream
            finally:
                await backend.close()

    return asyncio.run(run())


def test_anthropic_counts_what_it_would_read() -> None:
    async def handler(call: Call) -> None:
        await call.whole(b'{"input_tokens": 2095}')

    tokens, upstream = counted(handler)
    assert tokens == 2095
    (call,) = upstream.calls
    assert call.path == "/v1/messages/count_tokens"
    assert call.headers["x-api-key"] == KEY
    assert set(call.json) == {"model", "system", "messages"}


@pytest.mark.parametrize(("body", "status"), [(b"{}", "200 OK"), (b"[", "200 OK"), (b"{}", "529 Overloaded")])
def test_a_count_that_makes_no_sense_is_an_error(body: bytes, status: str) -> None:
    async def handler(call: Call) -> None:
        await call.whole(body, status=status)

    with pytest.raises(UpstreamError):
        counted(handler)


def test_betas_go_as_a_header() -> None:
    asked = msgspec.structs.replace(ASKED, extra={"anthropic-beta": Extra('"a-1,b-2"', None)})
    _, _, upstream = answered(streaming(ANSWER), asked)
    assert upstream.calls[0].headers["anthropic-beta"] == "a-1,b-2"
    assert "anthropic-beta" not in upstream.calls[0].json


def error_body(kind: str) -> bytes:
    return json.dumps(
        {"type": "error", "error": {"type": kind, "message": f"It said {KEY}."}, "request_id": "r"}
    ).encode()


@pytest.mark.parametrize(
    ("status", "kind", "error", "retryable"),
    [
        ("400 Bad Request", "invalid_request_error", InvalidRequest, False),
        ("401 Unauthorized", "authentication_error", UpstreamError, False),
        ("404 Not Found", "not_found_error", UpstreamError, False),
        ("429 Too Many Requests", "rate_limit_error", RateLimited, True),
        ("500 Internal Server Error", "api_error", UpstreamError, True),
        ("529 Overloaded", "overloaded_error", UpstreamError, True),
    ],
)
def test_errors_are_classified(status: str, kind: str, error: type[MillicentError], retryable: bool) -> None:
    async def handler(call: Call) -> None:
        await call.whole(error_body(kind), status=status, more="Retry-After: 3\r\n")

    _, end, _ = answered(handler)
    assert end.reason is FinishReason.ERROR
    assert type(end.error) is error
    assert end.error.retryable is retryable
    assert KEY not in end.error.message
    assert end.usage.leaves == {}


def test_an_error_in_the_middle_is_one_and_what_was_read_counts() -> None:
    begun = fake.answer(fake.text(0, "To"))
    broken = (
        begun[: begun.index(b"event: message_delta")]
        + b"event: error\ndata: "
        + error_body("overloaded_error")
        + b"\n\n"
    )
    texts, end, _ = answered(streaming(broken))
    assert "".join(text.text for text in texts) == "To"
    assert isinstance(end.error, UpstreamError)
    assert end.error.retryable
    assert end.usage.leaves[Leaf.INPUT_FRESH].tokens == 12
    assert end.usage.leaves[Leaf.OUTPUT_TEXT].provenance is Provenance.ESTIMATED


@pytest.mark.parametrize("kept", [30, 200, len(ANSWER) - 40])
def test_an_answer_that_breaks_off_is_an_error(kept: int) -> None:
    for end_well in (True, False):
        _, end, _ = answered(streaming(ANSWER[:kept], end=end_well))
        assert isinstance(end.error, UpstreamError)
        assert "\n" not in end.error.message


def test_what_a_picture_took_is_unknown_where_nothing_was_counted() -> None:
    picture = Message("user", (TextPart("What is it?"), ImagePart("image/png", "AAAA")))
    _, end, _ = answered(
        streaming(b": nothing yet\n\n", end=False), msgspec.structs.replace(ASKED, messages=(picture,))
    )
    assert end.usage.leaves[Leaf.INPUT_IMAGE].tokens is None
    assert end.usage.input_tokens is None


@pytest.mark.parametrize(
    "data", [b"data: nonsense\n\n", b"data: [1]\n\n", b'data: {"type": "message_delta", "usage": 7}\n\n']
)
def test_garbage_is_an_error(data: bytes) -> None:
    _, end, _ = answered(streaming(data))
    assert isinstance(end.error, UpstreamError)


def test_a_cancelled_answer_says_so_and_counts_what_came() -> None:
    async def handler(call: Call) -> None:
        await call.stream([ANSWER[: ANSWER.index(b"event: message_delta")]], end=False)
        await call.until_gone()

    _, end, _ = answered(handler, cancel=True)
    assert (end.reason, end.error) == (FinishReason.CANCELLED, None)
    assert end.usage.leaves[Leaf.INPUT_CACHE_READ].tokens == 7


def test_a_refusal_costs_no_call() -> None:
    asked: Any = msgspec.structs.replace(ASKED, dialect="openai.chat", choices=2)
    with pytest.raises(InvalidRequest, match="`n` is not something that Anthropic"):
        answered(streaming(ANSWER), asked)
