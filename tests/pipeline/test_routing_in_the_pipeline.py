"""Requests to a policy: which model they go to, what the receipt says of it, and that a cascade's attempts add up."""

from __future__ import annotations

from decimal import Decimal

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millicent.backends.fake import FakeAnswer
from millicent.core.chunks import Text, TokenLogprob
from millicent.core.errors import Forbidden, InvalidRequest, PaymentRequired, UpstreamError
from millicent.core.money import Money
from millicent.core.receipts import Receipt, Role, Status
from millicent.core.request import Embedding, Message, Request, Sampling
from millicent.core.usage import Usage
from millicent.pipeline.config import ModelPolicy
from millicent.pipeline.features import FeatureConfig
from millicent.routing.config import PolicyConfig, RuleConfig, VerifyConfig
from support.places import World, letters, read
from support.virtual_time import run

# `spare` is cheap, on a machine of ours; `main` is the strong one, a provider's.
MODELS = ("spare", "main")
DOWN = FakeAnswer((), usage=Usage(), error=UpstreamError("down", retryable=False))


def policy(kind: str = "rules", **given: object) -> PolicyConfig:
    return msgspec.convert({"kind": kind, "models": MODELS, **given}, PolicyConfig)


BY_FEATURE = PolicyConfig(kind="rules", models=MODELS, rules=(RuleConfig(model="spare", feature="easy"),))
LOOKS = PolicyConfig(kind="cascade", models=MODELS, verify=VerifyConfig(pattern="ok"))
JUDGED = PolicyConfig(kind="cascade", models=MODELS, verify=VerifyConfig(judge="main"))


def quick(count: int, *, text: str = "y") -> FakeAnswer:
    """Cheap: a hundredth of a second for each letter, at a cent a second."""
    return letters(count, text=text, delay_s=0.01)


def about(feature: str | None) -> dict[str, object]:
    from millicent.core.request import Attribution

    return {"model": "auto", "attribution": Attribution(feature=feature)}


def shown(receipt: Receipt) -> list[tuple[str, str, str | None]]:
    return [(each.model, each.role.value, each.status) for each in receipt.attempts]


def assert_adds_up(receipt: Receipt) -> None:
    """Savings are list minus effective, whatever was chosen."""
    if receipt.saved:
        assert receipt.list_price is not None
        assert receipt.total is not None
        assert Money.total(receipt.saved.values()) == receipt.list_price - receipt.total


def told(receipt: Receipt) -> dict[str, str]:
    assert receipt.policy is not None
    return receipt.policy


def test_a_rule_sends_a_request_to_its_model_and_the_receipt_says_why_and_what_the_others_would_have_cost() -> None:
    async def story() -> None:
        world = World(letters(3), here=quick(3, text="y"), routing={"auto": BY_FEATURE})
        receipt, text, error = await world.ask(**about("easy"))
        assert (text, error) == ("yyy", None)
        assert (receipt.model, receipt.served_model, receipt.placement) == ("auto", "spare", "here")
        found = told(receipt)
        assert (found["routing"], found["chosen"], found["why"]) == ("auto", "spare", "rule 1")
        quotes = msgspec.json.decode(found["quotes_usd"])
        assert set(quotes) == set(MODELS)
        assert Decimal(quotes["main"]) > 0
        # `main` would have charged a millicent for each of 100 tokens read and four for each of three written.
        assert receipt.list_price == Money.from_usd("0.00112")
        assert receipt.saved == {"routing": Money.from_usd("0.00112") - (receipt.total or Money(0))}
        assert found["saved_provenance"] == "estimated"
        assert_adds_up(receipt)
        await world.close()

    run(story)


def test_a_request_that_no_rule_is_for_goes_to_the_strongest_model_and_saves_nothing() -> None:
    async def story() -> None:
        world = World(letters(3), here=quick(3, text="y"), routing={"auto": BY_FEATURE})
        receipt, text, _ = await world.ask(**about("hard"))
        assert text == "xxx"
        assert (told(receipt)["answered_by"], told(receipt)["why"]) == ("main", "no rule holds")
        assert receipt.saved == {}
        await world.close()

    run(story)


