"""Policies asked for over HTTP like models, on a live gateway with two providers behind it."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from millicent.core.errors import ConfigError
from millicent.routing.difficulty import Scorer, features_of
from millicent.routing.graded_sets import read_set
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

[holdout]
levers = ["routing"]
features = {{ measured = 0.5 }}

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
    status, tags = server.get("/api/tags")
    assert (status, len(tags["models"])) == (200, 6)
    assert server.request("POST", "/api/show", b'{"model": "cheap"}')[0] == 200


def test_the_cheapest_is_asked_and_the_receipt_says_what_that_saved(server: LiveServer) -> None:
    text, receipt = ask(server, "cheap", "hello")
    assert (text, receipt["policy"]["answered_by"], receipt["model"]) == ("It is hello", "small", "cheap")
    assert receipt["policy"]["why"] == "the cheapest quote"
    assert "small (the cheapest quote)" in server.command("receipts", receipt["id"])
    # The other's prices are ten times as high.
    assert Decimal(receipt["saved_usd"]["routing"]) > 5 * Decimal(receipt["total_usd"])


def test_what_routing_saves_is_measured_against_a_random_part_that_goes_without(server: LiveServer) -> None:
    costs: dict[str, list[Decimal]] = {"with": [], "without": []}
    reckoned = Decimal(0)
    for number in range(100):
        headers = {"x-millicent-feature": "measured", "x-millicent-conversation": f"talk {number}"}
        text, receipt = ask(server, "cheap", "hello", **headers)
        side = receipt["policy"]["holdout_routing"]
        assert text == {"with": "It is hello", "without": "The far answer"}[side]
        costs[side].append(Decimal(receipt["total_usd"]))
        reckoned += Decimal(receipt["saved_usd"].get("routing", 0))
    (found,) = json.loads(server.command("plan", "cheaper", "--feature", "measured", "--json"))["measured"]
    assert (found["lever"], found["unpriced"]) == ("routing", 0)
    assert (found["requests_with"], found["requests_without"]) == (len(costs["with"]), len(costs["without"]))
    # All that had the lever cost the same, and so did all that went without: nothing is left to chance.
    (dear,), (cheap,) = set(costs["without"]), set(costs["with"])
    assert Decimal(found["saved_usd"]["expected"]) == (dear - cheap) * len(costs["with"])
    assert found["saved_usd"]["low"] == found["saved_usd"]["high"] == found["saved_usd"]["expected"]
    # The other model's tokens are only counted here, and its provider reports more.
    assert 0 < Decimal(found["predicted_usd"]) == reckoned < Decimal(found["saved_usd"]["expected"])
    shown = server.command("plan", "cheaper", "--feature", "measured")
    assert "SAVED AGAINST A HOLD-OUT" in shown


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


def graded(path: Path, count: int) -> str:
    """Prompts of which `small` gets all right and `large`, which always says the same, none; one is judged."""
    lines: list[dict[str, Any]] = [{"prompt": str(each), "expect": f"It is {each}"} for each in range(count)]
    lines.append({"prompt": "judged", "pattern": "^It", "judge": "Is it?"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_models_are_compared_on_graded_prompts_and_what_that_costs_is_on_receipts(
    server: LiveServer, tmp_path: Path
) -> None:
    prompts = graded(tmp_path / "set.jsonl", 20)
    options = ["--model", "small", "--model", "large", "--judge", "large", "--url", server.url, "--json"]
    told = json.loads(server.command("eval", prompts, *options, "--floor", "0.7"))
    small, large = told["data"]
    assert (small["model"], small["answers"], small["passed"], small["quality"]) == ("small", 21, 21, 1)
    assert (large["passed"], large["cost_per_useful_usd"]) == (0, None)
    low, high = small["quality_interval"]
    assert 0.8 < low < high == 1
    assert told["chosen"] == "small"
    assert Decimal(small["cost_per_useful_usd"]) * 21 == pytest.approx(Decimal(small["cost_usd"]))
    receipts = [each for each in server.receipts("&run=eval") if each["attribution"]["tags"] == {"eval": "set"}]
    assert len(receipts) == 2 * 21 + 1  # one answer was judged, the other's form was wrong
    assert sum(Decimal(each["total_usd"]) for each in receipts) == Decimal(told["spent_usd"])
    kept = (tmp_path / "set.results.jsonl").read_text()
    assert "It is" not in kept
    assert kept.count("\n") == 42


def test_an_evaluation_goes_on_where_it_stopped(server: LiveServer, tmp_path: Path) -> None:
    prompts, kept = graded(tmp_path / "more.jsonl", 4), tmp_path / "more.results.jsonl"
    options = ["--model", "small", "--judge", "large", "--url", server.url, "--json"]
    first = json.loads(server.command("eval", prompts, *options))
    lines = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(lines[:3]) + lines[3][:10])  # it was killed while it wrote
    asked = len(server.receipts("&run=eval"))
    again = json.loads(server.command("eval", prompts, *options))
    assert (again["data"][0]["answers"], again["data"][0]["passed"]) == (5, 5)
    assert len(server.receipts("&run=eval")) - asked in {2, 3}  # one of the two may be the judged one
    assert first["chosen"] is None
    with pytest.raises(subprocess.CalledProcessError) as refused:  # five prompts can't say so
        server.command("eval", prompts, *options, "--floor", "0.9")
    assert refused.value.returncode == 3
    with pytest.raises(subprocess.CalledProcessError) as failed:
        server.command("eval", prompts, "--model", "nowhere", "--judge", "large", "--url", server.url)
    assert failed.value.returncode == 1
    assert "5 answers are missing" in failed.value.stderr
    assert "Traceback" not in failed.value.stderr


@pytest.mark.parametrize(
    ("line", "said_"),
    [
        ('{"prompt": "a"}', "nothing grades"),
        ('{"expect": "a"}', "needs either"),
        ('{"prompt": "a", "pattern": "("}', "not a regular expression"),
        ('{"prompt": "a", "judge": "?"}', "--judge MODEL"),
        ('{"prompt": "a", "expect": "b", "other": 1}', "other"),
        ("nonsense", "malformed"),
    ],
)
def test_a_set_that_cannot_be_graded_is_refused_by_line(line: str, said_: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    with pytest.raises(ConfigError, match=r"bad\.jsonl:1.*" + re.escape(said_)):
        read_set(tmp_path / "bad.jsonl", None)


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
