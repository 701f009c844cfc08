"""Marks for a provider's cache: where they stand, and that they pay, against a model of Anthropic's cache."""

from __future__ import annotations

import itertools
import json
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millicent.caching.prompt_caching import ALLOWED_PERCENT, Marks, PromptCaching, Terms, least_tokens, marked
from millicent.caching.segments import prompt_of
from millicent.core.clock import NS_PER_S
from millicent.core.money import Money
from millicent.core.receipts import Receipt
from millicent.core.request import Attribution, Extra, ImagePart, Message, OtherPart, Request, TextPart, Tool, ToolCall
from millicent.core.usage import Provenance, Usage
from millicent.meter.prices import PriceList
from millicent.wire.anthropic_upstream import encode
from support.fake_anthropic import PromptCache
from support.receipts import settled

SECRET = b"s" * 32
MODEL = "claude-sonnet-4-20250514"
PRICES = PriceList(
    input=Decimal(3),
    input_cached=Decimal("0.3"),
    cache_write_5m=Decimal("3.75"),
    cache_write_1h=Decimal(6),
    output=Decimal(15),
)
FRESH = Decimal(3).scaleb(-6)
MINUTE = 60 * NS_PER_S


class Provider:
    """Sends requests as the planner marks them, through the real encoder, and adds up what their input costs: `paid`,
    and `plain`, what it would without marks."""

    def __init__(self, prices: PriceList = PRICES, least: int = 1024) -> None:
        self.caching = PromptCaching()
        self.cache = PromptCache(least)
        self.prices = prices
        self.now_ns = 1_767_225_600 * NS_PER_S
        self.paid = self.plain = Money(0)
        self.usages: list[dict[str, Any]] = []
        self.bodies: list[dict[str, Any]] = []
        self._numbers = itertools.count()
        self._under_way: dict[str, tuple[dict[str, Any], dict[str, tuple[int, int]]]] = {}

    def begin(self, *messages: Message, **more: Any) -> tuple[str, Marks | None, dict[str, Any]]:
        """A request that is under way, and its body."""
        receipt_id = f"rcpt_{next(self._numbers):026d}"
        asked = Request(receipt_id, "openai.chat", "m", messages=messages, **more)
        asked = msgspec.structs.replace(asked, hashed=prompt_of(asked, SECRET))
        marks = self.caching.marks(asked, "there", MODEL, self.prices, self.now_ns)
        if marks is not None:
            asked = marked(asked, marks)
            self.caching.begin(receipt_id, marks, self.now_ns)
        body = json.loads(encode(asked, MODEL, "the fake").body)
        self.bodies.append(body)
        writing: dict[str, tuple[int, int]] = {}
        self._under_way[receipt_id] = (self.cache.usage(body, self.now_ns, writing), writing)
        return receipt_id, marks, body

    def end(self, receipt_id: str) -> None:
        """Only now can others read what it wrote."""
        told, writing = self._under_way.pop(receipt_id)
        self.cache.kept.update(writing)
        self.usages.append(told)
        written = told["cache_creation"]
        usage = Usage.of(
            Provenance.REPORTED,
            input_fresh=told["input_tokens"],
            input_cache_read=told["cache_read_input_tokens"],
            input_cache_write_5m=written["ephemeral_5m_input_tokens"],
            input_cache_write_1h=written["ephemeral_1h_input_tokens"],
        )
        terms = Terms.of(self.prices, 0)
        assert terms is not None
        plain = Money.price(usage.input_tokens or 0, FRESH)
        self.plain += plain
        self.paid += plain - terms.saved(usage)
        self.caching.settle(receipt_id, msgspec.structs.replace(settled(receipt_id), usage=usage))

    def ask(self, *messages: Message, after_ns: int = MINUTE, **more: Any) -> dict[str, Any]:
        self.now_ns += after_ns
        receipt_id, _, _ = self.begin(*messages, **more)
        self.end(receipt_id)
        return self.usages[-1]


def text(tokens: int, name: str = "x") -> str:
    return (name + " ").ljust(4 * tokens, "x")


SYSTEM = Message("system", text(5000))


def turns(count: int) -> list[Message]:
    """Of a conversation: a question, then answers and questions of 50 tokens."""
    return [Message("user" if i % 2 == 0 else "assistant", text(50, str(i))) for i in range(2 * count - 1)]


