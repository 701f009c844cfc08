"""The circuit breaker: a state machine in virtual time."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from millicent.core.clock import NS_PER_S, ManualClock
from millicent.core.errors import (
    EngineCrashed,
    InvalidRequest,
    MillicentError,
    ModelNotFound,
    RateLimited,
    Unavailable,
    UpstreamError,
    UpstreamTimeout,
)
from millicent.pipeline.breaker import Breaker, State, Verdict, verdict_of
from millicent.pipeline.config import BreakerConfig

CONFIG = BreakerConfig(failures=3, failed_percent=50, window_calls=8, window_s=60, cooldown_s=10)


def made() -> tuple[Breaker, ManualClock]:
    clock = ManualClock()
    return Breaker(CONFIG, clock), clock


def state_of(breaker: Breaker) -> State:
    return breaker.state


def call(breaker: Breaker, verdict: Verdict, retry_after_s: int | None = None) -> None:
    ticket = breaker.enter()
    assert ticket is not None
    breaker.leave(ticket, verdict, retry_after_s=retry_after_s)


def opened() -> tuple[Breaker, ManualClock]:
    breaker, clock = made()
    for _ in range(3):
        call(breaker, Verdict.FAILED)
    assert state_of(breaker) is State.OPEN
    return breaker, clock


def test_failures_in_a_row_open_it_and_a_success_between_them_does_not() -> None:
    breaker, _ = made()
    for verdict in (Verdict.FAILED, Verdict.FAILED, Verdict.SUCCEEDED, Verdict.FAILED, Verdict.FAILED):
        call(breaker, verdict)
    assert state_of(breaker) is State.CLOSED
    call(breaker, Verdict.FAILED)
    assert state_of(breaker) is State.OPEN
    assert breaker.enter() is None
    assert breaker.wait_ns() == 10 * NS_PER_S


def test_a_share_of_failures_opens_it_but_only_of_late_calls() -> None:
    breaker, clock = made()
    verdicts = [Verdict.SUCCEEDED, Verdict.FAILED] * 4
    for verdict in verdicts[:-1]:
        call(breaker, verdict)
    clock.advance(61 * NS_PER_S)
    call(breaker, Verdict.FAILED)
    assert state_of(breaker) is State.CLOSED  # the others are forgotten
    breaker, _ = made()
    for verdict in verdicts:
        call(breaker, verdict)
    assert state_of(breaker) is State.OPEN


def test_after_the_pause_one_call_tries_and_the_others_wait_for_it() -> None:
    breaker, clock = opened()
    clock.advance(10 * NS_PER_S)
    assert state_of(breaker) is State.HALF_OPEN
    probe = breaker.enter()
    assert probe is not None
    assert breaker.enter() is None
    assert breaker.wait_ns() is None
    breaker.leave(probe, Verdict.SUCCEEDED)
    assert state_of(breaker) is State.CLOSED
    assert breaker.enter() is not None


def test_each_failed_probe_doubles_the_pause_up_to_a_bound() -> None:
    breaker, clock = opened()
    pauses = []
    for _ in range(7):
        wait_ns = breaker.wait_ns()
        assert wait_ns is not None
        pauses.append(wait_ns // NS_PER_S)
        clock.advance(wait_ns)
        call(breaker, Verdict.FAILED)
    assert pauses == [10, 20, 40, 80, 160, 160, 160]


def test_a_probe_that_says_nothing_leaves_room_for_another() -> None:
    breaker, clock = opened()
    clock.advance(10 * NS_PER_S)
    call(breaker, Verdict.NEITHER)
    assert state_of(breaker) is State.HALF_OPEN
    call(breaker, Verdict.SUCCEEDED)
    assert state_of(breaker) is State.CLOSED


def test_calls_that_began_before_it_opened_say_nothing_any_more() -> None:
    breaker, clock = made()
    early = breaker.enter()
    assert early is not None
    for _ in range(3):
        call(breaker, Verdict.FAILED)
    breaker.leave(early, Verdict.SUCCEEDED)
    assert state_of(breaker) is State.OPEN
    clock.advance(10 * NS_PER_S)
    probe = breaker.enter()
    assert probe is not None


def test_a_server_that_asks_for_a_longer_pause_gets_it() -> None:
    breaker, _ = made()
    for _ in range(3):
        call(breaker, Verdict.FAILED, retry_after_s=30)
    assert breaker.wait_ns() == 30 * NS_PER_S


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (None, Verdict.SUCCEEDED),
        (InvalidRequest("no"), Verdict.NEITHER),
        (ModelNotFound("no"), Verdict.NEITHER),
        (EngineCrashed("gone"), Verdict.NEITHER),
        (RateLimited("slowly", retry_after_s=1), Verdict.FAILED),
        (UpstreamError("broken"), Verdict.FAILED),
        (UpstreamError("who are you", retryable=False), Verdict.FAILED),
        (UpstreamTimeout("late"), Verdict.FAILED),
        (Unavailable("down"), Verdict.FAILED),
        (MillicentError("a bug"), Verdict.FAILED),
    ],
)
def test_only_what_the_other_side_does_counts(error: MillicentError | None, verdict: Verdict) -> None:
    assert verdict_of(error) is verdict


class BreakerMachine(RuleBasedStateMachine):
    """Whatever happens, in whatever order: at most one probe, no call while it is open, never stuck."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker, self.clock = made()
        self.running: list[tuple[int, State]] = []

    @rule()
    def begin(self) -> None:
        state = self.breaker.state
        ticket = self.breaker.enter()
        probes = [before for _, before in self.running if before is State.HALF_OPEN]
        if state is State.OPEN:
            assert ticket is None
        if state is State.CLOSED:
            assert ticket is not None
        if ticket is not None:
            if state is State.HALF_OPEN:
                current = [each for each, before in self.running if before is State.HALF_OPEN and each == ticket]
                assert not current, probes
            self.running.append((ticket, state))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), verdict=st.sampled_from(Verdict), retry_after_s=st.sampled_from([None, 0, 100]))
    def end(self, data: st.DataObject, verdict: Verdict, retry_after_s: int | None) -> None:
        ticket, state = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        before = self.breaker.state
        self.breaker.leave(ticket, verdict, retry_after_s=retry_after_s)
        after = self.breaker.state
        if verdict is Verdict.NEITHER:
            assert after is before
        if before is State.OPEN:
            assert after is State.OPEN
        if after is State.OPEN and before is not State.OPEN:
            assert verdict is Verdict.FAILED
        if before is State.HALF_OPEN and after is State.CLOSED:
            assert (verdict, state) == (Verdict.SUCCEEDED, State.HALF_OPEN)

    @rule(seconds=st.integers(0, 200))
    def wait(self, seconds: int) -> None:
        self.clock.advance(seconds * NS_PER_S)

    @invariant()
    def it_is_never_stuck(self) -> None:
        wait_ns = self.breaker.wait_ns()
        if wait_ns is None:  # a probe runs, and its end will tell
            assert any(state is State.HALF_OPEN for _, state in self.running)
        else:
            assert 0 <= wait_ns <= 160 * NS_PER_S
            assert (wait_ns > 0) == (self.breaker.state is State.OPEN)


TestBreakerMachine = BreakerMachine.TestCase
