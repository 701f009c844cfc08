"""Every field is honoured, a documented hint, or refused by name; nothing a client sends is a crash."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.core.errors import InvalidRequest
from millicent.core.money import Money
from millicent.core.request import Limits, Sampling
from millicent.wire import openai_chat, openai_completions

HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def chat(headers: dict[str, str] | None = None, **fields: Any) -> Any:
    return openai_chat.decode(json.dumps(HELLO | fields).encode(), headers or {}, "rcpt_1")


def complaint(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    return caught.value


def test_a_plain_chat_request_takes_openai_defaults() -> None:
    request, shape = chat()
    assert (request.model, request.messages[0].content, request.stream) == ("m", "hi", False)
    assert (request.sampling.temperature, request.sampling.top_p, request.limits.max_tokens) == (1.0, 1.0, None)
    assert not shape.usage


def test_honoured_fields_reach_the_request() -> None:
    request, shape = chat(
        temperature=0.5, top_p=0.9, top_k=40, seed=7, stop=["a", "b"], max_completion_tokens=5, ignore_eos=True,
        stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True},
    )  # fmt: skip
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.top_k) == (0.5, 0.9, 40)
    assert (request.sampling.seed, request.limits.stop, request.limits.max_tokens) == (7, ("a", "b"), 5)
    assert request.limits.ignore_eos
    assert request.stream
    assert shape.usage
    assert shape.running_usage


def test_sampling_fields_and_extensions_reach_the_request() -> None:
    request, shape = chat(
        n=3, logprobs=True, top_logprobs=4, presence_penalty=0.5, frequency_penalty=-0.5, logit_bias={"7": -100},
        min_p=0.1, typical_p=0.9, repetition_penalty=1.2, min_tokens=2, stop_token_ids=[5], max_tokens=9,
        truncate_prompt_tokens=-1, priority=-3,
    )  # fmt: skip
    assert request.sampling == Sampling(
        min_p=0.1, typical_p=0.9, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=-0.5,
        logit_bias={7: -100.0}, logprobs=4,
    )  # fmt: skip
    assert request.limits == Limits(max_tokens=9, min_tokens=2, stop_tokens=(5,))
    assert (request.choices, shape.choices) == (3, 3)
    assert (request.truncate_prompt_tokens, request.priority) == (-1, -3)


def completion(**fields: Any) -> Any:
    return openai_completions.decode(json.dumps({"model": "m", "prompt": "x"} | fields).encode(), {}, "rcpt_1")[0]


def test_echo_with_logprobs_scores_the_prompt_and_may_ask_for_no_output() -> None:
    request = completion(echo=True, logprobs=2, max_tokens=0, n=2, best_of=2)
    assert (request.echo, request.choices, request.limits.max_tokens) == (True, 2, 0)
    assert (request.sampling.logprobs, request.sampling.prompt_logprobs) == (2, True)
    assert not completion(logprobs=2).sampling.prompt_logprobs
    assert not completion(echo=True).sampling.prompt_logprobs


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"best_of": 2}, "best_of"), ({"max_tokens": 0}, "max_tokens"), ({"suffix": "s"}, "suffix"),
     ({"logprobs": 21}, "logprobs"), ({"n": 0}, "n"), ({"logprobs": True}, "logprobs")],
)  # fmt: skip
def test_completions_refuse_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        completion(**fields)
    assert caught.value.param == param


def test_nulls_and_neutral_values_change_nothing() -> None:
    neutral = dict.fromkeys(openai_chat._NEUTRAL) | {"temperature": None, "stop": None, "max_tokens": None}
    assert chat(**neutral)[0] == chat()[0]
    assert (
        chat(n=1, frequency_penalty=0, logprobs=False, top_logprobs=0, logit_bias={}, min_p=0, typical_p=1)[0]
        == (chat()[0])
    )
    assert chat(n=1, tools=[], response_format={"type": "text"})[0] == chat()[0]


@pytest.mark.parametrize(
    ("field", "value"),
    [("tools", [{"type": "function"}]),
     ("response_format", {"type": "json_object"}), ("audio", {}), ("store", True), ("reasoning_effort", "high")],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(field: str, value: Any) -> None:
    error = complaint(**{field: value})
    assert (error.param, error.code, error.status) == (field, "unsupported_parameter", 400)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"n": True}, "n"),
        ({"n": 0}, "n"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_p": -1}, "top_p"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"stop": [""]}, "stop[0]"),
        ({"seed": 2**64}, "seed"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"metadata": {"user": "x" * 300}}, "metadata.user"),
    ],
)
def test_a_bad_value_is_a_400_that_names_the_field(fields: dict[str, Any], param: str) -> None:
    error = complaint(**fields)
    assert (error.status, error.param) == (400, param)


def test_an_unknown_field_is_named_with_a_suggestion() -> None:
    error = complaint(max_token=5)
    assert (error.param, error.code) == ("max_token", "unknown_parameter")
    assert "did you mean `max_tokens`" in error.message


def test_a_missing_field_is_named() -> None:
    with pytest.raises(InvalidRequest) as caught:
        openai_chat.decode(b'{"messages": []}', {}, "rcpt_1")
    assert (caught.value.param, caught.value.code) == ("model", "missing_required_parameter")


@pytest.mark.parametrize(
    "body",
    [b"", b"not json", b"[]", b'"x"', b"null", b'{"model": "\xff"}', b"\xff\xfe", b'{"model":', b"[" * 100_000,
     b'{"model": "m", "messages": ' + b"[" * 100_000, b'{"model":"m","messages":[],"metadata":' + b'{"a":' * 100_000],
)  # fmt: skip
def test_garbage_is_a_400_and_nothing_else(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        openai_chat.decode(body, {}, "rcpt_1")
    with pytest.raises(InvalidRequest):
        openai_completions.decode(body, {}, "rcpt_1")


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_an_invalid_request(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        openai_chat.decode(body, {}, "rcpt_1")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(openai_chat.ChatBody.__struct_fields__)), json_values))
def test_any_values_in_known_fields_decode_or_are_an_invalid_request(fields: dict[str, Any]) -> None:
    try:
        request, _ = openai_chat.decode(json.dumps(HELLO | fields).encode(), {}, "rcpt_1")
    except InvalidRequest:
        return
    assert request.id == "rcpt_1"


def test_an_assistant_message_comes_back_as_it_was_sent() -> None:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "annotations": [],
        "tool_calls": None,
        "audio": None,
    }
    request, _ = chat(messages=[message, {"role": "user", "content": "go on"}])
    assert request.messages[0].role == "assistant"


def test_developer_is_system_and_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request, _ = chat(messages=[{"role": "developer", "content": parts}])
    assert (request.messages[0].role, request.messages[0].content) == ("system", "ab")


def test_headers_win_over_the_body_and_other_metadata_become_tags() -> None:
    request, _ = chat(
        {"x-millicent-user": "ada", "x-millicent-feature": "search", "x-millicent-tags": "env=prod, ab = 2"},
        user="bob",
        metadata={"team": "core", "user": "eve", "ticket": "7"},
    )
    given_to = request.attribution
    assert (given_to.user, given_to.feature, given_to.team) == ("ada", "search", "core")
    assert given_to.tags == {"env": "prod", "ab": "2", "ticket": "7"}


@pytest.mark.parametrize(
    ("headers", "param"),
    [
        ({"x-millicent-tags": "novalue"}, "x-millicent-tags"),
        ({"x-millicent-user": "a\x07"}, "x-millicent-user"),
        ({"x-millicent-team": "x" * 257}, "x-millicent-team"),
        ({"x-millicent-max-cost-usd": "0"}, "x-millicent-max-cost-usd"),
        ({"x-millicent-max-cost-usd": "-1"}, "x-millicent-max-cost-usd"),
        ({"x-millicent-max-cost-usd": "cheap"}, "x-millicent-max-cost-usd"),
        ({"x-millicent-max-cost-usd": "nan"}, "x-millicent-max-cost-usd"),
        ({"x-millicent-max-cost-usd": "1e-10"}, "x-millicent-max-cost-usd"),
        ({"x-millicent-latency-target-ms": "5"}, "x-millicent-latency-target-ms"),
    ],
)
def test_a_bad_or_unkept_header_is_a_400_that_names_it(headers: dict[str, str], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(headers)
    assert caught.value.param == param


def test_a_maximum_cost_is_taken_to_the_nano_dollar_below() -> None:
    request, _ = chat({"x-millicent-max-cost-usd": "0.0020000009"})
    assert request.max_cost == Money(2_000_000)
    assert chat({})[0].max_cost is None


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("hi", "hi"), (["hi"], "hi"), ([1, 2], (1, 2)), ([[1, 2]], (1, 2))],
)
def test_a_prompt_is_text_or_token_ids_alone_or_as_a_list_of_one(prompt: Any, expected: Any) -> None:
    body = json.dumps({"model": "m", "prompt": prompt}).encode()
    request, _ = openai_completions.decode(body, {}, "rcpt_1")
    assert request.prompt == expected
    assert request.limits.max_tokens == 16


@pytest.mark.parametrize("prompt", [[], ["a", "b"], [1, "a"], [[1], [2]], [-1], [1.5]])
def test_several_or_senseless_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        openai_completions.decode(json.dumps({"model": "m", "prompt": prompt}).encode(), {}, "rcpt_1")
    assert caught.value.param == "prompt"
