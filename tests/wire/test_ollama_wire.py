"""Ollama's requests become ours, and our answers become Ollama's, to the byte."""

import json
from pathlib import Path
from typing import Any

import pytest

from millicent.core.chunks import CallPiece, FinishReason, Text, merge_texts
from millicent.core.errors import InvalidRequest, RateLimited
from millicent.core.request import (
    Embedding,
    ImagePart,
    Limits,
    Message,
    OutputFormat,
    Request,
    Sampling,
    TextPart,
    Thinking,
    Thought,
    ToolCall,
)
from millicent.wire import ollama_answers, ollama_common, ollama_requests
from millicent.wire import receipts as receipts_wire
from support import receipts, snapshots

SNAPSHOTS = Path(__file__).parent / "snapshots"
HI: Any = [{"role": "user", "content": "hi"}]
CALLED = [
    Text("", 2, reasoning="Hm."),
    Text("Let me ", 1),
    Text("look.", 1),
    Text("", 9, calls=(CallPiece(0, "weather", '{"ci'),)),
    Text("", 3, calls=(CallPiece(0, "", 'ty": "Rome"}'), CallPiece(1, "now", "{}"))),
]


def chat(**changes: Any) -> Request:
    body = json.dumps({"model": "m", "messages": HI} | changes).encode()
    return ollama_requests.decode_chat(body, {}, "rcpt_1")[0]


def generate(**changes: Any) -> Request:
    body = json.dumps({"model": "m", "prompt": "hi"} | changes).encode()
    return ollama_requests.decode_generate(body, {}, "rcpt_1")[0]


def embed(**changes: Any) -> Request:
    return ollama_requests.decode_embed(json.dumps({"model": "m", "input": "hi"} | changes).encode(), {}, "rcpt_1")[0]


def pretty(body: object) -> str:
    return json.dumps(json.loads(receipts_wire.encode(body)), indent=1, ensure_ascii=False) + "\n"


def test_the_least_there_can_be_has_ollamas_own_defaults() -> None:
    assert chat() == Request(
        id="rcpt_1",
        dialect="ollama.chat",
        model="m",
        messages=(Message("user", "hi"),),
        sampling=Sampling(temperature=0.8, top_p=0.9, top_k=40),
        stream=True,
        assumed=("temperature", "top_p", "top_k"),
    )
    some = chat(options={"temperature": 0.8, "top_k": 40})
    assert (some.sampling, some.assumed) == (chat().sampling, ("top_p",))
    # Servers elsewhere are told what was said.
    assert chat().as_asked().sampling == Sampling()
    assert some.as_asked().sampling == Sampling(temperature=0.8, top_k=40)


def test_options_are_honoured() -> None:
    options = {
        "num_predict": 5, "temperature": 0.5, "top_k": 0, "top_p": 1, "min_p": 0.1, "typical_p": 0.9, "seed": 3,
        "stop": ["x"], "repeat_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3, "num_ctx": 4096,
        "num_gpu": 1, "repeat_last_n": -1, "mirostat": 0,
    }  # fmt: skip
    request = chat(options=options, format="json", think=True, stream=False, keep_alive="5m", logprobs=True)
    assert request.sampling == Sampling(
        temperature=0.5, top_p=1.0, top_k=0, seed=3, min_p=0.1, typical_p=0.9, repetition_penalty=1.1,
        presence_penalty=0.2, frequency_penalty=0.3, logprobs=0,
    )  # fmt: skip
    assert request.limits == Limits(5, ("x",))
    assert (request.output_format, request.thinking) == (OutputFormat("json_object"), Thinking())
    assert (request.stream, request.restated) == (False, ("top_p", "top_k"))
    assert chat(options={"num_predict": -1}).limits.max_tokens is None
    assert chat(think=False).thinking == Thinking("none")
    assert chat(format={"type": "object"}).output_format == OutputFormat("json_schema", '{"type":"object"}')


