"""Requests as Gemini takes them, and answers as it writes them."""

from __future__ import annotations

import contextlib
import json
import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.core.chunks import CallPiece, FinishReason, Text, TokenLogprob, merge_texts
from millicent.core.errors import InvalidRequest, RateLimited, UpstreamError
from millicent.core.request import (
    Embedding,
    Extra,
    ImagePart,
    Limits,
    Message,
    OtherPart,
    OutputFormat,
    Request,
    Sampling,
    TextPart,
    Thinking,
    Thought,
    Tool,
    ToolCall,
)
from millicent.core.usage import Leaf, Provenance, Usage
from millicent.wire import gemini_embeddings
from millicent.wire.gemini_upstream import encode
from millicent.wire.gemini_upstream_answers import AnswerReader
from millicent.wire.upstream_errors import complaint_in, error_of
from support import fake_gemini as fake

HELLO = (Message("user", "hi"),)
WEATHER = Tool("weather", "of a city", '{"type":"object","properties":{"city":{"type":"string"}}}')
OLD, NEW = "gemini-2.5-pro", "gemini-3-pro-preview"


def sent(model: str = OLD, **fields: Any) -> dict[str, Any]:
    request = Request(**({"id": "rcpt_1", "dialect": "openai.chat", "model": "far", "messages": HELLO} | fields))
    found = encode(request, model, "It")
    assert found.path == f"/models/{model}:streamGenerateContent?alt=sse"
    body = json.loads(found.body)
    assert isinstance(body, dict)
    return body


def test_a_plain_request_says_only_what_was_asked() -> None:
    assert sent() == {"contents": [{"role": "user", "parts": [{"text": "hi"}]}]}
    assert encode(Request("r", "openai.chat", "m", messages=HELLO), "models/a b", "It").path.startswith(
        "/models/a%20b:"
    )


def test_how_an_answer_is_drawn_and_ends_is_told() -> None:
    config = sent(
        sampling=Sampling(0.5, 0.9, 40, seed=7, presence_penalty=0.5, frequency_penalty=-0.5, logprobs=3),
        limits=Limits(99, ("END",)), choices=2, output_format=OutputFormat("json_schema", '{"type":"object"}'),
    )["generationConfig"]  # fmt: skip
    assert config == {
        "temperature": 0.5, "topP": 0.9, "topK": 40, "seed": 7, "presencePenalty": 0.5, "frequencyPenalty": -0.5,
        "responseLogprobs": True, "logprobs": 3, "maxOutputTokens": 99, "stopSequences": ["END"], "candidateCount": 2,
        "responseMimeType": "application/json", "responseJsonSchema": {"type": "object"},
    }  # fmt: skip
    assert sent(restated=("temperature",))["generationConfig"] == {"temperature": 1.0}
    assert sent(output_format=OutputFormat("json_object"))["generationConfig"] == {
        "responseMimeType": "application/json"
    }


@pytest.mark.parametrize(
    ("model", "thinking", "config"),
    [
        (OLD, Thinking("low"), {"thinkingBudget": 1024, "includeThoughts": True}),
        (OLD, Thinking("none"), {"thinkingBudget": 0}),
        (OLD, Thinking(budget_tokens=99), {"thinkingBudget": 99, "includeThoughts": True}),
        (OLD, Thinking(), {"includeThoughts": True}),
        (NEW, Thinking("low"), {"thinkingLevel": "low", "includeThoughts": True}),
        (NEW, Thinking("none"), None),
    ],
)
def test_how_much_to_think_is_told_in_the_models_own_terms(model: str, thinking: Thinking, config: Any) -> None:
    assert sent(model, thinking=thinking).get("generationConfig", {}).get("thinkingConfig") == config


@pytest.mark.parametrize(
    ("fields", "config"),
    [
        ({}, {"mode": "AUTO"}),
        ({"tool_choice": "none"}, {"mode": "NONE"}),
        ({"tool_choice": "required"}, {"mode": "ANY"}),
        ({"tool_choice": "required", "tool_name": "weather"}, {"mode": "ANY", "allowedFunctionNames": ["weather"]}),
        ({"tools": (msgspec.structs.replace(WEATHER, strict=True),)}, {"mode": "VALIDATED"}),
    ],
)
def test_tools_are_declared_and_chosen(fields: Any, config: Any) -> None:
    body = sent(**({"tools": (WEATHER,)} | fields))
    assert body["tools"] == [
        {"functionDeclarations": [
            {"name": "weather", "description": "of a city", "parametersJsonSchema": json.loads(WEATHER.parameters)}
        ]}
    ]  # fmt: skip
    assert body["toolConfig"] == {"functionCallingConfig": config}


