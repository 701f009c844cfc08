"""Requests go to Anthropic without loss, or are refused by name; its answers are read wherever they are cut."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.core.chunks import FinishReason, merge_texts
from millicent.core.errors import InvalidRequest
from millicent.core.request import (
    CacheMark,
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
from millicent.core.usage import Count, Leaf, Provenance
from millicent.wire import anthropic_messages
from millicent.wire.anthropic_upstream import DEFAULT_MAX_TOKENS, encode
from millicent.wire.anthropic_upstream_answers import AnswerReader
from support import fake_anthropic as fake

HI = (Message("user", "hi"),)


def request(dialect: str = "openai.chat", **fields: Any) -> Request:
    return Request("rcpt_1", dialect, "m", **({"messages": HI} | fields))


def sent(dialect: str = "openai.chat", **fields: Any) -> Any:
    return json.loads(encode(request(dialect, **fields), "claude", "It").body)


# A conversation as this dialect can say it: random, and in the one form that decoding gives.
WORDS = st.text(min_size=1, max_size=8)
MARKS: st.SearchStrategy[CacheMark | None] = st.sampled_from([None, "5m", "1h"])
TEXTS = st.builds(TextPart, WORDS, MARKS)
IMAGES = st.one_of(
    st.builds(lambda data, mark: ImagePart("image/png", data, cache=mark), st.sampled_from(["AAAA", "BBBB"]), MARKS),
    st.builds(lambda mark: ImagePart(url="https://x.example/a.png", cache=mark), MARKS),
)


def plain(parts: list[Any]) -> Any:
    if not parts:
        return ""
    only_text = len(parts) == 1 and isinstance(parts[0], TextPart) and parts[0].cache is None
    return parts[0].text if only_text else tuple(parts)


CONTENTS = st.lists(st.one_of(TEXTS, IMAGES), min_size=1, max_size=3).map(plain)
ARGUMENTS = st.dictionaries(WORDS, st.one_of(st.integers(-9, 9), WORDS, st.none()), max_size=2).map(
    lambda found: json.dumps(found, ensure_ascii=False, separators=(",", ":"))
)
THOUGHTS = st.lists(
    st.one_of(st.builds(Thought, st.text(max_size=5), WORDS), st.builds(lambda data: Thought(sealed=data), WORDS)),
    max_size=2,
).map(tuple)
TOOLS = st.lists(
    st.builds(
        lambda name, described, mark, strict: Tool(name, described, '{"type":"object"}', mark, strict),
        st.sampled_from(["f", "g", "h-1"]), st.text(max_size=5), MARKS, st.sampled_from([None, True, False]),
    ),
    max_size=3, unique_by=lambda tool: tool.name,
).map(tuple)  # fmt: skip


@st.composite
def turns(draw: st.DrawFn) -> tuple[Message, ...]:
    system = draw(st.lists(TEXTS, max_size=2))
    found = [Message("system", plain(list(system)))] if system else []
    for turn in range(draw(st.integers(1, 3))):
        found.append(Message("user", draw(CONTENTS)))
        calls = [
            ToolCall(f"t{turn}{i}", draw(st.sampled_from(["f", "g"])), draw(ARGUMENTS), draw(MARKS))
            for i in range(draw(st.integers(0, 2)))
        ]
        said = draw(st.lists(TEXTS, min_size=0 if calls else 1, max_size=2).map(plain))
        found.append(Message("assistant", said, tool_calls=tuple(calls), thoughts=draw(THOUGHTS)))
        for call in calls:
            answer = draw(st.one_of(st.just(""), CONTENTS))
            found.append(Message("tool", answer, tool_call_id=call.id, failed=draw(st.booleans())))
    return (*found, Message("user", draw(CONTENTS)))


@given(
    messages=turns(), tools=TOOLS,
    thinking=st.sampled_from([None, Thinking("none"), Thinking("max"), Thinking(None, 2048)]),
    parallel=st.booleans(), choice=st.sampled_from(["auto", "none", "required"]), sampling=st.sampled_from(
        [Sampling(), Sampling(temperature=0.5, top_p=0.25, top_k=3)]),
    form=st.sampled_from([None, OutputFormat("json_schema", '{"type":"object"}')]),
)  # fmt: skip
def test_what_goes_there_says_what_was_asked(
    messages: tuple[Message, ...], tools: tuple[Tool, ...], thinking: Thinking | None, parallel: bool, choice: Any,
    sampling: Sampling, form: OutputFormat | None,
) -> None:  # fmt: skip
    asked = Request(
        "rcpt_1", anthropic_messages.DIALECT, "m", messages=messages, tools=tools, thinking=thinking,
        tool_choice=choice if tools else "auto", parallel_tool_calls=parallel or not tools or choice == "none",
        sampling=sampling, limits=Limits(5, ("x",)), output_format=form, stream=True,
        extra={"anthropic-beta": Extra('"b-1"', None), "unheard": Extra("[1]", "Unknown field `unheard`: remove it.")},
    )  # fmt: skip
    body = encode(asked, "m", "It")
    read, _ = anthropic_messages.decode(body.body, body.headers, "rcpt_1")
    assert read == asked


def test_an_openai_request_with_all_that_can_go() -> None:
    body = sent(
        messages=(
            Message("system", "Be kind."),
            Message("user", (TextPart("what?"), ImagePart("image/jpeg", "AAAA", detail="low"))),
            Message("assistant", "", tool_calls=(ToolCall("call_1", "f", '{"a":1}'),), thoughts=(Thought("unsealed"),)),
            Message("tool", "2", tool_call_id="call_1"), Message("tool", "3", tool_call_id="call_2", failed=True),
            Message("user", "so?"),
        ),
        tools=(Tool("f", "d", '{"type":"object"}'),), tool_choice="required", tool_name="f", parallel_tool_calls=False,
        thinking=Thinking("minimal"), sampling=Sampling(top_p=0.5), restated=("temperature",),
    )  # fmt: skip
    source = {"type": "base64", "media_type": "image/jpeg", "data": "AAAA"}
    assert body == {
        "model": "claude", "max_tokens": DEFAULT_MAX_TOKENS, "stream": True, "service_tier": "standard_only",
        "system": [{"type": "text", "text": "Be kind."}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "what?"}, {"type": "image", "source": source}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "call_1", "name": "f", "input": {"a": 1}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "call_1", "content": "2"},
                {"type": "tool_result", "tool_use_id": "call_2", "content": "3", "is_error": True},
                {"type": "text", "text": "so?"},
            ]},
        ],
        "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
        "thinking": {"type": "adaptive"}, "output_config": {"effort": "low"},
        "temperature": 1.0, "top_p": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"sampling": Sampling(seed=1)}, "seed"),
        ({"sampling": Sampling(temperature=1.5)}, "temperature"),
        ({"sampling": Sampling(presence_penalty=1)}, "presence_penalty"),
        ({"sampling": Sampling(logprobs=2)}, "logprobs"),
        ({"sampling": Sampling(logit_bias={1: 1.0})}, "logit_bias"),
        ({"limits": Limits(min_tokens=1)}, "min_tokens"),
        ({"limits": Limits(stop_tokens=(1,))}, "stop_token_ids"),
        ({"choices": 2}, "n"),
        ({"priority": 1}, "priority"),
        ({"output_format": OutputFormat("regex", "a")}, "response_format"),
        ({"messages": None, "prompt": "x"}, "prompt"),
        ({"messages": (Message("user", "x", name="ada"),)}, "messages[0].name"),
        ({"messages": (Message("user", (OtherPart("input_audio", "{}", "messages[0].content[0]"),)),)},
         "messages[0].content[0].type"),
        ({"messages": (Message("user", (ImagePart("image/tiff", "AAAA"),)),)}, "messages"),
        ({"extra": {"verbosity": Extra('"high"', "`verbosity` is not supported.")}}, "verbosity"),
    ],
)  # fmt: skip
def test_what_cannot_go_there_is_refused_by_name(fields: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        sent(**fields)
    assert caught.value.param == param


BLOCKS = [
    *fake.thought(0, "Let me think.", "c2VhbA=="),
    *fake.block(1, {"type": "redacted_thinking", "data": "eHl6"}),
    *fake.text(2, "To", "kyo ✓"),
    *fake.called(3, "weather", "", '{"ci', 'ty": "東京"}'),
    *fake.called(4, "now"),
]


def read(*bodies: bytes) -> tuple[AnswerReader, list[Any]]:
    reader = AnswerReader()
    texts = [text for body in bodies for text in reader.take(body)]
    return reader, texts


def data_of(stream: bytes) -> list[bytes]:
    return [line.removeprefix(b"data: ") for line in stream.split(b"\n") if line.startswith(b"data: ")]


def test_a_stream_is_read_as_it_was_said() -> None:
    reader, texts = read(*data_of(fake.answer(BLOCKS, "tool_use")))
    (text,) = merge_texts(texts)
    assert (text.reasoning, text.signature, text.sealed, text.text) == ("Let me think.", "c2VhbA==", "eHl6", "Tokyo ✓")
    assert [(call.index, call.name, json.loads(call.arguments)) for call in text.calls] == [
        (0, "weather", {"city": "東京"}), (1, "now", {}),
    ]  # fmt: skip
    assert (reader.ended, reader.reasons, reader.id) == (True, (FinishReason.TOOL_CALLS,), "msg_01")
    assert reader.served_model == "claude-sonnet-4-20250514"
    known = Provenance.REPORTED
    assert reader.usage is not None
    assert reader.usage.leaves == {
        Leaf.INPUT_FRESH: Count(12, known), Leaf.INPUT_CACHE_READ: Count(7, known),
        Leaf.INPUT_CACHE_WRITE_5M: Count(11, known), Leaf.INPUT_CACHE_WRITE_1H: Count(13, known),
        Leaf.OUTPUT_TEXT: Count(21, known), Leaf.OUTPUT_REASONING: Count(9, known),
    }  # fmt: skip


def test_a_whole_answer_says_the_same() -> None:
    content: list[dict[str, Any]] = [
        {"type": "thinking", "thinking": "Let me think.", "signature": "c2VhbA=="},
        {"type": "redacted_thinking", "data": "eHl6"},
        {"type": "text", "text": "Tokyo ✓"},
        {"type": "tool_use", "id": "a", "name": "weather", "input": {"city": "東京"}},
        {"type": "tool_use", "id": "b", "name": "now", "input": {}},
    ]
    whole, texts = read(json.dumps(fake.message(content, fake.USAGE | fake.ENDED, stop_reason="tool_use")).encode())
    streamed, pieces = read(*data_of(fake.answer(BLOCKS, "tool_use")))
    (one,), (other,) = merge_texts(texts), merge_texts(pieces)
    assert (one.text, one.reasoning, one.signature, one.sealed) == (
        other.text,
        other.reasoning,
        other.signature,
        other.sealed,
    )
    assert [json.loads(call.arguments) for call in one.calls] == [json.loads(call.arguments) for call in other.calls]
    assert (whole.usage, whole.reasons, whole.ended) == (streamed.usage, streamed.reasons, True)


@pytest.mark.parametrize(
    ("said", "stop", "reason"),
    [
        ("end_turn", None, FinishReason.STOP),
        ("stop_sequence", "END", FinishReason.STOP),
        ("max_tokens", None, FinishReason.LENGTH),
        ("model_context_window_exceeded", None, FinishReason.LENGTH),
        ("refusal", None, FinishReason.CONTENT_FILTER),
    ],
)
def test_why_it_ended(said: str, stop: str | None, reason: FinishReason) -> None:
    reader, texts = read(*data_of(fake.answer(fake.text(0, "x"), said, stop)))
    assert (reader.reasons, "".join(text.stop for text in texts)) == ((reason,), stop or "")


def test_an_answer_that_broke_off_has_its_input_reported_and_its_output_estimated() -> None:
    lines = data_of(fake.answer(fake.text(0, "x" * 40)))
    reader, _ = read(*lines[:4])
    assert not reader.ended
    assert reader.usage is not None
    assert reader.usage.leaves[Leaf.INPUT_FRESH] == Count(12, Provenance.REPORTED)
    assert reader.usage.leaves[Leaf.OUTPUT_TEXT] == Count(10, Provenance.ESTIMATED)
    assert AnswerReader().usage is None


def test_what_is_no_answer_raises() -> None:
    with pytest.raises(msgspec.DecodeError):
        read(b"[1]")
    reader, _ = read(b'{"type": "something_new", "delta": {"type": "new_delta"}}')
    assert not reader.ended
