"""Gemini behind the gateway: streams cut anywhere, and ways to go wrong that each give one clear error."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest

from millicent.backends.config import UpstreamConfig
from millicent.backends.elsewhere import Elsewhere, open_backend
from millicent.backends.gemini import GeminiBackend
from millicent.core.chunks import CallPiece, End, FinishReason, Text, merge_texts
from millicent.core.clock import ManualClock
from millicent.core.errors import ConfigError, InvalidRequest, MillicentError, ModelNotFound, RateLimited, UpstreamError
from millicent.core.request import Embedding, ImagePart, Limits, Message, Request
from millicent.core.usage import Leaf, Provenance
from support import fake_gemini as fake
from support.fake_upstream import Call, FakeUpstream, Handler, fake_upstream, split

KEY = "AIza-secret-1234567890"
ASKED = Request("rcpt_1", "openai.chat", "far", messages=(Message("user", "Rome?"),), limits=Limits(50))
SAID = fake.answer(
    fake.thought("Hm."), fake.text("Un ✓ moment."), fake.called("weather", {"city": "Rōma"}, thoughtSignature="seal")
)


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_GEMINI_KEY", KEY)


def opened(url: str, **config: Any) -> GeminiBackend:
    upstream = UpstreamConfig(base_url=url, api_key_env="TEST_GEMINI_KEY", **config)
    return GeminiBackend("there", upstream, {"far": "gemini-2.5-pro"}, ManualClock())


def answered(handler: Handler, request: Request = ASKED, **config: Any) -> tuple[list[Text], End, FakeUpstream]:
    async def run() -> tuple[list[Text], End, FakeUpstream]:
        async with asyncio.timeout(20), fake_upstream(handler) as server:
            backend = opened(server.url, **config)
            try:
                *texts, end = [chunk async for chunk in (await backend.prepare(request)).start()]
            finally:
                await backend.close()
            assert isinstance(end, End)
            return [text for text in texts if isinstance(text, Text)], end, server

    return asyncio.run(run())


def streaming(data: bytes, size: int, *, end: bool = True) -> Handler:
    async def handler(call: Call) -> None:
        await call.stream(split(data, size), end=end)
        if not end:
            call.writer.close()

    return handler


def whole(body: Any, status: str = "200 OK", kind: str = "application/json") -> Handler:
    async def handler(call: Call) -> None:
        await call.whole(json.dumps(body).encode(), kind, status)

    return handler


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100_000])
def test_a_stream_is_the_same_however_it_is_cut(size: int) -> None:
    texts, end, server = answered(streaming(SAID, size))
    (text,) = merge_texts(texts)
    assert (text.reasoning, text.text, text.signature) == ("Hm.", "Un ✓ moment.", "seal")
    assert text.calls == (CallPiece(0, "weather", '{"city": "Rōma"}'),)
    assert (end.reason, end.served_model, end.upstream_id) == (FinishReason.TOOL_CALLS, "gemini-2.5-pro", "r-1")
    assert (end.usage.input_tokens, end.usage.output_tokens) == (310, 42)
    (call,) = server.calls
    assert call.path == "/v1/models/gemini-2.5-pro:streamGenerateContent?alt=sse"
    assert call.headers["x-goog-api-key"] == KEY
    assert KEY not in call.path


def test_an_answer_that_comes_whole_is_understood() -> None:
    texts, end, _ = answered(whole(fake.chunk(fake.text("Ciao."), reason="MAX_TOKENS", usageMetadata=fake.USAGE)))
    assert ([text.text for text in texts], end.reason) == (["Ciao."], FinishReason.LENGTH)


def test_what_is_withheld_is_no_error() -> None:
    texts, end, _ = answered(streaming(fake.events({"promptFeedback": {"blockReason": "SAFETY"}}), 9))
    assert (texts, end.reason, end.error) == ([], FinishReason.CONTENT_FILTER, None)
    texts, end, _ = answered(streaming(fake.answer(fake.text("Well"), reason="SAFETY"), 9))
    assert ("".join(text.text for text in texts), end.reason) == ("Well", FinishReason.CONTENT_FILTER)


@pytest.mark.parametrize(
    ("handler", "kind", "code"),
    [
        (streaming(fake.events(fake.chunk(fake.text("Well"))), 9), UpstreamError, "upstream_garbled"),
        (streaming(SAID[:-200], 9, end=False), UpstreamError, "upstream_broke_off"),
        (streaming(b"data: {\r\n\r\n", 9), UpstreamError, "upstream_garbled"),
        (streaming(b'data: {"candidates": 3}\r\n\r\n', 9), UpstreamError, "upstream_garbled"),
        (streaming(fake.answer(fake.text("Well"), reason="MALFORMED_FUNCTION_CALL"), 9), UpstreamError,
         "upstream_garbled"),
        (streaming(fake.events(fake.chunk(fake.text("Well")), {"error": {"code": 503, "message": "overloaded"}}), 9),
         UpstreamError, "upstream_failed"),
        (whole({"error": {"code": 400, "message": "no", "status": "INVALID_ARGUMENT"}}, "400 Bad Request"),
         InvalidRequest, None),
        (whole({"error": {"code": 429, "message": "slow"}}, "429 Too Many Requests"), RateLimited,
         "rate_limit_exceeded"),
        (whole({"error": {"code": 403, "message": KEY}}, "403 Forbidden"), UpstreamError, "upstream_unauthorized"),
        (whole("x", kind="text/html"), UpstreamError, "upstream_garbled"),
        (whole({}), UpstreamError, "upstream_garbled"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_told_in_one_line(handler: Handler, kind: type[MillicentError], code: str | None) -> None:
    _, end, _ = answered(handler)
    assert end.reason is FinishReason.ERROR
    assert type(end.error) is kind
    assert code is None or end.error.code == code
    assert end.error.message.startswith("Gemini (placement `there`) ")
    assert "\n" not in end.error.message
    assert KEY not in end.error.message


def test_what_is_not_counted_there_is_estimated() -> None:
    body = {"candidates": [{"content": {"parts": [{"text": "word " * 8}]}, "finishReason": "STOP"}]}
    _, end, _ = answered(streaming(fake.events(body), 9))
    assert end.usage.leaves[Leaf.OUTPUT_TEXT].provenance is Provenance.ESTIMATED
    assert (end.usage.input_tokens, end.usage.output_tokens) == (6, 10)
    picture = msgspec.structs.replace(ASKED, messages=(Message("user", (ImagePart("image/png", "AAAA"),)),))
    _, end, _ = answered(streaming(fake.events(body), 9), picture)
    assert end.usage.input_tokens is None


def test_a_cancelled_call_leaves_at_once_and_tells_what_came() -> None:
    async def run() -> tuple[End, bool]:
        async def handler(call: Call) -> None:
            await call.stream([fake.events(fake.chunk(fake.text("Well")))], end=False)
            await call.until_gone()

        async with asyncio.timeout(20), fake_upstream(handler) as server:
            backend = opened(server.url)
            running = (await backend.prepare(ASKED)).start()
            chunks = []
            async for chunk in running:
                chunks.append(chunk)
                running.cancel()
            await server.calls[0].gone.wait()
            await backend.close()
            end = chunks[-1]
            assert isinstance(end, End)
            return end, server.calls[0].gone.is_set()

    end, gone = asyncio.run(run())
    assert gone
    assert (end.reason, end.usage.output_tokens) == (FinishReason.CANCELLED, 1)


def test_how_it_is_configured() -> None:
    place = Elsewhere("there", UpstreamConfig(), "google", "standard", {"far": "gemini-2.5-pro"}, {})
    backend = open_backend(place, ManualClock())
    assert isinstance(backend, GeminiBackend)
    assert backend.upstream.base_url == "https://generativelanguage.googleapis.com/v1beta"
    assert backend.models() == ("far",)
    with pytest.raises(ModelNotFound, match="far"):
        asyncio.run(backend.prepare(msgspec.structs.replace(ASKED, model="nix")))
    with pytest.raises(ConfigError, match="service"):
        open_backend(msgspec.structs.replace(place, service="flex"), ManualClock())


def test_vectors_come_with_an_estimate_where_no_tokens_are_told() -> None:
    request = Request("rcpt_1", "openai.embeddings", "far", embedding=Embedding(("x" * 40, "y" * 8)))

    async def run() -> tuple[list[Any], str]:
        async with fake_upstream(whole({"embeddings": [{"values": [1.0]}, {"values": [0.5]}]})) as server:
            backend = opened(server.url)
            call = await backend.prepare(request)
            assert call.max_output_tokens == 0
            chunks = [chunk async for chunk in call.start()]
            await backend.close()
            return chunks, server.calls[0].path

    chunks, path = asyncio.run(run())
    *vectors, end = chunks
    assert path.endswith(":batchEmbedContents")
    assert [vector.index for vector in vectors] == [0, 1]
    assert (end.reason, end.usage.input_tokens) == (FinishReason.STOP, 12)
    assert end.usage.leaves[Leaf.INPUT_FRESH].provenance is Provenance.ESTIMATED