def test_calls_and_their_answers_find_each_other() -> None:
    calls = [{"function": {"name": name, "arguments": {"a": [1.50], "b": "x"}}} for name in ("f", "g", "f")]
    messages = [
        {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": calls},
        {"role": "tool", "content": "G", "tool_name": "g"},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2", "tool_name": "f"},
    ]
    found = chat(messages=messages).messages
    assert found is not None
    arguments = '{"a":[1.5],"b":"x"}'
    assert found[0] == Message(
        "assistant",
        "",
        tool_calls=tuple(ToolCall(f"call_0_{i}", name, arguments) for i, name in enumerate(("f", "g", "f"))),
        thoughts=(Thought("hm"),),
    )
    assert [message.tool_call_id for message in found[1:]] == ["call_0_1", "call_0_0", "call_0_2"]


def test_pictures_are_told_by_how_they_begin() -> None:
    found = generate(images=["/9j/AAAA"], system="Look.").messages
    assert found == (Message("system", "Look."), Message("user", (TextPart("hi"), ImagePart("image/jpeg", "/9j/AAAA"))))


def test_a_raw_prompt_gets_no_template() -> None:
    assert generate(raw=True).prompt == "hi"
    assert generate(raw=True).messages is None


def test_texts_to_embed_are_cut_to_what_the_model_reads_unless_told_otherwise() -> None:
    assert embed().embedding == Embedding(("hi",), None, -1)
    assert embed(input=["a", "b"], truncate=False, dimensions=3).embedding == Embedding(("a", "b"), 3)


@pytest.mark.parametrize(
    ("decode", "changes", "param"),
    [
        (chat, {"messages": []}, "messages"),
        (chat, {"messages": [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}]},
         "messages[0].tool_calls"),
        (chat, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        (chat, {"messages": [{"role": "user", "images": ["AAAA"]}]}, "messages[0].images[0]"),
        (chat, {"format": "xml"}, "format"),
        (chat, {"think": "much"}, "think"),
        (chat, {"top_logprobs": 2}, "top_logprobs"),
        (chat, {"options": {"mirostat": 2}}, "options.mirostat"),
        (chat, {"options": {"penalize_newline": False}}, "options.penalize_newline"),
        (chat, {"options": {"num_predict": -3}}, "options.num_predict"),
        (generate, {"suffix": "x"}, "suffix"),
        (generate, {"template": "x"}, "template"),
        (generate, {"context": [1]}, "context"),
        (generate, {"raw": True, "system": "x"}, "system"),
        (embed, {"input": []}, "input"),
        (embed, {"input": ["a", ""]}, "input"),
        (embed, {"options": {"tfs_z": 0.5}}, "options.tfs_z"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(decode: Any, changes: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode(**changes)
    assert caught.value.param == param
    assert param in caught.value.message


def test_unknown_fields_are_named_with_a_suggestion() -> None:
    with pytest.raises(InvalidRequest, match="did you mean `messages`"):
        chat(message=1).refuse_foreign()


@pytest.mark.parametrize(
    ("name", "models", "served"),
    [
        ("tiny", ["tiny"], "tiny"),
        ("tiny:latest", ["tiny"], "tiny"),
        ("tiny", ["tiny:latest"], "tiny:latest"),
        ("tiny", ["tiny:1m", "other"], "tiny:1m"),
        ("tiny:latest", ["tiny:1m"], "tiny:1m"),
        ("tiny", ["tiny:1m", "tiny:2m"], "tiny"),
        ("tiny:2m", ["tiny:1m"], "tiny:2m"),
        ("org/model:latest", ["org/model"], "org/model"),
    ],
)
def test_latest_goes_without_saying(name: str, models: list[str], served: str) -> None:
    assert ollama_common.served_name(name, models) == served


def read_load(kind: str, **body: Any) -> ollama_requests.Load | None:
    return ollama_requests.read_load(kind, json.dumps({"model": "m"} | body).encode(), {})


KINDS = [ollama_requests.CHAT, ollama_requests.GENERATE]


@pytest.mark.parametrize(
    ("kind", "body", "loads"),
    [
        (ollama_requests.CHAT, {}, True),
        (ollama_requests.CHAT, {"messages": []}, True),
        (ollama_requests.CHAT, {"messages": None}, True),
        (ollama_requests.CHAT, {"messages": HI}, False),
        (ollama_requests.CHAT, {"messages": HI, "keep_alive": 0}, False),
        (ollama_requests.CHAT, {"messages": "hi"}, False),
        (ollama_requests.GENERATE, {}, True),
        (ollama_requests.GENERATE, {"prompt": ""}, True),
        (ollama_requests.GENERATE, {"prompt": None, "images": [], "system": "Be short."}, True),
        (ollama_requests.GENERATE, {"prompt": " "}, False),
        (ollama_requests.GENERATE, {"prompt": "hi", "keep_alive": 0}, False),
        (ollama_requests.GENERATE, {"images": ["iVBORw0KGgo="]}, False),
        (ollama_requests.GENERATE, {"prompt": 3}, False),
    ],
)
def test_who_says_nothing_wants_the_model_loaded(kind: str, body: Any, loads: bool) -> None:
    assert read_load(kind, **body) == (ollama_requests.Load(kind, "m", stream=True, unloads=False) if loads else None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep_alive", [0, 0.0, -0.0, "0", "-0", "0s", "0m", "0.0s", ".0h", "0h0m0s", "00ms"])
def test_a_load_that_is_to_stay_no_time_unloads(kind: str, keep_alive: Any) -> None:
    assert read_load(kind, keep_alive=keep_alive, stream=False) == ollama_requests.Load(kind, "m", False, True)


@pytest.mark.parametrize(
    "keep_alive", [None, 1, -1, 0.5, "5m", "-1", "0.5s", "1h0m", "", "s", "0x", "0" * 100_000 + "x"]
)
def test_any_other_time_is_a_hint(keep_alive: Any) -> None:
    assert read_load(ollama_requests.CHAT, keep_alive=keep_alive) == ollama_requests.Load(
        ollama_requests.CHAT, "m", stream=True, unloads=False
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"modle": "m"}, "modle"),
        ({"options": {"mirostat": 1}}, "options.mirostat"),
        ({"options": {"temprature": 1}}, "options.temprature"),
        ({"keep_alive": []}, "keep_alive"),
        ({"think": "much"}, "think"),
        ({"format": "xml"}, "format"),
        ({"model": None}, "model"),
    ],
)
def test_a_load_says_nothing_that_a_prompt_could_not_be_sent_with(kind: str, body: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_load(kind, **body)
    assert caught.value.param == param


def test_what_cannot_be_read_is_left_to_the_decoders_to_refuse() -> None:
    for body in (b"", b"{", b"[]", b"\xff", b'{"prompt": "\xff"}', b'{"a":' + b"[" * 100_000):
        for kind, decode in zip(KINDS, (ollama_requests.decode_chat, ollama_requests.decode_generate), strict=True):
            assert ollama_requests.read_load(kind, body, {}) is None
            with pytest.raises(InvalidRequest):
                decode(body, {}, "rcpt_1")
    with pytest.raises(InvalidRequest, match="suffix"):
        read_load(ollama_requests.GENERATE, suffix="x")
    assert read_load(ollama_requests.GENERATE, context=[], template="") is not None


@pytest.mark.parametrize("stream", [True, False])
def test_nothing_is_generated_of_nothing(stream: bool) -> None:
    with pytest.raises(InvalidRequest, match="`prompt` is empty"):
        generate(prompt="", raw=True, stream=stream)
    with pytest.raises(InvalidRequest, match="`messages` is empty"):
        chat(messages=[], stream=stream)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unloads", [True, False])
def test_a_load_is_answered_as_ollama_does(kind: str, unloads: bool) -> None:
    load = ollama_requests.Load(kind, "m", stream=True, unloads=unloads)
    said = {"message": {"role": "assistant", "content": ""}} if kind == ollama_requests.CHAT else {"response": ""}
    told = {"model": "m:1b", "created_at": "2026-01-01T00:00:00.000000Z"} | said
    ended = {"done": True, "done_reason": "unload" if unloads else "load"}
    assert ollama_answers.load_body(load, "m:1b", 1_767_225_600 * 10**9) == told | ended


@pytest.mark.parametrize("kind", KINDS)
def test_whole_answers_and_streams(kind: str) -> None:
    (text,) = merge_texts(CALLED if kind == ollama_requests.CHAT else CALLED[:3])
    body = ollama_answers.answer_body(receipts.settled(), text, FinishReason.STOP, kind)
    snapshots.check(SNAPSHOTS / f"{kind}.answer.json", pretty(body))
    writer = ollama_answers.Stream(kind)
    texts = CALLED if kind == ollama_requests.CHAT else CALLED[:3]
    opened = receipts.running()
    parts = [writer.start(opened), *(writer.text(opened, each) for each in texts)]
    stream = b"".join([*parts, writer.end(receipts.settled(), [FinishReason.STOP])])
    snapshots.check(SNAPSHOTS / f"{kind}.stream.txt", stream.decode())
    lines = [json.loads(ollama_common.FAMILY.heartbeat + line) for line in stream.splitlines()]
    if kind == ollama_requests.CHAT:
        assert "".join(line["message"]["content"] for line in lines) == text.text
        assert [call for line in lines for call in line["message"].get("tool_calls", [])] == body["message"][
            "tool_calls"
        ]
    else:
        assert "".join(line["response"] for line in lines) == text.text


def test_errors_are_one_line() -> None:
    error = RateLimited("256 requests are running: retry in a moment.", retry_after_s=1)
    told = ollama_common.FAMILY.error_event(error, "rcpt_1")
    assert told.endswith(b"\n")
    assert json.loads(told) == {"error": error.message, "code": "rate_limit_exceeded", "param": None}


def test_what_nobody_knows_is_null() -> None:
    ended = ollama_common.done(receipts.unknown(), FinishReason.STOP)
    assert (ended["prompt_eval_count"], ended["cost"]) == (None, None)


def test_a_line_is_one_to_readers_that_cut_at_any_end_of_a_line() -> None:
    said = "a\x85b\u2028c\u2029d\ne\x0bf\x1cg"
    (line,) = ollama_common.line({"response": said}).decode().splitlines()
    assert json.loads(line) == {"response": said}
