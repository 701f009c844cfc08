"""A policy's choice among candidates: bounded, explained, deterministic."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.core.clock import NS_PER_MS
from millicent.core.errors import ConfigError, Forbidden, PaymentRequired, RateLimited, Unavailable
from millicent.core.money import Money
from millicent.core.quotes import CostInterval, Interval, Quote
from millicent.core.request import Attribution, Message, Request, Tool
from millicent.core.usage import Provenance
from millicent.meter.placements import Placement
from millicent.meter.quotes import Asked
from millicent.routing.config import PolicyConfig
from millicent.routing.difficulty import Scorer, features_of
from millicent.routing.language import language_of
from millicent.routing.policies import Candidate, Decision, Policies, Policy

MODELS = ("small", "medium", "large")
PLACE = Placement("here", 1, Decimal(1), Provenance.MEASURED)


def policy(**config: Any) -> Policy:
    return Policy("auto", msgspec.convert({"models": MODELS, **config}, PolicyConfig), Path())


def request(text: str = "Hello", **given: Any) -> Request:
    return Request(id="r", dialect="test", model="auto", messages=(Message("user", text),), **given)


def candidate(model: str, nanousd: int | None = 1000, *, tokens: int = 10, total_ms: int = 100) -> Candidate:
    cost = None if nanousd is None else CostInterval(Money(0), Money(nanousd), Money(2 * nanousd))
    total = Interval(0, total_ms * NS_PER_MS, 2 * total_ms * NS_PER_MS)
    quote = Quote(model, "here", tokens, Interval(1, 2, 3), total, total, cost, Provenance.ESTIMATED)
    return Candidate(model, Asked(model, PLACE, tokens, Provenance.COUNTED, 10, None), quote)


def refused(model: str) -> Candidate:
    return Candidate(model, refusal=Forbidden("not there", code="placement_not_allowed"))


ALL = tuple(map(candidate, MODELS))
TOOL = Tool("look", "", "{}")


@pytest.mark.parametrize(
    ("rule", "given", "chosen"),
    [
        ({"feature": "chat"}, {"attribution": Attribution(feature="chat")}, "small"),
        ({"feature": "chat"}, {"attribution": Attribution(feature="other")}, "large"),
        ({"max_input_tokens": 10}, {}, "small"),
        ({"max_input_tokens": 9}, {}, "large"),
        ({"min_input_tokens": 10}, {}, "small"),
        ({"min_input_tokens": 11}, {}, "large"),
        ({"tools": True}, {"tools": (TOOL,)}, "small"),
        ({"tools": False}, {"tools": (TOOL,)}, "large"),
        ({"language": "de"}, {"text": "Was ist das und wie geht es mit der Arbeit?"}, "small"),
        ({"language": "de"}, {"text": "What is that and how does it work?"}, "large"),
    ],
)
def test_a_rule_holds_for_what_it_names(rule: dict[str, Any], given: dict[str, Any], chosen: str) -> None:
    found = policy(kind="rules", rules=[{"model": "small", **rule}]).decide(request(**given), ALL)
    assert found.stages == (chosen,)


def test_the_first_rule_that_holds_decides() -> None:
    rules = [{"model": "medium", "tools": False}, {"model": "small"}]
    assert policy(kind="rules", rules=rules).decide(request(), ALL).why == "rule 1"
    assert policy(kind="rules", rules=rules).decide(request(tools=(TOOL,)), ALL).stages == ("small",)


def test_the_cheapest_meets_the_floor_the_target_and_the_price() -> None:
    candidates = (candidate("small", 10), candidate("medium", 20, total_ms=50), candidate("large", 30, total_ms=50))
    quality = {"small": 0.5, "medium": 0.7, "large": 0.9}
    plain = policy(kind="cheapest")
    assert plain.decide(request(), candidates).stages == ("small",)
    floor = policy(kind="cheapest", quality=quality, quality_floor=0.6)
    assert floor.decide(request(), candidates).stages == ("medium",)
    assert plain.decide(request(latency_target_ms=60), candidates).stages == ("medium",)
    with pytest.raises(RateLimited):
        plain.decide(request(latency_target_ms=40), candidates)
    with pytest.raises(PaymentRequired):
        floor.decide(request(max_cost=Money(19)), candidates)
    with pytest.raises(Unavailable):
        floor.decide(request(), (candidates[0], refused("medium"), refused("large")))
    unpriced = (candidate("small", None), *candidates[1:])
    assert plain.decide(request(), unpriced).stages == ("medium",)


def test_a_policys_target_and_price_are_for_requests_that_bring_none() -> None:
    found = policy(kind="cheapest", latency_target_ms=70, max_cost_usd=0.5)
    aimed = found.aimed(request())
    assert (aimed.latency_target_ms, aimed.max_cost) == (70, Money.from_usd("0.5"))
    own = request(latency_target_ms=5, max_cost=Money(7))
    assert found.aimed(own) == own


def test_a_learned_score_chooses_between_two_and_says_the_score(tmp_path: Path) -> None:
    hard = dict.fromkeys(set(features_of("prove the theorem")) - set(features_of("Hi!")), 9.0)
    Scorer(1, 2, -4.0, hard).save(tmp_path / "s.json")
    config = PolicyConfig(kind="learned", models=("weak", "strong"), scores="s.json", threshold=Decimal("0.5"))
    found = Policy("auto", config, tmp_path)
    both = (candidate("weak"), candidate("strong"))
    assert found.decide(request("prove the theorem"), both).stages == ("strong",)
    easy = found.decide(request("Hi!"), both)
    assert easy.stages == ("weak",)
    assert easy.why.startswith("difficulty 0.")
    assert easy.why.endswith("< 0.5")


def test_a_model_that_cannot_be_asked_is_stood_in_for_by_a_stronger_one_and_the_receipt_says_so() -> None:
    found = policy(kind="rules", rules=[{"model": "small"}])
    decision = found.decide(request(), (refused("small"), candidate("medium"), candidate("large")))
    assert decision.stages == ("medium",)
    assert decision.why == "rule 1; `small` can't be asked: placement_not_allowed"
    weaker = policy(kind="rules", rules=[{"model": "large"}]).decide(request(), (*ALL[:2], refused("large")))
    assert (weaker.stages, weaker.reference) == (("medium",), None)
    told = msgspec.json.decode(decision.explained()["quotes_usd"])
    assert told == {"small": "placement_not_allowed", "medium": "0.000001", "large": "0.000001"}
    with pytest.raises(Forbidden):
        found.decide(request(), tuple(map(refused, MODELS)))


def test_a_cascade_goes_through_those_that_can_be_asked_in_order() -> None:
    found = policy(kind="cascade", verify={"pattern": "x"})
    assert found.decide(request(), (ALL[0], refused("medium"), ALL[2])).stages == ("small", "large")


def decide(kind: str, costs: list[int | None], able: list[bool], text: str) -> Decision:
    extra: dict[str, dict[str, Any]] = {
        "rules": {"rules": [{"model": "medium", "language": "en"}, {"model": "small", "max_input_tokens": 10}]},
        "cheapest": {"quality": {"small": 0.2, "medium": 0.6, "large": 0.9}, "quality_floor": 0.5},
        "cascade": {"verify": {"judge": "large"}},
    }
    candidates = [
        candidate(model, cost) if there else refused(model)
        for model, cost, there in zip(MODELS, costs, able, strict=True)
    ]
    return policy(kind=kind, **extra[kind]).decide(request(text), candidates)


@given(
    kind=st.sampled_from(["rules", "cheapest", "cascade"]),
    costs=st.lists(st.none() | st.integers(0, 10**9), min_size=3, max_size=3),
    able=st.lists(st.booleans(), min_size=3, max_size=3),
    text=st.text(),
)
def test_the_same_candidates_give_the_same_choice_which_is_always_one_that_may_be_asked(
    kind: str, costs: list[int | None], able: list[bool], text: str
) -> None:
    try:
        first = decide(kind, costs, able, text)
    except (Forbidden, Unavailable):
        assert not any(able) or (kind == "cheapest" and not any(able[1:]))
        return
    again = decide(kind, costs, able, text)
    assert (first.stages, first.explained()) == (again.stages, again.explained())
    there = {model for model, ok in zip(MODELS, able, strict=True) if ok}
    assert first.stages
    assert set(first.stages) <= there
    priced = {model: cost for model, cost in zip(MODELS, costs, strict=True) if cost is not None}
    if kind == "cheapest" and first.stages[0] in priced:
        good = [priced[model] for model in there - {"small"} if model in priced]
        assert priced[first.stages[0]] == min(good)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"kind": "rules"}, "there are none"),
        ({"kind": "rules", "rules": [{"model": "huge"}]}, "isn't among models"),
        ({"kind": "rules", "rules": [{"model": "small"}], "threshold": 0.5}, "doesn't go with"),
        ({"kind": "cheapest", "models": ["one"]}, "fewer than two"),
        ({"kind": "cheapest", "models": ["auto", "b"]}, "or itself"),
        ({"kind": "cheapest", "quality_floor": 0.5}, "isn't known"),
        ({"kind": "cheapest", "quality": dict.fromkeys(MODELS, 0.2), "quality_floor": 0.5}, "none of the models"),
        ({"kind": "cheapest", "quality": {"small": 2}}, "from 0 to 1"),
        ({"kind": "cheapest", "max_cost_usd": 0}, "above 0"),
        ({"kind": "cascade"}, "nothing is verified"),
        ({"kind": "cascade", "verify": {"pattern": "("}}, "not a regular expression"),
        ({"kind": "cascade", "verify": {"json_schema": {"type": 3}}}, "not a JSON schema"),
        ({"kind": "cascade", "verify": {"min_logprob": 1}}, "at most 0"),
        ({"kind": "learned"}, "chooses between two"),
        ({"kind": "learned", "models": ["a", "b"]}, "both are needed"),
        ({"kind": "learned", "models": ["a", "b"], "scores": "nowhere", "threshold": 0.5}, "no scores can be read"),
    ],
)
def test_what_is_wrong_with_a_policy_is_said(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        policy(**config)


def test_policies_know_only_models_that_are_served_and_have_names_of_their_own() -> None:
    config = msgspec.convert({"kind": "cheapest", "models": ["a", "b"]}, PolicyConfig)
    policies = Policies({"auto": config}, Path())
    policies.check_models(("a", "b", "c"))
    with pytest.raises(ConfigError, match="no model `b`"):
        policies.check_models(("a",))
    with pytest.raises(ConfigError, match="another name"):
        policies.check_models(("a", "b", "auto"))


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("How do I write a function that is fast?", "en"),
        ("Wie schreibe ich eine Funktion, die nicht langsam ist?", "de"),
        ("Comment est-ce que je peux faire une page avec des images ?", "fr"),
        ("¿Cómo se escribe una función que es más rápida?", "es"),
        ("これは何ですか。日本語です", "ja"),
        ("这是什么意思", "zh"),
        ("Как это работает?", "ru"),
        ("", None),
        ("12345", None),
    ],
)
def test_a_language_is_told_from_script_and_common_words(text: str, language: str | None) -> None:
    assert language_of(text) == language
