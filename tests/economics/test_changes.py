"""Why a cost changed: parts that sum to the difference, each laid to what really changed."""

from __future__ import annotations

import asyncio
from datetime import date
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millicent.core.errors import InvalidRequest
from millicent.core.money import Money
from millicent.core.periods import DAY_NS, Period, parse_period
from millicent.core.tallies import Tally
from millicent.economics.changes import FACTORS, ChangeReport, changes, drifts, shapley
from millicent.economics.config import EarningsConfig
from millicent.ledger import tallies as tallies_of_ledger
from millicent.ledger.queries import ReceiptFilter
from support.economy import answered, ledger_of

MONDAY, TUESDAY = parse_period("2026-11-02"), parse_period("2026-11-03")

kinds = st.sampled_from(
    ["inference input", "inference output", "inference input_cached", "inference accelerator", "inference request_fee",
     "inference cache_write", "retry input", "verification output", "adjustment other"]
)  # fmt: skip
tallies = st.builds(
    Tally,
    requests=st.integers(1, 50),
    priced=st.integers(0, 50),
    prefill_ns=st.integers(0, 10**10),
    decode_ns=st.integers(0, 10**10),
    nanousd=st.dictionaries(kinds, st.integers(-(10**6), 10**13), max_size=6),
    priced_tokens=st.dictionaries(
        st.sampled_from(
            ["input_fresh", "input_cache_read", "input_cache_write_5m", "input_hit", "output_hit", "output_text"]
        ),
        st.integers(0, 10**7),
        max_size=5,
    ),
).map(lambda tally: tally if tally.priced else Tally(requests=tally.requests))
sides = st.dictionaries(st.sampled_from(["large", "small", "tiny"]), tallies, min_size=1, max_size=3).filter(
    lambda side: any(tally.priced for tally in side.values())
)


@settings(max_examples=60, deadline=None)
@given(sides, sides)
def test_the_parts_sum_to_the_difference_to_the_nano_dollar(before: dict[str, Tally], after: dict[str, Tally]) -> None:
    parts = shapley(before, after)
    cost = [sum(tally.cost_nanousd for tally in side.values()) for side in (before, after)]
    assert sum(parts) == cost[1] - cost[0]
    back = shapley(after, before)
    assert all(abs(there + here) <= 2 for there, here in zip(parts, back, strict=True))


@settings(max_examples=20, deadline=None)
@given(sides)
def test_where_nothing_changed_nothing_is_to_blame(side: dict[str, Tally]) -> None:
    assert shapley(side, side) == [0] * len(FACTORS)


