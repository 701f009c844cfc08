"""Answers from the response cache: who gets them, what receipts say, and what happens when several ask at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millicent.backends.fake import FakeAnswer, FakeBackend, FakeScript
from millicent.caching.cache import ResponseCache
from millicent.caching.config import CacheConfig, FeatureCacheConfig
from millicent.caching.store import AnswerStore
from millicent.control.config import BudgetConfig
from millicent.core.chunks import CallPiece, FinishReason, Text, TokenLogprob, merge_texts
from millicent.core.clock import NS_PER_S, ManualClock
from millicent.core.errors import MillicentError, PaymentRequired, UpstreamError, UpstreamTimeout
from millicent.core.idempotency import Claim
from millicent.core.identifiers import SequentialIds
from millicent.core.money import Money
from millicent.core.receipts import Receipt, Status
from millicent.core.request import Attribution, ImagePart, Limits, Message, OutsideCost, Request, Sampling, TextPart
from millicent.core.usage import Provenance
from millicent.ledger.budgets import put_budget, read_balances, read_budgets
from millicent.ledger.claims import find_claim
from millicent.ledger.memory import MemoryLedger
from millicent.meter.meter import Meter
from millicent.meter.placements import PlacementConfig
from millicent.meter.prices import PriceBook, PriceConfig
from millicent.meter.quotes import Quoter
from millicent.pipeline.answer import Answer
from millicent.pipeline.config import LimitsConfig, ModelPolicy
from millicent.pipeline.estimates import Estimates
from millicent.pipeline.features import FeatureConfig, Features, UsefulConfig
from millicent.pipeline.pipeline import Pipeline

WORDS = (Text("Hello", 1), Text(" world", 1))
ANYONE = Attribution()
ON = CacheConfig(enabled=True, store="memory")
PRICES = PriceConfig(input=Decimal(10), input_cached=Decimal(1), output=Decimal(100))


class World:
    """A gateway's pipeline before an API whose calls cost $10 and $100 per million tokens."""

    def __init__(
        self,
        answer: FakeAnswer | Callable[[Request], FakeAnswer] | None = None,
        config: CacheConfig = ON,
        *,
        features: dict[str, FeatureConfig] | None = None,
        policies: dict[str, ModelPolicy] | None = None,
    ) -> None:
        self.clock = ManualClock()
        self.ids = SequentialIds()
        self.ledger = MemoryLedger()
        placements = {
            name: PlacementConfig(kind="api", usd_per_hour=None).placement(name) for name in ("here", "elsewhere")
        }
        self.gate = asyncio.Event()  # the backend's, which waits for it before each chunk
        self.gate.set()
        self.backend = FakeBackend(
            answer or FakeAnswer(WORDS, provenance=Provenance.REPORTED),
            models=("fake", "other"),
            placement="here",
            clock=self.clock,
            sleep=self._work,
        )
        store = AnswerStore(None, max_bytes=1 << 20, max_entries=100)
        self.cache = ResponseCache(config, store, self.clock, secret=b"s" * 32, deployed=b"")
        self.told: list[Receipt] = []
        self.pipeline = Pipeline(
            backends=[self.backend],
            ledger=self.ledger,
            meter=Meter(self.clock, "gw", self.ids),
            placements=placements,
            clock=self.clock,
            limits=LimitsConfig(max_concurrent=64),
            features=Features(features or {}),
            estimates=Estimates(Quoter(lambda _: None), PriceBook({"fake": PRICES, "other": PRICES})),
            policies=policies,
            cache=self.cache,
            settled=self.told.append,
        )

    async def _work(self, seconds: float) -> None:
        self.clock.advance(int(seconds * NS_PER_S))
        await asyncio.sleep(0)
        await self.gate.wait()

    def request(self, question: str = "hi", *, who: Attribution = ANYONE, **fields: Any) -> Request:
        asked: dict[str, Any] = {"messages": (Message("user", question),), "sampling": Sampling(temperature=0)}
        asked |= fields
        return Request(id=self.ids.new("rcpt"), dialect="openai.chat", model="fake", attribution=who, **asked)

    async def ask(
        self, question: str = "hi", *, claim: Claim | None = None, cache_control: str | None = None, **fields: Any
    ) -> Receipt:
        """The closed receipt. Raises as the answer does."""
        answer = await self.pipeline.admit(self.request(question, **fields), claim, cache_control=cache_control)
        await read(answer)
        return self.receipt(answer)

    async def outcome(self, question: str = "hi", **fields: Any) -> str | None:
        return outcome(await self.ask(question, **fields))

    def receipt(self, answer: Answer) -> Receipt:
        found = self.ledger.queries.receipt(answer.receipt_id)
        assert found is not None
        return found

    @property
    def calls(self) -> int:
        return len(self.backend.requests)


async def read(answer: Answer) -> tuple[Text, ...]:
    pieces: list[Text] = []
    while (news := await answer.take()) is not None:
        pieces += news
    return merge_texts(pieces, in_order=True)


def outcome(receipt: Receipt) -> str | None:
    return (receipt.policy or {}).get("response_cache")


def run(story: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await story()

    asyncio.run(bounded())


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


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
            assert (receipt.total == Money(0)) == (not receipt.attempts or receipt.status is not Status.SUCCEEDED)
        await world.pipeline.drain(1)
        assert world.ledger.queries.verify() == []
        assert world.pipeline.load() == []
        assert len({receipt.id for receipt in world.told}) == len(world.told) == len(answers)

    run(story)
