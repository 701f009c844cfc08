"""What was wasted, recomputed by hand from a few receipts."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from typing import Any

import msgspec
import pytest

from millicent.core.clock import NS_PER_HOUR, NS_PER_S
from millicent.core.money import Money
from millicent.core.prompts import Prompt, Segment
from millicent.core.receipts import Line, Meter, PriceSource, Receipt, Role, Status
from millicent.core.request import Attribution
from millicent.core.usage import Provenance, Usage
from millicent.ledger.memory import MemoryLedger
from millicent.ledger.queries import ReceiptFilter
from millicent.ledger.waste import ADVICE, Waste, WasteReport
from support.receipts import START_NS, settled

FRESH, CACHED, WRITTEN = 100, 10, 125  # nano-dollars a token
SEARCH = Attribution(feature="search")


def line(meter: Meter, tokens: int, price: int | None) -> Line:
    return Line(
        attempt=1,
        role=Role.INFERENCE,
        meter=meter,
        quantity=Decimal(tokens),
        unit="token",
        unit_price_usd=None if price is None else Decimal(price).scaleb(-9),
        amount=None if price is None else Money(price * tokens),
        provenance=Provenance.UNKNOWN if price is None else Provenance.REPORTED,
        incurred_at_ns=START_NS,
        posted_at_ns=START_NS,
    )


def receipt(
    number: int, *, read: int = 100, cached: int = 0, written: int = 0, output: int = 10, parts: str = "",
    at_s: int | None = None, price: int | None = FRESH, prices: bool = False, **given: object,
) -> Receipt:  # fmt: skip
    """`parts`: one letter per segment of equal length, `s` for the system prompt's; what begins alike is alike."""
    usage = {"input_fresh": read - cached - written, "input_cache_read": cached, "input_cache_write_5m": written}
    lines = [line(Meter.INPUT, read - cached - written, price)]
    lines += [line(Meter.INPUT_CACHED, cached, CACHED)] if cached else []
    lines += [line(Meter.CACHE_WRITE, written, WRITTEN)] if written else []
    segments = tuple(
        Segment("system" if letter == "s" else "user", 10, parts[: i + 1].encode().ljust(8)[-8:])
        for i, letter in enumerate(parts)
    )
    snapshot = {"input": "0.1", "input_cached": "0.01"} if prices else {}
    base = msgspec.structs.replace(
        settled(f"rcpt_{number:026d}"),
        created_at_ns=START_NS + (number if at_s is None else at_s) * NS_PER_S,
        usage=Usage.of(Provenance.REPORTED, **usage, output_text=output),
        lines=tuple(lines),
        attribution=SEARCH,
        prices=PriceSource("published", snapshot),
        prompt=Prompt(bytes(20), segments) if parts else None,
    )
    return msgspec.structs.replace(base, **given)


def wasted(*receipts: Receipt, most: int = 50_000) -> WasteReport:
    async def fill() -> WasteReport:
        ledger = MemoryLedger()
        for each in receipts:
            await ledger.close(each, ())
        return ledger.queries.waste(ReceiptFilter(), most=most)

    return asyncio.run(fill())


def only(report: WasteReport, kind: str) -> Waste:
    (found,) = (each for each in report.found if each.kind == kind)
    return found


def kinds(report: WasteReport) -> list[str]:
    return [each.kind for each in report.found]


def rcpt(number: int) -> str:
    return f"rcpt_{number:026d}"


def test_an_empty_ledger_wastes_nothing() -> None:
    assert wasted() == WasteReport()


def test_outputs_that_were_cut_or_not_read_are_waste_with_all_they_cost() -> None:
    left: dict[str, Any] = {"status": Status.CANCELLED, "finish_reason": "cancelled"}
    report = wasted(
        receipt(1),
        receipt(2, finish_reason="length", output=50),
        receipt(3, finish_reason="length", output=60, read=200),
        receipt(4, output=7, **left),
        receipt(5, price=None, **left),
    )
    cut = Waste(kind="cut", feature="search", requests=2, tokens=110, cost=Money(30_000), unpriced=0, example=rcpt(3))
    unread = Waste(
        kind="unread", feature="search", requests=2, tokens=17, cost=Money(10_000), unpriced=1, example=rcpt(4)
    )
    assert report == WasteReport((cut, unread), 5, 5, START_NS + NS_PER_S)
    assert cut.provenance is Provenance.MEASURED


def test_a_prefix_that_comes_again_uncached_costs_what_a_cache_would_have_saved() -> None:
    """Of 3,000 tokens in three equal segments, the first two are those of the receipt before: 2,000 tokens, at nine
    tenths of the price of fresh input, since a token from the cache costs a tenth."""
    report = wasted(
        receipt(1, read=3000, parts="aab", prices=True),
        receipt(2, read=3000, parts="aac", prices=True),
        receipt(3, read=3000, parts="aad", prices=True),
    )
    found = only(report, "repeated")
    assert (found.requests, found.tokens, found.cost) == (2, 4000, Money(4000 * 90))
    assert (found.model, found.prefix_tokens, found.per_hour) == ("tiny", 2000, 2.0)
    assert found.provenance is Provenance.ESTIMATED


def test_what_was_read_from_a_cache_or_is_being_written_to_one_is_no_waste() -> None:
    report = wasted(
        receipt(1, read=3000, parts="aab"),
        receipt(2, read=3000, cached=2000, parts="aac"),
        receipt(3, read=3000, written=2000, parts="aad"),
    )
    assert "repeated" not in kinds(report)


