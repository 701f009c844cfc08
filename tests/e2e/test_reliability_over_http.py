"""Deployments that fail, over HTTP: what clients get, what receipts say, and what the operator sees."""

from __future__ import annotations

import http.client
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from support.fake_upstream import Call, FakeUpstream, events, fake_upstream_in_a_thread, said
from support.live import LiveServer, live_server

CONFIG = """
[server]
heartbeat_s = 1

[placements.east]
kind = "api"
base_url = "{east}"
[placements.west]
kind = "api"
base_url = "{west}"

[models.main]
deployments = [{{ placement = "east", weight = 1 }}, {{ placement = "west", weight = 0 }}]
retries = 1
fallbacks = ["spare"]
[models.main.breaker]
failures = 1000
window_calls = 1000
[models.spare]
placement = "west"
[models.alone]
placement = "east"
retries = 1
[models.fragile]
placement = "east"
retries = 0
breaker = {{ failures = 2, cooldown_s = 300 }}

[features.private]
placements = ["west"]

[prices.main]
input = 1
input_cached = 0.5
output = 2
[prices.spare]
input = 1
input_cached = 0.5
output = 2
"""
BROKEN = b'{"error": {"message": "on fire", "type": "server_error"}}'


async def east(call: Call) -> None:
    """Does what the message says."""
    told = call.json["messages"][0]["content"].split()
    count = tries[call.json["messages"][0]["content"]]
    tries[call.json["messages"][0]["content"]] += 1
    if told[0] == "busy" and count == 0:
        await call.whole(BROKEN, status="429 Too Many Requests", more=f"Retry-After: {told[1]}\r\n")
    elif told[0] == "broken":
        await call.whole(BROKEN, status="500 Internal Server Error")
    elif told[0] == "cut":
        await call.stream([events({"choices": [{"index": 0, "delta": {"content": "Half"}}]}, done=False)], end=True)
    else:
        await call.stream([said("From the ", "east")])


async def west(call: Call) -> None:
    if call.json["messages"][0]["content"] == "broken everywhere":
        await call.whole(BROKEN, status="503 Service Unavailable", more="Retry-After: 120\r\n")
    else:
        await call.stream([said("From the ", "west")])


tries: Counter[str] = Counter()


@pytest.fixture(scope="module")
def upstreams() -> Iterator[tuple[FakeUpstream, FakeUpstream]]:
    with fake_upstream_in_a_thread(east) as first, fake_upstream_in_a_thread(west) as second:
        yield first, second


@pytest.fixture(scope="module")
def server(
    upstreams: tuple[FakeUpstream, FakeUpstream], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    config = CONFIG.format(east=upstreams[0].url, west=upstreams[1].url)
    with live_server(tmp_path_factory.mktemp("reliability"), [], config) as live:
        yield live


def ask(server: LiveServer, model: str, text: str, **headers: str) -> tuple[int, Any, Mapping[str, str]]:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": text}]}).encode()
    return server.request("POST", "/v1/chat/completions", body, headers)


def receipt_of(server: LiveServer, headers: Mapping[str, str]) -> dict[str, Any]:
    status, receipt = server.get(f"/v1/receipts/{headers['x-millicent-receipt']}")
    assert status == 200
    assert isinstance(receipt, dict)
    return receipt


def test_another_deployment_answers_and_the_receipt_shows_both(server: LiveServer) -> None:
    status, body, headers = ask(server, "main", "broken here")
    assert (status, body["choices"][0]["message"]["content"], body["model"]) == (200, "From the west", "main")
    receipt = receipt_of(server, headers)
    assert [(each["placement"], each["role"], each["status"]) for each in receipt["attempts"]] == [
        ("east", "inference", "failed"),
        ("west", "retry", "succeeded"),
    ]
    assert "on fire" in receipt["attempts"][0]["error"]
    assert (receipt["placement"], receipt["error"], receipt["status"]) == ("west", None, "succeeded")
    assert headers["x-millicent-cost-usd"] == receipt["total_usd"]
    shown = server.command("receipts", receipt["id"])
    assert "Attempt 1" in shown
    assert "Attempt 2" in shown


def test_when_everything_fails_the_client_gets_the_error_its_receipt_and_how_long_to_wait(server: LiveServer) -> None:
    status, body, headers = ask(server, "main", "broken everywhere")
    assert status in {502, 503}
    assert "on fire" in body["error"]["message"]
    assert headers["retry-after"] == "120"
    receipt = receipt_of(server, headers)
    assert [each["role"] for each in receipt["attempts"]] == ["inference", "retry", "fallback"]
    assert (receipt["status"], receipt["total_usd"]) == ("failed", "0")


def test_a_stream_beats_while_its_deployment_asks_to_wait(server: LiveServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = {"model": "alone", "messages": [{"role": "user", "content": "busy 2"}], "stream": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(body).encode())
    response = connection.getresponse()
    sent = response.read().decode()
    connection.close()
    assert response.status == 200
    assert sent.count(": ") >= 2
    assert sent.index("\n:") < sent.index("From the")
    assert sent.rstrip().endswith("data: [DONE]")
    receipt = receipt_of(server, dict(response.headers))
    assert [each["status"] for each in receipt["attempts"]] == ["failed", "succeeded"]


def test_half_an_answer_is_not_begun_anew(server: LiveServer) -> None:
    status, _, headers = ask(server, "main", "cut")
    assert status == 502
    receipt = receipt_of(server, headers)
    assert len(receipt["attempts"]) == 1
    assert receipt["usage"]["output_text"]["tokens"] > 0
    assert receipt["total_usd"] != "0"


def test_a_feature_is_kept_to_its_placements(server: LiveServer, upstreams: tuple[FakeUpstream, FakeUpstream]) -> None:
    before = len(upstreams[0].calls)
    private = {"X-Millicent-Feature": "private"}
    status, body, headers = ask(server, "main", "hello", **private)
    assert (status, body["choices"][0]["message"]["content"]) == (200, "From the west")
    assert [each["placement"] for each in receipt_of(server, headers)["attempts"]] == ["west"]
    status, body, headers = ask(server, "alone", "hello", **private)
    assert (status, body["error"]["code"]) == (403, "placement_not_allowed")
    assert "Feature `private` may run only on west" in body["error"]["message"]
    assert "x-millicent-receipt" not in headers
    assert len(upstreams[0].calls) == before


def test_an_operator_sees_which_deployment_is_left_alone(server: LiveServer) -> None:
    for _ in range(2):
        assert ask(server, "fragile", "broken always")[0] == 502
    status, body, headers = ask(server, "fragile", "broken always")
    assert (status, body["error"]["code"]) == (503, "deployments_unhealthy")
    assert 290 <= int(headers["retry-after"]) <= 300
    [seen] = [each for each in server.get("/ready")[1]["deployments"] if each["model"] == "fragile"]
    assert (seen["placement"], seen["state"], seen["running"]) == ("east", "open", 0)
    assert 290 <= seen["retry_after_s"] <= 300
