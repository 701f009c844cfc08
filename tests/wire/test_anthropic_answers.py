"""What Anthropic's clients see, to the byte; and a stream says what a whole answer does."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.core.chunks import CallPiece, FinishReason, Text, merge_texts
from millicent.core.clock import NS_PER_S
from millicent.core.errors import EngineCrashed, Forbidden, InvalidRequest, RateLimited, TooLarge, UpstreamTimeout
from millicent.core.limits import Allowance
from millicent.core.usage import Provenance, Usage
from millicent.wire import anthropic_answers, anthropic_common
from millicent.wire import receipts as receipts_wire
from support import receipts, snapshots

SNAPSHOTS = Path(__file__).parent / "snapshots"

CALLED = [
    Text("", 5, reasoning="It is about"),
    Text("", 2, reasoning=" Rome.", signature="c2VhbA=="),
    Text("", 0, sealed="eHl6"),
    Text("Let me look.", 4),
    Text("", 9, calls=(CallPiece(0, "weather", '{"ci'),)),
    Text("", 3, calls=(CallPiece(0, "", 'ty": "Rome"}'), CallPiece(1, "now", "{}"))),
]


def stream_of(texts: list[Text], reason: FinishReason) -> bytes:
    opened, closed = receipts.running(), receipts.settled()
    writer = anthropic_answers.Stream(None)
    pieces = [writer.start(opened), *(writer.text(opened, text) for text in texts), writer.end(closed, [reason])]
    return b"".join(pieces)


def events(stream: bytes) -> list[dict[str, Any]]:
    found = []
    for event in stream.decode().removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        body = json.loads(data.removeprefix("data: "))
        assert name == f"event: {body['type']}"
        found.append(body)
    return found


def accumulated(stream: bytes) -> dict[str, Any]:
    """The message that a client makes of a stream."""
    message: dict[str, Any] = {}
    open_block, arguments = None, ""
    for event in events(stream):
        match event["type"]:
            case "message_start":
                message = event["message"]
            case "content_block_start":
                assert open_block is None
                assert event["index"] == len(message["content"])
                open_block, arguments = event["content_block"], ""
                message["content"].append(open_block)
            case "content_block_delta":
                assert open_block is not None
                assert event["index"] == len(message["content"]) - 1
                kind, value = next((name, value) for name, value in event["delta"].items() if name != "type")
                if kind == "partial_json":
                    arguments += value
                else:
                    open_block[kind] += value
            case "content_block_stop":
                assert open_block is not None
                if open_block["type"] == "tool_use":
                    open_block["input"] = json.loads(arguments or "{}")
                open_block = None
            case "message_delta":
                message |= event["delta"] | {"usage": event["usage"]}
    assert open_block is None
    return message


def pretty(body: object) -> str:
    return json.dumps(json.loads(receipts_wire.encode(body)), indent=1, ensure_ascii=False) + "\n"


def test_an_answer_with_all_there_is() -> None:
    body = anthropic_answers.answer_body(receipts.settled(), CALLED, FinishReason.TOOL_CALLS)
    snapshots.check(SNAPSHOTS / "anthropic.messages.answer.calls.json", pretty(body))
    stream = stream_of(CALLED, FinishReason.TOOL_CALLS)
    snapshots.check(SNAPSHOTS / "anthropic.messages.stream.calls.txt", stream.decode())
    assert accumulated(stream) == json.loads(receipts_wire.encode(body))


def test_a_plain_answer_that_a_stop_string_ended() -> None:
    texts = [Text("To\nkyo", 1), Text(" ✓", 1), Text("", 1, stop="END")]
    body = anthropic_answers.answer_body(receipts.settled(), texts, FinishReason.STOP)
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", "END")
    stream = stream_of(texts, FinishReason.STOP)
    snapshots.check(SNAPSHOTS / "anthropic.messages.stream.plain.txt", stream.decode())
    assert accumulated(stream) == json.loads(receipts_wire.encode(body))


THOUGHTS = st.builds(lambda text: Text("", 1, reasoning=text), st.text(min_size=1))
SEALS = st.builds(lambda text: Text("", 0, signature=text), st.text(min_size=1))
SEALED = st.builds(lambda text: Text("", 0, sealed=text), st.text(min_size=1))
SAID = st.builds(lambda text: Text(text, 1), st.text(min_size=1))


@given(texts=st.lists(st.one_of(THOUGHTS, SEALS, SEALED, SAID), max_size=12), data=st.data())
def test_a_stream_says_what_the_whole_answer_does_however_slowly_it_is_read(
    texts: list[Text], data: st.DataObject
) -> None:
    arguments = json.dumps({"a": data.draw(st.text())})
    cut = data.draw(st.integers(0, len(arguments)))
    texts = [
        *texts,
        Text("", 1, calls=(CallPiece(0, "f", arguments[:cut]),)),
        Text("", 1, calls=(CallPiece(0, "", arguments[cut:]), CallPiece(1, "g", ""))),
    ]
    body = anthropic_answers.answer_body(receipts.settled(), texts, FinishReason.TOOL_CALLS)
    begins = data.draw(st.integers(0, len(texts)))
    waited = [*merge_texts(texts[:begins], in_order=True), *texts[begins:]]  # as a slow reader gets it
    assert accumulated(stream_of(waited, FinishReason.TOOL_CALLS)) == json.loads(receipts_wire.encode(body))
    kept = merge_texts(texts, in_order=True)
    assert anthropic_answers.answer_body(receipts.settled(), kept, FinishReason.TOOL_CALLS) == body


def test_nothing_said_is_an_empty_message() -> None:
    message = accumulated(stream_of([], FinishReason.LENGTH))
    assert (message["content"], message["stop_reason"]) == ([], "max_tokens")


@pytest.mark.parametrize("arguments", ['{"city": "Ro', "[1]", "nonsense"])
def test_arguments_that_are_no_object_are_shown_as_they_came(arguments: str) -> None:
    texts = [Text("", 1, calls=(CallPiece(0, "f", arguments),))]
    body = anthropic_answers.answer_body(receipts.settled(), texts, FinishReason.LENGTH)
    assert body["content"][0]["input"] == {"_unparsed": arguments}


def test_usage_is_disjoint_and_unknown_is_null() -> None:
    import msgspec

    usage = Usage.of(
        Provenance.REPORTED, input_fresh=5, input_cache_read=7, input_cache_write_5m=11, input_cache_write_1h=13,
        output_text=17, output_reasoning=19,
    )  # fmt: skip
    body = anthropic_common.usage_body(msgspec.structs.replace(receipts.settled(), usage=usage))
    assert (body["input_tokens"], body["cache_read_input_tokens"], body["cache_creation_input_tokens"]) == (5, 7, 24)
    assert body["cache_creation"] == {"ephemeral_5m_input_tokens": 11, "ephemeral_1h_input_tokens": 13}
    assert (body["output_tokens"], body["output_tokens_details"]) == (36, {"thinking_tokens": 19})
    unknown = anthropic_common.usage_body(receipts.unknown())
    assert (unknown["input_tokens"], unknown["cost"]) == (None, None)


def test_cost_is_an_exact_json_number() -> None:
    encoded = receipts_wire.encode(anthropic_common.usage_body(receipts.settled()))
    assert json.loads(encoded, parse_float=Decimal)["cost"] == Decimal("0.000025")


def test_errors() -> None:
    errors = [
        InvalidRequest("Invalid `temperature`: Expected `float` <= 1.0.", param="temperature"),
        Forbidden("A viewer key may not run models."),
        TooLarge("The body is over 32 MB."),
        RateLimited("256 requests are running: retry in a moment.", retry_after_s=1),
        EngineCrashed("The engine process ended: retry.", retry_after_s=1),
        UpstreamTimeout("anthropic took too long."),
    ]
    bodies = [anthropic_common.error_body(error, "rcpt_1") for error in errors]
    snapshots.check(SNAPSHOTS / "anthropic.errors.json", pretty(bodies))
    event = anthropic_common.FAMILY.error_event(errors[0], None)
    assert events(event) == [json.loads(receipts_wire.encode(anthropic_common.error_body(errors[0])))]


def test_rates_reset_at_a_time_that_is_late_enough() -> None:
    allowances = {"requests": Allowance(limit=60, remaining=59, reset_ns=NS_PER_S // 2)}
    assert anthropic_common.rate_headers(allowances, 1_700_000_000 * NS_PER_S + 1) == {
        "anthropic-ratelimit-requests-limit": "60",
        "anthropic-ratelimit-requests-remaining": "59",
        "anthropic-ratelimit-requests-reset": "2023-11-14T22:13:21Z",
    }
