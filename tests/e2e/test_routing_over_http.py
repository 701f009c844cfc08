"""Policies asked for over HTTP like models, on a live gateway with two providers behind it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from millicent.routing.difficulty import Scorer, features_of
from support.fake_upstream import Call, fake_upstream_in_a_thread, said
from support.live import LiveServer, live_server

CONFIG = """
[placements.near]
kind = "api"
base_url = "{near}"
[placements.far]
kind = "api"
base_url = "{far}"

[models.small]
placement = "near"
[models.large]
placement = "far"

[prices.small]
input = 1
input_cached = 0.5
output = 2
[prices.large]
input = 10
input_cached = 5
output = 20

[features.private]
placements = ["far"]

[routing.cheap]
kind = "cheapest"
models = ["small", "large"]

[routing.checked]
kind = "cascade"
models = ["small", "large"]
verify = {{ pattern = "42" }}

[routing.judged]
kind = "cascade"
models = ["small", "large"]
verify = {{ judge = "large" }}

[routing.learned]
kind = "learned"
models = ["small", "large"]
scores = "scores.json"
threshold = 0.5
"""


async def near(call: Call) -> None:
    await call.stream([said("It is ", call.json["messages"][-1]["content"])])


async def far(call: Call) -> None:
    judging = call.json["messages"][0]["content"].startswith("You check")
    await call.stream([said("Yes" if judging else "The far ", "" if judging else "answer")])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    home = tmp_path_factory.mktemp("routing")
    hard = dict.fromkeys(set(features_of("prove it")) - set(features_of("hi")), 9.0)
    Scorer(1, 2, -4.0, hard).save(home / "scores.json")
    with (
        fake_upstream_in_a_thread(near) as one,
        fake_upstream_in_a_thread(far) as two,
        live_server(home, [], CONFIG.format(near=one.url, far=two.url)) as live,
    ):
        yield live


def ask(server: LiveServer, model: str, text: str, **headers: str) -> tuple[str, dict[str, Any]]:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": text}]}).encode()
    status, answer, told = server.request("POST", "/v1/chat/completions", body, headers)
    assert status == 200, answer
    receipt = server.get(f"/v1/receipts/{told['x-millicent-receipt']}")[1]
    assert told["x-millicent-cost-usd"] == receipt["total_usd"]
    saved = sum(map(Decimal, receipt["saved_usd"].values()))
    assert not receipt["saved_usd"] or saved == Decimal(receipt["list_usd"]) - Decimal(receipt["total_usd"])
    return answer["choices"][0]["message"]["content"], receipt


def test_policies_are_listed_beside_the_models(server: LiveServer) -> None:
    listed = [each["id"] for each in server.get("/v1/models")[1]["data"]]
    assert listed == ["small", "large", "cheap", "checked", "judged", "learned"]


def test_the_cheapest_is_asked_and_the_receipt_says_what_that_saved(server: LiveServer) -> None:
    text, receipt = ask(server, "cheap", "hello")
    assert (text, receipt["policy"]["answered_by"], receipt["model"]) == ("It is hello", "small", "cheap")
    assert receipt["policy"]["why"] == "the cheapest quote"
    # The other's prices are ten times as high.
    assert Decimal(receipt["saved_usd"]["routing"]) > 5 * Decimal(receipt["total_usd"])


def test_a_features_placements_bound_the_choice(server: LiveServer) -> None:
    headers = {"x-millicent-feature": "private"}
    text, receipt = ask(server, "cheap", "hello", **headers)
    assert (text, receipt["placement"]) == ("The far answer", "far")
    assert "routing" not in receipt["saved_usd"]


@pytest.mark.parametrize(
    ("model", "text", "answer", "roles"),
    [
        ("checked", "42", "It is 42", ["inference"]),
        ("checked", "43", "The far answer", ["inference", "fallback"]),
        ("judged", "anything", "It is anything", ["inference", "verification"]),
    ],
)
def test_a_cascade_is_one_answer_and_one_receipt(
    server: LiveServer, model: str, text: str, answer: str, roles: list[str]
) -> None:
    said_, receipt = ask(server, model, text)
    assert (said_, [each["role"] for each in receipt["attempts"]]) == (answer, roles)
    assert {line["attempt"] for line in receipt["lines"]} == set(range(1, len(roles) + 1))
    assert receipt["policy"]["verified"] == ("strongest" if "fallback" in roles else "true")


def test_a_cascade_streams_what_was_verified_only(server: LiveServer) -> None:
    text = server.command("run", "checked", "43", "--url", server.url)
    assert "The far answer" in text
    assert "It is" not in text


@pytest.mark.parametrize(("text", "model"), [("hi", "small"), ("prove it", "large")])
def test_a_learned_score_sends_the_hard_prompts_to_the_strong_model(server: LiveServer, text: str, model: str) -> None:
    _, receipt = ask(server, "learned", text)
    assert receipt["policy"]["answered_by"] == model
    assert receipt["policy"]["why"].startswith("difficulty 0.")


def test_a_policy_is_quoted_as_each_of_its_models(server: LiveServer) -> None:
    body = json.dumps({"model": "cheap", "messages": [{"role": "user", "content": "hi"}]}).encode()
    quotes = server.request("POST", "/v1/quote", body)[1]["data"]
    assert [each["model"] for each in quotes] == ["small", "large"]


def test_the_report_tells_how_much_was_routed(server: LiveServer) -> None:
    ask(server, "cheap", "once more")
    found = json.loads(server.command("report", "--routing", "--json"))["data"]
    by_policy = {each["policy"]: each for each in found}
    assert 1 <= by_policy["cheap"]["cheaper"] <= by_policy["cheap"]["routed"]
    assert Decimal(by_policy["cheap"]["saved_usd"]) > 0


def test_a_policy_without_its_model_doesnt_start(tmp_path: Path) -> None:
    lone = '[routing.auto]\nkind = "cheapest"\nmodels = ["small", "nowhere"]\n'
    with fake_upstream_in_a_thread(near) as one:
        config = CONFIG.format(near=one.url, far=one.url).replace("[routing.learned]", "[routing.gone]") + lone
        Scorer(1, 2, 0.0, {}).save(tmp_path / "scores.json")
        server = LiveServer(tmp_path, [], config)
        with pytest.raises(AssertionError, match="has no model `nowhere`"):
            server.start()
