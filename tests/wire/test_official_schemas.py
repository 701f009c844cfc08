"""Whatever is answered is what the makers' own packages say that it is, to the letter: more strictly than they read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import anthropic.types
import msgspec
import ollama
import openai.types
import openai.types.chat
import openai.types.responses
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from millicent.core.chunks import CallPiece, Candidate, FinishReason, Text, TokenLogprob, Vector, merge_texts
from millicent.core.errors import InvalidRequest, MillicentError, RateLimited, Unauthorized, Unavailable
from millicent.core.usage import Provenance, Usage
from millicent.server.families import family_of
from millicent.server.inference import DIALECTS, Dialect
from millicent.wire import anthropic_common, ollama_answers, ollama_common, ollama_requests, openai_common
from millicent.wire.receipts import encode
from support import receipts

CHAT, TEXT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
OLLAMA_CHAT, OLLAMA_GENERATE = "/api/chat", "/api/generate"
WHOLE: dict[str, TypeAdapter[Any]] = {
    CHAT: TypeAdapter(openai.types.chat.ChatCompletion),
    TEXT: TypeAdapter(openai.types.Completion),
    RESPONSES: TypeAdapter(openai.types.responses.Response),
    MESSAGES: TypeAdapter(anthropic.types.Message),
    OLLAMA_CHAT: TypeAdapter(ollama.ChatResponse),
    OLLAMA_GENERATE: TypeAdapter(ollama.GenerateResponse),
}
EVENTS: dict[str, TypeAdapter[Any]] = WHOLE | {
    CHAT: TypeAdapter(openai.types.chat.ChatCompletionChunk),
    RESPONSES: TypeAdapter(openai.types.responses.ResponseStreamEvent),
    MESSAGES: TypeAdapter(anthropic.types.RawMessageStreamEvent),
}
ASKED: dict[str, dict[str, Any]] = {
    TEXT: {"prompt": "x"}, RESPONSES: {"input": "x"}, OLLAMA_GENERATE: {"prompt": "x"}, MESSAGES: {"max_tokens": 9},
}  # fmt: skip
ADDRESSES = pytest.mark.parametrize("address", WHOLE)
KINDS = st.sampled_from(["text", "reasoning", "call", "sealed", "stop", "nothing"])
ENDS = st.sampled_from([each for each in FinishReason if each not in {FinishReason.CANCELLED, FinishReason.ERROR}])
USAGE = Usage.of(
    Provenance.REPORTED, input_fresh=3, input_cache_read=4, input_cache_write_5m=5, input_cache_write_1h=6,
    input_image=7, input_audio=8, output_text=9, output_reasoning=10, output_audio=11,
)  # fmt: skip


def shape_of(address: str, **more: Any) -> tuple[Dialect, Any]:
    """As a request to this address would set it."""
    body = {"model": "tiny"} | (ASKED.get(address) or {}) | more
    if address in {CHAT, MESSAGES, OLLAMA_CHAT}:
        body["messages"] = [{"role": "user", "content": "x"}]
    dialect = DIALECTS[address]
    return dialect, dialect.decode(json.dumps(body).encode(), {}, "rcpt_1")[1]


def said(pieces: Sequence[tuple[str, str]]) -> list[Text]:
    texts, calls = [], 0
    for kind, content in pieces:
        match kind:
            case "text":
                texts.append(Text(content, 1))
            case "reasoning":
                texts.append(Text("", 1, reasoning=content, signature="seal"))
            case "call":
                texts.append(Text("", 1, calls=(CallPiece(calls, "f", '{"a": '), CallPiece(calls, "", "1}"))))
                calls += 1
            case "sealed":
                texts.append(Text("", 1, sealed=content))
            case "stop":
                texts.append(Text("", 0, stop=content))
            case _:
                texts.append(Text("", 0))
    return texts


def events(stream: bytes) -> list[Any]:
    lines = [line for line in stream.decode().split("\n") if line]
    if lines[0][:1] == "{":
        return [json.loads(line) for line in lines]
    return [json.loads(line[6:]) for line in lines if line.startswith("data: ") and line != "data: [DONE]"]


def check(adapter: TypeAdapter[Any], body: object) -> None:
    adapter.validate_json(json.dumps(body), strict=True)


@ADDRESSES
@given(st.lists(st.tuples(KINDS, st.text(min_size=1, max_size=9)), max_size=9), ENDS, st.booleans())
def test_answers_and_events_are_as_their_makers_describe_them(
    address: str, pieces: list[tuple[str, str]], reason: FinishReason, reported: bool
) -> None:
    dialect, shape = shape_of(address)
    if address == TEXT and reason is FinishReason.TOOL_CALLS:
        return  # nobody can call there
    closed = receipts.settled()
    if reported:
        closed = msgspec.structs.replace(closed, usage=USAGE)
    texts = said(pieces)
    merged = merge_texts([*texts, Text("", 0)], in_order=dialect.in_order)
    check(WHOLE[address], json.loads(encode(dialect.answer_body(closed, merged, [reason], shape))))
    dialect, shape = shape_of(address, stream=True)
    assert dialect.stream is not None
    writer = dialect.stream(shape)
    opened = receipts.running()
    told = [writer.start(opened), *(writer.text(opened, text) for text in texts), writer.end(closed, [reason])]
    for event in events(b"".join(told)):
        if address == TEXT:
            # Null until the end, as OpenAI sends it, whatever its package says.
            for choice in event["choices"]:
                choice["finish_reason"] = choice["finish_reason"] or "stop"
        check(EVENTS[address], event)


@pytest.mark.parametrize("address", [CHAT, TEXT])
@given(st.lists(st.tuples(st.integers(0, 2), st.binary(max_size=3), st.floats(max_value=0)), max_size=6))
def test_choices_and_log_probabilities_are_as_openai_describes_them(
    address: str, tokens: list[tuple[int, bytes, float]]
) -> None:
    dialect, shape = shape_of(address, n=3, logprobs=True if address == CHAT else 1)
    texts = [
        Text("x", 1, choice, (TokenLogprob(content, logprob, (Candidate(b"\xff", logprob),)),))
        for choice, content, logprob in tokens
    ]
    merged = merge_texts([*texts, *(Text("", 0, choice) for choice in range(3))])
    reasons = [FinishReason.STOP, FinishReason.LENGTH, FinishReason.CONTENT_FILTER]
    body = json.loads(encode(dialect.answer_body(receipts.settled(), merged, reasons, shape)))
    check(WHOLE[address], body)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert dialect.stream is not None
    writer = dialect.stream(shape)
    opened = receipts.running()
    told = [writer.start(opened), *(writer.text(opened, text) for text in texts)]
    for event in events(b"".join([*told, writer.end(receipts.settled(), reasons)])):
        for choice in event["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        check(EVENTS[address], event)


@pytest.mark.parametrize("form", ["float", "base64"])
def test_vectors_are_as_openai_and_ollama_describe_them(form: str) -> None:
    text = "".join(Vector(index, bytes(8), 1).line for index in range(2))
    closed = receipts.settled()
    dialect, shape = shape_of("/v1/embeddings", input=["a", "b"], encoding_format=form)
    body = json.loads(encode(dialect.answer_body(closed, [Text(text, 0)], [FinishReason.STOP], shape)))
    if form == "float":  # the package decodes the other before it looks at the type
        check(TypeAdapter(openai.types.CreateEmbeddingResponse), body)
    assert len(body["data"]) == 2
    dialect, shape = shape_of("/api/embed", input=["a", "b"])
    answer = dialect.answer_body(closed, [Text(text, 0)], [FinishReason.STOP], shape)
    check(TypeAdapter(ollama.EmbedResponse), json.loads(encode(answer)))


ERRORS: list[MillicentError] = [
    InvalidRequest("m", param="a[0].b", code="c"), Unauthorized("m"), RateLimited("m", retry_after_s=3),
    Unavailable("m"), MillicentError("m"),
]  # fmt: skip


@pytest.mark.parametrize(("address", "kind"), [(OLLAMA_CHAT, "ollama.chat"), (OLLAMA_GENERATE, "ollama.generate")])
def test_loads_are_as_ollama_describes_them(address: str, kind: str) -> None:
    load = ollama_requests.Load(kind, "m", stream=True, unloads=True)
    check(WHOLE[address], json.loads(ollama_common.line(ollama_answers.load_body(load, "m", 0))))


@pytest.mark.parametrize("error", ERRORS)
def test_errors_are_as_their_makers_describe_them(error: MillicentError) -> None:
    def body(path: str) -> Any:
        return family_of({"path": path, "headers": []}).error_body(error, "rcpt_1")

    check(TypeAdapter(openai.types.ErrorObject), body(CHAT)["error"])
    check(TypeAdapter(anthropic.types.ErrorResponse), body(MESSAGES))
    assert isinstance(body(OLLAMA_CHAT)["error"], str)
    for family in (openai_common.FAMILY, anthropic_common.FAMILY, ollama_common.FAMILY):
        (event,) = events(family.error_event(error, "rcpt_1"))
        assert "error" in event


def test_models_are_as_their_makers_describe_them() -> None:
    found = anthropic_common.model_list(["a", "b"], 1_767_225_600, {})
    for each in found["data"]:
        TypeAdapter(anthropic.types.ModelInfo).validate_json(json.dumps(each))
