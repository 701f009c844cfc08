"""Identical requests at once: one runs, the others are given its answer, and nobody is lost whatever happens to it."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millicent.backends.fake import FakeAnswer
from millicent.control.config import BudgetConfig
from millicent.core.chunks import Text
from millicent.core.errors import PaymentRequired, UpstreamError, UpstreamTimeout
from millicent.core.money import Money
from millicent.core.receipts import Status
from millicent.core.request import Attribution, Limits
from millicent.core.usage import Provenance
from millicent.ledger.budgets import put_budget
from millicent.pipeline.answer import Answer
from millicent.pipeline.config import ModelPolicy
from support.cached_world import WORDS, World, outcome, read, run, turns


def test_identical_requests_at_once_run_once() -> None:
    async def story() -> None:
        world = World()
        world.gate.clear()
        answers = [await world.pipeline.admit(world.request(stream=number % 2 == 0)) for number in range(5)]
        assert [outcome(answer.opened) for answer in answers] == ["miss", "wait", "wait", "wait", "wait"]
        assert [world.receipt(answer).status for answer in answers] == [None] * 5
        await turns()
        assert world.calls == 1
        assert len(world.pipeline.load()) == 1
        world.gate.set()
        said = [await read(answer) for answer in answers]
        assert said == [(Text("Hello world", 2),)] * 5
        receipts = [world.receipt(answer) for answer in answers]
        assert [outcome(receipt) for receipt in receipts] == ["miss", "hit", "hit", "hit", "hit"]
        assert Money.total(receipt.total or Money(0) for receipt in receipts) == Money(250_000)
        assert {(each.policy or {}).get("response_cache_filled_by") for each in receipts[1:]} == {receipts[0].id}
        assert world.calls == 1
        assert world.ledger.queries.verify() == []

    run(story)


def test_when_the_first_is_cancelled_the_next_runs_for_the_others() -> None:
    async def story() -> None:
        world = World()
        world.gate.clear()
        answers = [await world.pipeline.admit(world.request()) for _ in range(3)]
        await turns()
        answers[0].cancel()
        await read(answers[0])
        await turns()
        assert world.calls == 2
        world.gate.set()
        assert [bool(await read(answer)) for answer in answers[1:]] == [True, True]
        receipts = [world.receipt(answer) for answer in answers]
        assert [each.status for each in receipts] == [Status.CANCELLED, Status.SUCCEEDED, Status.SUCCEEDED]
        assert [outcome(each) for each in receipts] == ["miss", "miss", "hit"]
        assert len(receipts[1].attempts) == 1
        assert receipts[1].total == Money(250_000)
        assert world.calls == 2
        assert world.ledger.queries.verify() == []

    run(story)


def test_whoever_waits_can_leave_without_stopping_what_runs() -> None:
    async def story() -> None:
        world = World()
        world.gate.clear()
        leader, follower = [await world.pipeline.admit(world.request()) for _ in range(2)]
        follower.cancel()
        assert await read(follower) == ()
        left = world.receipt(follower)
        assert (left.status, left.total, left.attempts) == (Status.CANCELLED, Money(0), ())
        world.gate.set()
        assert await read(leader)
        assert world.receipt(leader).status is Status.SUCCEEDED
        await world.pipeline.drain(1)

    run(story)


def test_after_two_failures_nobody_waits_any_more() -> None:
    async def story() -> None:
        world = World(FakeAnswer((), error=UpstreamError("on fire", retryable=False), provenance=Provenance.REPORTED))
        world.gate.clear()
        answers = [await world.pipeline.admit(world.request()) for _ in range(5)]
        world.gate.set()
        errors = await asyncio.gather(*(read(answer) for answer in answers), return_exceptions=True)
        assert [isinstance(error, UpstreamError) for error in errors] == [True] * 5
        assert world.calls == 5
        assert {world.receipt(answer).status for answer in answers} == {Status.FAILED}

    run(story)


def test_a_follower_that_cannot_pay_for_its_own_run_is_refused_and_its_hold_released() -> None:
    async def story() -> None:
        world = World()
        budget = BudgetConfig(limit_usd=Decimal("0.0003"), per="user").budget("each")
        await world.ledger.write(lambda connection: put_budget(connection, budget))
        world.gate.clear()
        asked: dict[str, Any] = {"limits": Limits(max_tokens=100)}
        with pytest.raises(PaymentRequired):
            await world.ask(who=Attribution(user="poor"), **asked)
        await world.ledger.write(
            lambda connection: put_budget(
                connection, BudgetConfig(limit_usd=Decimal(1), per="user", only="rich").budget("each")
            )
        )
        poor = BudgetConfig(limit_usd=Decimal("0.0003"), per="user", only="poor").budget("small")
        await world.ledger.write(lambda connection: put_budget(connection, poor))
        leader = await world.pipeline.admit(world.request(who=Attribution(user="rich"), **asked))
        follower = await world.pipeline.admit(world.request(who=Attribution(user="poor"), **asked))
        await turns()
        leader.cancel()
        with pytest.raises(PaymentRequired) as refused:
            await read(follower)
        assert refused.value.quote is not None
        assert world.receipt(follower).status is Status.REFUSED
        assert world.receipt(follower).total == Money(0)
        assert world.ledger.queries.verify() == []

    run(story)


def test_nobody_waits_longer_than_the_models_time_limit() -> None:
    async def story() -> None:
        world = World(policies={"fake": ModelPolicy(timeout_s=0.05)})
        world.gate.clear()
        lookup = world.cache.look(world.request(), None, None)
        assert lookup is not None  # somebody who never comes back
        with pytest.raises(UpstreamTimeout, match="timeout_s"):
            await world.ask()

    run(story)


def test_a_stream_with_a_latency_target_does_not_wait_for_anothers_end() -> None:
    async def story() -> None:
        world = World()
        world.gate.clear()
        leader = await world.pipeline.admit(world.request())
        hasty = await world.pipeline.admit(world.request(stream=True, latency_target_ms=500))
        assert outcome(hasty.opened) == "miss"
        world.gate.set()
        assert await read(leader) == await read(hasty)
        assert world.calls == 2

    run(story)


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.sampled_from("ab")),
        st.tuples(st.just("cancel"), st.integers(0, 9)),
        st.tuples(st.just("turns"), st.integers(1, 12)),
        st.tuples(st.just("open"), st.booleans()),
    ),
    max_size=25,
)


@settings(max_examples=60)
@given(EVENTS, st.lists(st.booleans(), min_size=20, max_size=20))
def test_nobody_is_lost_nothing_runs_twice_at_once_and_the_books_agree(
    events: list[tuple[str, Any]], fails: list[bool]
) -> None:
    """Whoever asks, leaves or fails, and whenever: everyone gets an answer or an error, one receipt, one price."""

    async def story() -> None:
        outcomes = iter(fails)
        good = FakeAnswer(WORDS, provenance=Provenance.REPORTED)
        bad = FakeAnswer((), error=UpstreamError("on fire", retryable=False), provenance=Provenance.REPORTED)
        world = World(lambda _: bad if next(outcomes, False) else good)
        answers: list[Answer] = []
        for what, value in events:
            if what == "ask":
                answers.append(await world.pipeline.admit(world.request(value)))
            elif what == "cancel" and value < len(answers):
                answers[value].cancel()
            elif what == "turns":
                await turns(value)
            elif what == "open":
                world.gate.set() if value else world.gate.clear()
            # of each question at most one runs for others; who saw two fail may run beside it
            running = [answer for answer in answers if answer.settled is None and answer.opened.attempts]
            assert len({answer.lookup.leads for answer in running if answer.lookup and answer.lookup.leads}) <= 2
        world.gate.set()
        said = await asyncio.gather(*(read(answer) for answer in answers), return_exceptions=True)
        for answer, text in zip(answers, said, strict=True):
            receipt = world.receipt(answer)
            assert receipt.status is not None
            if receipt.status is Status.SUCCEEDED:
                assert text == (Text("Hello world", 2),)
            if not receipt.attempts or receipt.status is Status.SUCCEEDED:  # who left while it ran has paid for a part
                assert receipt.total == Money(250_000 if receipt.attempts else 0)
        await world.pipeline.drain(1)
        assert world.ledger.queries.verify() == []
        assert world.pipeline.load() == []
        assert len({receipt.id for receipt in world.told}) == len(world.told) == len(answers)

    run(story)