def test_without_a_price_for_cached_input_a_repeated_prefix_counts_in_full() -> None:
    report = wasted(receipt(1, read=3000, parts="aab"), receipt(2, read=3000, parts="aac"))
    assert only(report, "repeated").cost == Money(2000 * FRESH)


def test_what_the_response_cache_answered_was_not_paid_for_again() -> None:
    hit = receipt(2, read=3000, parts="aac", backend="response_cache", lines=())
    assert kinds(wasted(receipt(1, read=3000, parts="aab"), hit)) == []


@pytest.mark.parametrize(
    "second",
    [
        receipt(2, read=3000, parts="aac", model="other"),
        receipt(2, read=3000, parts="aac", attribution=Attribution(feature="search", key="another tenant")),
        receipt(2, read=3000, parts="aac", at_s=1 + 3600),
        receipt(2, read=3000, parts="xac"),
        receipt(2, read=1500, parts="aac"),
    ],
    ids=["another model", "another key", "an hour later", "it begins otherwise", "too short"],
)
def test_a_prefix_is_repeated_only_where_a_cache_could_have_held_it(second: Receipt) -> None:
    assert kinds(wasted(receipt(1, read=3000, parts="aab"), second)) == []


def test_before_prompts_were_hashed_a_conversations_turns_are_taken_to_go_on_from_each_other() -> None:
    turn = Attribution(feature="search", conversation="c")
    report = wasted(
        receipt(1, read=2000, output=100, attribution=turn),
        receipt(2, read=2500, output=100, attribution=turn),  # 2,100 of it were there before
        receipt(3, read=3000, cached=2500, output=100, attribution=turn),  # all but 100 came from a cache
        receipt(4, read=2500, attribution=Attribution(feature="search", conversation="other")),
    )
    found = only(report, "repeated")
    assert (found.requests, found.tokens, found.cost, found.example) == (1, 2100, Money(210_000), rcpt(2))


def test_a_system_prompt_that_is_most_of_the_input_says_what_part() -> None:
    """Three quarters of 400 tokens are the system prompt's; half of them come from a cache at a tenth."""
    mostly = [receipt(number, read=400, cached=150, parts="sssb") for number in range(20)]
    hardly = [
        receipt(100 + number, read=400, parts="sbbb", attribution=Attribution(feature="chat")) for number in range(20)
    ]
    found = only(wasted(*mostly, *hardly), "system")
    each = 150 * CACHED + 150 * FRESH
    assert (found.feature, found.requests, found.tokens, found.prefix_tokens) == ("search", 20, 6000, 300)
    assert found.cost == Money(20 * each)
    assert found.share == round(each / (150 * CACHED + 250 * FRESH), 3)


def test_prompts_that_grow_over_weeks_cost_what_the_last_quarter_of_the_time_has_more() -> None:
    week_s = 7 * 24 * 3600
    grows = [
        receipt(100 * week + number, read=100 + 20 * week, at_s=week * week_s)
        for week in range(5)
        for number in range(20)
    ]
    # The five weeks' requests fall into quarters of 100, 120, 140, and 160 and 180 together.
    steady = [
        msgspec.structs.replace(
            each,
            id=each.id.replace("rcpt_0", "rcpt_1"),
            attribution=Attribution(feature="steady"),
            usage=Usage.of(Provenance.REPORTED, input_fresh=100),
        )
        for each in grows
    ]
    report = wasted(*grows, *steady)
    found = only(report, "growing")
    assert (found.feature, found.before_tokens, found.after_tokens) == ("search", 100, 170)
    assert (found.requests, found.tokens, found.cost) == (40, 40 * 70, Money(40 * 70 * FRESH))
    assert found.tokens_per_week == 23  # a straight line through 100, 120, 140 and 170
    assert found.example == rcpt(400)


def test_conversations_that_grow_cost_what_later_turns_read_beyond_the_first() -> None:
    turns = [
        receipt(
            10 * talk + turn, read=100 + 100 * turn, attribution=Attribution(feature="chat", conversation=f"c{talk}")
        )
        for talk in range(5)
        for turn in range(5)
    ]
    found = only(wasted(*turns), "lengthening")
    assert (found.feature, found.requests, found.tokens) == ("chat", 20, 5 * (100 + 200 + 300 + 400))
    assert found.cost == Money(5000 * FRESH)
    assert (found.before_tokens, found.after_tokens, found.tokens_per_turn) == (100, 500, 100)


def test_only_the_latest_are_read_and_the_report_says_how_many() -> None:
    report = wasted(*(receipt(number, finish_reason="length") for number in range(10)), most=4)
    assert (report.read, report.of, report.from_ns) == (4, 10, START_NS + 6 * NS_PER_S)
    assert only(report, "cut").requests == 4


def test_every_kind_of_waste_says_what_to_do() -> None:
    hour = NS_PER_HOUR // NS_PER_S
    turns = [
        receipt(
            number, read=2000 * (1 + number), parts="s" * (1 + number), at_s=number * hour // 40,
            finish_reason="length", status=Status.SUCCEEDED, attribution=Attribution(feature="all", conversation="c"),
        )
        for number in range(30)
    ]  # fmt: skip
    grown = [receipt(100 + number, read=10 + 10 * number, at_s=26 * number) for number in range(100)]
    gone = receipt(300, status=Status.CANCELLED)
    report = wasted(*turns, *grown, gone)
    assert set(kinds(report)) == set(ADVICE)
    costs = [each.cost.nanousd for each in report.found]
    assert costs == sorted(costs, reverse=True)
