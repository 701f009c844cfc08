"""What comes after an answer, through the front door: lines, feedback, what they do to reports; and fits that last."""

import json
import subprocess
import sys
from collections.abc import Iterator
from os import environ
from typing import Any

import pytest

from millicent.ledger.queries import LedgerQueries
from support.live import LiveServer, live_server
from support.tiny_models import TinyLlama, write_tiny_model

CONFIG = """
[placements.local]
kind = "owned"
capital_usd = 1000
life_years = 4
watts = 100
usd_per_kwh = 0.2
[features.extract.useful]
json_schema = { type = "object" }
[features.search.useful]
score = 0.8
[features.weather]
owner = "ada"
cost_target_usd = 0.01
latency_target_ms = 3600000
useful = { tool_succeeded = true }
"""
RETRIEVAL = {"role": "retrieval", "meter": "other", "quantity": 3, "unit": "query", "amount_usd": "0.0015"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("late")
    tiny = write_tiny_model(folder / "tiny", TinyLlama(context_tokens=1024))
    with live_server(folder / "home", [str(tiny)], CONFIG) as live:
        yield live


def post(server: LiveServer, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    status, answer, _ = server.request("POST", path, json.dumps(body).encode(), headers)
    return status, answer


def ask(server: LiveServer, **headers: str) -> dict[str, Any]:
    """A settled receipt."""
    body = {"model": "tiny", "prompt": "x", "max_tokens": 4, "ignore_eos": True}
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    status, answer, sent = server.request("POST", "/v1/completions", json.dumps(body).encode(), given)
    assert status == 200, answer
    _, receipt = server.get(f"/v1/receipts/{sent['x-millicent-receipt']}")
    assert isinstance(receipt, dict)
    return receipt


def report(server: LiveServer, *arguments: str) -> Any:
    command = [sys.executable, "-m", "millicent", "report", *arguments, "--json"]
    env = environ | {"MILLICENT_HOME": str(server.home)}
    return json.loads(subprocess.run(command, env=env, capture_output=True, check=True).stdout)


def dollars(receipt: dict[str, Any]) -> float:
    return float(receipt["total_usd"])


def test_a_cost_posted_later_is_a_line_of_its_own_once(server: LiveServer) -> None:
    receipt = ask(server, X_Millicent_Feature="later")
    path = f"/v1/receipts/{receipt['id']}/lines"
    for _ in range(2):
        status, changed = post(server, path, RETRIEVAL | {"id": "r1", "incurred_at": "2026-01-01T00:00:00Z"})
        assert status == 201, changed
    assert len(changed["lines"]) == len(receipt["lines"]) + 1
    assert changed["lines"][-1]["amount_usd"] == "0.0015"
    assert changed["lines"][-1]["incurred_at"].startswith("2026-01-01")
    assert changed["lines"][0] == receipt["lines"][0]
    assert dollars(changed) == pytest.approx(dollars(receipt) + 0.0015, abs=1e-9)
    assert post(server, path, RETRIEVAL | {"id": "r1", "amount_usd": "9"})[0] == 409
    assert post(server, path, [RETRIEVAL, RETRIEVAL])[0] == 201
    [group] = [each for each in report(server, "--by", "feature")["data"] if each["group"] == "later"]
    assert group["roles_usd"]["retrieval"] == "0.0045"


def test_a_cost_told_with_the_request_is_in_its_price(server: LiveServer) -> None:
    receipt = ask(server, X_Millicent_Lines=json.dumps([RETRIEVAL, RETRIEVAL | {"role": "verification"}]))
    assert [line["role"] for line in receipt["lines"]] == ["retrieval", "verification", "inference"]
    assert dollars(receipt) > 0.003
    assert post(server, "/v1/completions", {"model": "tiny", "prompt": "x"}, {"X-Millicent-Lines": "{}"})[0] == 400


@pytest.mark.parametrize(
    "line",
    [{}, RETRIEVAL | {"role": "magic"}, RETRIEVAL | {"amount_usd": "NaN"}, RETRIEVAL | {"amount_usd": -1},
     RETRIEVAL | {"quantity": "-3"}, RETRIEVAL | {"incurred_at": "soon"}, RETRIEVAL | {"colour": "red"}, []],
)  # fmt: skip
def test_a_line_that_makes_no_sense_is_refused(server: LiveServer, line: Any) -> None:
    receipt = ask(server)
    status, answer = post(server, f"/v1/receipts/{receipt['id']}/lines", line)
    assert status == 400, answer
    assert server.get(f"/v1/receipts/{receipt['id']}")[1] == receipt


def test_feedback_makes_outputs_useful_or_not_and_the_report_says_what_a_useful_one_costs(server: LiveServer) -> None:
    ids = [ask(server, X_Millicent_Feature="search")["id"] for _ in range(4)]
    status, given = post(server, "/v1/feedback", {"receipt": ids[0], "score": 0.7, "comment": "almost"})
    assert (status, given["useful"]) == (201, False)
    status, several = post(server, "/v1/feedback", [{"receipt": one, "score": 1} for one in ids[:2]])
    assert (status, [each["useful"] for each in several["data"]]) == (201, [True, True])
    assert post(server, "/v1/feedback", {"receipt": ids[2], "score": 0})[0] == 201
    assert [server.get(f"/v1/receipts/{one}")[1]["useful"] for one in ids] == [True, True, False, None]
    [group] = [each for each in report(server)["data"] if each["group"] == "search"]
    assert (group["rated"], group["useful"]["outputs"], group["useful"]["coverage"]) == (3, 2, 0.75)
    mean = float(group["cost_usd"]) / 4
    assert float(group["useful"]["cost_per_useful_usd"]) == pytest.approx(mean * 3 / 2, abs=1e-8)


@pytest.mark.parametrize(
    ("given", "status"),
    [({"receipt": "rcpt_none", "score": 1}, 404), ({"score": 1}, 400), ({"receipt": "x", "score": 2}, 400),
     ({"receipt": "x"}, 400), ([], 400)],
)  # fmt: skip
def test_feedback_that_makes_no_sense_is_refused(server: LiveServer, given: Any, status: int) -> None:
    assert post(server, "/v1/feedback", given)[0] == status


def test_an_output_is_judged_by_its_features_rule_when_it_ends(server: LiveServer) -> None:
    judged = ask(server, X_Millicent_Feature="extract")
    assert judged["useful"] is False  # a tiny model's gibberish isn't a JSON object
    assert ask(server, X_Millicent_Feature="other")["useful"] is None


def test_joules_are_estimated_from_the_stated_watts(server: LiveServer) -> None:
    receipt = ask(server)
    assert receipt["energy"]["provenance"] == "estimated"
    assert receipt["energy"]["joules"] == pytest.approx(100 * receipt["accelerator"]["seconds"], abs=1e-5)


def test_what_steps_cost_is_known_before_the_first_request_and_after_a_restart(server: LiveServer) -> None:
    version = ask(server)["accelerator"]["step_time_version"]
    assert version is not None
    assert server.stop() == 0
    server.start()
    assert ask(server)["accelerator"]["step_time_version"] is not None
    server.check_accounts()
    assert LedgerQueries(server.home / "ledger.db").verify() == []


def test_the_next_turn_tells_whether_a_called_tool_succeeded(server: LiveServer) -> None:
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "weather", "parameters": nothing}}
    asked = {"role": "user", "content": "is it warm?"}
    body: dict[str, Any] = {"model": "tiny", "messages": [asked], "tools": [tool], "tool_choice": "required"}
    body = body | {"parallel_tool_calls": False}
    headers = {"X-Millicent-Feature": "weather"}

    def turn(*messages: Any, tools: bool = True) -> tuple[dict[str, Any], str]:
        sent = body | {"messages": [asked, *messages]} if tools else {"model": "tiny", "messages": [asked, *messages]}
        status, answer, told = server.request(
            "POST", "/v1/chat/completions", json.dumps(sent | {"max_tokens": 200}).encode(), headers
        )
        assert status == 200, answer
        return answer["choices"][0]["message"], told["x-millicent-receipt"]

    verdicts = []
    for content in ("12 C", '{"error": "no such city"}'):
        message, receipt_id = turn()
        [call] = message["tool_calls"]
        assert server.get(f"/v1/receipts/{receipt_id}")[1]["useful"] is None
        history = [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": content},
        ]
        for _ in range(2):  # a conversation tells everything again
            turn(*history, tools=False)
        verdicts.append(server.get(f"/v1/receipts/{receipt_id}")[1]["useful"])
    assert verdicts == [True, False]
    [row] = [each for each in report(server)["data"] if each["group"] == "weather"]
    assert row["rated"] == 2
    assert row["owner"] == "ada"
    targets = row["targets"]
    assert (targets["cost_usd"], targets["latency_ms"], targets["in_time"]) == ("0.01", 3600000, 1)
    assert float(targets["mean_cost_usd"]) == pytest.approx(float(row["cost_usd"]) / row["requests"], abs=1e-9)
