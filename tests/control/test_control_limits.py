"""Rates: what is let through, how long the rest must wait, and what the headers say."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.control.config import Rates
from millicent.control.limits import RateLimiter, Ticket
from millicent.core.clock import NS_PER_S, ManualClock
from millicent.core.errors import ConfigError, RateLimited
from millicent.core.limits import Allowance
from millicent.core.money import Money
from millicent.wire.openai_common import rate_headers


def limiter(**rates: Any) -> tuple[RateLimiter, ManualClock]:
    clock = ManualClock()
    return RateLimiter(clock, lambda _: Rates(**rates)), clock


def refused(make: Any, *arguments: Any) -> RateLimited:
    with pytest.raises(RateLimited) as caught:
        make(*arguments)
    return caught.value


def test_after_exactly_retry_after_the_next_request_goes_and_not_a_second_sooner() -> None:
    limits, clock = limiter(requests_per_minute=7)
    for _ in range(7):
        limits.enter("k")
    wait_s = refused(limits.enter, "k").retry_after_s
    assert wait_s == 9  # 60 / 7 is 8.57
    clock.advance((wait_s - 1) * NS_PER_S)
    assert refused(limits.enter, "k").retry_after_s == 1
    clock.advance(NS_PER_S)
    limits.enter("k")


def test_keys_do_not_share_their_rates() -> None:
    limits, _ = limiter(requests_per_minute=1)
    for key in ("a", "b", None):
        limits.enter(key)
        refused(limits.enter, key)


def test_a_refused_request_does_not_count() -> None:
    limits, _ = limiter(requests_per_minute=1)
    for _ in range(5):
        limits.enter("k").withdraw()
    limits.enter("k")


def test_concurrent_requests_are_counted_until_they_leave() -> None:
    limits, _ = limiter(concurrent=2)
    first, _ = limits.enter("k"), limits.enter("k")
    assert refused(limits.enter, "k").code == "concurrency_limit_exceeded"
    first.leave(1, None)
    limits.enter("k")


def test_tokens_are_reserved_at_most_and_what_was_not_used_is_given_back() -> None:
    limits, clock = limiter(tokens_per_minute=600)
    ticket = limits.enter("k")
    ticket.reserve(500, None)
    other = limits.enter("k")
    assert refused(other.reserve, 200, None).retry_after_s == 10  # 100 are missing at 10 a second
    ticket.leave(50, None)
    other.reserve(200, None)
    assert limits.allowances("k") == {"tokens": Allowance(600, 350, 25 * NS_PER_S)}
    clock.advance(25 * NS_PER_S)
    assert limits.allowances("k")["tokens"] == Allowance(600, 600, 0)


def test_more_than_a_minutes_worth_waits_for_a_full_bucket_and_then_goes() -> None:
    limits, clock = limiter(tokens_per_minute=600)
    limits.enter("k").reserve(60, None)
    big = limits.enter("k")
    assert refused(big.reserve, 10_000, None).retry_after_s == 6
    clock.advance(6 * NS_PER_S)
    big.reserve(10_000, None)
    assert refused(limits.enter("k").reserve, 1, None).retry_after_s == 941  # it owes 9400, and one more: 940.1 s


def test_dollars_a_minute_hold_the_quote_and_settle_the_cost() -> None:
    limits, _ = limiter(usd_per_minute=Decimal("0.60"))
    ticket = limits.enter("k")
    ticket.reserve(1, Money.from_usd("0.5"))
    other = limits.enter("k")
    assert refused(other.reserve, 1, Money.from_usd("0.2")).retry_after_s == 10
    ticket.leave(1, Money.from_usd("0.1"))
    other.reserve(1, Money.from_usd("0.2"))


def test_a_change_of_a_keys_rates_holds_at_once() -> None:
    rates = Rates(requests_per_minute=1)
    limits = RateLimiter(ManualClock(), lambda _: rates)
    limits.enter("k")
    refused(limits.enter, "k")
    rates = Rates(requests_per_minute=5)
    limits.enter("k")
    assert limits.allowances("k")["requests"].remaining == 4


def test_what_ran_when_a_keys_rates_changed_still_leaves() -> None:
    rates = [Rates(concurrent=1)]
    limits = RateLimiter(ManualClock(), lambda _: rates[0])
    first = limits.enter("k")
    rates[0] = Rates(concurrent=2)
    second = limits.enter("k")
    refused(limits.enter, "k")
    for ticket in (first, second):
        ticket.leave(0, Money(0))
    for _ in range(2):
        limits.enter("k")


def test_a_refusal_for_dollars_is_told_in_dollars() -> None:
    limits, _ = limiter(usd_per_minute=Decimal("0.5"))
    limits.enter("k").reserve(0, Money.from_usd("0.4"))
    told = refused(limits.enter("k").reserve, 0, Money.from_usd("0.3")).message
    assert told.startswith("This key may use $0.5 a minute, and this request needs $0.3: ")


def test_nothing_is_said_where_nothing_is_limited() -> None:
    limits, _ = limiter()
    for _ in range(1000):
        limits.enter("k").reserve(10**9, Money(10**12))
    assert limits.allowances("k") == {}


@given(st.lists(st.tuples(st.integers(0, 20 * NS_PER_S), st.integers(1, 400)), max_size=60), st.integers(1, 300))
def test_no_minute_ever_gets_more_than_a_bucket_and_a_minutes_worth(
    arrivals: list[tuple[int, int]], per_minute: int
) -> None:
    limits, clock = limiter(tokens_per_minute=per_minute)
    passed: list[tuple[int, int]] = []
    waits: list[int] = []
    for gap_ns, tokens in arrivals:
        clock.advance(gap_ns)
        ticket: Ticket = limits.enter("k")
        try:
            ticket.reserve(min(tokens, per_minute), None)
        except RateLimited as error:
            waits.append(error.retry_after_s or 0)
        else:
            passed.append((clock.monotonic_ns(), min(tokens, per_minute)))
    assert all(1 <= wait_s <= 60 for wait_s in waits)
    for start_ns, _ in passed:
        assert sum(tokens for at_ns, tokens in passed if start_ns <= at_ns < start_ns + 60 * NS_PER_S) <= 2 * per_minute


def test_a_keys_own_rates_stand_before_the_defaults() -> None:
    assert Rates(requests_per_minute=3).or_else(Rates(9, 9, Decimal(9), None)) == Rates(3, 9, Decimal(9), None)
    with pytest.raises(ConfigError, match=r"usd_per_minute = 0"):
        Rates(usd_per_minute=Decimal(0)).check("[limits]")


@pytest.mark.parametrize(
    ("reset_ns", "told"),
    [(0, "0s"), (1, "1ms"), (120_000_000, "120ms"), (NS_PER_S, "1s"), (8_600_000_000, "8.6s"),
     (60 * NS_PER_S, "1m0s"), (3690 * NS_PER_S, "61m30s")],
)  # fmt: skip
def test_headers_are_written_as_openai_writes_them(reset_ns: int, told: str) -> None:
    assert rate_headers({"tokens": Allowance(100, 40, reset_ns)}) == {
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "40",
        "x-ratelimit-reset-tokens": told,
    }
