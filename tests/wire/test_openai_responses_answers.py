"""What clients of OpenAI's Responses see, to the byte; and a stream says what a whole answer does."""

import json
from pathlib import Path
from typing import Any

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent

from millicent.core.chunks import CallPiece, Candidate, FinishReason, Text, TokenLogprob, merge_texts
from millicent.core.errors import UpstreamError
from millicent.wire import openai_response_answers, openai_responses
from millicent.wire import receipts as receipts_wire
from millicent.wire.openai_responses import Shape
from support import receipts, snapshots

SNAPSHOTS = Path(__file__).parent / "snapshots"
EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)
# What the public schema of Open Responses (2026-04-24) wants of every response, beyond the official client's types.
REQUIRED = (
    "id object created_at completed_at status incomplete_details model previous_response_id instructions output error "
    "tools tool_choice truncation parallel_tool_calls text top_p presence_penalty frequency_penalty top_logprobs "
    "temperature reasoning user usage max_output_tokens max_tool_calls store background service_tier metadata "
    "safety_identifier prompt_cache_key"
)
TOOLS = [{"type": "function", "name": name, "parameters": {"type": "object"}} for name in ("weather", "now")]
CALLED = [
    Text("", 5, reasoning="It is about"),
    Text("", 2, reasoning=" Rome.", signature="c2VhbA=="),
    Text("", 0, sealed="eHl6"),
    Text("Let me look.", 4),
    Text("", 9, calls=(CallPiece(0, "weather", '{"ci'),)),
    Text("", 3, calls=(CallPiece(1, "now", "{}"), CallPiece(0, "", 'ty": "Rome"}'))),
]


def shape(**fields: Any) -> Shape:
    return openai_responses.decode(json.dumps({"model": "tiny", "input": "hi"} | fields).encode(), {}, "rcpt_1")[1]


def stream_of(texts: list[Text], reason: FinishReason, given: Shape) -> bytes:
    opened, closed = receipts.running(), receipts.settled()
    writer = openai_response_answers.Stream(given)
    pieces = [writer.start(opened), *(writer.text(opened, text) for text in texts), writer.end(closed, [reason])]
    return b"".join(pieces)


def events(stream: bytes) -> list[dict[str, Any]]:
    """Each is what the official client's types say, named, and numbered from 0."""
    *told, done, rest = stream.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    found = []
    for number, event in enumerate(told):
        name, data = event.split("\n")
        body = json.loads(data.removeprefix("data: "))
        assert name == f"event: {body['type']}"
        assert body["sequence_number"] == number
        if "response" in body:
            assert set(REQUIRED.split()) <= body["response"].keys()
            if body["response"]["incomplete_details"] != {"reason": "cancelled"} and body["type"] != "response.failed":
                EVENT.validate_python(body)
        else:
            EVENT.validate_python(body)
        found.append(body)
    return found


def accumulated(stream: bytes) -> list[dict[str, Any]]:
    """The items that a client makes of a stream's deltas; every `done` says the same."""
    items: dict[int, dict[str, Any]] = {}
    for event in events(stream):
        kind: str = event["type"]
        index: int = event.get("output_index", -1)
        if kind == "response.output_item.added":
            assert index == len(items)
            items[index] = event["item"]
        elif kind == "response.output_item.done":
            status = event["item"]["status"]
            seal = {name: event["item"][name] for name in ("encrypted_content",) if name in event["item"]}
            assert event["item"] == items[index] | {"status": status} | seal
            items[index] = event["item"]
        elif kind.endswith("part.added"):
            field, at = ("summary", "summary_index") if "summary_index" in event else ("content", "content_index")
            assert event[at] == len(items[index][field])
            items[index][field].append(event["part"])
        elif kind.endswith(".delta"):
            assert event["item_id"] == items[index]["id"]
            if "arguments" in kind:
                items[index]["arguments"] += event["delta"]
            else:
                part = items[index]["summary" if "summary_index" in event else "content"][-1]
                part["text"] += event["delta"]
                if "logprobs" in part:
                    part["logprobs"] += event["logprobs"]
    return [items[index] for index in sorted(items)]


