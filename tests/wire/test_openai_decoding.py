"""Every field is honoured, a documented hint, or refused by name; nothing a client sends is a crash."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.core.errors import InvalidRequest
from millicent.core.money import Money
from millicent.core.request import Limits, Message, OutputFormat, Request, Sampling, Tool, ToolCall
from millicent.wire import openai_chat, openai_completions, tokens
from millicent.wire.attribution import read_latency_target, read_max_cost

HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def chat(headers: dict[str, str] | None = None, **fields: Any) -> Any:
    return openai_chat.decode(json.dumps(HELLO | fields).encode(), headers or {}, "rcpt_1")


def refuse_elsewhere(request: Request) -> None:
    """What a model of our own says to what only an upstream may know."""
    request.refuse_foreign()
    request.refuse_thinking()
    request.refuse_images()


def complaint(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        refuse_elsewhere(chat(**fields)[0])
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


TOOL = {"type": "function", "function": {"name": "f", "description": "Does it.", "parameters": {"type": "object"}}}


def test_tools_their_calls_and_their_results_reach_the_request() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    request, _ = chat(
        tools=[TOOL], tool_choice={"type": "function", "function": {"name": "f"}}, parallel_tool_calls=False,
        messages=[{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]},
                  {"role": "tool", "tool_call_id": "c1", "content": "2"}],
    )  # fmt: skip
    assert request.tools == (Tool("f", "Does it.", '{"type":"object"}'),)
    assert (request.tool_choice, request.tool_name, request.parallel_tool_calls) == ("required", "f", False)
    assert request.messages[1:] == (
        Message("assistant", "", tool_calls=(ToolCall("c1", "f", '{"a": 1}'),)),
        Message("tool", "2", tool_call_id="c1"),
    )


def test_the_forms_of_an_answer_reach_the_request() -> None:
    def form(**fields: Any) -> Any:
        return chat(response_format=fields)[0].output_format

    assert form(type="json_object") == OutputFormat("json_object")
    schema = {"name": "x", "strict": False, "schema": {"b": 1, "a": {"enum": [1.5]}}}
    assert form(type="json_schema", json_schema=schema) == OutputFormat(
        "json_schema", '{"b":1,"a":{"enum":[1.5]}}', "x", strict=False
    )
    assert form(type="grammar", syntax="regex", definition="a+") == OutputFormat("regex", "a+")
    assert completion(response_format={"type": "grammar", "syntax": "lark", "definition": "x"}).output_format == (
        OutputFormat("lark", "x")
    )


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
    restated, _ = chat(n=1, frequency_penalty=0, logprobs=False, top_logprobs=0, logit_bias={}, min_p=0, typical_p=1)
    assert restated.restated == ("frequency_penalty", "min_p", "typical_p")
    assert msgspec.structs.replace(restated, restated=()) == chat()[0]
    assert chat(n=1, tools=[], response_format={"type": "text"})[0] == chat()[0]


@pytest.mark.parametrize(
    ("field", "value"),
    [("functions", [{"name": "f"}]), ("function_call", {"name": "f"}), ("audio", {}), ("store", True),
     ("reasoning_effort", "high")],
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
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].image_url"),
        ({"stop": [""]}, "stop[0]"),
        ({"seed": 2**64}, "seed"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"metadata": {"user": "x" * 300}}, "metadata.user"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": True}}},
            "response_format.json_schema.schema",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": "x",
                        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
                    }
                ]
            },
            "messages[0].tool_calls",
        ),
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
    ],
)
def test_a_bad_header_is_a_400_that_names_it(headers: dict[str, str], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(headers)
    assert caught.value.param == param


def test_a_name_in_a_header_is_the_same_name_as_in_the_body() -> None:
    """curl and Go send UTF-8, which was read as Latin-1: Zoë had two accounts, and 漢字 was refused."""
    for name in ("Zoë", "漢字 😀"):
        sent = name.encode().decode("latin-1")  # as a server reads a header's bytes
        request, _ = chat({"x-millicent-user": sent, "x-millicent-tags": f"who={sent}"}, metadata={"feature": name})
        assert (request.attribution.user, request.attribution.feature) == (name, name)
        assert request.attribution.tags == {"who": name}
    assert chat({"x-millicent-user": "Zo\xeb"})[0].attribution.user == "Zoë", "as browsers send it"


def test_spaces_around_a_name_are_none_of_it_and_an_empty_one_is_none() -> None:
    request, _ = chat({"x-millicent-team": "core  "}, user=" ada ", metadata={"feature": " ", "tier": ""})
    given_to = request.attribution
    assert (given_to.team, given_to.user, given_to.feature, given_to.tier) == ("core", "ada", None, None)


def test_a_latency_target_is_whole_milliseconds() -> None:
    assert read_latency_target({"x-millicent-latency-target-ms": " 250 "}) == 250
    assert read_latency_target({}) is None


@pytest.mark.parametrize("header", ["0", "2.5", "soon", "-3", "99999999999"])
def test_a_latency_target_that_cannot_be_one_is_a_400_that_names_the_header(header: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_latency_target({"x-millicent-latency-target-ms": header})
    assert caught.value.param == "x-millicent-latency-target-ms"


def test_a_maximum_cost_is_taken_to_the_nano_dollar_below() -> None:
    assert read_max_cost({"x-millicent-max-cost-usd": "0.0020000009"}) == Money(2_000_000)
    assert read_max_cost({}) is None


@pytest.mark.parametrize("header", ["0", "-1", "cheap", "nan", "1e-10"])
def test_a_maximum_cost_that_cannot_be_one_is_a_400_that_names_the_header(header: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_max_cost({"x-millicent-max-cost-usd": header})
    assert caught.value.param == "x-millicent-max-cost-usd"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", ("hi",)),
        (["hi"], ("hi",)),
        ([1, 2], ((1, 2),)),
        ([[1, 2]], ((1, 2),)),
        (["a", "b"], ("a", "b")),
        ([[1], [2, 3]], ((1,), (2, 3))),
        (["a", [2, 3]], ("a", (2, 3))),
    ],
)
def test_prompts_are_texts_or_token_ids_alone_or_in_a_list(prompt: Any, expected: Any) -> None:
    body = json.dumps({"model": "m", "prompt": prompt, "n": 2}).encode()
    request, _ = openai_completions.decode(body, {}, "rcpt_1")
    assert request.prompts == expected
    assert request.answers == 2 * len(expected)
    assert request.limits.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ([], "prompt"),
        ([1, "a"], "prompt"),
        ([-1], "prompt"),
        ([1.5], "prompt"),
        ([[]], "prompt"),
        (["a", []], "prompt[1]"),
        (["a", None], "prompt[1]"),
        (["a"] * 2049, "prompt"),
    ],
)
def test_a_senseless_prompt_is_refused_by_its_place(prompt: Any, named: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        openai_completions.decode(json.dumps({"model": "m", "prompt": prompt}).encode(), {}, "rcpt_1")
    assert caught.value.param == named


def test_more_answers_than_one_call_may_have_are_refused() -> None:
    body = {"model": "m", "prompt": ["a"] * 1025, "n": 2}
    with pytest.raises(InvalidRequest, match="1025 prompts") as caught:
        openai_completions.decode(json.dumps(body).encode(), {}, "rcpt_1")
    assert caught.value.param == "n"


def test_several_prompts_are_not_one_to_be_shown_in_tokens() -> None:
    with pytest.raises(InvalidRequest, match="one by one"):
        tokens.decode(b'{"prompt": ["a", "b"]}', {}, "rcpt_1", "m")