def marks_in(body: dict[str, Any]) -> list[tuple[str, str]]:
    """Which blocks have a mark, by their first word, and for how long."""
    blocks = [*body.get("tools", []), *body.get("system", [])]
    blocks += [block for message in body["messages"] for block in message["content"]]
    return [
        (block.get("text", block.get("name", "")).split(" ")[0], block["cache_control"].get("ttl", "5m"))
        for block in blocks
        if "cache_control" in block
    ]


def test_a_conversation_of_twenty_turns_with_a_long_system_prompt_costs_less_than_a_third() -> None:
    provider = Provider()
    for count in range(1, 21):
        provider.ask(SYSTEM, *turns(count))
    # The second turn sees that the first comes again, the third reads that, and until it has nothing else is risked.
    assert [usage["cache_read_input_tokens"] > 0 for usage in provider.usages] == [False, False, *[True] * 18]
    assert [usage["input_tokens"] for usage in provider.usages] == [5050, 0, 100, *[0] * 17]
    assert marks_in(provider.bodies[0]) == []
    assert marks_in(provider.bodies[1]) == [("x", "5m"), ("0", "5m"), ("2", "5m")]
    assert provider.paid.nanousd * 3 < provider.plain.nanousd
    # The next conversation is marked from its first turn: it is likely to go on.
    assert provider.ask(SYSTEM, Message("user", text(50, "anew")))["cache_creation_input_tokens"] == 5050
    assert provider.ask(SYSTEM, *turns(1))["cache_read_input_tokens"] == 5000


def test_a_shared_system_prompt_is_read_from_the_third_time_on() -> None:
    provider = Provider()
    for number in range(10):
        provider.ask(SYSTEM, Message("user", f"question {number}"))
    assert [usage["cache_read_input_tokens"] for usage in provider.usages] == [0, 0, *[5000] * 8]
    assert [marks_in(body) for body in provider.bodies] == [[], *[[("x", "5m")]] * 9]


def test_what_comes_again_within_the_hour_but_not_within_five_minutes_is_kept_for_the_hour() -> None:
    provider = Provider()
    for number in range(12):
        provider.ask(SYSTEM, Message("user", f"question {number}"), after_ns=20 * MINUTE)
    kept = [mark for body in provider.bodies for mark in marks_in(body)]
    assert set(kept) == {("x", "1h")}
    assert provider.usages[-1]["cache_read_input_tokens"] == 5000
    assert provider.paid < provider.plain


def test_what_comes_again_only_after_hours_is_never_marked() -> None:
    provider = Provider()
    for number in range(12):
        provider.ask(SYSTEM, Message("user", f"question {number}"), after_ns=90 * MINUTE)
    assert [marks_in(body) for body in provider.bodies] == [[]] * 12


def test_prompts_that_are_too_short_for_the_model_are_not_marked() -> None:
    provider = Provider()
    for _ in range(5):
        provider.ask(Message("system", text(900)), Message("user", "Hello"))
    assert [marks_in(body) for body in provider.bodies] == [[]] * 5
    assert [least_tokens(model) for model in (MODEL, "claude-haiku-4-5", "claude-3-haiku-20240307")] == [
        1024,
        4096,
        2048,
    ]


def test_a_prefix_that_another_request_is_writing_is_not_written_twice() -> None:
    provider = Provider()
    provider.ask(SYSTEM, Message("user", "one"))
    provider.now_ns += MINUTE
    begun = [provider.begin(SYSTEM, Message("user", f"burst {number}")) for number in range(8)]
    assert [marks_in(body) for *_, body in begun] == [[("x", "5m")], *[[]] * 7]
    for receipt_id, *_ in begun:
        provider.end(receipt_id)
    assert provider.ask(SYSTEM, Message("user", "after"))["cache_read_input_tokens"] == 5000


def test_a_write_that_failed_may_be_tried_again() -> None:
    provider = Provider()
    provider.ask(SYSTEM, Message("user", "one"))
    receipt_id, _, _ = provider.begin(SYSTEM, Message("user", "two"))
    provider.caching.settle(receipt_id, None)
    assert provider.ask(SYSTEM, Message("user", "three"))["cache_creation_input_tokens"] == 5000


