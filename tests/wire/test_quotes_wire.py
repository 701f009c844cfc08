"""`POST /v1/quote`, in and out, and the 402 that carries a quote."""

import json
from pathlib import Path
from typing import Any

import pytest

from millicent.core.errors import InvalidRequest, PaymentRequired
from millicent.core.money import Money
from millicent.core.quotes import CostInterval, Interval, Quote
from millicent.core.usage import Provenance
from millicent.wire import openai_common, quotes
from millicent.wire import receipts as receipts_wire
from support import snapshots

SNAPSHOTS = Path(__file__).parent / "snapshots"
QUOTE = Quote(
    model="tiny",
    placement="this-machine",
    input_tokens=12,
    output_tokens=Interval(3, 40, 128),
    ttft=Interval(1_000_000, 2_500_000, 9_000_000),
    total=Interval(2_000_000, 50_000_000, 200_000_000),
    cost=CostInterval(Money(10), Money(1_234), Money(50_000)),
    provenance=Provenance.ESTIMATED,
)
UNPRICED = Quote("far", "provider", 12, Interval(1, 2, 3), None, None, None, Provenance.UNKNOWN)


def decode(**fields: Any) -> tuple[str, tuple[str, ...]]:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    request, models = quotes.decode(json.dumps(body).encode(), {}, "rcpt_1")
    request.refuse_foreign()
    return request.model, models


def test_quotes_and_the_402_that_carries_one() -> None:
    listed = receipts_wire.list_body([receipts_wire.quote_body(each) for each in (QUOTE, UNPRICED)], None)
    refusal = openai_common.error_body(PaymentRequired("Too dear: ask for less.", quote=QUOTE))
    text = json.dumps(json.loads(receipts_wire.encode([listed, refusal])), indent=1) + "\n"
    snapshots.check(SNAPSHOTS / "quotes.json", text)


def test_models_are_those_named_or_the_requests_own() -> None:
    assert decode(model="a") == ("a", ("a",))
    assert decode(models=["b", "a", "b"]) == ("b", ("b", "a"))
    assert decode(model="c", models=["a"]) == ("c", ("a",))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"models": []}, "models"),
        ({"models": "a"}, "models"),
        ({"models": [f"m{number}" for number in range(33)]}, "models"),
        ({}, "model"),
        ({"model": "a", "tempature": 1}, "tempature"),
        ({"models": ["a"], "temperature": 9}, "temperature"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize("body", [b"", b"[]", b'{"models": ', b"\xff"])
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        quotes.decode(body, {}, "rcpt_1")