def report(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> ChangeReport:
    receipts = [
        answered(number, day.from_ns + number, **facts)
        for number, (day, facts) in enumerate(
            [*((MONDAY, facts) for facts in before), *((TUESDAY, facts) for facts in after)]
        )
    ]
    ledger = ledger_of(receipts)
    found = changes(ledger.queries, MONDAY, TUESDAY)
    whole = [
        Money.total(
            each.cost for each in ledger.queries.totals("feature", ReceiptFilter(from_ns=day.from_ns, to_ns=day.to_ns))
        )
        for day in (MONDAY, TUESDAY)
    ]
    asyncio.run(ledger.stop())
    assert [found.total.before, found.total.after] == whole
    assert Money.total(found.total.effects.values()) == found.total.difference == whole[1] - whole[0]
    for each in found.features:
        assert Money.total(each.effects.values()) == each.difference
    return found


def test_each_thing_that_changes_alone_is_what_is_blamed() -> None:
    usual: dict[str, Any] = {"fresh": 1000, "output": 100}
    base = [usual] * 4
    for factor, after in {
        "volume": [usual] * 6,
        "input_tokens": [{**usual, "fresh": 1500}] * 4,
        "output_tokens": [{**usual, "output": 300}] * 4,
        "price": [{**usual, "prices": ("6", "0.5", "16")}] * 4,
        "cache": [{**usual, "fresh": 400, "cached": 600}] * 4,
        "other": [{**usual, "retries_usd": "0.002"}] * 4,
        "model_mix": [usual, usual, usual, {**usual, "model": "small"}],
    }.items():
        assert set(report(base, after).total.effects) == {factor}, factor


def test_two_things_that_change_at_once_share_what_they_do_together() -> None:
    """4 requests of $0.005 become 6 of $0.0075. Volume alone adds $0.01 and prompts $0.01; the $0.005 that only both
    together add is halved."""
    found = report([{"fresh": 1000, "output": 0}] * 4, [{"fresh": 1500, "output": 0}] * 6)
    assert found.total.effects == {"volume": Money.from_usd("0.0125"), "input_tokens": Money.from_usd("0.0125")}


def test_features_that_came_or_went_are_new_or_gone() -> None:
    found = report([{"feature": "old"}, {"feature": "kept"}], [{"feature": "fresh"}, {"feature": "kept"}])
    effects = {each.group: each.effects for each in found.features}
    cost = Money.from_usd("0.0065")
    assert effects == {"old": {"gone": -cost}, "fresh": {"new": cost}, "kept": {}}


def test_what_is_unpriced_is_counted_and_left_out() -> None:
    found = report([{}], [{}, {"priced": False}])
    assert found.total.effects == {}
    assert (found.total.was.unpriced, found.total.became.unpriced) == (0, 1)


def test_drift_is_told_against_last_week_and_against_a_baseline_that_stays() -> None:
    """Prompts grow by a tenth each week: never much against the week before, and by a third against the baseline."""
    week = 7 * DAY_NS
    start = parse_period("2026-10-05").from_ns
    receipts = [
        answered(number * 10 + each, start + number * week + each * DAY_NS, fresh=1000 * 11**number // 10**number)
        for number in range(4)
        for each in range(5)
    ]
    ledger = ledger_of([*receipts, answered(99, start + 4 * week - 1, feature=None)])
    chat, nobody = drifts(ledger.queries, start + 4 * week, {})
    assert (chat.feature, chat.baseline_from) == ("chat", "2026-10-05")
    assert chat.now.input_tokens == 1331
    assert chat.week_ago.input_tokens == 1210
    assert chat.baseline.input_tokens == 1000
    assert chat.moved == ("cost_per_request", "input_tokens")
    assert nobody.feature is None
    assert nobody.moved == ()
    pinned = {"chat": EarningsConfig(baseline=date(2026, 10, 19))}
    (chat, _) = drifts(ledger.queries, start + 4 * week, pinned)
    assert (chat.baseline_from, chat.moved) == ("2026-10-19", ())
    asyncio.run(ledger.stop())


def test_a_machines_time_is_laid_to_prompts_and_outputs_by_what_each_took() -> None:
    """A second of prefill and one of decode, at $1 for each; then outputs twice as long, for two seconds."""
    before = Tally(1, 1, prefill_ns=10**9, decode_ns=10**9, nanousd={"inference accelerator": 2 * 10**9})
    before.priced_tokens = {"input_fresh": 100, "output_text": 10}
    after = Tally(1, 1, prefill_ns=10**9, decode_ns=2 * 10**9, nanousd={"inference accelerator": 3 * 10**9})
    after.priced_tokens = {"input_fresh": 100, "output_text": 20}
    parts = dict(zip(FACTORS, shapley({"m": before}, {"m": after}), strict=True))
    assert {name: part for name, part in parts.items() if part} == {"output_tokens": 10**9}


def test_a_period_is_told_as_it_was_asked() -> None:
    found = report([{}], [{}])
    assert (found.before, found.after) == (MONDAY, TUESDAY)
    assert found.total.became.cost_per_request == Money.from_usd("0.0065")
    assert found.total.became.input_tokens == Decimal(1000)
    assert Period(1, 3).common(Period(3, 4)) is None


def test_what_the_response_cache_answers_is_laid_to_caches_and_not_to_prices() -> None:
    """Four answers of a thousand tokens in and a hundred out, for $1 each; then every other one is a hit."""
    tokens = {"input_fresh": 4000, "output_text": 400}
    before = Tally(4, 4, nanousd={"inference input": 3 * 10**9, "inference output": 10**9}, priced_tokens=tokens)
    after = Tally(4, 4, nanousd={"inference input": 15 * 10**8, "inference output": 5 * 10**8})
    after.priced_tokens = {"input_fresh": 2000, "input_hit": 2000, "output_text": 200, "output_hit": 200}
    parts = dict(zip(FACTORS, shapley({"m": before}, {"m": after}), strict=True))
    assert {name: part for name, part in parts.items() if part} == {"cache": -2 * 10**9}


def test_filters_that_would_take_reading_everything_are_refused_rather_than_answered_by_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ledger = ledger_of([answered(number, MONDAY.from_ns + number) for number in range(3)])
    monkeypatch.setattr(tallies_of_ledger, "MOST_DETAIL", 2)
    with pytest.raises(InvalidRequest, match="too many receipts"):
        changes(ledger.queries, MONDAY, TUESDAY, ReceiptFilter(user="ada"))
    asyncio.run(ledger.stop())
