"""What happens when a deployment fails: who is asked next, what the client gets, and what the receipt says of it."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter

import msgspec
import pytest

from millicent.backends.fake import FakeAnswer, FakeScript
from millicent.core.chunks import FinishReason, Text
from millicent.core.clock import NS_PER_S
from millicent.core.errors import (
    EngineCrashed,
    Forbidden,
    InvalidRequest,
    LedgerUnavailable,
    MillicentError,
    PaymentRequired,
    RateLimited,
    Unavailable,
    UpstreamError,
    UpstreamTimeout,
)
from millicent.core.money import Money
from millicent.core.receipts import Receipt, Role, Status
from millicent.core.request import Embedding, Limits
from millicent.core.usage import Count, Leaf, Provenance, Usage
from millicent.ledger.queries import ReceiptFilter
from millicent.pipeline.config import BreakerConfig, ModelPolicy
from millicent.pipeline.features import FeatureConfig
from support.places import World, letters, read
from support.virtual_time import run

DOWN = FakeAnswer((), usage=Usage(), error=UpstreamError("one is down"))
BUSY = FakeAnswer((), usage=Usage(), error=RateLimited("slowly", retry_after_s=7))
UNKNOWN_KEY = FakeAnswer((), usage=Usage(), error=UpstreamError("who are you?", retryable=False))
WRONG = FakeAnswer((), usage=Usage(), error=InvalidRequest("no such voice", param="voice"))
# It read the prompt, and failed before it wrote.
READ_ONLY = FakeAnswer(
    (),
    usage=Usage.of(Provenance.REPORTED, input_fresh=100),
    input_tokens=100,
    error=UpstreamError("failed after reading"),
)
STUCK = letters(3, delay_s=100_000.0)
THREE = letters(3)


def shown(receipt: Receipt) -> list[tuple[str, str, str | None]]:
    return [(each.backend, each.role.value, each.status) for each in receipt.attempts]


def test_a_failed_deployment_is_followed_at_once_by_another_and_both_are_on_the_receipt() -> None:
    async def story() -> None:
        world = World(READ_ONLY, THREE, weights=(1, 0))
        before = asyncio.get_running_loop().time()
        receipt, text, error = await world.ask()
        assert (text, error) == ("xxx", None)
        assert asyncio.get_running_loop().time() - before == pytest.approx(1.5)  # no pause: it is somebody else
        assert shown(receipt) == [("one", "inference", "failed"), ("two", "retry", "succeeded")]
        assert (receipt.backend, receipt.placement, receipt.status) == ("two", "two", Status.SUCCEEDED)
        assert receipt.attempts[0].error == "failed after reading"
        assert receipt.error is None
        # 100 tokens read at a millicent each, twice; three written at four millicents.
        costs = [(line.attempt, line.role.value, line.meter.value, str(line.amount)) for line in receipt.lines]
        assert costs == [
            (1, "inference", "input", "0.001"),
            (2, "retry", "input", "0.001"),
            (2, "retry", "output", "0.00012"),
        ]
        assert receipt.total == Money.from_usd("0.00212")
        assert (receipt.usage.input_tokens, receipt.usage.output_tokens) == (100, 3)
        await world.close()

    run(story)


def test_the_same_deployment_is_asked_again_after_pauses_that_grow_and_as_often_as_the_policy_says() -> None:
    async def story() -> None:
        world = World(DOWN, policy=ModelPolicy(retries=3))
        before = asyncio.get_running_loop().time()
        receipt, text, error = await world.ask()
        assert (text, type(error)) == ("", UpstreamError)
        assert [each.role.value for each in receipt.attempts] == ["inference", "retry", "retry", "retry"]
        starts = [each.started_at_ns for each in receipt.attempts]
        pauses_s = [(late - early) / NS_PER_S for early, late in itertools.pairwise(starts)]
        for pause_s, longest_s in zip(pauses_s, (0.5, 1.0, 2.0), strict=True):
            assert longest_s / 2 <= pause_s <= longest_s
        assert asyncio.get_running_loop().time() - before == pytest.approx(sum(pauses_s))
        # Nothing was used, which is known to cost nothing.
        assert (receipt.status, receipt.total) == (Status.FAILED, Money(0))
        await world.close()

    run(story)


def test_a_pause_is_as_long_as_the_server_asks_for() -> None:
    async def story() -> None:
        world = World(FakeScript(BUSY, THREE))
        receipt, text, error = await world.ask()
        assert (text, error) == ("xxx", None)
        waited_ns = receipt.attempts[1].started_at_ns - receipt.attempts[0].started_at_ns
        assert 7 * NS_PER_S <= waited_ns <= 8 * NS_PER_S
        await world.close()

    run(story)


@pytest.mark.parametrize("limit_s", [5.0, None])
def test_a_pause_that_is_too_long_goes_to_the_fallback_or_to_the_client(limit_s: float | None) -> None:
    late = msgspec.structs.replace(BUSY, error=RateLimited("much later", retry_after_s=7 if limit_s else 3600))

    async def story() -> None:
        policy = ModelPolicy(timeout_s=limit_s)
        world = World(late, policy=policy)
        receipt, _, error = await world.ask()
        assert isinstance(error, RateLimited)
        assert error.retry_after_s == (7 if limit_s else 3600)
        assert len(receipt.attempts) == 1
        await world.close()
        world = World(late, here=THREE, policy=msgspec.structs.replace(policy, fallbacks=("spare",)))
        receipt, text, error = await world.ask()
        assert (text, error) == ("xxx", None)
        assert shown(receipt) == [("one", "inference", "failed"), ("here", "fallback", "succeeded")]
        assert (receipt.model, receipt.served_model, receipt.placement) == ("main", "spare", "here")
        assert receipt.accelerator.provenance is Provenance.MEASURED
        assert receipt.accelerator.serving_ns == 3 * NS_PER_S // 2
        await world.close()

    run(story)


def test_nothing_is_begun_anew_once_some_of_it_is_out() -> None:
    async def story() -> None:
        world = World(letters(2, text="a", error=UpstreamError("broke off")), letters(3, text="b"), weights=(1, 0))
        receipt, text, error = await world.ask()
        assert text == "aa"
        assert isinstance(error, UpstreamError)
        assert shown(receipt) == [("one", "inference", "failed")]
        # What came is paid for.
        assert receipt.total == Money.from_usd("0.00108")
        await world.close()

    run(story)


def test_an_error_that_stays_is_never_sent_to_the_same_deployment_again() -> None:
    async def story() -> None:
        world = World(UNKNOWN_KEY)
        receipt, _, error = await world.ask()
        assert (len(receipt.attempts), type(error)) == (1, UpstreamError)
        world = World(UNKNOWN_KEY, THREE, weights=(1, 0))
        receipt, text, _ = await world.ask()
        assert (text, [each.backend for each in receipt.attempts]) == ("xxx", ["one", "two"])
        await world.close()

    run(story)


def test_a_clients_own_mistake_goes_straight_back_to_it() -> None:
    async def story() -> None:
        world = World(WRONG, THREE, THREE, weights=(1, 0), policy=ModelPolicy(fallbacks=("spare",)))
        for _ in range(10):
            receipt, _, error = await world.ask()
            assert isinstance(error, InvalidRequest)
            assert len(receipt.attempts) == 1
        assert {each.state for each in world.pipeline.deployments()} == {"closed"}
        await world.close()

    run(story)


def test_what_one_deployment_cannot_take_another_may() -> None:
    async def story() -> None:
        unable = FakeAnswer(refusal=InvalidRequest("only text here"))
        world = World(unable, THREE, weights=(1, 0))
        receipt, text, _ = await world.ask()
        assert (text, shown(receipt)) == ("xxx", [("two", "inference", "succeeded")])
        world = World(unable, unable, THREE, policy=ModelPolicy(fallbacks=("spare",)))
        with pytest.raises(InvalidRequest, match="only text"):
            await world.ask()
        await world.close()

    run(story)


def test_a_request_during_which_the_engine_ended_is_not_given_to_it_again() -> None:
    async def story() -> None:
        crashing = FakeAnswer((), error=EngineCrashed("the engine ended", retry_after_s=1))
        world = World(crashing)
        receipt, _, error = await world.ask()
        assert (len(receipt.attempts), receipt.status, type(error)) == (1, Status.INTERRUPTED, EngineCrashed)
        world = World(crashing, here=THREE, policy=ModelPolicy(fallbacks=("spare",)))
        receipt, text, _ = await world.ask()
        assert (text, receipt.status) == ("xxx", Status.SUCCEEDED)
        await world.close()

    run(story)


def test_fallbacks_come_after_the_retries_and_each_gets_one_call() -> None:
    async def story() -> None:
        policy = ModelPolicy(retries=1, fallbacks=("nowhere", "spare"))
        world = World(DOWN, here=msgspec.structs.replace(DOWN, error=Unavailable("also down")), policy=policy)
        receipt, _, error = await world.ask()
        assert isinstance(error, Unavailable)
        assert shown(receipt) == [
            ("one", "inference", "failed"),
            ("one", "retry", "failed"),
            ("here", "fallback", "failed"),
        ]
        await world.close()

    run(story)


def test_a_fallback_answers_at_once_while_the_model_is_left_alone_and_teaches_nothing_of_it() -> None:
    async def story() -> None:
        policy = ModelPolicy(retries=0, fallbacks=("spare",), breaker=BreakerConfig(failures=1, cooldown_s=600))
        world = World(DOWN, here=letters(7), policy=policy)
        [before] = await world.pipeline.quotes(world.request(), ["main"])
        await world.ask()
        for _ in range(20):
            receipt, text, _ = await world.ask()
            assert (text, shown(receipt)) == ("xxxxxxx", [("here", "fallback", "succeeded")])
            assert (receipt.model, receipt.served_model) == ("main", "spare")
        assert [quote.output_tokens for quote in await world.pipeline.quotes(world.request(), ["main"])] == [
            before.output_tokens
        ]
        await world.close()

    run(story)


def test_quotes_show_the_deployments_that_can_and_say_why_none_may() -> None:
    async def story() -> None:
        unable = FakeAnswer(refusal=InvalidRequest("only text here"))
        world = World(unable, THREE, features={"nowhere": FeatureConfig(placements=())})
        quotes = await world.pipeline.quotes(world.request(), ["main"])
        assert [quote.placement for quote in quotes] == ["two"]
        none = msgspec.structs.replace(world.request().attribution, feature="nowhere")
        with pytest.raises(Forbidden):
            await world.pipeline.quotes(world.request(attribution=none), ["main"])
        with pytest.raises(InvalidRequest, match="only text"):
            await World(unable).pipeline.quotes(world.request(), ["main"])
        await world.close()

    run(story)


def test_vectors_never_come_from_another_model() -> None:
    async def story() -> None:
        world = World(DOWN, here=THREE, policy=ModelPolicy(retries=0, fallbacks=("spare",)))
        receipt, _, error = await world.ask(messages=None, embedding=Embedding(("text",)))
        assert (type(error), len(receipt.attempts)) == (UpstreamError, 1)
        await world.close()

    run(story)


def test_a_feature_stays_on_its_placements_whatever_fails() -> None:
    async def story() -> None:
        features = {"private": FeatureConfig(placements=("two", "here")), "nowhere": FeatureConfig(placements=())}
        policy = ModelPolicy(fallbacks=("spare",))
        world = World(THREE, msgspec.structs.replace(DOWN), letters(2), policy=policy, features=features)
        mine = msgspec.structs.replace(world.request().attribution, feature="private")
        for _ in range(5):
            receipt, text, _ = await world.ask(attribution=mine)
            assert text == "xx"
            assert {each.placement for each in receipt.attempts} <= {"two", "here"}
        assert world.one.calls == 0
        none = msgspec.structs.replace(mine, feature="nowhere")
        with pytest.raises(
            Forbidden, match=r"Feature `nowhere` may run only on no placement .* `main` runs on one, two"
        ):
            await world.ask(attribution=none)
        quotes = await world.pipeline.quotes(world.request(attribution=mine), ["main"])
        assert [quote.placement for quote in quotes] == ["two"]
        await world.close()

    run(story)


def test_a_call_that_runs_where_it_was_not_said_to_is_not_made() -> None:
    async def story() -> None:
        features = {"private": FeatureConfig(placements=("one",))}
        world = World(THREE, features=features)
        world.one.placement = "two"
        mine = msgspec.structs.replace(world.request().attribution, feature="private")
        with pytest.raises(Forbidden):
            await world.ask(attribution=mine)
        assert world.one.calls == 0
        await world.close()

    run(story)


def test_calls_are_shared_out_by_weight_and_the_same_way_each_time() -> None:
    async def story() -> None:
        counts = []
        for _ in range(2):
            world = World(THREE, THREE, weights=(3, 1), seed=7)
            served = [(await world.ask())[0].backend for _ in range(200)]
            counts.append(served)
            await world.close()
        assert counts[0] == counts[1]
        assert 120 < Counter(counts[0])["one"] < 175

    run(story)


def test_the_least_busy_gets_the_next_call_for_its_weight() -> None:
    async def story() -> None:
        world = World(THREE, THREE, weights=(2, 1), policy=ModelPolicy(balance="least_busy"))
        answers = [await world.pipeline.admit(world.request()) for _ in range(9)]
        running = {each.placement: each.running for each in world.pipeline.deployments()}
        assert running == {"one": 6, "two": 3}
        for answer in answers:
            await read(answer)
        await world.close()

    run(story)


def test_the_cheapest_healthy_one_is_asked_by_quote() -> None:
    async def story() -> None:
        policy = ModelPolicy(balance="cheapest", retries=0, breaker=BreakerConfig(failures=2))
        long = msgspec.structs.replace(THREE, input_tokens=500)  # the same, read as more tokens
        world = World(FakeScript(*[THREE] * 4, *[DOWN] * 9), long, policy=policy)
        assert [(await world.ask())[0].backend for _ in range(3)] == ["one"] * 3
        await world.close()
        world = World(DOWN, long, policy=policy)
        assert [(await world.ask())[0].backend for _ in range(4)] == ["one", "one", "two", "two"]
        await world.close()

    run(story)


def test_an_open_breaker_is_a_clear_503_until_a_probe_succeeds() -> None:
    async def story() -> None:
        policy = ModelPolicy(retries=0, breaker=BreakerConfig(failures=3, cooldown_s=10))
        world = World(FakeScript(*[DOWN] * 3, THREE), policy=policy)
        for _ in range(3):
            await world.ask()
        [report] = world.pipeline.deployments()
        assert (report.state, report.retry_after_s) == ("open", 10)
        calls = world.one.calls
        with pytest.raises(Unavailable, match=r"`main` fails wherever it runs \(one\)") as caught:
            await world.ask()
        assert (caught.value.retry_after_s, caught.value.code) == (10, "deployments_unhealthy")
        assert world.one.calls == calls
        await asyncio.sleep(10)
        probing = await world.pipeline.admit(world.request())
        with pytest.raises(Unavailable):  # while one tries
            await world.ask()
        await read(probing)
        assert [each.state for each in world.pipeline.deployments()] == ["closed"]
        await world.close()

    run(story)


def test_a_full_deployment_is_passed_over_and_all_full_is_a_429() -> None:
    async def story() -> None:
        world = World(THREE, THREE, max_connections=1, policy=ModelPolicy(retries=0))
        answers = [await world.pipeline.admit(world.request()) for _ in range(4)]
        assert {each.placement: each.running for each in world.pipeline.deployments()} == {"one": 2, "two": 2}
        with pytest.raises(RateLimited, match="max_connections") as caught:
            await world.pipeline.admit(world.request())
        assert caught.value.retry_after_s == 1
        for answer in answers:
            await read(answer)
        assert (await world.ask())[1] == "xxx"
        await world.close()

    run(story)


@pytest.mark.parametrize(
    ("policy", "script", "took_s", "began"),
    [
        (ModelPolicy(timeout_s=60, retries=0), STUCK, 60, False),
        (ModelPolicy(first_token_timeout_s=20, retries=0), STUCK, 20, False),
        (ModelPolicy(between_tokens_timeout_s=5, retries=0), letters(3, delay_s=6), 11, True),
        (ModelPolicy(timeout_s=7, retries=0), letters(9, delay_s=1), 7, True),
    ],
)
def test_any_run_is_held_to_its_time_limits(policy: ModelPolicy, script: FakeAnswer, took_s: int, began: bool) -> None:
    async def story() -> None:
        world = World(script, policy=policy)
        before = asyncio.get_running_loop().time()
        receipt, text, error = await world.ask()
        assert isinstance(error, UpstreamTimeout)
        assert error.status == 504
        assert bool(text) == began
        assert asyncio.get_running_loop().time() - before == pytest.approx(took_s, abs=0.01)
        assert receipt.status is Status.FAILED
        await world.close()

    run(story)


def test_a_first_token_that_is_late_is_tried_elsewhere_within_the_time_for_all() -> None:
    async def story() -> None:
        policy = ModelPolicy(first_token_timeout_s=20, timeout_s=100)
        world = World(STUCK, THREE, weights=(1, 0), policy=policy)
        receipt, text, _ = await world.ask()
        assert (text, len(receipt.attempts)) == ("xxx", 2)
        assert receipt.timing.ttft_ns == 20 * NS_PER_S + NS_PER_S // 2
        world = World(STUCK, STUCK, policy=msgspec.structs.replace(policy, timeout_s=30.0))
        before = asyncio.get_running_loop().time()
        receipt, _, error = await world.ask()
        assert isinstance(error, UpstreamTimeout)
        assert asyncio.get_running_loop().time() - before == pytest.approx(30, abs=0.01)
        assert len(receipt.attempts) == 2
        await world.close()

    run(story)


def test_a_client_that_goes_during_a_pause_ends_it_at_once_and_keeps_what_was_spent() -> None:
    async def story() -> None:
        world = World(msgspec.structs.replace(READ_ONLY, error=RateLimited("later", retry_after_s=20)))
        answer = await world.pipeline.admit(world.request())
        await asyncio.sleep(5)
        assert world.receipt(answer).status is None
        answer.cancel()
        before = asyncio.get_running_loop().time()
        assert await read(answer) == ("", None)
        assert asyncio.get_running_loop().time() == before
        receipt = world.receipt(answer)
        assert (receipt.status, receipt.finish_reason) == (Status.CANCELLED, "cancelled")
        assert [each.status for each in receipt.attempts] == [Status.FAILED]
        assert receipt.total == Money.from_usd("0.001")
        await world.close()

    run(story)


def test_a_hard_budget_that_lacks_the_money_for_another_attempt_gets_none() -> None:
    async def story() -> None:
        # Each attempt may cost 0.0014: 100 read, 10 written. The first one has spent 0.001 of it.
        for limit, attempts in (("0.0014", 1), ("0.0023", 1), ("0.0024", 2)):
            world = World(READ_ONLY, THREE, weights=(1, 0))
            await world.limit(limit)
            receipt, _, error = await world.ask()
            assert len(receipt.attempts) == attempts
            assert (error is None) == (attempts == 2)
            balance = await world.balance()
            assert (balance.spent, balance.held) == (receipt.total, Money(0))
            assert balance.spent <= Money.from_usd(limit)
            await world.close()

    run(story)


def test_a_callers_maximum_is_for_all_attempts_together() -> None:
    async def story() -> None:
        for maximum, attempts in (("0.0015", 1), ("0.0022", 2)):
            world = World(READ_ONLY, letters(9), weights=(1, 0))
            receipt, text, _ = await world.ask(max_cost=Money.from_usd(maximum))
            assert len(receipt.attempts) == attempts
            assert receipt.total is not None
            assert receipt.total <= Money.from_usd(maximum)
            assert text == ("xxxxx" if attempts == 2 else "")  # 0.0002 pays for five tokens
            await world.close()

    run(story)


def test_a_maximum_holds_on_our_own_machine_after_a_provider_failed() -> None:
    async def story() -> None:
        policy = ModelPolicy(retries=0, fallbacks=("spare",))
        world = World(READ_ONLY, here=letters(50, delay_s=0.5), policy=policy)
        receipt, text, _ = await world.ask(max_cost=Money.from_usd("0.051"), limits=Limits(max_tokens=60))
        # A tenth of a cent is gone; half a cent for each step: at most ten of them.
        assert receipt.total is not None
        assert receipt.total <= Money.from_usd("0.051")
        assert 5 <= len(text) <= 10
        assert receipt.finish_reason == "length"
        await world.close()

    run(story)


def test_an_attempt_whose_cost_nobody_knows_leaves_the_receipt_unpriced_and_its_hold_booked() -> None:
    async def story() -> None:
        lost = Usage({Leaf.INPUT_FRESH: Count(None, Provenance.UNKNOWN)})
        world = World(
            FakeAnswer((), usage=lost, input_tokens=100, error=UpstreamTimeout("no word")), THREE, weights=(1, 0)
        )
        await world.limit("1")
        receipt, text, _ = await world.ask()
        assert (text, receipt.total) == ("xxx", None)
        assert receipt.hold == Money.from_usd("0.0028")
        assert (await world.balance()).spent == receipt.hold
        await world.close()

    run(story)


def test_a_ledger_that_cannot_write_down_the_next_attempt_prevents_it() -> None:
    async def story() -> None:
        world = World(BUSY, THREE, weights=(1, 0))
        answer = await world.pipeline.admit(world.request())
        world.ledger.problem = "disk full"
        _, error = await read(answer)
        assert isinstance(error, LedgerUnavailable)
        assert world.two is not None
        assert world.two.calls == 0
        world.ledger.problem = None
        await world.pipeline.checkpoint()
        assert world.receipt(answer).status is Status.FAILED
        await world.close()

    run(story)


def test_a_providers_own_figure_stands_beside_ours_with_the_residual() -> None:
    async def story() -> None:
        told = letters(3, reported_cost=Money.from_usd("0.0013"), served_model="main-2026-01-01")
        world = World(
            msgspec.structs.replace(READ_ONLY, reported_cost=Money.from_usd("0.001")),
            told,
            weights=(1, 0),
        )
        receipt, _, _ = await world.ask()
        assert receipt.served_model == "main-2026-01-01"
        assert receipt.total == Money.from_usd("0.00212")
        assert receipt.reported == Money.from_usd("0.0023")
        assert receipt.residual == Money.from_usd("0.00018")
        [found] = world.ledger.queries.receipts(ReceiptFilter(), limit=1).receipts
        assert (found.reported, found.residual, found.total) == (receipt.reported, receipt.residual, receipt.total)
        await world.close()

    run(story)


def test_costs_by_role_tell_what_retries_and_fallbacks_come_to() -> None:
    async def story() -> None:
        policy = ModelPolicy(retries=1, fallbacks=("spare",))
        world = World(READ_ONLY, here=THREE, policy=policy)
        receipt, _, _ = await world.ask()
        by_role = Counter[Role]()
        for line in receipt.lines:
            assert line.amount is not None
            by_role[line.role] += line.amount.nanousd
        assert by_role == {Role.INFERENCE: 1_000_000, Role.RETRY: 1_000_000, Role.FALLBACK: 15_000_000}
        assert receipt.total == Money(sum(by_role.values()))
        await world.close()

    run(story)


def test_a_model_that_all_of_its_deployments_refuse_for_money_is_refused_with_the_quote() -> None:
    async def story() -> None:
        world = World(THREE, THREE, THREE, policy=ModelPolicy(fallbacks=("spare",)))
        with pytest.raises(PaymentRequired) as caught:
            await world.ask(max_cost=Money.from_usd("0.0000001"))
        assert caught.value.quote is not None
        await world.close()

    run(story)


def test_an_answer_with_several_choices_or_none_ends_once() -> None:
    async def story() -> None:
        empty = FakeAnswer((Text("", 0),), input_tokens=100, finish=FinishReason.STOP)
        world = World(empty)
        receipt, text, error = await world.ask()
        assert (text, error, receipt.status, len(receipt.attempts)) == ("", None, Status.SUCCEEDED, 1)
        await world.close()

    run(story)


def test_errors_keep_their_kind_on_the_way_to_the_client() -> None:
    async def story() -> None:
        for failure in (DOWN, BUSY):
            world = World(failure, policy=ModelPolicy(retries=0))
            _, _, error = await world.ask()
            assert error is failure.error
            assert isinstance(error, MillicentError)
            await world.close()

    run(story)