def test_a_policy_never_leaves_a_features_placements() -> None:
    async def story() -> None:
        features = {
            "easy": FeatureConfig(placements=("one",)),
            "nowhere": FeatureConfig(placements=("two",)),
        }
        world = World(letters(3), here=quick(3, text="y"), routing={"auto": BY_FEATURE}, features=features)
        receipt, text, _ = await world.ask(**about("easy"))
        assert (text, receipt.placement) == ("xxx", "one")
        assert told(receipt)["why"] == "rule 1; `spare` can't be asked: placement_not_allowed"
        assert msgspec.json.decode(told(receipt)["quotes_usd"])["spare"] == "placement_not_allowed"
        with pytest.raises(Forbidden):
            await world.ask(**about("nowhere"))
        await world.close()

    run(story)


def test_what_was_learned_of_a_routed_answer_is_of_the_model_that_gave_it() -> None:
    async def story() -> None:
        world = World(letters(3), here=quick(7, text="y"), routing={"auto": BY_FEATURE})
        for _ in range(20):
            await world.ask(**about("easy"))
        quote = (await world.pipeline.quotes(world.request(model="spare"), ["spare"]))[0]
        assert quote.output_tokens.expected == 7
        both = await world.pipeline.quotes(world.request(model="auto"), ["auto"])
        assert [each.model for each in both] == list(MODELS)
        await world.close()

    run(story)


def test_vectors_are_not_routed() -> None:
    async def story() -> None:
        world = World(letters(3), here=quick(3), routing={"auto": BY_FEATURE})
        with pytest.raises(InvalidRequest, match="routing policy"):
            await world.ask(model="auto", messages=None, embedding=Embedding(("a",)))
        await world.close()

    run(story)


def test_an_answer_that_passes_its_check_is_given_and_nobody_else_is_asked() -> None:
    async def story() -> None:
        world = World(letters(3), here=quick(1, text="ok"), routing={"auto": LOOKS})
        receipt, text, error = await world.ask(model="auto")
        assert (text, error) == ("ok", None)
        assert shown(receipt) == [("spare", "inference", "succeeded")]
        assert told(receipt)["verified"] == "true"
        assert world.one.calls == 0
        assert receipt.saved["routing"] > Money(0)
        assert_adds_up(receipt)
        await world.close()

    run(story)


def test_an_answer_that_fails_its_check_is_never_shown_and_the_stronger_model_is_asked_on_the_same_receipt() -> None:
    async def story() -> None:
        world = World(letters(3), here=quick(4, text="no"), routing={"auto": LOOKS})
        receipt, text, error = await world.ask(model="auto")
        assert (text, error) == ("xxx", None)
        assert shown(receipt) == [("spare", "inference", "succeeded"), ("main", "fallback", "succeeded")]
        assert (told(receipt)["escalated"], told(receipt)["verified"]) == ("pattern", "strongest")
        assert (receipt.usage.input_tokens, receipt.usage.output_tokens) == (100, 3)
        # What the cheap attempt cost was spent for nothing, and is counted so.
        assert receipt.saved["routing"] < Money(0)
        assert_adds_up(receipt)
        await world.close()

    run(story)


def judge(verdict: str) -> FakeAnswer:
    return FakeAnswer((Text(verdict, 1),), input_tokens=40)


def main_that_judges(verdict: str) -> object:
    def answer(request: Request) -> FakeAnswer:
        asked = (request.messages or ())[0].text
        return judge(verdict) if asked.startswith("You check") else letters(3)

    return answer


@pytest.mark.parametrize(("verdict", "text", "roles"), [
    ("Yes.", "yy", ["inference", "verification"]),
    ("No", "xxx", ["inference", "verification", "fallback"]),
    ("Perhaps", "xxx", ["inference", "verification", "fallback"]),
])  # fmt: skip
def test_a_judges_word_decides_and_is_paid_for_as_verification(verdict: str, text: str, roles: list[str]) -> None:
    async def story() -> None:
        world = World(main_that_judges(verdict), here=quick(2, text="y"), routing={"auto": JUDGED})  # type: ignore[arg-type]
        receipt, said, error = await world.ask(model="auto")
        assert (said, error) == (text, None)
        assert [each.role.value for each in receipt.attempts] == roles
        assert {line.role for line in receipt.lines if line.attempt == 2} == {Role.VERIFICATION}
        if len(roles) == 2:
            # The receipt tells of the answer, not of the judge's word.
            assert (receipt.served_model, receipt.placement, receipt.usage.output_tokens) == ("spare", "here", 2)
            assert told(receipt)["verified"] == "true"
        else:
            assert (receipt.served_model, told(receipt)["escalated"]) == ("main", "judge")
        assert receipt.status is Status.SUCCEEDED
        assert_adds_up(receipt)
        await world.close()

    run(story)


