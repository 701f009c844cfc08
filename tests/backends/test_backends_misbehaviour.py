"""What any server elsewhere may do to us, whatever its dialect: one clear error, or the answer; and what was used until
then."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from millicent.backends.anthropic import AnthropicBackend
from millicent.backends.config import UpstreamConfig
from millicent.backends.gemini import GeminiBackend
from millicent.backends.openai_compatible import OpenAIBackend
from millicent.core.chunks import Chunk, End, FinishReason, Text
from millicent.core.clock import ManualClock
from millicent.core.errors import InvalidRequest, MillicentError, RateLimited, UpstreamError, UpstreamTimeout
from millicent.core.request import Limits, Message, Request
from millicent.core.usage import Leaf, Provenance
from support import fake_anthropic, fake_gemini, fake_upstream
from support.fake_upstream import Call, Handler, chunk

KEY = "sk-secret-1234567890"
ASKED = Request("rcpt_1", "openai.chat", "far", messages=(Message("user", "Rome?"),), limits=Limits(50))
Provider = OpenAIBackend | AnthropicBackend | GeminiBackend
MODELS = {"far": "there"}


def openai(config: UpstreamConfig, name: Any = "openai") -> Provider:
    return OpenAIBackend("there", name, config, MODELS, ManualClock())


def ollama(config: UpstreamConfig) -> Provider:
    return openai(config, "ollama")


def anthropic(config: UpstreamConfig) -> Provider:
    return AnthropicBackend("there", config, MODELS, ManualClock())


def gemini(config: UpstreamConfig) -> Provider:
    return GeminiBackend("there", config, MODELS, ManualClock())


Opened = Callable[[UpstreamConfig], Provider]
ANSWERS: dict[Opened, bytes] = {
    openai: fake_upstream.said("Rōma", "."),
    ollama: fake_upstream.said("Rōma", ".", usage=None),
    anthropic: fake_anthropic.answer(fake_anthropic.text(0, "Rōma", ".")),
    gemini: fake_gemini.answer(fake_gemini.text("Rōma"), fake_gemini.text(".")),
}
PROVIDERS = pytest.mark.parametrize("opened", ANSWERS)


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)


async def _ask(backend: Provider) -> tuple[str, End]:
    chunks: list[Chunk] = [each async for each in (await backend.prepare(ASKED)).start()]
    end = chunks.pop()
    assert isinstance(end, End)
    assert not any(isinstance(each, End) for each in chunks)
    return "".join(each.text for each in chunks if isinstance(each, Text)), end


def answered(opened: Opened, handler: Handler, times: int = 1, **config: Any) -> list[tuple[str, End]]:
    async def run() -> list[tuple[str, End]]:
        async with asyncio.timeout(60), fake_upstream.fake_upstream(handler) as fake:
            backend = opened(UpstreamConfig(base_url=fake.url, api_key_env="TEST_KEY", **config))
            try:
                return [await _ask(backend) for _ in range(times)]
            finally:
                await backend.close()

    return asyncio.run(run())


def told(end: End) -> MillicentError:
    assert end.reason is FinishReason.ERROR
    assert end.error is not None
    assert "(placement `there`)" in end.error.message
    assert end.error.message.isprintable()
    assert KEY not in end.error.message
    return end.error


def sending(head: str, body: bytes = b"") -> Handler:
    async def handler(call: Call) -> None:
        await call.send(head.replace("\n", "\r\n").encode() + b"\r\n" + body)
        call.writer.close()

    return handler


@PROVIDERS
@pytest.mark.parametrize("framed", [True, False])
def test_an_answer_that_stops_at_any_byte_says_what_came_and_what_it_took(opened: Opened, framed: bool) -> None:
    data = ANSWERS[opened]
    cuts = iter(range(len(data) + 1))

    async def handler(call: Call) -> None:
        piece = data[: next(cuts)]
        if framed:  # as chunks, of which the last is missing
            await call.stream([piece], end=False)
        else:  # until the connection ends
            await call.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + piece)
        call.writer.close()

    ends = answered(opened, handler, len(data) + 1)
    came = ""
    for text, end in ends:
        assert text.startswith(came)
        came = text
        assert end.usage.tokens(Leaf.INPUT_FRESH)
        if end.reason is FinishReason.ERROR:
            assert told(end).retryable
            assert end.usage.output_tokens or not text
        else:
            assert (end.reason, text) == (FinishReason.STOP, "Rōma.")
    assert ends[0][1].reason is FinishReason.ERROR
    assert ends[-1][1].reason is FinishReason.STOP


STREAM = "Content-Type: text/event-stream\n"
TYPED = "HTTP/1.1 200 OK\n" + STREAM


@PROVIDERS
@pytest.mark.parametrize(
    ("before", "packed"),
    [
        ("HTTP/1.1 100 Continue\n\nHTTP/1.1 103 Early Hints\nLink: </x>\n\n" + TYPED, bytes),
        ("HTTP/1.0 200 OK\n" + STREAM, bytes),
        ("HTTP/1.1 200 \nContent-Type: Text/Event-Stream; charset=UTF-8\n", bytes),
        (TYPED + "Content-Encoding: gzip\n", gzip.compress),
        (TYPED + "Content-Encoding: deflate\n", zlib.compress),
        (TYPED + "Connection: close\nX: " + "y" * 30_000 + "\n", bytes),
    ],
)
def test_what_is_odd_but_http_is_read(opened: Opened, before: str, packed: Callable[[bytes], bytes]) -> None:
    ((text, end),) = answered(opened, sending(before, packed(ANSWERS[opened])))
    assert (text, end.reason) == ("Rōma.", FinishReason.STOP)


@PROVIDERS
@pytest.mark.parametrize(
    ("head", "body", "says"),
    [
        ("HTTP/1.1 204 No Content\n", b"", "(HTTP 204)"),
        ("HTTP/1.1 301 x\nLocation: http://127.0.0.1:1/\nContent-Length: 0\n", b"", "redirects elsewhere"),
        ("HTTP/1.1 308 x\nLocation: /\nContent-Length: 0\n", b"", "redirects elsewhere"),
        ("HTTP/1.1 200 OK\nContent-Length: 2\n", b"{}", "answered with nothing known"),
        ("HTTP/1.1 200 OK\nContent-Type: text/html\nContent-Length: 2\n", b"hi", "answered with text/html"),
        ("HTTP/1.1 200 OK\nContent-Type: application/json\nContent-Length: 9\n", b"{}", "broke off"),
        ("HTTP/1.1 200 OK\nContent-Type: application/json\nContent-Length: 1\n", b"{}", "no answer"),
        ("HTTP/1.1 200 OK\nContent-Type: application/json\nContent-Length: 2\n", b"{}", "without an answer"),
        (TYPED + "Content-Length: 3\nContent-Length: 5\n", b"abc", "not HTTP"),
        (TYPED + "Transfer-Encoding: chunked\nContent-Length: 5\n", b"abc", "not HTTP"),
        (TYPED + "Transfer-Encoding: chunked\n", b"zz\r\nabc", "not HTTP"),
        (TYPED + "Transfer-Encoding: chunked\n", b"5\r\ndat", "broke off"),
        (TYPED + "Content-Encoding: gzip\n", b"data: {}\n\n", "compressed wrongly"),
        (TYPED + "Content-Encoding: br\n", b"data: {}\n\n", "compressed as br"),
        (TYPED, b"data: {not json}\n\n", "no answer"),
        (TYPED, b"data: \xff\n\n", "no answer"),
        (TYPED, b"data: " + b"[" * 100_000 + b"\n\n", "no answer"),
        (TYPED, b": only a comment\n\n", "without an answer"),
        (TYPED + "X: " + "y" * 70_000 + "\n", b"", "not HTTP"),
        ("SSH-2.0-OpenSSH_9.6\n", b"", "not HTTP"),
        ("HTTP/2 200\n", b"", "not HTTP"),
        ("HTTP/1.1 101 Switching Protocols\nUpgrade: websocket\nConnection: Upgrade\n", b"", "another protocol"),
    ],
)
def test_what_is_no_answer_is_one_clear_error(opened: Opened, head: str, body: bytes, says: str) -> None:
    ((text, end),) = answered(opened, sending(head, body))
    assert says in told(end).message
    assert text == ""


REFUSALS: list[tuple[int, type[MillicentError], bool]] = [
    (400, InvalidRequest, False), (401, UpstreamError, False), (402, UpstreamError, False),
    (403, UpstreamError, False), (404, UpstreamError, False), (405, UpstreamError, False),
    (408, UpstreamTimeout, True), (409, UpstreamError, False), (413, InvalidRequest, False),
    (418, UpstreamError, False), (422, InvalidRequest, False), (429, RateLimited, True), (500, UpstreamError, True),
    (502, UpstreamError, True), (503, UpstreamError, True), (504, UpstreamTimeout, True), (529, UpstreamError, True),
    (599, UpstreamError, True),
]  # fmt: skip
COMPLAINTS = [
    b'{"error": {"message": "because", "type": "t", "code": "c"}}',
    b'{"type": "error", "error": {"type": "t", "message": "because"}}',
    b'[{"error": {"code": 1, "message": "because", "status": "X", "details": []}}]',
    b'{"error": "because"}', b"<html>because</html>", b"", b'{"error": {}}', b'{"error": null}', b"[" * 70_000,
]  # fmt: skip


@PROVIDERS
@pytest.mark.parametrize(("status", "kind", "retryable"), REFUSALS)
def test_a_refusal_is_of_its_own_kind_and_has_cost_nothing(
    opened: Opened, status: int, kind: type[MillicentError], retryable: bool
) -> None:
    said = iter(COMPLAINTS)

    async def handler(call: Call) -> None:
        await call.whole(next(said), status=f"{status} x", more="Retry-After: 7\r\n")

    for text, end in answered(opened, handler, len(COMPLAINTS)):
        error = told(end)
        assert (type(error), error.retryable, text, end.usage.leaves) == (kind, retryable, "", {})
        assert error.retry_after_s == (7 if status in {429, 500, 502, 503, 529, 599} else None)


@PROVIDERS
@pytest.mark.parametrize("before", ["", "HTTP/1.1 200 OK\n", TYPED + "\n", TYPED + "\n: waiting\n\n"])
def test_a_server_that_says_nothing_more_is_given_up_in_time(opened: Opened, before: str) -> None:
    async def handler(call: Call) -> None:
        await call.send(before.replace("\n", "\r\n").encode())
        await call.until_gone()

    ((_, end),) = answered(opened, handler, first_token_timeout_s=0.2)
    assert isinstance(told(end), UpstreamTimeout)
    # Nothing where a slow machine hadn't even connected by then.
    assert {count.provenance for count in end.usage.leaves.values()} <= {Provenance.ESTIMATED}


def test_what_comes_after_the_end_is_nobodys() -> None:
    extra = fake_upstream.events(chunk({"content": "more"}), done=False)
    for opened in (openai, anthropic):
        ((text, end),) = answered(opened, sending(TYPED, ANSWERS[opened] + extra))
        assert (text, end.reason, end.usage.tokens(Leaf.INPUT_FRESH) or 0) == (
            "Rōma.",
            FinishReason.STOP,
            11 if opened is openai else 12,
        )


@pytest.mark.parametrize(
    ("usages", "leaves"),
    [
        ([{"prompt_tokens": 9, "completion_tokens": 2}, {"prompt_tokens": 9, "completion_tokens": 4}], (9, 4)),
        ([{"prompt_tokens": 9, "completion_tokens": 4}, None], (9, 4)),
        ([{}], (6, 1)),
        ([{"prompt_tokens": 9}], (9, 1)),
        ([{"completion_tokens": 4}], (6, 4)),
    ],
)  # fmt: skip
def test_usage_that_comes_twice_early_or_in_part_is_that_which_was_told_last(
    usages: list[dict[str, Any] | None], leaves: tuple[int, int]
) -> None:
    first, *later = usages
    bodies = [chunk({"content": "Roma"}, usage=first), chunk({}, "stop"), *(chunk(usage=each) for each in later)]
    data = fake_upstream.events(*bodies)
    ((_, end),) = answered(openai, sending(TYPED, data))
    assert (end.usage.input_tokens, end.usage.output_tokens) == leaves


@pytest.mark.parametrize(
    ("bodies", "reason"),
    [
        ([chunk({"content": "x"}, "some_new_reason")], FinishReason.STOP),
        ([chunk({"content": "x"})], FinishReason.STOP),  # and [DONE]
        ([chunk({"content": "x"}), {"choices": []}, chunk({}, "length")], FinishReason.LENGTH),
        ([chunk({"content": "x"}) | {"id": "a"}, chunk({}, "stop") | {"id": "b"}], FinishReason.STOP),
        ([chunk({"content": "x"}, index=1)], FinishReason.ERROR),
        ([{"choices": []}], FinishReason.ERROR),
        ([], FinishReason.ERROR),
    ],
)  # fmt: skip
def test_an_answer_is_one_although_its_form_is_odd(bodies: list[dict[str, Any]], reason: FinishReason) -> None:
    ((text, end),) = answered(openai, sending(TYPED, fake_upstream.events(*bodies)))
    assert (end.reason, text) == (reason, "" if reason is FinishReason.ERROR else "x")


def test_arguments_that_are_no_json_are_handed_on_as_they_came() -> None:
    call = {"index": 0, "id": "c", "function": {"name": "f", "arguments": '{"a": '}}
    data = fake_upstream.events(chunk({"tool_calls": [call]}), chunk({}, "tool_calls"))

    async def run() -> list[Chunk]:
        async with fake_upstream.fake_upstream(sending(TYPED, data)) as fake:
            backend = openai(UpstreamConfig(base_url=fake.url))
            try:
                return [each async for each in (await backend.prepare(ASKED)).start()]
            finally:
                await backend.close()

    text, end = asyncio.run(run())
    assert isinstance(text, Text)
    assert [piece.arguments for piece in text.calls] == ['{"a": ']
    assert isinstance(end, End)
    assert end.reason is FinishReason.TOOL_CALLS
    assert msgspec.json.encode(text)
