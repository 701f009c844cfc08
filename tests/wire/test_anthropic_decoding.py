"""Anthropic's messages become requests without loss, or are refused by name."""

import json
from typing import Any

import msgspec
import pytest

from millicent.core.errors import InvalidRequest
from millicent.core.request import (
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
from millicent.wire import anthropic_messages

HI: Any = [{"role": "user", "content": "hi"}]
SHORT: Any = {"type": "ephemeral"}
LONG: Any = {"type": "ephemeral", "ttl": "1h"}


def decode(headers: dict[str, str] | None = None, **changes: Any) -> Request:
    body: dict[str, Any] = {"model": "m", "max_tokens": 7, "messages": HI} | changes
    return anthropic_messages.decode(json.dumps(body).encode(), headers or {}, "rcpt_1")[0]


def messages(*blocks: Any, role: str = "user") -> tuple[Message, ...]:
    found = decode(messages=[{"role": role, "content": list(blocks)}]).messages
    assert found is not None
    return found


def test_the_least_there_can_be() -> None:
    assert decode() == Request(
        id="rcpt_1", dialect="anthropic.messages", model="m", messages=(Message("user", "hi"),), limits=Limits(7)
    )


def test_everything_at_once() -> None:
    found = decode(
        {"anthropic-beta": "some-beta-2025-01-01", "x-millicent-feature": "search"},
        system=[{"type": "text", "text": "Be kind."}, {"type": "text", "text": " Be brief.", "cache_control": LONG}],
        temperature=1, top_p=0.5, top_k=3, stop_sequences=["a", "b"], stream=True,
        metadata={"user_id": "ada"}, service_tier="auto", cache_control=SHORT,
        tools=[{"name": "f", "description": "d", "input_schema": {"type": "object"}, "cache_control": SHORT,
                "strict": True, "type": "custom"}],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        thinking={"type": "enabled", "budget_tokens": 1024},
        output_config={"effort": "max", "format": {"type": "json_schema", "schema": {"type": "object"}}},
    )  # fmt: skip
    assert found.messages == (
        Message("system", (TextPart("Be kind."), TextPart(" Be brief.", "1h"))),
        Message("user", "hi"),
    )
    assert found.sampling == Sampling(temperature=1.0, top_p=0.5, top_k=3)
    assert found.restated == ("temperature",)
    assert found.limits == Limits(7, ("a", "b"))
    assert found.tools == (Tool("f", "d", '{"type":"object"}', "5m", strict=True),)
    assert (found.tool_choice, found.tool_name, found.parallel_tool_calls) == ("required", None, False)
    assert found.thinking == Thinking("max", 1024)
    assert found.output_format == OutputFormat("json_schema", '{"type":"object"}')
    assert (found.attribution.user, found.attribution.feature, found.stream) == ("ada", "search", True)
    assert found.extra == {
        "cache_control": Extra('{"type":"ephemeral","ttl":"5m"}', None),
        "anthropic-beta": Extra('"some-beta-2025-01-01"', None),
    }
    found.refuse_foreign()


def test_answers_of_tools_are_messages_of_their_own() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    assert messages(
        {"type": "tool_result", "tool_use_id": "a", "content": "1", "is_error": True},
        {"type": "tool_result", "tool_use_id": "b", "content": [{"type": "text", "text": "2"}, image]},
        {"type": "tool_result", "tool_use_id": "c", "cache_control": LONG},
        {"type": "text", "text": "and now?"},
    ) == (
        Message("tool", "1", tool_call_id="a", failed=True),
        Message("tool", (TextPart("2"), ImagePart("image/png", "AAAA")), tool_call_id="b"),
        Message("tool", (TextPart("", "1h"),), tool_call_id="c"),
        Message("user", "and now?"),
    )


def test_thoughts_and_calls_of_an_earlier_answer() -> None:
    found = messages(
        {"type": "thinking", "thinking": "hm", "signature": "s1"},
        {"type": "redacted_thinking", "data": "xyz"},
        {"type": "text", "text": "Let me see.", "citations": None},
        {"type": "tool_use", "id": "t", "name": "f", "input": {"a": [1.50]}, "cache_control": SHORT},
        {"type": "thinking", "thinking": "more", "signature": "s2"},
        {"type": "text", "text": "So."},
        role="assistant",
    )
    assert found == (
        Message(
            "assistant",
            "Let me see.",
            tool_calls=(ToolCall("t", "f", '{"a": [1.5]}', "5m"),),
            thoughts=(Thought("hm", "s1"), Thought(sealed="xyz")),
        ),
        Message("assistant", "So.", thoughts=(Thought("more", "s2"),)),
    )


def test_what_was_thought_without_a_seal_needs_no_place_of_its_own() -> None:
    found = messages(
        {"type": "text", "text": "A"}, {"type": "thinking", "thinking": "b", "signature": ""}, role="assistant"
    )
    assert found == (Message("assistant", "A", thoughts=(Thought("b"),)),)


def test_pictures_lie_somewhere_or_come_along() -> None:
    assert messages(
        {"type": "image", "source": {"type": "url", "url": "https://x.example/a.png"}, "cache_control": SHORT}
    ) == (Message("user", (ImagePart(url="https://x.example/a.png", cache="5m"),)),)


@pytest.mark.parametrize(
    "block",
    [
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x"}},
        {"type": "image", "source": {"type": "file", "file_id": "f"}},
        {"type": "text", "text": "x", "citations": [{"type": "char_location"}]},
    ],
)
def test_what_only_anthropic_knows_is_kept_and_named_where_it_cannot_go(block: Any) -> None:
    request = decode(messages=[{"role": "user", "content": [block]}])
    assert request.messages is not None
    content = request.messages[0].content
    assert isinstance(content, tuple)
    (part,) = content
    assert isinstance(part, OtherPart)
    assert json.loads(part.json) == block
    with pytest.raises(InvalidRequest, match=r"messages\[0\]\.content\[0\]"):
        request.refuse_foreign()


@pytest.mark.parametrize(
    ("thinking", "effort", "read"),
    [
        (None, None, None),
        ({"type": "adaptive"}, None, Thinking()),
        ({"type": "adaptive"}, "low", Thinking("low")),
        ({"type": "disabled"}, None, Thinking("none")),
        (None, "high", None),
    ],
)
def test_how_much_to_think(thinking: Any, effort: str | None, read: Thinking | None) -> None:
    assert decode(thinking=thinking, output_config={"effort": effort}).thinking == read


@pytest.mark.parametrize(("thinking", "read"), [({"type": "disabled"}, Thinking("none")), (None, None)])
def test_no_thought_but_some_effort_is_for_anthropic_alone(thinking: Any, read: Thinking | None) -> None:
    request = decode(thinking=thinking, output_config={"effort": "low"})
    assert request.thinking == read
    with pytest.raises(InvalidRequest, match=r"output_config\.effort"):
        request.refuse_foreign()


def test_an_answer_that_is_begun_is_to_be_continued() -> None:
    request = decode(messages=[*HI, {"role": "assistant", "content": "The"}])
    assert request.continues
    assert not decode().continues
    with pytest.raises(InvalidRequest, match="assistant's"):
        request.refuse_foreign()


def test_counting_needs_no_limit() -> None:
    body = msgspec.json.encode({"model": "m", "messages": HI})
    assert anthropic_messages.decode_count(body, {}, "rcpt_1").limits.max_tokens is None
    with pytest.raises(InvalidRequest, match="max_tokens"):
        anthropic_messages.decode(body, {}, "rcpt_1")


def block(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [fields]}]}