def test_where_nobody_stronger_can_be_asked_the_answer_is_given_and_called_unverified() -> None:
    async def story() -> None:
        features = {"private": FeatureConfig(placements=("here",))}
        world = World(letters(3), here=quick(2, text="y"), routing={"auto": LOOKS}, features=features)
        receipt, text, error = await world.ask(**about("private"))
        assert (text, error) == ("yy", None)
        assert shown(receipt) == [("spare", "inference", "succeeded")]
        # One stage is left, and the last one's answer isn't verified.
        assert "verified" not in told(receipt)
        await world.close()

    run(story)


def test_a_budget_that_lacks_the_money_for_the_stronger_model_leaves_the_answer_there_is() -> None:
    async def story() -> None:
        dear = letters(3, input_tokens=1000)
        world = World(dear, here=quick(2, text="y"), routing={"auto": LOOKS})
        receipt, text, error = await world.ask(model="auto", max_cost=Money.from_usd("0.009"))
        assert (text, error) == ("yy", None)
        assert told(receipt)["verified"] == "false"
        assert shown(receipt) == [("spare", "inference", "succeeded")]
        await world.close()

    run(story)


def test_a_stage_that_fails_is_followed_by_the_next() -> None:
    async def story() -> None:
        world = World(letters(3), here=DOWN, routing={"auto": LOOKS}, policy=ModelPolicy(retries=0))
        receipt, text, error = await world.ask(model="auto")
        assert (text, error) == ("xxx", None)
        assert shown(receipt) == [("spare", "inference", "failed"), ("main", "fallback", "succeeded")]
        await world.close()

    run(story)


@pytest.mark.parametrize(("logprob", "text"), [(-0.1, "y"), (-3.0, "xxx")])
def test_log_probabilities_are_asked_for_to_verify_by_and_not_shown_to_who_did_not(logprob: float, text: str) -> None:
    sure = FakeAnswer((Text("y", 1, logprobs=(TokenLogprob(b"y", logprob),)),), input_tokens=100)
    config = PolicyConfig(kind="cascade", models=MODELS, verify=VerifyConfig(min_logprob=Decimal(-1)))

    async def story() -> None:
        world = World(letters(3), here=sure, routing={"auto": config})
        answer = await world.pipeline.admit(world.request(model="auto"))
        pieces: list[Text] = []
        while (news := await answer.take()) is not None:
            pieces += news
        assert "".join(piece.text for piece in pieces) == text
        assert all(piece.logprobs == () for piece in pieces)
        assert world.here is not None
        assert world.here.requests[-1].sampling.logprobs == 0
        assert all(each.sampling.logprobs is None for each in world.one.requests)
        kept, _, _ = await world.ask(model="auto", sampling=Sampling(logprobs=0))
        assert kept.status is Status.SUCCEEDED
        await world.close()

    run(story)