def pretty(body: object) -> str:
    return json.dumps(json.loads(receipts_wire.encode(body)), indent=1, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("name", ["calls", "summary"])
def test_an_answer_with_all_there_is(name: str) -> None:
    reasoning = {"effort": "low", "summary": "auto"} if name == "summary" else None
    given = shape(tools=TOOLS, reasoning=reasoning, instructions="Be brief.", metadata={"run": "7"})
    texts = merge_texts(CALLED, in_order=True)
    body = openai_response_answers.answer_body(receipts.settled(), texts, FinishReason.TOOL_CALLS, given)
    snapshots.check(SNAPSHOTS / f"openai.responses.answer.{name}.json", pretty(body))
    Response.model_validate_json(receipts_wire.encode(body))
    stream = stream_of(CALLED, FinishReason.TOOL_CALLS, given)
    snapshots.check(SNAPSHOTS / f"openai.responses.stream.{name}.txt", stream.decode())
    whole = json.loads(receipts_wire.encode(body))
    assert accumulated(stream) == whole["output"]
    assert events(stream)[-1]["response"] == whole


def test_a_plain_answer_with_its_log_probabilities() -> None:
    told = (TokenLogprob("é".encode(), -0.25, (Candidate(b"e", -2.0),)),)
    texts = [Text("", 1), Text("é", 1, logprobs=told), Text(" ✓", 1)]
    given = shape(top_logprobs=1)
    merged = merge_texts(texts, in_order=True)
    body = openai_response_answers.answer_body(receipts.settled(), merged, FinishReason.STOP, given)
    (item,) = body["output"]
    (entry,) = item["content"][0]["logprobs"]
    assert (entry["token"], entry["top_logprobs"][0]["token"]) == ("é", "e")
    stream = stream_of(texts, FinishReason.STOP, given)
    assert events(stream)[-1]["response"] == json.loads(receipts_wire.encode(body))
    assert accumulated(stream) == json.loads(receipts_wire.encode(body["output"]))


@pytest.mark.parametrize(
    ("reason", "why"),
    [
        (FinishReason.LENGTH, "max_output_tokens"),
        (FinishReason.CONTENT_FILTER, "content_filter"),
        (FinishReason.CANCELLED, "cancelled"),
    ],
)
def test_an_answer_that_was_cut_off_says_so_and_where(reason: FinishReason, why: str) -> None:
    stream = stream_of(CALLED[:-1], reason, shape(tools=TOOLS))
    last = events(stream)[-1]
    assert last["type"] == "response.incomplete"
    response = last["response"]
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": why})
    assert response["completed_at"] is None
    assert [item["status"] for item in response["output"]] == ["completed", "completed", "completed", "incomplete"]
    assert response["output"] == accumulated(stream)


def test_an_answer_that_says_nothing_is_an_empty_message() -> None:
    stream = stream_of([], FinishReason.STOP, shape())
    (item,) = events(stream)[-1]["response"]["output"]
    assert item["content"] == [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]
    assert accumulated(stream) == [item]


def test_a_stream_in_which_something_goes_wrong_ends_with_what_there_was() -> None:
    writer = openai_response_answers.Stream(shape())
    opened = receipts.running()
    error = UpstreamError("It broke off: retry.", code="upstream_broke_off")
    stream = writer.start(opened) + writer.text(opened, Text("To", 1)) + writer.failed(opened, error)
    last = events(stream)[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["error"] == {"code": "upstream_broke_off", "message": "It broke off: retry."}
    assert last["response"]["status"] == "failed"
    assert [item["status"] for item in last["response"]["output"]] == ["incomplete"]


def test_unknown_counts_are_null() -> None:
    body = openai_response_answers.answer_body(receipts.unknown(), [Text("x", 1)], FinishReason.STOP, shape())
    assert body["usage"]["input_tokens"] is None
    assert body["usage"]["cost"] is None


KINDS = st.sampled_from(["reasoning", "text", "call"])


@given(st.lists(st.tuples(KINDS, st.text(min_size=1), st.integers(0, 2)), max_size=20), st.booleans())
def test_a_stream_adds_up_to_its_last_event_whatever_comes_in_which_order(
    pieces: list[tuple[str, str, int]], summary: bool
) -> None:
    texts, seen = [], set()
    for kind, said, index in pieces:
        if kind == "call":
            texts.append(Text("", 1, calls=(CallPiece(index, "" if index in seen else "now", said),)))
            seen.add(index)
        else:
            texts.append(Text(said, 1) if kind == "text" else Text("", 1, reasoning=said))
    stream = stream_of(texts, FinishReason.STOP, Shape(shape().echo, summary=summary))
    output = events(stream)[-1]["response"]["output"]
    assert accumulated(stream) == output
    everything = "".join(said for kind, said, _ in pieces if kind == "text")
    assert "".join(item["content"][0]["text"] for item in output if item["type"] == "message") == everything
    ids = [item["id"] for item in output]
    assert len(set(ids)) == len(ids)


@given(st.lists(st.tuples(st.sampled_from(["reasoning", "sealed", "text", "call"]), st.text(min_size=1)), max_size=12),
       st.booleans())  # fmt: skip
def test_an_answer_sent_back_says_what_it_said(pieces: list[tuple[str, str]], summary: bool) -> None:
    """In the order it came: our own reader makes of the items what the writer was given."""
    texts, said, calls = [], [], 0
    for kind, content in pieces:
        match kind:
            case "reasoning":
                texts.append(Text("", 1, reasoning=content, signature=f"seal {content}"))
            case "sealed":
                texts.append(Text("", 1, sealed=content))
            case "text":
                texts.append(Text(content, 1))
            case _:
                texts.append(Text("", 1, calls=(CallPiece(calls, "now", json.dumps({"a": content})),)))
                calls += 1
        said.append((kind, content))
    given = Shape(shape().echo, summary=summary)
    merged = merge_texts(texts, in_order=True) or (Text("", 0),)
    body = openai_response_answers.answer_body(receipts.settled(), merged, FinishReason.STOP, given)
    items = json.loads(receipts_wire.encode(body))["output"]
    sent = json.dumps({"model": "m", "input": items}).encode()
    back = openai_responses.decode(sent, {}, "rcpt_1")[0].messages or ()
    found = [("text", text) for message in back if (text := message.text)]
    thoughts = [thought for message in back for thought in message.thoughts]
    assert "".join(text for _, text in found) == "".join(text for kind, text in said if kind == "text")
    assert [(thought.text, thought.signature or thought.sealed) for thought in thoughts] == [
        (content if kind == "reasoning" else "", f"seal {content}" if kind == "reasoning" else content)
        for kind, content in said
        if kind in {"reasoning", "sealed"}
    ]
    arguments = [json.loads(call.arguments)["a"] for message in back for call in message.tool_calls]
    assert arguments == [content for kind, content in said if kind == "call"]