def tool(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"name": "f", "input_schema": {"type": "object"}} | fields]}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"temperature": 1.5}, "temperature"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": [{"name": "x"}]}, "mcp_servers"),
        ({"service_tier": "gold"}, "service_tier"),
        ({"metadata": {"user_id": "x" * 300}}, "metadata.user_id"),
        ({"metadata": {"team": "x"}}, "metadata.team"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool", "name": "g"}}, "tool_choice.name"),
        ({"cache_control": {"type": "ephemeral", "ttl": "2h"}}, "cache_control.ttl"),
        ({"output_config": {"task_budget": 1}}, "output_config.task_budget"),
        ({"system": [{"type": "text", "txt": "x"}]}, "system[0].txt"),
        (block(type="text"), "messages[0].content[0].text"),
        (block(text="x"), "messages[0].content[0].type"),
        (block(type="text", text="x", cache_control={"type": "eternal"}), "messages[0].content[0].cache_control.type"),
        (block(type="tool_use", id="a", name="f", input={}), "messages[0].content[0]"),
        (block(type="image", source={"type": "url", "url": "file:///etc/passwd"}), "messages[0].content[0].source.url"),
        (block(type="tool_result", tool_use_id="a", content=[{"type": "thinking"}]),
         "messages[0].content[0].content[0]"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": []}]}]},
         "messages[0].content[0].input"),
        (tool(type="bash_20250124"), "tools[0].type"),
        (tool(name="f g"), "tools[0].name"),
        (tool(input_schema={"type": "array"}), "tools[0].input_schema.type"),
        (tool(defer_loading=True), "tools[0].defer_loading"),
        (tool(unknown=1), "tools[0].unknown"),
        ({"tools": [*tool()["tools"], *tool()["tools"]]}, "tools[1].name"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(changes: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode(**changes)
    assert caught.value.param == param
    assert param.split(".", maxsplit=1)[0] in caught.value.message


def test_unknown_fields_go_to_anthropic_or_are_refused() -> None:
    request = decode(context_management={"edits": []})
    assert json.loads(request.extra["context_management"].json) == {"edits": []}
    with pytest.raises(InvalidRequest, match="Unknown field `context_management`"):
        request.refuse_foreign()


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b'{"messages": "\xff"}',
        b'{"model":"m","max_tokens":1,"messages":[{"role":"user","content":[{"type":"zip","x":"\xff"}]}]}',
    ],
)
def test_what_is_no_json_is_a_400(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        anthropic_messages.decode(body, {}, "rcpt_1")