def test_two_tenants_do_not_learn_from_each_other() -> None:
    provider = Provider()
    for number in range(3):
        provider.ask(SYSTEM, Message("user", f"{number}"), attribution=Attribution(key="ann"))
    provider.ask(SYSTEM, Message("user", "Hello"), attribution=Attribution(key="ben"))
    assert marks_in(provider.bodies[2]) == [("x", "5m")]
    assert marks_in(provider.bodies[3]) == []


CALLER_MARKED: dict[str, dict[str, Any]] = {
    "a part": {"messages": (Message("user", (TextPart(text(5000), cache="5m"),)),)},
    "a tool": {"tools": (Tool("f", text(5000), "{}", cache="1h"),)},
    "a call": {"messages": (Message("assistant", "", tool_calls=(ToolCall("i", "f", "{}", cache="5m"),)),)},
    "what we don't know": {
        "messages": (Message("user", (OtherPart("document", '{"cache_control":{}}', "messages"),)),)
    },
    "the whole": {"extra": {"cache_control": Extra("{}", None)}},
}


@pytest.mark.parametrize("given", CALLER_MARKED.values(), ids=CALLER_MARKED)
def test_where_the_caller_set_marks_none_are_added(given: dict[str, Any]) -> None:
    caching = PromptCaching()
    asked = Request("rcpt_1", "anthropic.messages", "m", **({"messages": (SYSTEM,)} | given))
    asked = msgspec.structs.replace(asked, hashed=prompt_of(asked, SECRET))
    assert caching.marks(asked, "there", MODEL, PRICES, 0) is None


@pytest.mark.parametrize(
    "prices",
    [
        None,
        PriceList(input=Decimal(3)),
        PriceList(input=Decimal(3), input_cached=Decimal("0.3")),
        PriceList(input=Decimal(3), input_cached=Decimal(3), cache_write_5m=Decimal(3)),
    ],
    ids=["none", "no cache", "no writes", "nothing to save"],
)
def test_without_prices_by_which_it_pays_nothing_is_marked(prices: PriceList | None) -> None:
    asked = Request("rcpt_1", "openai.chat", "m", messages=(SYSTEM,))
    asked = msgspec.structs.replace(asked, hashed=prompt_of(asked, SECRET))
    assert PromptCaching().marks(asked, "there", MODEL, prices, 0) is None


def test_marks_stand_on_the_last_block_of_tools_calls_answers_and_pictures() -> None:
    provider = Provider()
    tools = (Tool("first", text(2000), "{}"), Tool("second", text(2000), "{}"))
    history = [
        Message("user", (TextPart("Look"), ImagePart("image/png", "aGk="))),
        Message("assistant", "", tool_calls=(ToolCall("c1", "first", "{}"), ToolCall("c2", "second", "{}"))),
        Message("tool", "found", tool_call_id="c1"),
        Message("tool", (TextPart("nothing"),), tool_call_id="c2"),
    ]
    for count in range(1, 5):
        provider.ask(*history[:count], tools=tools)
    assert [message["content"][-1].get("cache_control") for message in provider.bodies[1]["messages"]] == [
        {"type": "ephemeral"}, {"type": "ephemeral"},
    ]  # fmt: skip
    assert "cache_control" not in provider.bodies[1]["tools"][0]
    assert marks_in(provider.bodies[1])[0] == ("second", "5m")
    assert [block.get("cache_control") for block in provider.bodies[3]["messages"][-1]["content"]] == [
        {"type": "ephemeral"}, {"type": "ephemeral"},
    ]  # fmt: skip


def test_a_message_that_says_nothing_gets_no_mark() -> None:
    provider = Provider()
    for _ in range(4):
        provider.ask(SYSTEM, Message("user", " "))
    assert [marks_in(body) for body in provider.bodies[2:]] == [[("x", "5m")]] * 2


def test_a_hundred_messages_are_marked_where_they_end_though_not_all_segments_are_kept() -> None:
    provider = Provider()
    for count in range(40, 45):
        provider.ask(SYSTEM, *turns(count))
    assert [usage["input_tokens"] for usage in provider.usages[1:]] == [0, 100, 0, 0]
    assert provider.usages[-1]["cache_read_input_tokens"] == 5000 + 50 * (2 * 43 - 1)