def test_who_leaves_while_an_answer_is_verified_has_cancelled_it_and_pays_for_what_ran() -> None:
    async def story() -> None:
        slow = letters(50, delay_s=10.0)
        world = World(slow, here=quick(2, text="y"), routing={"auto": JUDGED})
        answer = await world.pipeline.admit(world.request(model="auto"))
        assert await answer.pause(3.0)
        answer.cancel()
        text, _ = await read(answer)
        receipt = world.receipt(answer)
        assert (text, receipt.status) == ("", Status.CANCELLED)
        assert [each.role.value for each in receipt.attempts] == ["inference", "verification"]
        await world.close()

    run(story)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["rules", "cheapest", "cascade"]),
    allowed=st.sampled_from([None, ("one",), ("here",), ("one", "here"), ("two",)]),
    words=st.sampled_from(["ok", "no"]),
    text=st.text(max_size=30),
)
def test_no_policy_runs_where_the_feature_may_not_and_every_receipt_adds_up(
    kind: str, allowed: tuple[str, ...] | None, words: str, text: str
) -> None:
    settings_: dict[str, dict[str, object]] = {
        "rules": {"rules": [{"model": "spare", "language": "en"}]},
        "cascade": {"verify": {"pattern": "ok"}},
    }

    async def story() -> None:
        features = {"f": FeatureConfig(placements=allowed)}
        world = World(
            letters(3),
            here=quick(2, text=words),
            routing={"auto": policy(kind, **settings_.get(kind, {}))},
            features=features,
        )
        try:
            receipts = [(await world.ask(**about("f"), messages=(Message("user", text),)))[0] for _ in range(2)]
        except Forbidden:
            assert allowed == ("two",)
        else:
            for receipt in receipts:
                assert allowed is None or {each.placement for each in receipt.attempts} <= set(allowed)
                assert receipt.total == Money.total(line.amount or Money(0) for line in receipt.lines)
                assert_adds_up(receipt)
            if kind == "rules":  # the others learn from answers
                assert told(receipts[0])["chosen"] == told(receipts[1])["chosen"]
        await world.close()

    run(story)


BROKEN_OFF = FakeAnswer((Text("ha", 1),), input_tokens=100, delay_s=0.01, error=UpstreamError("broken off"))


@settings(max_examples=50, deadline=None)
@given(
    cheap=st.sampled_from(["ok", "no", "down", "broken off"]),
    strong=st.sampled_from(["ok", "down", "broken off"]),
    verdict=st.sampled_from([None, "yes", "no"]),
    budget=st.sampled_from([None, "0.002", "0.041"]),
    retries=st.integers(0, 1),
    leaves_after_s=st.none() | st.floats(0, 3),
)
def test_whatever_becomes_of_a_cascade_the_client_gets_one_answer_whole_or_an_error_and_every_attempt_is_booked(
    cheap: str, strong: str, verdict: str | None, budget: str | None, retries: int, leaves_after_s: float | None
) -> None:
    def main(request: Request) -> FakeAnswer:
        if (request.messages or ())[0].text.startswith("You check"):
            return judge(verdict or "")
        return {"ok": letters(3), "down": DOWN, "broken off": BROKEN_OFF}[strong]

    here = {"ok": quick(2, text="ok"), "no": quick(2, text="no"), "down": DOWN, "broken off": BROKEN_OFF}[cheap]
    config = PolicyConfig(
        kind="cascade",
        models=MODELS,
        verify=VerifyConfig(pattern="ok", judge=None if verdict is None else "main"),
    )

    async def story() -> None:
        world = World(main, here=here, routing={"auto": config}, policy=ModelPolicy(retries=retries))
        if budget is not None:
            await world.limit(budget)
        try:
            answer = await world.pipeline.admit(world.request(model="auto"))
        except PaymentRequired:
            assert budget == "0.002"
        else:
            if leaves_after_s is not None:
                await answer.pause(leaves_after_s)
                answer.cancel()
            text, error = await read(answer)
            receipt = world.receipt(answer)
            assert text in {"", "okok", "nono", "xxx", "xx", "x", "ha"}
            if text == "ha":  # it came straight from the last stage, which nobody verifies
                assert (strong, type(error)) == ("broken off", UpstreamError)
            if text == "nono" and receipt.status is Status.SUCCEEDED:
                assert told(receipt)["verified"] == "false"
            if error is None and leaves_after_s is None:
                assert text in {"okok", "nono", "xxx"}
                assert receipt.status is Status.SUCCEEDED
                assert receipt.usage.output_tokens == len(text) // (1 if text == "xxx" else 2)
            assert all(each.ended_at_ns is not None for each in receipt.attempts)
            assert {line.attempt for line in receipt.lines} == {each.ordinal for each in receipt.attempts}
            assert len(receipt.attempts) <= 2 * (1 + retries) + 2
            assert_adds_up(receipt)
        await world.close()

    run(story)
