"""Two requests that ask the same thing have one digest, and any two others have two."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.caching.canonical import DIGEST_BYTES, request_digest
from millicent.caching.secret import FILE_NAME, installation_secret
from millicent.core.errors import ConfigError
from millicent.core.money import Money
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
from millicent.wire import anthropic_messages, ollama_requests, openai_chat, openai_responses

SECRET = b"s" * 32
PLAIN = Request("rcpt_1", "openai.chat", "fake", messages=(Message("user", "Hello"),))
SCHEMA = '{"type":"object","properties":{"a":{"type":"string"}}}'
WEATHER = Tool("weather", "Of a city", SCHEMA)


def digest(request: Request) -> bytes:
    return request_digest(request, SECRET)


def changed(request: Request = PLAIN, **fields: Any) -> Request:
    return msgspec.structs.replace(request, **fields)


def said(**message: Any) -> Request:
    return changed(messages=(Message(**message),))


SAME = {
    "the receipt": changed(id="rcpt_2"),
    "the dialect": changed(dialect="anthropic.messages"),
    "streaming": changed(stream=True),
    "who asks": changed(attribution=Attribution(key="mk_1", user="ann", tags={"a": "b"})),
    "the maximum cost": changed(max_cost=Money(5)),
    "the latency target": changed(latency_target_ms=100),
    "priority": changed(priority=-3),
    "text as a part": said(role="user", content=(TextPart("Hello"),)),
    "a mark for a prompt cache": said(role="user", content=(TextPart("Hello", cache="5m"),)),
    "a harmless hint": changed(extra={"service_tier": Extra('"auto"', None)}),
    "thinking as usual": changed(thinking=Thinking()),
    "what chooses among no tools": changed(tool_choice="none", parallel_tool_calls=False),
}


@pytest.mark.parametrize("what", SAME)
def test_what_does_not_determine_the_answer_is_not_in_the_digest(what: str) -> None:
    assert digest(SAME[what]) == digest(PLAIN)


OTHERS = {
    "the model": changed(model="other"),
    "the words": said(role="user", content="hello"),
    "the role": said(role="system", content="Hello"),
    "the speaker's name": said(role="user", content="Hello", name="ann"),
    "a prompt": changed(messages=None, prompt="Hello"),
    "a prompt in tokens": changed(messages=None, prompt=(1, 2)),
    "two prompts": changed(messages=None, prompt="Hello", further_prompts=("you",)),
    "two prompts, otherwise cut": changed(messages=None, prompt="Hel", further_prompts=("lo you",)),
    "texts to embed": changed(messages=None, embedding=Embedding(("Hello",))),
    "fewer dimensions": changed(messages=None, embedding=Embedding(("Hello",), dimensions=8)),
    "temperature": changed(sampling=Sampling(temperature=0)),
    "a default written out": changed(restated=("temperature",)),
    "a default of its dialect's": changed(assumed=("temperature",)),
    "a seed": changed(sampling=Sampling(seed=1)),
    "a bias": changed(sampling=Sampling(logit_bias={1: 2.0})),
    "logprobs": changed(sampling=Sampling(logprobs=0)),
    "the limit": changed(limits=Limits(max_tokens=7)),
    "a stop string": changed(limits=Limits(stop=("x",))),
    "the format": changed(output_format=OutputFormat("json_object")),
    "a schema": changed(output_format=OutputFormat("json_schema", SCHEMA)),
    "a grammar": changed(output_format=OutputFormat("lark", SCHEMA)),
    "a tool": changed(tools=(WEATHER,)),
    "a tool that must be called": changed(tools=(WEATHER,), tool_choice="required"),
    "several choices": changed(choices=2),
    "an echo": changed(echo=True),
    "cutting": changed(truncate_prompt_tokens=3),
    "thinking": changed(thinking=Thinking("high")),
    "going on": changed(continues=True),
    "a field of the dialect's own": changed(extra={"verbosity": Extra('"low"', "no")}),
    "a provider's trial": changed(extra={"anthropic-beta": Extra('"tokens-2"', None)}),
    "a picture": said(role="user", content=(TextPart("Hello"), ImagePart("image/png", "aaaa"))),
    "another picture": said(role="user", content=(TextPart("Hello"), ImagePart("image/png", "bbbb"))),
    "a sound": said(role="user", content=(OtherPart("sound", '{"a":1}', "messages[0]"),)),
    "a thought": said(role="user", content="Hello", thoughts=(Thought("hm"),)),
    "an answer": changed(messages=(Message("user", "Hello"), Message("assistant", "Hi"))),
}


def test_whatever_determines_the_answer_makes_another_digest() -> None:
    digests = {digest(PLAIN), *map(digest, OTHERS.values())}
    assert len(digests) == len(OTHERS) + 1
    assert {len(each) for each in digests} == {DIGEST_BYTES}


def test_every_field_of_a_request_was_thought_of() -> None:
    """A new field determines the answer or doesn't: say which, in canonical.py and here."""
    determine = {
        "model", "messages", "prompt", "embedding", "sampling", "limits", "output_format", "tools", "tool_choice",
        "tool_name", "parallel_tool_calls", "choices", "echo", "truncate_prompt_tokens", "thinking", "extra",
        "restated", "continues", "further_prompts", "assumed",
    }  # fmt: skip
    others = {
        "id", "dialect", "stream", "priority", "attribution", "latency_target_ms", "max_cost", "outside_costs",
        "hashed",
    }  # fmt: skip
    assert set(Request.__struct_fields__) == determine | others
    assert Message.__struct_fields__ == (
        "role", "content", "name", "tool_calls", "tool_call_id", "thoughts", "failed",
    )  # fmt: skip
    assert Tool.__struct_fields__ == ("name", "description", "parameters", "cache", "strict")
    assert Limits.__struct_fields__ == ("max_tokens", "stop", "ignore_eos", "min_tokens", "stop_tokens")
    assert ImagePart.__struct_fields__ == ("media_type", "data", "url", "detail", "cache")


