"""Answers from the response cache: who gets them, what receipts say of them, and what is never kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millicent.backends.fake import FakeAnswer, FakeScript
from millicent.caching.config import CacheConfig, FeatureCacheConfig
from millicent.control.config import BudgetConfig
from millicent.core.chunks import CallPiece, Chunk, End, FinishReason, Text, TokenLogprob, Vector, vector_lines
from millicent.core.clock import NS_PER_S
from millicent.core.errors import LedgerUnavailable, MillicentError, NotCached, PaymentRequired, UpstreamError
from millicent.core.idempotency import Claim
from millicent.core.money import Money
from millicent.core.protocols import Call
from millicent.core.receipts import Status
from millicent.core.request import (
    Attribution,
    Embedding,
    ImagePart,
    Limits,
    Message,
    OutsideCost,
    Request,
    Sampling,
    TextPart,
)
from millicent.core.usage import Provenance, Usage
from millicent.ledger.budgets import put_budget, read_balances, read_budgets
from millicent.ledger.claims import find_claim
from millicent.ledger.queries import ReceiptFilter
from millicent.ledger.recovery import recover
from millicent.pipeline.features import FeatureConfig, UsefulConfig
from support.cached_world import ON, WORDS, World, outcome, read, run


def test_the_same_question_is_answered_once_and_given_twice() -> None:
    async def story() -> None:
        world = World()
        first = await world.pipeline.admit(world.request())
        said = await read(first)
        second = await world.pipeline.admit(world.request(stream=True, who=Attribution(user="ann")))
        assert await read(second) == said
        assert (second.reasons, world.calls) == (first.reasons, 1)
        ran, hit = world.receipt(first), world.receipt(second)
        assert hit == second.settled
        assert (outcome(ran), outcome(hit)) == ("miss", "hit")
        assert [each.id for each in world.told] == [ran.id, hit.id]
        # 5 tokens at $10 and 2 at $100 per million
        assert (ran.total, ran.saved) == (Money(250_000), {})
        assert (hit.total, hit.list_price, hit.saved) == (Money(0), Money(250_000), {"response_cache": Money(250_000)})
        assert hit.list_price == (hit.total or Money(0)) + Money.total(hit.saved.values())
        assert hit.usage == ran.usage
        assert (hit.status, hit.finish_reason, hit.served_model) == (Status.SUCCEEDED, "stop", "fake")
        assert (hit.attempts, hit.backend, hit.placement) == ((), "response_cache", None)
        assert [(line.amount, line.unit, line.provenance) for line in hit.lines] == [
            (Money(0), "lookup", Provenance.MEASURED)
        ]
        assert hit.policy == {
            "response_cache": "hit", "response_cache_filled_by": ran.id, "saved_provenance": "estimated",
        }  # fmt: skip
        assert hit.attribution.user == "ann"
        assert world.ledger.queries.verify() == []

    run(story)


def test_calls_thoughts_and_logprobs_are_given_again_in_their_order() -> None:
    async def story() -> None:
        chunks = (
            Text("", 1, reasoning="Let me "),
            Text("", 1, reasoning="think", signature="seal"),
            Text("I ", 1, logprobs=(TokenLogprob(b"I ", -0.5),)),
            Text("look", 1, logprobs=(TokenLogprob(b"look", -0.25),)),
            Text("", 1, calls=(CallPiece(0, "weather", '{"city":'),)),
            Text("", 1, calls=(CallPiece(0, "", '"Bern"}'),)),
            Text("Another", 1, choice=1),
        )
        world = World(FakeAnswer(chunks, FinishReason.TOOL_CALLS, provenance=Provenance.REPORTED))
        asked: dict[str, Any] = {"choices": 2, "sampling": Sampling(temperature=0, logprobs=0)}
        first = await world.pipeline.admit(world.request(**asked))
        said = await read(first)
        second = await world.pipeline.admit(world.request(**asked))
        assert await read(second) == said
        assert second.reasons == first.reasons == (FinishReason.TOOL_CALLS, FinishReason.TOOL_CALLS)
        assert world.calls == 1

    run(story)


LEFT_ALONE: dict[str, dict[str, Any]] = {
    "a draw": {"sampling": Sampling()},
    "a picture at an address": {"messages": (Message("user", (TextPart("?"), ImagePart(url="https://a/b.png"))),)},
}


@pytest.mark.parametrize("what", LEFT_ALONE)
def test_what_may_have_another_answer_the_next_time_is_passed_by(what: str) -> None:
    async def story() -> None:
        world = World()
        receipts = [await world.ask(**LEFT_ALONE[what]) for _ in range(2)]
        assert [outcome(receipt) for receipt in receipts] == ["bypass", "bypass"]
        assert "response_cache_why" in (receipts[0].policy or {})
        assert world.calls == 2

    run(story)


def test_a_draw_with_a_seed_is_kept_and_others_where_the_configuration_says_so() -> None:
    async def story() -> None:
        world = World()
        assert [await world.outcome(sampling=Sampling(seed=1)) for _ in range(2)] == ["miss", "hit"]
        world = World(config=msgspec.structs.replace(ON, sampled=True))
        assert [await world.outcome(sampling=Sampling()) for _ in range(2)] == ["miss", "hit"]

    run(story)


def test_without_the_cache_receipts_say_nothing_of_it() -> None:
    async def story() -> None:
        world = World(config=CacheConfig())
        assert [(await world.ask()).policy for _ in range(2)] == [None, None]
        assert world.calls == 2

    run(story)


def test_what_has_outlived_its_time_is_asked_again() -> None:
    async def story() -> None:
        world = World(config=msgspec.structs.replace(ON, ttl_s=60))
        assert await world.outcome() == "miss"
        world.clock.advance(59 * NS_PER_S)
        assert await world.outcome() == "hit"
        world.clock.advance(NS_PER_S)
        assert await world.outcome() == "miss"

    run(story)


def test_a_feature_gets_nothing_that_is_older_than_its_own_time() -> None:
    async def story() -> None:
        world = World(config=msgspec.structs.replace(ON, features={"news": FeatureCacheConfig(ttl_s=60)}))
        assert await world.outcome() == "miss"
        world.clock.advance(61 * NS_PER_S)
        assert await world.outcome(who=Attribution(feature="news")) == "miss"
        assert await world.outcome(who=Attribution(feature="news")) == "hit"

    run(story)


def test_cache_control_is_honoured() -> None:
    async def story() -> None:
        world = World()
        assert await world.outcome(cache_control="no-store") == "bypass"
        assert await world.outcome() == "miss"
        world.clock.advance(10 * NS_PER_S)
        assert await world.outcome(cache_control="no-store") == "bypass"
        assert await world.outcome(cache_control="max-age=20") == "hit"
        assert await world.outcome(cache_control="max-age=5") == "miss"
        assert await world.outcome(cache_control="max-age=5") == "hit"
        fresh = await world.ask(cache_control="private, No-Cache")
        assert outcome(fresh) == "bypass"
        given = await world.ask(cache_control="no-transform")
        assert (given.policy or {})["response_cache_filled_by"] == fresh.id
        assert world.calls == 5

    run(story)


def test_where_only_a_kept_answer_will_do_nothing_else_is_tried() -> None:
    async def story() -> None:
        world = World()
        for said in ("only-if-cached", "only-if-cached, no-store", "only-if-cached, no-cache"):
            with pytest.raises(NotCached):
                await world.ask(cache_control=said)
        assert (world.calls, await world.outcome()) == (0, "miss")
        assert await world.outcome(cache_control="only-if-cached") == "hit"
        world.clock.advance(10 * NS_PER_S)
        assert await world.outcome(cache_control="only-if-cached, max-age=20") == "hit"
        with pytest.raises(NotCached):
            await world.ask(cache_control="only-if-cached, max-age=5")
        with pytest.raises(NotCached):
            await World(config=CacheConfig()).ask(cache_control="only-if-cached")
        # Nobody waits for an answer that never comes.
        assert await world.outcome(cache_control="max-age=5") == "miss"
        assert world.calls == 2

    run(story)


MK_1, MK_2 = Attribution(key="mk_1"), Attribution(key="mk_2")


def test_two_tenants_never_see_each_others_answers() -> None:
    async def story() -> None:
        world = World()
        assert [await world.outcome(who=who) for who in (MK_1, MK_2, Attribution(), MK_1, MK_2)] == [
            "miss", "miss", "miss", "hit", "hit",
        ]  # fmt: skip
        gated = World()
        gated.gate.clear()
        one = await gated.pipeline.admit(gated.request(who=MK_1))
        other = await gated.pipeline.admit(gated.request(who=MK_2))
        gated.gate.set()
        assert [outcome((await read(each), gated.receipt(each))[1]) for each in (one, other)] == ["miss", "miss"]

    run(story)


def test_sharing_is_on_purpose_and_for_the_features_that_say_so() -> None:
    async def story() -> None:
        faq = {"faq": FeatureCacheConfig(enabled=True, scope="shared", ttl_s=60)}
        world = World(config=CacheConfig(store="memory", features=faq))
        shared = [msgspec.structs.replace(who, feature="faq") for who in (MK_1, MK_2)]
        assert [await world.outcome(who=who) for who in (*shared, MK_1)] == ["miss", "hit", None]
        world.clock.advance(60 * NS_PER_S)
        assert await world.outcome(who=shared[0]) == "miss"

    run(story)


def test_an_answer_from_a_placement_that_a_feature_may_not_use_is_not_given_to_it() -> None:
    async def story() -> None:
        world = World(features={"private": FeatureConfig(placements=("here",))})
        assert await world.outcome() == "miss"
        assert await world.outcome(who=Attribution(feature="private")) == "miss"

    run(story)


def test_behind_a_policy_each_feature_has_its_own_since_each_may_get_another_model() -> None:
    async def story() -> None:
        cases: list[tuple[tuple[str, ...], str]] = [((), "hit"), (("fake",), "miss")]
        for policies, expected in cases:
            world = World(cached_behind=policies)
            await world.ask(who=Attribution(feature="hard"))
            assert await world.outcome(who=Attribution(feature="easy")) == expected
            assert await world.outcome(who=Attribution(feature="hard")) == "hit"

    run(story)


def test_only_whole_answers_that_ended_well_are_kept() -> None:
    async def story() -> None:
        broken = FakeAnswer(WORDS[:1], error=UpstreamError("on fire", retryable=False))
        for answer in (
            broken,
            FakeAnswer(WORDS, FinishReason.CONTENT_FILTER),
            FakeAnswer((), provenance=Provenance.REPORTED),
        ):
            good = FakeAnswer(WORDS, provenance=Provenance.REPORTED)
            world = World(FakeScript(answer, good))
            answered = await world.pipeline.admit(world.request())
            with_errors = await asyncio.gather(read(answered), return_exceptions=True)
            assert isinstance(with_errors[0], MillicentError) == (answer is broken)
            assert await world.outcome() == "miss"
            assert await world.outcome() == "hit"

    run(story)


def test_an_answer_of_the_length_that_was_asked_for_is_whole_and_one_that_money_cut_is_not() -> None:
    async def story() -> None:
        world = World()
        short: dict[str, Any] = {"limits": Limits(max_tokens=1)}
        assert [await world.outcome(**short) for _ in range(2)] == ["miss", "hit"]
        # 5 tokens of input and one of output
        most = Money(150_000)
        cut = await world.ask("cut", max_cost=most)
        assert (cut.finish_reason, cut.total) == ("length", most)
        assert await world.outcome("cut") == "miss"
        assert await world.outcome("cut", max_cost=most) == "hit"

    run(story)


def test_a_hit_is_free_and_the_costs_that_a_request_brings_along_are_not() -> None:
    async def story() -> None:
        world = World()
        budget = BudgetConfig(limit_usd=Decimal("0.001")).budget("all")
        await world.ledger.write(lambda connection: put_budget(connection, budget))
        asked: dict[str, Any] = {"limits": Limits(max_tokens=6)}
        assert await world.outcome(**asked) == "miss"
        with pytest.raises(PaymentRequired):
            await world.ask("something else", limits=Limits(max_tokens=100))
        assert await world.outcome(**asked) == "hit"
        searched = OutsideCost("retrieval", "request_fee", Decimal(1), "search", Money(700_000))
        hit = await world.ask(outside_costs=(searched,), **asked)
        assert (outcome(hit), hit.total, hit.saved) == ("hit", Money(700_000), {"response_cache": Money(250_000)})
        with pytest.raises(PaymentRequired):
            await world.ask(outside_costs=(searched,), **asked)
        balances = await world.ledger.write(
            lambda connection: [
                (balance.spent, balance.held)
                for each in read_budgets(connection)
                for balance in read_balances(connection, each, world.clock.now_ns())
            ]
        )
        assert balances == [(Money(950_000), Money(0))]

    run(story)


def test_a_hit_that_the_ledger_cannot_take_is_refused_and_leaves_nothing() -> None:
    async def story() -> None:
        world = World()
        await world.ask()
        world.ledger.problem = "ledger: the disk is full: free some space"
        for _ in range(3):
            with pytest.raises(LedgerUnavailable):
                await world.ask()
        world.ledger.problem = None
        await world.pipeline.checkpoint()
        assert len(world.ledger.queries.receipts(ReceiptFilter()).receipts) == 1
        assert await world.outcome() == "hit"

    run(story)


def test_a_hit_under_an_idempotency_key_is_kept_for_it() -> None:
    async def story() -> None:
        world = World()
        await world.ask()
        hit = await world.ask(claim=Claim("", "once", b"hash"))
        assert outcome(hit) == "hit"
        found = await world.ledger.write(lambda connection: find_claim(connection, "", "once", world.clock.now_ns()))
        assert found is not None
        assert found.receipt == hit.id
        assert '"Hello world"' in (found.answer or "")

    run(story)


def test_the_features_rule_judges_what_it_was_given() -> None:
    async def story() -> None:
        features = {
            name: FeatureConfig(useful=UsefulConfig(pattern=pattern))
            for name, pattern in {"polite": "Hello", "curt": "^Hi"}.items()
        }
        world = World(features=features)
        assert (await world.ask()).useful is None
        assert [(await world.ask(who=Attribution(feature=name))).useful for name in features] == [True, False]
        assert world.calls == 1

    run(story)


def test_what_the_cache_answers_teaches_nobody_how_quick_a_model_is() -> None:
    from millicent.routing.policies import learnable

    async def story() -> None:
        world = World()
        ran, hit = await world.ask(), await world.ask()
        assert learnable(ran) == ran
        assert learnable(hit) is None
        assert [each.id for each in world.ledger.queries.recent(9)] == [ran.id]

    run(story)


def test_purging_a_user_forgets_what_was_answered_to_them() -> None:
    async def story() -> None:
        world = World()
        ann, bob = Attribution(user="ann"), Attribution(user="bob")
        await world.ask("ann's", who=ann)
        await world.ask("bob's", who=bob)
        assert await world.cache.purge(user="ann") == 1
        assert [await world.outcome(question) for question in ("ann's", "bob's")] == ["miss", "hit"]

    run(story)


class OneVector:
    """A call that reads three tokens and makes a vector of each text."""

    served_model, placement = "fake", "here"
    sequences: tuple[int, ...] = ()
    input_tokens: int | None = 3
    max_output_tokens: int | None = 0

    def start(self) -> OneVector:
        return self

    def cancel(self) -> None:
        """It is over at once."""

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        yield Vector(1, b"\x00\x00\x80\x3f", 2)
        yield Vector(0, b"\x00\x00\x00\x40", 1)
        yield End(FinishReason.STOP, Usage.of(Provenance.REPORTED, input_fresh=3))


def test_vectors_are_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def prepare(_: Request) -> Call:
        return OneVector()

    async def story() -> None:
        world = World()
        monkeypatch.setattr(world.backend, "prepare", prepare)
        asked: dict[str, Any] = {"messages": None, "sampling": Sampling(), "embedding": Embedding(("a", "b"))}
        said = []
        for expected in ("miss", "hit"):
            answer = await world.pipeline.admit(world.request(**asked))
            said.append([vector_lines(text.text) for text in await read(answer)])
            assert outcome(world.receipt(answer)) == expected
        assert said == [[["AAAAQA==", "AACAPw=="]]] * 2

    run(story)


def test_a_request_that_waited_when_its_gateway_died_is_closed_at_no_cost() -> None:
    async def story() -> None:
        world = World()
        world.gate.clear()
        for key in ("first", "second"):
            await world.pipeline.admit(world.request(), Claim("", key, b"hash"))
        await world.ledger.write(lambda connection: recover(connection, "gateway", world.clock.now_ns()))
        second, first = world.ledger.queries.receipts(ReceiptFilter()).receipts
        assert (first.status, second.status) == (Status.INTERRUPTED, Status.INTERRUPTED)
        assert (first.total, second.total, second.attempts) == (None, Money(0), ())
        assert world.ledger.queries.verify() == []
        now_ns = world.clock.now_ns()
        assert await world.ledger.write(lambda connection: find_claim(connection, "", "second", now_ns)) is None

    run(story)


CHUNKS = st.lists(
    st.builds(
        Text,
        st.text(max_size=4),
        st.integers(0, 2),
        choice=st.integers(0, 1),
        reasoning=st.sampled_from(["", "", "hm", "so"]),
        signature=st.sampled_from(["", "", "", "seal"]),
        calls=st.lists(st.builds(CallPiece, st.integers(0, 1), st.just("f"), st.sampled_from(["{", "}"])), max_size=1)
        .map(tuple),
    ),
    min_size=1,
    max_size=8,
)  # fmt: skip


@settings(max_examples=60)
@given(CHUNKS, st.booleans())
def test_what_is_given_again_adds_up_to_the_same_answer(chunks: list[Text], stream: bool) -> None:
    async def story() -> None:
        world = World(FakeAnswer((*chunks, Text("end", 1)), provenance=Provenance.REPORTED))
        first = await world.pipeline.admit(world.request(choices=2))
        said = await read(first)
        again = await world.pipeline.admit(world.request(choices=2, stream=stream))
        assert await read(again) == said
        assert again.reasons == first.reasons
        assert world.calls == 1

    run(story)
