"""What providers say that an answer used, however badly they count."""

import json
from decimal import Decimal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.core.money import Money
from millicent.core.usage import Count, Leaf, Provenance, Usage
from millicent.wire.anthropic_upstream_answers import AnswerReader as AnthropicReader
from millicent.wire.gemini_upstream_answers import _Usage as GeminiUsage
from millicent.wire.gemini_upstream_answers import usage_of as gemini_usage_of
from millicent.wire.openai_upstream_answers import AnswerReader, _Usage, usage_of
from millicent.wire.reported import completed, cost_told, split

COUNTS = st.one_of(st.none(), st.integers(-(10**25), 10**25), st.integers(-3, 50))


def openai(**said: object) -> dict[str, int | None]:
    found = usage_of(msgspec.convert(said, _Usage))
    return {} if found is None else {leaf.value: count.tokens for leaf, count in found.leaves.items()}


@pytest.mark.parametrize("total", [-1, 10**18, 10**30, None])
def test_a_total_that_is_no_count_says_nothing(total: int | None) -> None:
    assert split(total, Leaf.INPUT_FRESH, {Leaf.INPUT_CACHE_READ: 3}) == {}


def test_a_part_larger_than_its_whole_is_the_whole() -> None:
    found = openai(prompt_tokens=10, completion_tokens=4, prompt_tokens_details={"cached_tokens": 100})
    assert found == {"input_fresh": 0, "input_cache_read": 10, "output_text": 4}


def test_more_reasoning_than_output_stands_beside_it_unless_the_total_says_otherwise() -> None:
    details = {"reasoning_tokens": 100}
    beside = {"input_fresh": 10, "output_text": 4, "output_reasoning": 100}
    said = {"prompt_tokens": 10, "completion_tokens": 4, "completion_tokens_details": details}
    assert openai(**said) == beside
    assert openai(**said, total_tokens=114) == beside
    assert openai(**said, total_tokens=14) == {"input_fresh": 10, "output_text": 0, "output_reasoning": 4}


@pytest.mark.parametrize(
    ("total", "left_out"), [(150, 120), (30, None), (0, None), (None, None), (-7, None), (10**15, None)]
)
def test_a_total_beyond_its_parts_holds_reasoning_that_was_left_out(total: int | None, left_out: int | None) -> None:
    usage = usage_of(_Usage(prompt_tokens=10, completion_tokens=20, total_tokens=total))
    told = {Leaf.INPUT_FRESH: Count(10, Provenance.REPORTED), Leaf.OUTPUT_TEXT: Count(20, Provenance.REPORTED)}
    assumed = {} if left_out is None else {Leaf.OUTPUT_REASONING: Count(left_out, Provenance.ASSUMED)}
    assert usage == Usage(told | assumed)


def test_only_the_half_that_was_told_is_known() -> None:
    told = usage_of(msgspec.convert({"prompt_tokens": 10, "completion_tokens": -2}, _Usage))
    found = completed(told, lambda: Usage.of(Provenance.ESTIMATED, input_fresh=7, output_text=5))
    assert {leaf: (count.tokens, count.provenance) for leaf, count in found.leaves.items()} == {
        Leaf.INPUT_FRESH: (10, Provenance.REPORTED),
        Leaf.OUTPUT_TEXT: (5, Provenance.ESTIMATED),
    }


@pytest.mark.parametrize("said", ["NaN", "Infinity", "-1", "1e300"])
def test_what_is_no_price_is_not_taken_for_one(said: str) -> None:
    assert cost_told(Decimal(said)) is None
    assert cost_told(Decimal("0.25")) == Money(250_000_000)


@given(COUNTS, COUNTS, COUNTS, COUNTS, COUNTS)
def test_no_count_of_a_provider_is_negative_raises_or_goes_beyond_its_total(
    read: int | None, cached: int | None, written: int | None, reasoning: int | None, audio: int | None
) -> None:
    said = {
        "prompt_tokens": read,
        "completion_tokens": written,
        "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": audio},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }
    usages = [
        usage_of(msgspec.convert(said, _Usage)),
        gemini_usage_of(GeminiUsage(read or 0, cached or 0, written or 0, reasoning or 0)),
    ]
    reader = AnthropicReader()
    counts = {"input_tokens": read, "cache_read_input_tokens": cached, "output_tokens": written}
    thoughts = {"output_tokens_details": {"thinking_tokens": reasoning}}
    body = {"type": "message", "content": [{"type": "text", "text": "word"}], "usage": counts | thoughts}
    reader.take(json.dumps(body).encode())
    usages.append(reader.usage)
    for usage in usages:
        for count in () if usage is None else usage.leaves.values():
            assert count.tokens is not None
            assert 0 <= count.tokens <= 1 << 31
    if usages[0] is not None and read is not None and 0 <= read <= 1 << 30:
        assert usages[0].input_tokens == read


def test_a_cost_that_is_none_leaves_the_count_and_the_text() -> None:
    reader = AnswerReader()
    reader.take(b'{"choices":[{"index":0,"delta":{"content":"word"},"finish_reason":"stop"}]}')
    reader.take(b'{"choices":[],"usage":{"prompt_tokens":10,"completion_tokens":4,"cost":"NaN"}}')
    assert reader.cost is None
    assert reader.usage == Usage.of(Provenance.REPORTED, input_fresh=10, output_text=4)