def test_what_was_asked_before_the_start_is_known() -> None:
    provider = Provider()
    asked = Request("rcpt_0", "openai.chat", "m", messages=(SYSTEM, Message("user", "yesterday")))
    earlier: Receipt = msgspec.structs.replace(
        settled("rcpt_0"), created_at_ns=provider.now_ns, placement="there", model="m", prompt=prompt_of(asked, SECRET),
        attribution=Attribution(), usage=Usage.of(Provenance.REPORTED, input_fresh=5003),
    )  # fmt: skip
    provider.caching.remember(earlier)
    provider.ask(SYSTEM, Message("user", "today"))
    assert marks_in(provider.bodies[0]) == [("x", "5m")]


# What is asked: one of a few long beginnings, how it goes on (of the letters so far, or anew), and after how long.
ASKED = st.tuples(
    st.integers(0, 3),
    st.integers(0, 5),
    st.sampled_from([NS_PER_S, MINUTE, 4 * MINUTE, 6 * MINUTE, 20 * MINUTE, 50 * MINUTE, 70 * MINUTE]),
)
SIZES = st.lists(st.integers(100, 30_000), min_size=4, max_size=4)


def conversation(system: int, turns: int, sizes: list[int]) -> list[Message]:
    return [
        Message("system", text(sizes[system], f"s{system}")),
        *(Message("user", text(sizes[(system + i) % 4] // 4, f"{i}")) for i in range(turns)),
    ]


@settings(max_examples=40, deadline=None)
@given(st.lists(ASKED, max_size=60), SIZES)
def test_whatever_is_asked_marks_cost_at_most_one_write_and_a_twentieth_more_than_none(
    asked: list[tuple[int, int, int]], sizes: list[int]
) -> None:
    provider = Provider()
    dearest = Money(0)
    for system, count, after_ns in asked:
        before = provider.plain
        provider.ask(*conversation(system, count, sizes), after_ns=after_ns)
        dearest = max(dearest, provider.plain - before)
    # A write for an hour costs as much again as the prompt itself.
    allowed = provider.plain.nanousd * ALLOWED_PERCENT // 100 + dearest.nanousd
    assert provider.paid.nanousd <= provider.plain.nanousd + allowed


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(ASKED, st.integers(0, 8)), max_size=40), SIZES)
def test_the_bound_holds_too_while_many_requests_run_beside_each_other(
    asked: list[tuple[tuple[int, int, int], int]], sizes: list[int]
) -> None:
    """Of those that run, the one of the number given ends after each begins, if there are so many."""
    provider = Provider()
    running: list[str] = []
    for (system, count, after_ns), ends in asked:
        provider.now_ns += after_ns
        running.append(provider.begin(*conversation(system, count, sizes))[0])
        if ends < len(running):
            provider.end(running.pop(ends))
    for each in running:
        provider.end(each)
    dearest = Money.price(max(_tokens(usage) for usage in provider.usages) if provider.usages else 0, FRESH)
    allowed = provider.plain.nanousd * ALLOWED_PERCENT // 100 + dearest.nanousd
    assert provider.paid.nanousd <= provider.plain.nanousd + allowed


def _tokens(usage: dict[str, Any]) -> int:
    read, written = usage["cache_read_input_tokens"], usage["cache_creation_input_tokens"]
    return int(usage["input_tokens"] + read + written)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(4, 9), min_size=1, max_size=6), SIZES, st.integers(1, 240))
def test_prefixes_that_come_again_four_times_within_five_minutes_never_cost_more_than_without_marks(
    times: list[int], sizes: list[int], after_s: int
) -> None:
    """Break-even: a write at a quarter more is paid back by the first read, which saves nine tenths."""
    provider = Provider()
    for number, count in enumerate(times):
        for question in range(count):
            provider.ask(
                Message("system", text(sizes[number % 4], f"{number}")),
                Message("user", f"{number} {question}"),
                after_ns=after_s * NS_PER_S,
            )
    assert provider.paid <= provider.plain


def test_an_adversary_who_repeats_only_until_it_is_marked_is_soon_refused_marks() -> None:
    provider = Provider()
    for number in range(100):
        prefix = Message("system", text(5000, str(number)))
        for question in range(5):
            provider.ask(prefix, Message("user", f"{question}"), after_ns=NS_PER_S)
            if marks_in(provider.bodies[-1]):
                break
        provider.now_ns += 100 * MINUTE
    # A write for five minutes costs $0.75 a million tokens more.
    assert provider.paid.nanousd <= provider.plain.nanousd * (100 + ALLOWED_PERCENT) // 100 + 5000 * 750
