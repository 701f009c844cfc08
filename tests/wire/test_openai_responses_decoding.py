"""`POST /v1/responses` read: every field honoured, a harmless hint, or refused by name."""

import contextlib
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.core.errors import InvalidRequest
from millicent.core.request import (
    Attribution,
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
    ToolCall,
)
from millicent.wire import openai_responses
from millicent.wire.openai_servers import SERVERS
from millicent.wire.openai_upstream import encode

WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": True}
PIXEL = "iVBORw0KGgo="


def decode(**fields: Any) -> Request:
    body = {"model": "m", "input": "hi"} | fields
    return openai_responses.decode(json.dumps(body).encode(), {}, "rcpt_1")[0]


def messages(*items: Any) -> tuple[Message, ...]:
    return decode(input=list(items)).messages or ()


def refused(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        decode(**fields)
    return caught.value


def test_a_text_is_a_users_message() -> None:
    assert decode() == Request("rcpt_1", "openai.responses", "m", messages=(Message("user", "hi"),))


def test_every_field_that_is_honoured_is_read() -> None:
    asked = decode(
        instructions="Be brief.", stream=True, max_output_tokens=7, temperature=0.5, top_p=0.9, presence_penalty=1,
        frequency_penalty=-1, top_logprobs=3, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False,
        text={"format": {"type": "json_schema", "name": "city", "schema": {"type": "object"}, "strict": True}},
        reasoning={"effort": "low", "summary": "auto"}, truncation="auto",
        metadata={"feature": "search", "env": "prod"}, safety_identifier="ada",
    )  # fmt: skip
    assert asked.messages == (Message("system", "Be brief."), Message("user", "hi"))
    assert (asked.stream, asked.limits) == (True, Limits(7))
    assert asked.sampling == Sampling(0.5, 0.9, presence_penalty=1.0, frequency_penalty=-1.0, logprobs=3)
    assert [(tool.name, tool.strict) for tool in asked.tools] == [("weather", True)]
    assert (asked.tool_choice, asked.tool_name, asked.parallel_tool_calls) == ("required", None, False)
    assert asked.output_format == OutputFormat("json_schema", '{"type":"object"}', "city", strict=True)
    assert asked.thinking == Thinking("low")
    assert asked.truncate_prompt_tokens == -1
    assert asked.attribution == Attribution(user="ada", feature="search", tags={"env": "prod"})


def test_what_was_asked_stands_in_the_answer_again() -> None:
    form = {"type": "json_schema", "name": "city", "schema": {"type": "object"}}
    body = {"model": "m", "input": "hi", "text": {"format": form}, "tools": [WEATHER], "tool_choice": "required"}
    echo = openai_responses.decode(json.dumps(body).encode(), {}, "rcpt_1")[1].echo
    assert json.loads(echo["text"])["format"] == form | {"description": None, "strict": False}
    assert json.loads(echo["tools"]) == [WEATHER | {"description": None}]
    assert (echo["tool_choice"], echo["truncation"]) == ('"required"', '"disabled"')


def test_hints_change_nothing() -> None:
    hints = {
        "store": True, "service_tier": "flex", "prompt_cache_key": "k", "prompt_cache_retention": "24h",
        "prompt_cache_options": {"mode": "implicit"}, "stream_options": {"include_obfuscation": False},
        "max_tool_calls": 3, "include": ["reasoning.encrypted_content", "web_search_call.action.sources"],
        "background": False, "text": {"format": {"type": "text"}, "verbosity": "medium"}, "truncation": "disabled",
        "reasoning": {"mode": "standard", "context": "auto"}, "context_management": [], "user": None,
    }  # fmt: skip
    asked = decode(**hints)
    assert decode() == Request(**{field: getattr(asked, field) for field in Request.__struct_fields__} | {"extra": {}})
    asked.refuse_foreign()
    nulls = dict.fromkeys(set(openai_responses.ResponsesBody.__struct_fields__) - {"model", "input"})
    assert decode(**nulls) == decode()


def test_a_conversation_is_read_turn_by_turn() -> None:
    call = {"type": "function_call", "name": "weather", "arguments": "{}", "status": "completed"}
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
    read = messages(
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Rome?"}]},
        thought | {"encrypted_content": "signature:c2VhbA=="},
        {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "phase": "commentary",
         "content": [{"type": "output_text", "text": "I ", "annotations": [], "logprobs": []},
                     {"type": "refusal", "refusal": "look."}]},
        call | {"id": "fc_1", "call_id": "call_1"},
        call | {"call_id": "call_2"},
        {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
        {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "warm"}]},
        {"id": "rs_2", "type": "reasoning", "summary": [{"type": "summary_text", "text": "So."}],
         "encrypted_content": "sealed:eHl6"},
        call | {"call_id": "call_3"},
        {"role": "assistant", "content": "Sunny."},
        {"role": "assistant", "content": "And warm."},
        {"role": "user", "content": "Thanks."},
    )  # fmt: skip
    assert read == (
        Message("system", "Be brief."),
        Message("user", "Rome?"),
        Message("assistant", "I look.",
                tool_calls=(ToolCall("call_1", "weather", "{}"), ToolCall("call_2", "weather", "{}")),
                thoughts=(Thought("Hm.", "c2VhbA=="),)),
        Message("tool", "sunny", tool_call_id="call_1"),
        Message("tool", "warm", tool_call_id="call_2"),
        Message("assistant", "", tool_calls=(ToolCall("call_3", "weather", "{}"),),
                thoughts=(Thought("So.", sealed="eHl6"),)),
        Message("assistant", "Sunny."),
        Message("assistant", "And warm."),
        Message("user", "Thanks."),
    )  # fmt: skip


