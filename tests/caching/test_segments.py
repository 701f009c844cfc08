"""Prompts are cut alike in every dialect, and their chains are equal exactly as far as they begin alike."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from millicent.caching.segments import prompt_of
from millicent.core.prompts import KEPT_FIRST, KEPT_LAST, PICTURE_BYTES, Prompt
from millicent.core.request import Embedding, ImagePart, Message, OtherPart, Request, TextPart, Thought, Tool, ToolCall
from millicent.wire import anthropic_messages, openai_chat

SECRET = b"s" * 32
MESSAGES = st.builds(
    Message,
    role=st.sampled_from(["system", "user", "assistant", "tool"]),
    content=st.text(max_size=5) | st.lists(st.builds(TextPart, st.text(max_size=5)), max_size=2).map(tuple),
    tool_calls=st.lists(st.builds(ToolCall, st.text(max_size=2), st.just("f"), st.just("{}")), max_size=1).map(tuple),
)


def chat(*messages: Message, **given: Any) -> Request:
    return Request("rcpt_1", "openai.chat", "m", messages=messages, **given)


def cut(request: Request) -> Prompt:
    return prompt_of(request, SECRET)


def said(message: Message) -> tuple[object, ...]:
    """What a message is, however it was written."""
    return message.role, message.text, message.tool_calls


@given(st.lists(MESSAGES, max_size=6), st.lists(MESSAGES, max_size=6))
def test_chains_are_equal_exactly_as_far_as_two_prompts_begin_alike(one: list[Message], two: list[Message]) -> None:
    alike = 0
    while alike < min(len(one), len(two)) and said(one[alike]) == said(two[alike]):
        alike += 1
    first, second = cut(chat(*one)).segments, cut(chat(*two)).segments
    equal = [ours.chain == theirs.chain for ours, theirs in zip(first, second, strict=False)]
    assert equal == [i < alike for i in range(min(len(one), len(two)))]


@given(st.integers(0, 120))
def test_of_long_prompts_the_first_and_the_last_segments_are_kept_and_lengths_still_add_up(count: int) -> None:
    prompt = cut(chat(*(Message("user", "x" * i) for i in range(count))))
    assert prompt.length == sum(range(count))
    assert len(prompt.segments) == min(count, KEPT_FIRST + KEPT_LAST)
    assert prompt.omitted == count - len(prompt.segments)
    if count:
        assert prompt.ends()[-1] == sum(range(count))


def test_two_dialects_that_ask_the_same_thing_are_cut_the_same() -> None:
    schema = {"type": "object", "properties": {}}
    asked = {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": schema}}],
    }
    told = {
        "model": "m",
        "max_tokens": 5,
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
        "tools": [{"name": "f", "description": "d", "input_schema": schema}],
    }
    ours, _ = openai_chat.decode(json.dumps(asked).encode(), {}, "rcpt_1")
    theirs, _ = anthropic_messages.decode(json.dumps(told).encode(), {}, "rcpt_2")
    assert [each.kind for each in cut(ours).segments] == ["tools", "system", "user"]
    assert cut(ours).segments == cut(theirs).segments


def test_marks_for_a_providers_cache_change_no_chain() -> None:
    picture = ImagePart("image/png", "aGk=")
    plain = chat(Message("user", (TextPart("a"), picture)), tools=(Tool("f", "", "{}"),))
    marked = chat(
        Message("user", (TextPart("a", cache="5m"), msgspec.structs.replace(picture, cache="1h"))),
        tools=(Tool("f", "", "{}", cache="5m"),),
    )
    assert cut(plain).segments == cut(marked).segments


def test_what_isnt_text_has_an_assumed_length() -> None:
    parts = (TextPart("four"), ImagePart("image/png", "A" * 100_000), OtherPart("file", "x" * 10, "messages[0]"))
    call = Message("assistant", "", tool_calls=(ToolCall("id", "name", '{"a":1}'),), thoughts=(Thought("thought"),))
    first, second = cut(chat(Message("user", parts), call)).segments
    assert first.length == 4 + PICTURE_BYTES + 10
    assert second.length == len("name") + len('{"a":1}') + len("thought")


def test_a_text_and_its_tokens_are_one_segment_each_and_embeddings_have_none() -> None:
    text = cut(msgspec.structs.replace(chat(), messages=None, prompt="Once é"))
    tokens = cut(msgspec.structs.replace(chat(), messages=None, prompt=(5, 6, 7)))
    vectors = cut(msgspec.structs.replace(chat(), messages=None, embedding=Embedding(("a",))))
    assert [(each.kind, each.length) for each in (*text.segments, *tokens.segments)] == [("text", 7), ("tokens", 3)]
    assert vectors.segments == ()


def test_another_installation_has_other_hashes() -> None:
    asked = chat(Message("user", "Hello"))
    theirs = prompt_of(asked, b"t" * 32)
    assert theirs.digest != cut(asked).digest
    assert theirs.segments[0].chain != cut(asked).segments[0].chain