def test_the_digest_says_nothing_without_the_secret() -> None:
    assert request_digest(PLAIN, b"other" * 4) != digest(PLAIN)


def test_at_temperature_0_what_narrows_or_seeds_a_draw_is_left_out() -> None:
    greedy = changed(sampling=Sampling(temperature=0))
    narrowed = Sampling(temperature=0, top_p=0.9, top_k=40, min_p=0.1, typical_p=0.5, seed=7)
    assert digest(changed(sampling=narrowed, restated=("top_k",))) == digest(greedy)
    assert digest(changed(sampling=Sampling(temperature=0, repetition_penalty=1.1))) != digest(greedy)


def test_the_order_of_stop_strings_and_biases_does_not_matter() -> None:
    one = changed(limits=Limits(stop=("a", "b"), stop_tokens=(1, 2)), sampling=Sampling(logit_bias={1: 1.0, 2: 2.0}))
    other = changed(
        limits=Limits(stop=("b", "a", "b"), stop_tokens=(2, 1)), sampling=Sampling(logit_bias={2: 2.0, 1: 1.0})
    )
    assert digest(one) == digest(other)


def test_json_is_the_same_however_it_is_written_but_not_in_another_order() -> None:
    written = '{ "type": "object",\n "properties": {"a": {"type": "string", "description": "\\u00e9"}} }'
    compact = '{"type":"object","properties":{"a":{"type":"string","description":"é"}}}'
    turned = '{"properties":{"a":{"type":"string","description":"é"}},"type":"object"}'
    of = [changed(tools=(Tool("t", "", source),)) for source in (written, compact, turned)]
    assert digest(of[0]) == digest(of[1]) != digest(of[2])
    of = [changed(output_format=OutputFormat("json_schema", source)) for source in (written, compact, turned)]
    assert digest(of[0]) == digest(of[1]) != digest(of[2])


def conversation(first: str, second: str, answered: tuple[str, str], arguments: str = '{"city":"Bern"}') -> Request:
    calls = (ToolCall(first, "weather", arguments), ToolCall(second, "weather", '{"city":"Chur"}'))
    return changed(
        messages=(
            Message("user", "Where is it warmer?"),
            Message("assistant", "", tool_calls=calls),
            *(Message("tool", str(place), tool_call_id=call) for place, call in enumerate(answered)),
        ),
        tools=(WEATHER,),
    )


def test_calls_count_by_which_answer_belongs_to_which_not_by_their_names() -> None:
    plain = digest(conversation("call_1", "call_2", ("call_1", "call_2")))
    assert digest(conversation("toolu_x", "toolu_y", ("toolu_x", "toolu_y"))) == plain
    assert digest(conversation("call_2", "call_1", ("call_2", "call_1"), '{ "city": "Bern" }')) == plain
    assert digest(conversation("call_1", "call_2", ("call_2", "call_1"))) != plain