def test_pictures_files_and_marks_are_kept() -> None:
    (message,) = messages(
        {"role": "user", "content": [
            {"type": "input_text", "text": "Look", "prompt_cache_breakpoint": {"mode": "explicit"}},
            {"type": "input_image", "image_url": f"data:image/png;base64,{PIXEL}", "detail": "low"},
            {"type": "input_image", "image_url": "https://example.com/a.png", "detail": "auto"},
            {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,AA=="},
        ]},
    )  # fmt: skip
    assert isinstance(message.content, tuple)
    assert message.content[:3] == (
        TextPart("Look", "1h"),
        ImagePart("image/png", PIXEL, detail="low"),
        ImagePart(url="https://example.com/a.png"),
    )
    document = message.content[3]
    assert isinstance(document, OtherPart)
    assert json.loads(document.json)["file"] == {"filename": "a.pdf", "file_data": "data:application/pdf;base64,AA=="}


def test_only_the_tools_that_are_allowed_can_be_called() -> None:
    now = WEATHER | {"name": "now"}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "now"}]}
    asked = decode(tools=[WEATHER, now], tool_choice=allowed)
    assert ([tool.name for tool in asked.tools], asked.tool_choice, asked.tool_name) == (["now"], "required", None)
    asked = decode(tools=[WEATHER, now], tool_choice={"type": "function", "name": "weather"})
    assert (len(asked.tools), asked.tool_choice, asked.tool_name) == (2, "required", "weather")


def test_an_upstream_of_openais_gets_chats_names() -> None:
    asked = decode(
        prompt_cache_key="k", safety_identifier="ada", store=True, text={"verbosity": "low"}, max_output_tokens=9,
        reasoning={"effort": "low"}, input=[{"role": "user", "content": [{"type": "input_file", "file_id": "file-1"}]}],
    )  # fmt: skip
    body = json.loads(encode(asked, "gpt", SERVERS["openai"], "OpenAI").body)
    assert body["messages"] == [{"role": "user", "content": [{"type": "file", "file": {"file_id": "file-1"}}]}]
    assert {name: body[name] for name in ("prompt_cache_key", "safety_identifier", "verbosity")} == {
        "prompt_cache_key": "k", "safety_identifier": "ada", "verbosity": "low"
    }  # fmt: skip
    assert (body["max_completion_tokens"], body["reasoning_effort"]) == (9, "low")
    assert "store" not in body


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"moderation": {"model": "omni"}}, "moderation"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        ({"reasoning": {"effort": "enormous"}}, "reasoning.effort"),
        ({"include": ["everything"]}, "include"),
        ({"temprature": 1}, "temprature"),
        ({"stop": "x"}, "stop"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"input": [{"id": "msg_1"}]}, "input[0]"),
        ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input[0].type"),
        ({"input": [{"type": "compaction", "encrypted_content": "x"}]}, "input[0].type"),
        ({"input": [{"role": "critic", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_video"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "system", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
         "input[0].content[0].file_id"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "file:///etc/passwd"}]}]},
         "input[0].content[0].image_url"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_url": "https://x"}]}]},
         "input[0].content[0].file_url"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "gAAAA"}]},
         "input[0].encrypted_content"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "tools[0].type"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
        ({"tools": [WEATHER | {"parameters": {"type": "array"}}]}, "tools[0].parameters"),
        ({"tools": [WEATHER | {"defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [WEATHER], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "now"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}},
         "tool_choice.tools"),
        ({"tools": [WEATHER],
          "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "now"}]}},
         "tool_choice.tools"),
        ({"text": {"format": {"type": "json_schema", "name": "x y", "schema": {}}}}, "text.format.name"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format"),
        ({"truncation": "middle"}, "truncation"),
        ({"metadata": {"n": 1}}, "metadata"),
    ],
)  # fmt: skip
def test_what_is_not_taken_is_refused_by_name(fields: Any, param: str) -> None:
    error = refused(**fields)
    assert (error.param or "").startswith(param), error.message
    assert re.split(r"[.\[]", param)[0] in error.message


def test_others_complaints_are_told_in_this_dialects_names() -> None:
    error = InvalidRequest("`messages[0].content` is longer than `max_tokens`; `max_tokens_x` isn't.", param="messages")
    told = openai_responses.error_body(error)["error"]
    assert told["message"] == "`input` is longer than `max_output_tokens`; `max_tokens_x` isn't."
    assert told["param"] == "input"
    with pytest.raises(InvalidRequest, match=r"reasoning\.effort"):
        decode(reasoning={"effort": "low"}).refuse_thinking()
    with pytest.raises(InvalidRequest, match=r"text\.verbosity"):
        decode(text={"verbosity": "low"}).refuse_foreign()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KINDS = st.sampled_from(
    ["message", "function_call", "function_call_output", "reasoning", "input_text", "input_image", "input_file"]
)
ITEM_FIELDS = st.sampled_from(
    ["role", "content", "call_id", "name", "arguments", "output", "summary", "encrypted_content", "text", "image_url"]
)
items = st.lists(st.builds(lambda kind, rest: rest | {"type": kind}, KINDS,
                           st.dictionaries(ITEM_FIELDS, json_values, max_size=4)), max_size=3)  # fmt: skip


@given(
    st.dictionaries(st.sampled_from(sorted(openai_responses.ResponsesBody.__struct_fields__)), json_values, max_size=4),
    items | json_values,
)
def test_whatever_comes_is_read_or_refused(fields: dict[str, Any], given_input: Any) -> None:
    with contextlib.suppress(InvalidRequest):
        decode(**({"input": given_input} | fields))


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b"\xff", b'{"model": "m", "input": ' + b"[" * 5000 + b"]" * 5000 + b"}"]
)
def test_what_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        openai_responses.decode(body, {}, "rcpt_1")
