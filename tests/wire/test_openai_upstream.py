"""Requests as each server takes them, and answers as each writes them."""

from __future__ import annotations

import json
import struct
from decimal import Decimal
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.backends.config import ServerName
from millicent.core.chunks import CallPiece, Candidate, FinishReason, Text, TokenLogprob, merge_texts
from millicent.core.errors import InvalidRequest
from millicent.core.money import Money
from millicent.core.prompts import Prompt, Segment
from millicent.core.request import (
    Attribution,
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
from millicent.core.usage import Provenance, Usage
from millicent.wire import openai_chat
from millicent.wire.openai_servers import SERVERS
from millicent.wire.openai_upstream import encode
from millicent.wire.openai_upstream_answers import AnswerReader, VectorsReader, _Usage, usage_of
from support.fake_upstream import USAGE, chunk

HELLO = (Message("user", "hi"),)
WEATHER = Tool("weather", "of a city", '{"type":"object","properties":{"city":{"type":"string"}}}')


def request(**fields: Any) -> Request:
    return Request(**({"id": "rcpt_1", "dialect": "openai.chat", "model": "small", "messages": HELLO} | fields))


def sent(server: str = "openai", **fields: Any) -> dict[str, Any]:
    body = json.loads(encode(request(**fields), "there", SERVERS[server], "It").body)
    assert body["model"] == "there"
    assert isinstance(body, dict)
    return body


def refused(server: str, **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        sent(server, **fields)
    assert "\n" not in caught.value.message
    return caught.value


def test_every_server_that_can_be_configured_has_its_row() -> None:
    assert set(SERVERS) == set(get_args(ServerName)) - {"anthropic", "gemini"}


@pytest.mark.parametrize("server", SERVERS)
def test_a_plain_request_says_only_what_was_asked(server: str) -> None:
    body = sent(server, limits=Limits(max_tokens=5))
    assert body.pop(SERVERS[server].max_tokens) == 5
    options = body.pop("stream_options", {})
    assert options.get("include_usage", not SERVERS[server].include_usage)
    assert body == {"model": "there", "stream": True, "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize("server", SERVERS)
def test_several_prompts_go_in_one_call_where_that_is_understood(server: str) -> None:
    asked: dict[str, Any] = {"dialect": "openai.completions", "messages": None, "prompt": "a", "choices": 1}
    if not SERVERS[server].completions:
        assert refused(server, **asked).param == "prompt"
    elif SERVERS[server].several_prompts:
        assert sent(server, **asked, further_prompts=((1, 2),))["prompt"] == ["a", [1, 2]]
    else:
        assert sent(server, **asked)["prompt"] == "a"
        assert refused(server, **asked, further_prompts=("b",)).param == "prompt"


def test_a_default_that_was_written_out_is_sent_and_one_that_was_not_is_left_to_the_server() -> None:
    asked, _ = openai_chat.decode(
        b'{"model": "small", "messages": [{"role": "user", "content": "hi"}], "temperature": 1, "top_k": 0}', {}, "r"
    )
    assert json.loads(encode(asked, "m", SERVERS["vllm"], "It").body)["temperature"] == 1
    assert json.loads(encode(asked, "m", SERVERS["vllm"], "It").body)["top_k"] == 0
    assert "top_k" not in json.loads(encode(asked, "m", SERVERS["openai"], "It").body)
    assert "temperature" not in sent("vllm")


def test_extensions_go_under_the_server_s_own_names() -> None:
    sampling = Sampling(temperature=0.5, top_k=7, min_p=0.1, repetition_penalty=1.1, seed=3)
    body = sent("llama.cpp", sampling=sampling)
    assert {key: body[key] for key in ("temperature", "top_k", "min_p", "repeat_penalty", "seed")} == {
        "temperature": 0.5, "top_k": 7, "min_p": 0.1, "repeat_penalty": 1.1, "seed": 3,
    }  # fmt: skip
    assert sent("vllm", sampling=sampling)["repetition_penalty"] == 1.1
    assert sent("mistral", sampling=Sampling(seed=3))["random_seed"] == 3


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("openai", {"sampling": Sampling(top_k=5)}, "top_k"),
    ("openai", {"sampling": Sampling(min_p=0.5)}, "min_p"),
    ("openai", {"limits": Limits(min_tokens=5)}, "min_tokens"),
    ("openai", {"limits": Limits(ignore_eos=True)}, "ignore_eos"),
    ("openai", {"limits": Limits(stop_tokens=(5,))}, "stop_token_ids"),
    ("openai", {"priority": 1}, "priority"),
    ("openai", {"truncate_prompt_tokens": -1}, "truncate_prompt_tokens"),
    ("openai", {"output_format": OutputFormat("regex", "a+")}, "response_format"),
    ("openai", {"thinking": Thinking(budget_tokens=5)}, "reasoning_effort"),
    ("groq", {"choices": 2}, "n"),
    ("groq", {"sampling": Sampling(logprobs=0)}, "logprobs"),
    ("groq", {"messages": (Message("user", "hi", name="ada"),)}, "messages[0].name"),
    ("groq", {"messages": None, "prompt": "x", "dialect": "openai.completions"}, "prompt"),
    ("groq", {"messages": None, "embedding": Embedding(("x",))}, "model"),
    ("mistral", {"sampling": Sampling(logit_bias={5: 1.0})}, "logit_bias"),
    ("deepseek", {"output_format": OutputFormat("json_schema", "{}")}, "response_format"),
    ("deepseek", {"thinking": Thinking("high")}, "reasoning_effort"),
    ("mlx", {"output_format": OutputFormat("json_object")}, "response_format"),
    ("ollama", {"tools": (WEATHER,), "tool_choice": "required"}, "tool_choice"),
    ("tgi", {"tools": (WEATHER,), "parallel_tool_calls": False}, "parallel_tool_calls"),
]


@pytest.mark.parametrize(("server", "fields", "param"), REFUSALS)
def test_what_a_server_can_not_do_is_refused_by_name(server: str, fields: dict[str, Any], param: str) -> None:
    error = refused(server, **fields)
    assert (error.param, error.code) == (param, "unsupported_parameter")
    assert "It" in error.message


def test_thinking_is_asked_for_in_each_server_s_way() -> None:
    assert sent("openai", thinking=Thinking("low"))["reasoning_effort"] == "low"
    assert sent("openrouter", thinking=Thinking("low"))["reasoning"] == {"effort": "low"}
    assert sent("openrouter", thinking=Thinking(budget_tokens=99))["reasoning"] == {"max_tokens": 99}
    assert sent("deepseek", thinking=Thinking("none"))["thinking"] == {"type": "disabled"}
    assert sent("llama.cpp", thinking=Thinking("none"))["chat_template_kwargs"] == {"enable_thinking": False}
    assert sent("tgi", thinking=Thinking("none")) == sent("tgi")


def test_tools_their_calls_and_what_they_answered_go_along() -> None:
    messages = (
        Message("user", "weather?"),
        Message("assistant", "", tool_calls=(ToolCall("call_long_identifier", "weather", '{"city":"Oslo"}'),)),
        Message("tool", "rain", tool_call_id="call_long_identifier"),
    )
    body = sent("openai", messages=messages, tools=(WEATHER,), tool_choice="required", parallel_tool_calls=False)
    assert body["tools"] == [
        {"type": "function", "function": {
            "name": "weather", "description": "of a city", "parameters": json.loads(WEATHER.parameters)}}
    ]  # fmt: skip
    assert (body["tool_choice"], body["parallel_tool_calls"]) == ("required", False)
    assert body["messages"][1] == {
        "role": "assistant", "content": None,
        "tool_calls": [{"id": "call_long_identifier", "type": "function",
                        "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}],
    }  # fmt: skip
    assert body["messages"][2] == {"role": "tool", "content": "rain", "tool_call_id": "call_long_identifier"}
    named = sent("openai", tools=(WEATHER,), tool_choice="required", tool_name="weather")
    assert named["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert sent("openai", tools=(WEATHER,), tool_choice="none")["tool_choice"] == "none"
    theirs = sent("mistral", messages=messages, tools=(WEATHER,), tool_choice="required")
    [call] = theirs["messages"][1]["tool_calls"]
    assert call["id"] == theirs["messages"][2]["tool_call_id"]
    assert len(call["id"]) == 9
    assert call["id"].isalnum()
    assert theirs["tool_choice"] == "any"


def test_pictures_and_the_parts_of_the_same_dialect_go_along() -> None:
    parts = (
        TextPart("look"),
        ImagePart("image/png", "AAAA"),
        ImagePart(url="https://x/y.png", detail="low"),
        OtherPart("input_audio", '{"type":"input_audio","input_audio":{"data":"","format":"wav"}}', "messages[0]"),
    )
    assert sent("openai", messages=(Message("user", parts),))["messages"][0]["content"] == [
        {"type": "text", "text": "look"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "image_url", "image_url": {"url": "https://x/y.png", "detail": "low"}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
    ]
    assert refused("openai", messages=(Message("user", parts),), dialect="anthropic").code == "unsupported_parameter"


def test_unknown_fields_go_along_only_in_the_same_dialect() -> None:
    extra = {"store": Extra("true", "`store` isn't known here.")}
    assert sent("openai", extra=extra)["store"] is True
    assert refused("openai", extra=extra, dialect="anthropic").param == "store"


def test_forms_of_the_answer_are_told_in_each_server_s_way() -> None:
    schema = OutputFormat("json_schema", '{"b":1,"a":2}', "person", strict=True)
    form = encode(request(output_format=schema), "m", SERVERS["openai"], "It").body
    assert b'"schema":{"b":1,"a":2}' in form
    assert json.loads(form)["response_format"]["json_schema"] == {
        "name": "person", "schema": {"b": 1, "a": 2}, "strict": True,
    }  # fmt: skip
    loose = sent("openai", output_format=OutputFormat("json_schema", "{}"))["response_format"]
    assert "strict" not in loose["json_schema"]
    assert sent("vllm", output_format=OutputFormat("regex", "a+"))["structured_outputs"] == {"regex": "a+"}
    assert sent("millicent", output_format=OutputFormat("lark", "start: /a/"))["response_format"] == {
        "type": "grammar", "syntax": "lark", "definition": "start: /a/",
    }  # fmt: skip


def test_the_service_that_is_paid_for_is_the_one_asked_for() -> None:
    assert json.loads(encode(request(), "m", SERVERS["openai"], "It", "flex").body)["service_tier"] == "flex"


def test_earlier_thoughts_go_where_they_are_read() -> None:
    messages = (Message("assistant", "4", thoughts=(Thought("2+2"),)), Message("user", "sure?"))
    assert sent("deepseek", messages=messages)["messages"][0]["reasoning_content"] == "2+2"
    assert sent("openai", messages=messages)["messages"][0] == {"role": "assistant", "content": "4"}


def test_completions_and_embeddings_have_their_own_addresses() -> None:
    text = encode(request(messages=None, prompt=(1, 2), limits=Limits(max_tokens=3)), "m", SERVERS["openai"], "It")
    assert text.path == "/completions"
    assert json.loads(text.body) | {"stream_options": 0} == {
        "model": "m", "stream": True, "stream_options": 0, "max_tokens": 3, "prompt": [1, 2],
    }  # fmt: skip
    vectors = encode(request(messages=None, embedding=Embedding(("a", "b"), 64)), "m", SERVERS["openai"], "It")
    assert vectors.path == "/embeddings"
    assert json.loads(vectors.body) == {"model": "m", "input": ["a", "b"], "encoding_format": "float", "dimensions": 64}


# Answers.


def read(*chunks: dict[str, Any], choices: int = 1) -> tuple[list[Text], AnswerReader]:
    reader = AnswerReader(choices)
    return [text for each in chunks for text in reader.take(json.dumps(each).encode())], reader


def call(index: int | None, arguments: str, name: str | None = None, ident: str | None = None) -> dict[str, Any]:
    function = {"arguments": arguments} | ({} if name is None else {"name": name})
    return {"type": "function", "function": function} | ({} if index is None else {"index": index}) | (
        {} if ident is None else {"id": ident}
    )  # fmt: skip


def test_calls_come_piece_by_piece_and_several_at_once() -> None:
    texts, reader = read(
        chunk({"tool_calls": [call(0, "", "weather", "call_a")]}),
        chunk({"tool_calls": [call(0, '{"city":')]}),
        chunk({"tool_calls": [call(0, '"Oslo"}'), call(1, "{}", "time", "call_b")]}),
        chunk({}, "tool_calls"),
    )
    [merged] = merge_texts(texts)
    assert merged.calls == (CallPiece(0, "weather", '{"city":"Oslo"}'), CallPiece(1, "time", "{}"))
    assert reader.reasons == (FinishReason.TOOL_CALLS,)


def test_calls_without_an_index_and_names_said_twice_are_understood() -> None:
    texts, reader = read(
        chunk({"tool_calls": [call(None, "{}", "a", "x1"), call(None, "{}", "b", "x2")]}),
        chunk({}, "stop"),
    )
    assert [piece.index for text in texts for piece in text.calls] == [0, 1]
    assert reader.reasons == (FinishReason.TOOL_CALLS,)
    texts, _ = read(*(chunk({"tool_calls": [call(0, part, "a", "x")]}) for part in ("{", "}")))
    assert merge_texts(texts)[0].calls == (CallPiece(0, "a", "{}"),)


def of_answer(index: int | None, read: int, written: int, cached: int = 0) -> bytes:
    """As llama.cpp tells usage: of one answer of a text's, or (None) of a chat's."""
    usage = {"prompt_tokens": read, "completion_tokens": written, "prompt_tokens_details": {"cached_tokens": cached}}
    choices = [] if index is None else [{"index": index, "text": "", "finish_reason": "length"}]
    return json.dumps({"choices": choices, "usage": usage}).encode()


def test_usage_that_comes_for_each_answer_is_added_up_and_each_prompt_counted_once() -> None:
    of_chat = AnswerReader(2, choices=2)
    for each in (of_answer(None, 32, 3), of_answer(None, 32, 5)):
        of_chat.take(each)
    assert of_chat.usage == Usage.of(Provenance.REPORTED, input_fresh=32, input_cache_read=0, output_text=8)
    of_prompts = AnswerReader(4, choices=2)
    assert of_prompts.take(b"null") == []
    for each in (of_answer(2, 9, 1, 4), of_answer(0, 5, 2), of_answer(1, 5, 3), of_answer(3, 9, 4, 4)):
        of_prompts.take(each)
    assert of_prompts.usage == Usage.of(Provenance.REPORTED, input_fresh=10, input_cache_read=4, output_text=10)
    assert of_prompts.ended


@pytest.mark.parametrize(
    ("delta", "thought"),
    [
        (
            {"reasoning": "Hm.", "reasoning_details": [{"type": "reasoning.text", "text": "Hm."}]},
            "Hm.",
        ),
        ({"reasoning": None, "reasoning_details": [{"type": "reasoning.text", "text": "Hm."}]}, "Hm."),
        (
            {"reasoning_details": [{"type": "reasoning.summary", "summary": "So."}, {"type": "x", "data": "c2VhbA"}]},
            "So.",
        ),
    ],
)
def test_what_openrouter_s_models_thought_is_read_once_wherever_it_stands(delta: dict[str, Any], thought: str) -> None:
    texts, reader = read(chunk(delta), chunk({"content": "Yes."}), chunk({}, "stop"))
    [merged] = merge_texts(texts)
    assert (merged.reasoning, merged.text) == (thought, "Yes.")
    assert reader.ended


def test_what_ollama_cuts_unasked_goes_to_servers_that_cannot_be_told_and_what_is_asked_for_does_not() -> None:
    asked: dict[str, Any] = {"messages": None, "dialect": "ollama.embed"}
    asked["embedding"] = Embedding(("hi",), truncate_tokens=-1)
    unasked = asked | {"assumed": ("truncate_tokens",)}
    assert sent("openai", **unasked) == {"model": "there", "input": "hi", "encoding_format": "float"}
    assert sent("vllm", **unasked)["truncate_prompt_tokens"] == -1
    assert refused("openai", **asked).param == "truncate_prompt_tokens"


def test_running_usage_of_one_answer_is_not_asked_for_where_there_are_several() -> None:
    assert sent("vllm")["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert sent("vllm", choices=2)["stream_options"] == {"include_usage": True}


def test_choices_are_kept_apart_and_each_says_how_it_ended() -> None:
    came = (
        chunk({"content": "a"}, index=1), chunk({"content": "b"}), chunk({}, "length", index=1), chunk({}, "stop"),
    )  # fmt: skip
    texts, reader = read(*came, choices=2)
    assert [(text.choice, text.text) for text in texts] == [(1, "a"), (0, "b")]
    assert reader.reasons == (FinishReason.STOP, FinishReason.LENGTH)
    assert reader.ended
    assert not read(*came, choices=3)[1].ended
    with pytest.raises(msgspec.DecodeError, match="a choice 1 that nobody asked for"):
        read(*came)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("stop", "stop"), ("length", "length"), ("model_length", "length"), ("content_filter", "content_filter"),
     ("function_call", "tool_calls"), ("eos_token", "stop"), ("stop_sequence", "stop")],
)  # fmt: skip
def test_reasons_are_ours(theirs: str, ours: str) -> None:
    assert read(chunk({"content": "a"}), chunk({}, theirs))[1].reasons == (FinishReason(ours),)


def test_a_refusal_is_text_that_ended_by_a_filter() -> None:
    texts, reader = read(chunk({"refusal": "I won't."}), chunk({}, "stop"))
    assert (texts[0].text, reader.reasons) == ("I won't.", (FinishReason.CONTENT_FILTER,))


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_is_told_from_the_answer(field: str) -> None:
    texts, _ = read(chunk({field: "hm"}), chunk({"content": "4"}))
    assert [(text.reasoning, text.text) for text in texts] == [("hm", ""), ("", "4")]
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "4"}]
    [text], _ = read(chunk({"content": parts}))
    assert (text.reasoning, text.text) == ("hm", "4")


def test_log_probabilities_come_in_both_shapes() -> None:
    top = [{"token": "b", "logprob": -0.2, "bytes": None}]
    entry = {"token": "\ufffd", "logprob": -0.1, "bytes": [0xE6], "top_logprobs": top}
    one = chunk({"content": "a"})
    one["choices"][0]["logprobs"] = {"content": [entry], "refusal": None}
    assert read(one)[0][0].logprobs == (TokenLogprob(b"\xe6", -0.1, (Candidate(b"b", -0.2),)),)
    old = {"tokens": ["a", "b"], "token_logprobs": [None, -1], "top_logprobs": [None, {"b": -1.0}]}
    text = {"choices": [{"index": 0, "text": "ab", "logprobs": old}]}
    assert read(text)[0][0].logprobs == (TokenLogprob(b"a", None), TokenLogprob(b"b", -1, (Candidate(b"b", -1.0),)))


def leaves(**usage: Any) -> dict[str, int | None]:
    found = usage_of(msgspec.convert(usage, _Usage))
    return {} if found is None else {leaf.value: count.tokens for leaf, count in found.leaves.items()}


def test_usage_becomes_leaves_that_do_not_overlap() -> None:
    assert leaves(**USAGE) == {"input_fresh": 11, "input_cache_read": 8, "output_text": 6, "output_reasoning": 4}
    assert leaves(prompt_tokens=9, completion_tokens=3, prompt_cache_hit_tokens=4) == {
        "input_fresh": 5, "input_cache_read": 4, "output_text": 3,
    }  # fmt: skip
    assert leaves(prompt_tokens=9, completion_tokens=3, prompt_tokens_details={"cache_write_tokens": 2}) == {
        "input_fresh": 7, "input_cache_write_5m": 2, "output_text": 3,
    }  # fmt: skip
    assert leaves(prompt_tokens=9, prompt_tokens_details={"audio_tokens": 2}) == {"input_fresh": 7, "input_audio": 2}
    beside = {"completion_tokens_details": {"reasoning_tokens": 5}}
    assert leaves(prompt_tokens=9, completion_tokens=3, total_tokens=17, **beside)["output_text"] == 3
    assert leaves(prompt_tokens=0, completion_tokens=0) == {"input_fresh": 0, "output_text": 0}
    assert leaves() == {}


@given(st.integers(0, 10_000), st.integers(0, 10_000), st.integers(0, 10_000), st.integers(0, 10_000))
def test_leaves_add_up_to_the_totals(read: int, cached: int, written: int, reasoning: int) -> None:
    cached, reasoning = min(cached, read), min(reasoning, written)
    found = usage_of(
        msgspec.convert(
            {
                "prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written,
                "prompt_tokens_details": {"cached_tokens": cached},
                "completion_tokens_details": {"reasoning_tokens": reasoning},
            },
            _Usage,
        )
    )  # fmt: skip
    assert found is not None
    assert (found.input_tokens, found.output_tokens) == (read, written)


def test_the_provider_s_own_cost_is_exact() -> None:
    reader = AnswerReader()
    reader.take(b'{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1, "cost": 0.000123456789}}')
    assert reader.cost == Money.from_usd(Decimal("0.000123456789"))


def test_tokens_follow_the_running_usage_where_there_is_one() -> None:
    texts, _ = read(
        chunk({"content": "a"}, usage={"prompt_tokens": 3, "completion_tokens": 2}),
        chunk({"content": "b"}, usage={"prompt_tokens": 3, "completion_tokens": 5}),
    )
    assert [text.tokens for text in texts] == [2, 3]


def test_vectors_come_as_numbers_or_base64_each_once() -> None:
    body = {"data": [{"index": 1, "embedding": "AACAPw=="}, {"index": 0, "embedding": [0.5]}],
            "model": "e", "usage": {"prompt_tokens": 7, "total_tokens": 7}}  # fmt: skip
    found = VectorsReader(json.dumps(body).encode(), 2)
    numbers = {vector.index: struct.unpack("<f", vector.values)[0] for vector in found.vectors}
    assert numbers == {0: 0.5, 1: 1.0}
    assert found.usage is not None
    assert found.usage.input_tokens == 7
    with pytest.raises(msgspec.DecodeError):
        VectorsReader(json.dumps(body).encode(), 3)


# What comes in.


def test_what_only_an_upstream_knows_is_kept_from_an_incoming_request() -> None:
    body = {
        "model": "small", "reasoning_effort": "low", "store": True, "prompt_cache_key": "k", "top_a": 0.5,
        "messages": [
            {"role": "user", "content": [
                {"type": "text", "text": "look"},
                {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,QUJD", "detail": "high"}},
                {"type": "file", "file": {"file_id": "f"}}]},
            {"role": "assistant", "content": "a cat", "reasoning_content": "fur"},
        ],
    }  # fmt: skip
    asked, _ = openai_chat.decode(json.dumps(body).encode(), {}, "r")
    assert asked.thinking == Thinking("low")
    assert {name: (extra.json, extra.refusal is None) for name, extra in asked.extra.items()} == {
        "store": ("true", False), "prompt_cache_key": ('"k"', True), "top_a": ("0.5", False),
    }  # fmt: skip
    assert asked.messages is not None
    content = asked.messages[0].content
    assert content[:2] == (TextPart("look"), ImagePart("image/jpeg", "QUJD", detail="high"))
    assert isinstance(content[2], OtherPart)
    assert (content[2].kind, content[2].at) == ("file", "messages[0].content[2]")
    assert asked.messages[1].thoughts == (Thought("fur"),)
    there = json.loads(encode(asked, "m", SERVERS["openai"], "It").body)
    assert (there["store"], there["top_a"], there["prompt_cache_key"]) == (True, 0.5, "k")
    assert there["messages"][0] == body["messages"][0]  # type: ignore[index]
    with pytest.raises(InvalidRequest, match=r"`messages\[0\].content\[2\]` is a `file` part"):
        msgspec.structs.replace(asked, extra={}).refuse_foreign()


@pytest.mark.parametrize(
    ("server", "cache_key", "length", "keyed"),
    [
        ("openai", True, 4096, True),
        ("openai", False, 4096, False),
        ("openai", True, 4095, False),
        ("azure", True, 4096, False),
        ("vllm", True, 4096, False),
    ],
)
def test_only_openai_is_told_a_cache_key_for_long_prompts_and_where_that_is_on(
    server: str, cache_key: bool, length: int, keyed: bool
) -> None:
    asked = request(hashed=Prompt(b"", (Segment("system", length, b"12345678"),)))
    body = json.loads(encode(asked, "there", SERVERS[server], "It", cache_key=cache_key).body)
    assert ("prompt_cache_key" in body) is keyed


def test_a_cache_key_tells_tenants_and_beginnings_apart_and_gives_way_to_the_callers() -> None:
    def key(chain: bytes, **more: Any) -> Any:
        asked = request(hashed=Prompt(b"", (Segment("system", 9000, chain), Segment("user", 1, b"other  1"))), **more)
        return json.loads(encode(asked, "there", SERVERS["openai"], "It", cache_key=True).body)["prompt_cache_key"]

    ours = key(b"12345678")
    assert len(ours) == 32
    assert ours != key(b"12345679")
    assert ours != key(b"12345678", attribution=Attribution(key="ann"))
    assert key(b"12345678", extra={"prompt_cache_key": Extra('"mine"', None)}) == "mine"