def test_a_conversation_is_told_turn_by_turn() -> None:
    calls = (ToolCall("c1", "weather", '{"city": "Rome"}'), ToolCall("c2", "weather", ""))
    image = ImagePart("image/png", "AAAA", detail="low")
    body = sent(
        NEW,
        messages=(
            Message("system", "Be brief."),
            Message("user", (TextPart("Look", "5m"), image)),
            Message("assistant", "So.", tool_calls=calls, thoughts=(Thought("Hm.", "seal"),)),
            Message("tool", "sunny", tool_call_id="c1"),
            Message("tool", "no such city", tool_call_id="c2", failed=True),
            Message("assistant", "", tool_calls=(ToolCall("c3", "weather", "{}"),)),
            Message("tool", "rain", tool_call_id="c3"),
            Message("assistant", "Rain."),
            Message("assistant", "", thoughts=(Thought("", "last"),)),
            Message("user", "Thanks."),
        ),
    )
    call = {"id": "c1", "name": "weather", "args": {"city": "Rome"}}
    assert body["systemInstruction"] == {"parts": [{"text": "Be brief."}]}
    assert body["contents"] == [
        {"role": "user", "parts": [{"text": "Look"}, {"inlineData": {"mimeType": "image/png", "data": "AAAA"}}]},
        {"role": "model", "parts": [
            {"text": "So."}, {"functionCall": call, "thoughtSignature": "seal"},
            {"functionCall": {"id": "c2", "name": "weather", "args": {}}},
        ]},
        {"role": "user", "parts": [
            {"functionResponse": {"id": "c1", "name": "weather", "response": {"output": "sunny"}}},
            {"functionResponse": {"id": "c2", "name": "weather", "response": {"error": "no such city"}}},
        ]},
        {"role": "model", "parts": [
            {"functionCall": {"id": "c3", "name": "weather", "args": {}},
             "thoughtSignature": "skip_thought_signature_validator"},
        ]},
        {"role": "user", "parts": [
            {"functionResponse": {"id": "c3", "name": "weather", "response": {"output": "rain"}}},
        ]},
        {"role": "model", "parts": [{"text": "Rain."}, {"text": "", "thoughtSignature": "last"}]},
        {"role": "user", "parts": [{"text": "Thanks."}]},
    ]  # fmt: skip
    old = sent(messages=(*HELLO, Message("assistant", "", tool_calls=calls), Message("tool", "x", tool_call_id="c1")))
    assert "thoughtSignature" not in json.dumps(old)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"sampling": Sampling(min_p=0.1)}, "min_p"),
        ({"sampling": Sampling(typical_p=0.5)}, "typical_p"),
        ({"sampling": Sampling(repetition_penalty=2)}, "repetition_penalty"),
        ({"sampling": Sampling(logit_bias={1: 1.0})}, "logit_bias"),
        ({"sampling": Sampling(seed=2**40)}, "seed"),
        ({"limits": Limits(stop=("a", "b", "c", "d", "e", "f"))}, "stop"),
        ({"limits": Limits(min_tokens=1)}, "min_tokens"),
        ({"limits": Limits(stop_tokens=(1,))}, "stop_token_ids"),
        ({"limits": Limits(ignore_eos=True)}, "ignore_eos"),
        ({"choices": 9}, "n"),
        ({"priority": 1}, "priority"),
        ({"truncate_prompt_tokens": -1}, "truncate_prompt_tokens"),
        ({"tools": (WEATHER,), "parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"output_format": OutputFormat("regex", "a+")}, "response_format"),
        ({"thinking": Thinking("xhigh")}, "reasoning_effort"),
        ({"messages": None, "prompt": "hi"}, "prompt"),
        ({"messages": (Message("user", "hi", name="ada"),)}, "messages[0].name"),
        ({"messages": (Message("system", "hi"),)}, "messages"),
        ({"messages": (Message("user", (ImagePart(url="https://example.com/a.png"),)),)}, "messages"),
        ({"messages": (Message("user", (OtherPart("input_audio", "{}", "messages[0].content[0]"),)),)}, "messages"),
        ({"messages": (Message("tool", "x", tool_call_id="nix"),)}, "messages"),
        ({"messages": (Message("assistant", "", thoughts=(Thought(sealed="x"),)),)}, "messages"),
        ({"extra": {"top_a": Extra("1", "`top_a` is unknown: remove it.")}}, "top_a"),
        ({"continues": True}, "messages"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(fields: Any, word: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        sent(**fields)
    assert (caught.value.param or "").startswith(word)
    assert "\n" not in caught.value.message


def read(*bodies: Any, choices: int = 1) -> tuple[list[Text], AnswerReader]:
    reader = AnswerReader(choices)
    texts = [text for body in bodies for text in reader.take(json.dumps(body).encode())]
    return texts, reader


def test_an_answer_with_all_there_is() -> None:
    texts, reader = read(
        fake.chunk(fake.thought("Hm.")),
        fake.chunk(fake.text("One "), fake.text("moment.")),
        fake.chunk(fake.called("weather", {"city": "Rome"}, thoughtSignature="seal"), fake.called("now", {})),
        fake.chunk(reason="STOP", usageMetadata=fake.USAGE),
    )
    first, second = merge_texts(texts, in_order=True)
    assert (first.reasoning, first.text, first.calls) == ("Hm.", "One moment.", ())
    assert second.signature == "seal"
    assert second.calls == (CallPiece(0, "weather", '{"city": "Rome"}'), CallPiece(1, "now", "{}"))
    assert (reader.ended, reader.reasons) == (True, (FinishReason.TOOL_CALLS,))
    assert (reader.served_model, reader.id) == ("gemini-2.5-pro", "r-1")
    # 310 read with what tools brought: 250 of fresh pictures, 40 cached; thoughts stand beside what was said.
    assert reader.usage == Usage.of(
        Provenance.REPORTED, input_fresh=20, input_cache_read=40, input_image=250, output_text=12, output_reasoning=30
    )


def test_counts_that_are_left_out_are_zero_and_an_answer_without_any_has_none() -> None:
    _, reader = read(fake.chunk(fake.text("x"), reason="STOP", usageMetadata={"promptTokenCount": 5}))
    assert reader.usage == Usage.of(Provenance.REPORTED, input_fresh=5, input_cache_read=0, output_text=0)
    _, reader = read({"candidates": [{"content": {"parts": [{"text": "x"}]}}]})
    assert reader.usage is None


def test_what_broke_off_has_its_output_from_characters() -> None:
    _, reader = read(fake.chunk(fake.text("word " * 20)))
    assert reader.usage is not None
    assert reader.usage.leaves[Leaf.OUTPUT_TEXT].provenance is Provenance.ESTIMATED
    assert reader.usage.output_tokens == 25


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("STOP", FinishReason.STOP), ("MAX_TOKENS", FinishReason.LENGTH), ("SAFETY", FinishReason.CONTENT_FILTER),
        ("RECITATION", FinishReason.CONTENT_FILTER), ("PROHIBITED_CONTENT", FinishReason.CONTENT_FILTER),
    ],
)  # fmt: skip
def test_why_an_answer_ended(said: str, reason: FinishReason) -> None:
    _, reader = read(fake.chunk(fake.text("x"), reason=said))
    assert (reader.reasons, reader.failed) == ((reason,), None)


def test_a_prompt_that_is_blocked_and_an_answer_that_is_none() -> None:
    _, reader = read({"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 5}}, choices=2)
    assert (reader.ended, reader.reasons) == (True, (FinishReason.CONTENT_FILTER,) * 2)
    _, reader = read(fake.chunk(reason="MALFORMED_FUNCTION_CALL"))
    assert (reader.ended, reader.failed) == (False, "MALFORMED_FUNCTION_CALL")


def test_several_choices_are_told_apart() -> None:
    texts, reader = read(
        fake.chunk(fake.text("a"), reason="STOP"), fake.chunk(fake.text("b"), reason="MAX_TOKENS", index=1), choices=2
    )
    assert [(text.choice, text.text) for text in texts] == [(0, "a"), (1, "b")]
    assert reader.reasons == (FinishReason.STOP, FinishReason.LENGTH)
    with pytest.raises(msgspec.DecodeError):
        read(fake.chunk(fake.text("x"), index=1))


def test_log_probabilities_are_read() -> None:
    body = fake.chunk(fake.text("x"))
    body["candidates"][0]["logprobsResult"] = {"chosenCandidates": [{"token": "x", "logProbability": -0.5}]}
    (text,), _ = read(body)
    assert text.logprobs == (TokenLogprob(b"x", -0.5),)


@given(st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(
        ["candidates", "content", "parts", "text", "functionCall", "name", "args", "finishReason", "usageMetadata"]
    ), inner, max_size=3),
    max_leaves=12,
))  # fmt: skip
def test_whatever_comes_is_read_or_no_answer(body: Any) -> None:
    with contextlib.suppress(msgspec.DecodeError):
        read(body)


def test_googles_complaints_are_ours() -> None:
    bad_key = {"error": {"code": 400, "message": "API key not valid.", "status": "INVALID_ARGUMENT", "details": [
        {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}]}}  # fmt: skip
    error = error_of("It", 400, complaint_in(json.dumps([bad_key]).encode()))
    assert isinstance(error, UpstreamError)
    assert error.code == "upstream_unauthorized"
    quota = {"error": {"code": 429, "message": "Slow down.", "status": "RESOURCE_EXHAUSTED", "details": [
        {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "21.3s"}]}}  # fmt: skip
    error = error_of("It", 429, complaint_in(quota))
    assert isinstance(error, RateLimited)
    assert error.retry_after_s == 22
    long = {"error": {"code": 400, "message": "The input token count (2) exceeds the maximum number of tokens (1)."}}
    assert error_of("It", 400, complaint_in(long)).code == "context_length_exceeded"


def embedding(**fields: Any) -> Request:
    return Request("rcpt_1", "openai.embeddings", "small", embedding=Embedding(**fields))


def test_texts_to_embed_go_in_one_batch() -> None:
    sent = gemini_embeddings.encode(embedding(inputs=("a", "b"), dimensions=3), "gemini-embedding-001", "Gemini")
    assert sent.path == "/models/gemini-embedding-001:batchEmbedContents"
    assert json.loads(sent.body) == {
        "requests": [
            {
                "model": "models/gemini-embedding-001",
                "content": {"parts": [{"text": text}]},
                "outputDimensionality": 3,
            }
            for text in ("a", "b")
        ]
    }


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"inputs": ((1, 2),)}, "input"),
        ({"inputs": ("a",) * 101}, "input"),
        ({"inputs": ("a",), "truncate_tokens": 5}, "truncate_prompt_tokens"),
    ],
)
def test_what_it_cannot_embed_is_refused_by_name(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        gemini_embeddings.encode(embedding(**fields), "gemini-embedding-001", "Gemini")
    assert caught.value.param == word


def test_vectors_come_in_order_as_unit_vectors_with_the_count_that_is_told() -> None:
    body = {"embeddings": [{"values": [3.0, 4.0]}, {"values": [0.0, 0.0]}], "usageMetadata": {"promptTokenCount": 7}}
    read = gemini_embeddings.VectorsReader(json.dumps(body).encode(), 2)
    assert [struct.unpack("<2f", each.values) for each in read.vectors] == [
        (pytest.approx(0.6), pytest.approx(0.8)), (0.0, 0.0),
    ]  # fmt: skip
    assert read.usage == Usage.of(Provenance.REPORTED, input_fresh=7)
    del body["usageMetadata"]
    assert gemini_embeddings.VectorsReader(json.dumps(body).encode(), 2).usage is None
    for wrong, inputs in ((body, 3), ({"embeddings": [{"values": []}]}, 1), ({"embeddings": [{"values": [1e999]}]}, 1)):
        with pytest.raises(msgspec.DecodeError):
            gemini_embeddings.VectorsReader(json.dumps(wrong).encode(), inputs)
