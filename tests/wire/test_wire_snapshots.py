"""What clients see, to the byte."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from millicent.core.accounts import Account
from millicent.core.chunks import CallPiece, Candidate, FinishReason, Text, TokenLogprob, merge_texts
from millicent.core.errors import InvalidRequest, RateLimited
from millicent.core.money import Money
from millicent.core.usage import Provenance
from millicent.wire import openai_chat, openai_common, openai_completions
from millicent.wire import receipts as receipts_wire
from support import receipts, snapshots

SNAPSHOTS = Path(__file__).parent / "snapshots"


def pretty(body: object) -> str:
    return json.dumps(json.loads(receipts_wire.encode(body)), indent=1, ensure_ascii=False) + "\n"


def stream(writer: Any, text: list[str]) -> str:
    return stream_of(writer, [Text(piece, 1) for piece in text], [FinishReason.STOP])


def stream_of(writer: Any, texts: list[Text], reasons: list[FinishReason]) -> str:
    opened, closed = receipts.running(), receipts.settled()
    events = [writer.start(opened), *(writer.text(opened, text) for text in texts), writer.end(closed, reasons)]
    return b"".join(events).decode()


# Two choices; the second's character comes in two tokens.
SCORED = [
    Text("Hi", 1, 0, (TokenLogprob(b"Hi", -0.25, (Candidate(b"Hi", -0.25), Candidate(b"\n", -2.5))),)),
    Text("\u00e9", 2, 1, (TokenLogprob(b"\xc3", -0.5), TokenLogprob(b"\xa9", -0.125, (Candidate(b"\xa8", -0.1),)))),
    Text("!", 1, 0, (TokenLogprob(b"!", float("-inf")),)),
]
REASONS = [FinishReason.STOP, FinishReason.LENGTH]


@pytest.mark.parametrize("dialect", [openai_chat, openai_completions])
def test_choices_and_log_probabilities(dialect: Any) -> None:
    body = dialect.answer_body(receipts.settled(), merge_texts(SCORED), REASONS)
    snapshots.check(SNAPSHOTS / f"{dialect.DIALECT}.answer.choices.json", pretty(body))
    writer = dialect.Stream(openai_common.StreamShape(choices=2))
    snapshots.check(SNAPSHOTS / f"{dialect.DIALECT}.stream.choices.txt", stream_of(writer, SCORED, REASONS))


CALLED = [
    Text("", 5, reasoning="It is about"),
    Text("", 2, reasoning=" Rome."),
    Text("Let me look.", 4),
    Text("", 9, 0, calls=(CallPiece(0, "weather", '{"ci'),)),
    Text("", 3, 0, calls=(CallPiece(0, "", 'ty": "Rome"}'), CallPiece(1, "now", "{}"))),
]


def test_reasoning_and_calls_of_tools() -> None:
    body = openai_chat.answer_body(receipts.settled(), merge_texts(CALLED), [FinishReason.TOOL_CALLS])
    snapshots.check(SNAPSHOTS / "openai.chat.answer.calls.json", pretty(body))
    events = stream_of(openai_chat.Stream(openai_common.StreamShape()), CALLED, [FinishReason.TOOL_CALLS])
    snapshots.check(SNAPSHOTS / "openai.chat.stream.calls.txt", events)


def test_an_echoed_prompt_begins_with_a_token_that_has_no_probability() -> None:
    texts = [Text("ab", 0, 0, (TokenLogprob(b"a", None), TokenLogprob(b"b", -1.5)))]
    body = openai_completions.answer_body(receipts.settled(), texts, [FinishReason.LENGTH])
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["a", "b"],
        "token_logprobs": [None, -1.5],
        "top_logprobs": [None, {"b": -1.5}],
        "text_offset": [0, 1],
    }


@pytest.mark.parametrize("dialect", [openai_chat, openai_completions])
def test_whole_answers(dialect: Any) -> None:
    body = dialect.answer_body(receipts.settled(), [Text("To\nkyo ✓", 3)], [FinishReason.STOP])
    snapshots.check(SNAPSHOTS / f"{dialect.DIALECT}.answer.json", pretty(body))


@pytest.mark.parametrize("dialect", [openai_chat, openai_completions])
@pytest.mark.parametrize("shape", ["plain", "usage", "running_usage"])
def test_streams(dialect: Any, shape: str) -> None:
    asked = openai_common.StreamShape(usage=shape != "plain", running_usage=shape == "running_usage")
    snapshots.check(
        SNAPSHOTS / f"{dialect.DIALECT}.stream.{shape}.txt", stream(dialect.Stream(asked), ["To\nkyo", " ✓"])
    )


def test_a_cut_off_answer_says_length() -> None:
    body = openai_chat.answer_body(receipts.settled(), [Text("To", 1)], [FinishReason.LENGTH])
    assert body["choices"][0]["finish_reason"] == "length"


def test_errors() -> None:
    errors = [
        InvalidRequest("Invalid `temperature`: Expected `float` <= 2.0.", param="temperature"),
        RateLimited("256 requests are running: retry in a moment.", retry_after_s=1),
    ]
    snapshots.check(SNAPSHOTS / "errors.json", pretty([openai_common.error_body(error) for error in errors]))


@pytest.mark.parametrize("name", ["running", "settled", "unknown"])
def test_receipts(name: str) -> None:
    receipt = getattr(receipts, name)()
    snapshots.check(SNAPSHOTS / f"receipt.{name}.json", pretty(receipts_wire.receipt_body(receipt)))


def test_accounts() -> None:
    account = Account(
        device="cpu", placement="this-machine", hour_ns=receipts.START_NS, accelerators=1, wall_ns=100, serving_ns=40,
        overhead_ns=30, lost_ns=5, idle_ns=20, down_ns=5, usd_per_hour=Decimal("0.10"),
        rate_provenance=Provenance.ASSUMED, cost=Money(12),
    )  # fmt: skip
    snapshots.check(
        SNAPSHOTS / "accounts.json", pretty(receipts_wire.list_body([receipts_wire.account_body(account)], None))
    )


def test_unknown_usage_is_null_and_an_unpriced_answer_costs_null() -> None:
    usage = openai_common.usage_body(receipts.unknown())
    assert usage["prompt_tokens"] is None
    assert usage["total_tokens"] is None
    assert usage["cost"] is None
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert b"null" in openai_common.encode(usage["cost_details"])


def test_cost_is_an_exact_json_number() -> None:
    encoded = openai_common.encode(openai_common.usage_body(receipts.settled()))
    assert json.loads(encoded, parse_float=Decimal)["cost"] == Decimal("0.000025")
