"""When an output counts as useful."""

import re
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.core.errors import ConfigError
from millicent.core.request import Message
from millicent.pipeline.features import FeatureConfig, Features, UsefulConfig


def rule(**useful: Any) -> Features:
    return Features({"f": FeatureConfig(useful=UsefulConfig(**useful))})


@pytest.mark.parametrize(
    ("useful", "score", "label", "verdict"),
    [
        ({}, "0.5", None, True),
        ({}, "0.49", None, False),
        ({}, None, "accepted", None),
        ({"score": Decimal("0.8")}, "0.7", None, False),
        ({"labels": ("accepted",)}, None, "accepted", True),
        ({"labels": ("accepted",)}, None, "thrown away", False),
        ({"labels": ("accepted",)}, "1", None, None),
        ({"labels": ("accepted",), "score": Decimal("0.5")}, "0.9", "thrown away", False),
        ({"pattern": "x"}, "1", None, None),
    ],
)
def test_feedback_is_judged_by_what_the_rule_names(
    useful: dict[str, Any], score: str | None, label: str | None, verdict: bool | None
) -> None:
    assert rule(**useful).feedback("f", None if score is None else Decimal(score), label) is verdict


def test_a_feature_without_a_rule_goes_by_the_score() -> None:
    assert Features({}).feedback(None, Decimal(1), None) is True
    assert Features({}).output("other", "anything") is None


@pytest.mark.parametrize(
    ("text", "verdict"),
    [('{"n": 3}', True), ('{"n": "3"}', False), ("{}", False), ("three", False), ("[" * 100_000, False)],
)
def test_an_output_must_be_json_that_the_schema_allows(text: str, verdict: bool) -> None:
    schema = {"type": "object", "required": ["n"], "properties": {"n": {"type": "number", "minimum": Decimal("0.5")}}}
    assert rule(json_schema=schema).output("f", text) is verdict


def test_all_that_is_given_must_hold() -> None:
    both = rule(pattern="yes", json_schema={"type": "string"})
    assert [both.output("f", text) for text in ('"yes"', "yes", '"no"')] == [True, False, False]


@pytest.mark.parametrize(
    "useful", [{"pattern": "("}, {"score": Decimal(2)}, {"json_schema": {"type": "colour"}}], ids=str
)
def test_a_rule_that_cannot_work_is_told_by_name(useful: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"\[features.f.useful\] {next(iter(useful))}"):
        rule(**useful)


@given(st.text())
def test_no_output_trips_a_rule(text: str) -> None:
    assert rule(pattern="a|b", json_schema={"type": "object"}).output("f", text) in {True, False}


def answer(content: str, failed: bool = False) -> Message:
    return Message("tool", content, tool_call_id="call_x", failed=failed)


@pytest.mark.parametrize(
    ("useful", "answers", "verdict"),
    [
        ({}, [answer("12 C")], None),
        ({"tool_succeeded": True}, [], None),
        ({"tool_succeeded": True}, [answer("12 C")], True),
        ({"tool_succeeded": True}, [answer('{"error": "no such city"}')], False),
        ({"tool_succeeded": True}, [answer('{"error": null, "celsius": 12}')], True),
        ({"tool_succeeded": True}, [answer("12 C"), answer('{"isError": true}')], False),
        ({"tool_succeeded": True}, [answer("Traceback", failed=True)], False),
        ({"tool_succeeded": True, "tool_failure": "^Traceback"}, [answer("Traceback (most recent")], False),
        ({"tool_succeeded": True, "tool_failure": "^Traceback"}, [answer('{"error": "but not by this rule"}')], True),
    ],
)
def test_a_tools_answer_tells_whether_it_succeeded(
    useful: dict[str, Any], answers: list[Message], verdict: bool | None
) -> None:
    rules = rule(**useful)
    assert rules.tools("f", answers) is verdict
    assert rules.judges_tools is bool(useful)
    assert rules.tools("other", answers) is None


@pytest.mark.parametrize(("label", "verdict"), [("tool_succeeded", True), ("tool_failed", False), ("fine", None)])
def test_whoever_ran_the_tool_can_say_so_by_feedback(label: str, verdict: bool | None) -> None:
    assert rule(tool_succeeded=True).feedback("f", None, label) is verdict
    assert rule(pattern="x").feedback("f", None, label) is None


@pytest.mark.parametrize(
    ("feature", "said"),
    [
        ({"cost_target_usd": Decimal(0)}, "cost_target_usd = 0"),
        ({"useful": UsefulConfig(tool_failure="x")}, "says nothing without"),
        ({"useful": UsefulConfig(tool_succeeded=True, tool_failure="(")}, "tool_failure: not a regular expression"),
    ],
)
def test_a_setting_that_cannot_be_is_told_by_name(feature: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        Features({"f": FeatureConfig(**feature)})