def test_four_dialects_that_ask_the_same_thing_have_one_digest() -> None:
    system, question = "Be brief.", "How warm is it in Bern?"
    parameters = msgspec.json.decode(SCHEMA)
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    bodies = [
        (
            openai_chat,
            {
                "messages": messages, "temperature": 0, "max_tokens": 50, "top_p": 0.9,
                "tools": [{"type": "function", "function": {"name": "weather", "parameters": parameters}}],
            },
        ),
        (
            anthropic_messages,
            {
                "system": [{"type": "text", "text": system, "cache_control": {"type": "ephemeral"}}],
                "messages": [{"role": "user", "content": [{"type": "text", "text": question}]}],
                "temperature": 0, "max_tokens": 50, "stream": True,
                "tools": [{"name": "weather", "input_schema": parameters}],
            },
        ),
        (
            openai_responses,
            {
                "instructions": system, "input": question, "temperature": 0, "max_output_tokens": 50,
                "tools": [{"type": "function", "name": "weather", "parameters": parameters, "strict": None}],
            },
        ),
    ]  # fmt: skip
    decoded = [
        dialect.decode(msgspec.json.encode({"model": "fake", **body}), {}, f"rcpt_{number}")[0]
        for number, (dialect, body) in enumerate(bodies)
    ]
    decoded.append(
        ollama_requests.decode_chat(
            msgspec.json.encode(
                {
                    "model": "fake", "messages": messages,
                    "options": {"temperature": 0, "num_predict": 50, "repeat_penalty": 1.0},
                    "tools": [{"type": "function", "function": {"name": "weather", "parameters": parameters}}],
                }
            ),
            {},
            "rcpt_9",
        )[0]
    )  # fmt: skip
    assert len({request.dialect for request in decoded}) == 4
    assert len({digest(request) for request in decoded}) == 1, [msgspec.to_builtins(each) for each in decoded]


WORDS = st.text(max_size=8)
MESSAGES = st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant"]), WORDS), min_size=1, max_size=4)


@given(MESSAGES, MESSAGES)
def test_only_the_same_conversation_has_the_same_digest(one: list[Message], other: list[Message]) -> None:
    """Whatever the words are: none can pass for a border between messages."""
    same = digest(changed(messages=tuple(one))) == digest(changed(messages=tuple(other)))
    assert same == (one == other)


TURNS = st.lists(st.text(min_size=1, max_size=8).filter(str.strip), min_size=1, max_size=5)


def in_each_dialect(system: str, turns: list[str], tokens: int, temperature: float, stop: list[str]) -> list[Request]:
    """The same conversation, as three dialects write it."""
    said = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(turns)]
    shared = {"model": "fake", "temperature": temperature, "top_p": 0.5, "top_k": 5}
    chat = {**shared, "messages": [{"role": "system", "content": system}, *said], "max_tokens": tokens, "stop": stop}
    parts = [{"role": each["role"], "content": [{"type": "text", "text": each["content"]}]} for each in said]
    messages = {**shared, "system": system, "messages": parts, "max_tokens": tokens, "stop_sequences": stop}
    options = {"temperature": temperature, "top_p": 0.5, "top_k": 5, "num_predict": tokens, "repeat_penalty": 1.0}
    ollama = {"model": "fake", "messages": chat["messages"], "options": {**options, "stop": stop}}
    return [
        openai_chat.decode(msgspec.json.encode(chat), {}, "rcpt_1")[0],
        anthropic_messages.decode(msgspec.json.encode(messages), {}, "rcpt_2")[0],
        ollama_requests.decode_chat(msgspec.json.encode(ollama), {}, "rcpt_3")[0],
    ]


ASKED = st.tuples(st.integers(1, 99), st.sampled_from([0, 0.25]), st.sampled_from([[], ["x"], ["x", "y"]]))


@given(st.text(min_size=1, max_size=8), TURNS, ASKED)
def test_whatever_is_said_every_dialect_says_it_with_the_same_digest(
    system: str, turns: list[str], asked: tuple[int, float, list[str]]
) -> None:
    turns = turns if len(turns) % 2 else turns[:-1]  # a user's is the last
    (one,) = {digest(request) for request in in_each_dialect(system, turns, *asked)}
    (other,) = {digest(request) for request in in_each_dialect(system, [*turns[:-1], turns[-1] + "?"], *asked)}
    assert one != other


def test_the_secret_is_made_once_and_only_this_user_can_read_it(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with ThreadPoolExecutor(8) as several:
        found = set(several.map(lambda _: installation_secret(home), range(8)))
    assert len(found) == 1
    assert installation_secret(home) in found
    assert stat.S_IMODE((home / FILE_NAME).stat().st_mode) == 0o600
    assert [path.name for path in home.iterdir()] == [FILE_NAME]
    assert installation_secret(tmp_path / "elsewhere") not in found


def test_a_secret_that_is_cut_off_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"short")
    with pytest.raises(ConfigError, match=r"digest\.key: has 5 bytes instead of 32"):
        installation_secret(tmp_path)
