"""The response cache over HTTP: every dialect is given what another was answered, keys and users keep theirs apart, and
what is kept survives a restart until it is purged."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from support.fake_upstream import Call, FakeUpstream, fake_upstream_in_a_thread, said
from support.live import LiveServer, live_server

CONFIG = """
[cache]
enabled = true

[cache.features.faq]
scope = "shared"

[placements.there]
kind = "api"
base_url = "{there}"
[models.main]
placement = "there"
retries = 0

[prices.main]
input = 1
input_cached = 0.5
output = 2
[prices.newer]
input = 1
input_cached = 0.5
output = 2
"""
QUESTION = "How warm is it in {}?"


async def there(call: Call) -> None:
    asked = call.json["messages"][-1]["content"]
    if "nowhere" in asked:
        await call.whole(b'{"error": {"message": "no", "type": "invalid_request_error"}}', status="400 Bad Request")
    else:
        await call.stream([said("Warm ", f"enough: {asked}")])


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    with fake_upstream_in_a_thread(there) as fake:
        yield fake


@pytest.fixture(scope="module")
def server(upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    config = CONFIG.format(there=upstream.url)
    with live_server(tmp_path_factory.mktemp("home"), [], config) as live:
        yield live


def post(
    server: LiveServer, body: Mapping[str, Any], headers: Mapping[str, str] | None = None,
    path: str = "/v1/chat/completions", token: str | None = None,
) -> tuple[int, bytes, Mapping[str, str]]:  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    token = token or server.token
    try:
        ours = {} if token is None else {"Authorization": f"Bearer {token}"}
        connection.request("POST", path, json.dumps(body), ours | dict(headers or {}))
        response = connection.getresponse()
        return response.status, response.read(), {name.lower(): value for name, value in response.headers.items()}
    finally:
        connection.close()


def chat(question: str, **more: Any) -> dict[str, Any]:
    return {
        "model": "main",
        "temperature": 0,
        "max_tokens": 50,
        "messages": [{"role": "user", "content": question}],
    } | more


def asked(upstream: FakeUpstream, question: str) -> int:
    return sum(call.json["messages"][-1]["content"] == question for call in upstream.calls)


def test_what_one_dialect_was_answered_is_given_in_every_other(server: LiveServer, upstream: FakeUpstream) -> None:
    question = QUESTION.format("Bern")
    answer = f"Warm enough: {question}"
    messages = [{"role": "user", "content": question}]
    status, body, headers = post(server, chat(question))
    assert (status, headers["x-millicent-cache"]) == (200, "miss")
    first = json.loads(body)

    status, body, headers = post(server, chat(question, seed=3))
    again = json.loads(body)
    assert headers["x-millicent-cache"] == "hit"
    assert (again["choices"], again["usage"]["total_tokens"]) == (first["choices"], first["usage"]["total_tokens"])
    assert (again["usage"]["cost"], headers["x-millicent-cost-usd"]) == (0, "0")
    assert again["id"] != first["id"]

    _, body, headers = post(server, chat(question, stream=True, stream_options={"include_usage": True}))
    assert headers["x-millicent-cache"] == "hit"
    chunks = [json.loads(line[6:]) for line in body.decode().splitlines() if line.startswith("data: {")]
    deltas = [each["delta"].get("content") or "" for chunk in chunks for each in chunk["choices"]]
    assert "".join(deltas) == answer
    assert chunks[-1]["usage"]["total_tokens"] == first["usage"]["total_tokens"]
    assert body.endswith(b"data: [DONE]\n\n")

    anthropic = {"model": "main", "temperature": 0, "max_tokens": 50, "messages": messages}
    _, body, headers = post(server, anthropic, path="/v1/messages")
    assert (headers["x-millicent-cache"], json.loads(body)["content"][0]["text"]) == ("hit", answer)
    _, body, _ = post(server, anthropic | {"stream": True}, path="/v1/messages")
    assert answer in "".join(
        json.loads(line[6:])["delta"].get("text", "")
        for line in body.decode().splitlines()
        if line.startswith("data: ") and "content_block_delta" in line
    )

    responses = {"model": "main", "temperature": 0, "max_output_tokens": 50, "input": question}
    _, body, headers = post(server, responses, path="/v1/responses")
    assert (headers["x-millicent-cache"], json.loads(body)["output"][-1]["content"][0]["text"]) == ("hit", answer)

    ollama = {"model": "main", "messages": messages, "stream": False}
    ollama["options"] = {"temperature": 0, "num_predict": 50, "repeat_penalty": 1.0}
    _, body, headers = post(server, ollama, path="/api/chat")
    assert (headers["x-millicent-cache"], json.loads(body)["message"]["content"]) == ("hit", answer)
    assert asked(upstream, question) == 1


def test_a_hits_receipt_says_what_it_saved_and_can_be_rated(server: LiveServer) -> None:
    question = QUESTION.format("Chur")
    _, _, ran = post(server, chat(question))
    _, _, given = post(server, chat(question))
    _, receipt = server.get(f"/v1/receipts/{given['x-millicent-receipt']}")
    _, filler = server.get(f"/v1/receipts/{ran['x-millicent-receipt']}")
    assert receipt["saved_usd"] == {"response_cache": filler["list_usd"]}
    assert (receipt["total_usd"], receipt["list_usd"], receipt["attempts"]) == ("0", filler["list_usd"], [])
    assert receipt["policy"]["response_cache_filled_by"] == filler["id"]
    feedback = json.dumps({"receipt": receipt["id"], "score": 1}).encode()
    assert server.request("POST", "/v1/feedback", feedback)[0] == 201
    report = json.loads(server.command("report", "--cache", "--json"))["data"][0]
    assert report["hits"] >= 1
    assert report["saved_counted"] == report["hits"]
    metrics = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    metrics.request("GET", "/metrics", headers={"Authorization": f"Bearer {server.token}"} if server.token else {})
    text = metrics.getresponse().read().decode()
    metrics.close()
    assert 'millicent_response_cache_requests_total{model="main",outcome="hit"}' in text


def test_an_error_is_not_given_twice_as_an_answer(server: LiveServer, upstream: FakeUpstream) -> None:
    question = QUESTION.format("nowhere")
    answers = [post(server, chat(question)) for _ in range(2)]
    assert [status for status, _, _ in answers] == [answers[0][0]] * 2
    assert answers[0][0] >= 400
    assert asked(upstream, question) == 2


def test_a_question_that_says_the_opposite_is_another(server: LiveServer, upstream: FakeUpstream) -> None:
    for question in ("Is 7 prime?", "Is 7 not prime?", "Is 70 prime?"):
        _, body, headers = post(server, chat(question))
        assert headers["x-millicent-cache"] == "miss"
        assert json.loads(body)["choices"][0]["message"]["content"] == f"Warm enough: {question}"


def test_identical_requests_at_once_make_one_call(server: LiveServer, upstream: FakeUpstream) -> None:
    question = QUESTION.format("Thun")
    with ThreadPoolExecutor(8) as several:
        answers = list(several.map(lambda number: post(server, chat(question, stream=number % 2 == 1)), range(8)))
    assert [status for status, _, _ in answers] == [200] * 8
    assert all(b"Thun" in body for _, body, _ in answers)
    assert asked(upstream, question) == 1
    receipts = [server.get(f"/v1/receipts/{headers['x-millicent-receipt']}")[1] for _, _, headers in answers]
    assert sorted(each["policy"]["response_cache"] for each in receipts) == ["hit"] * 7 + ["miss"]


def test_cache_control_reaches_the_cache(server: LiveServer, upstream: FakeUpstream) -> None:
    question = QUESTION.format("Sion")
    outcomes = [
        post(server, chat(question), {"Cache-Control": said})[2]["x-millicent-cache"]
        for said in ("no-store", "max-age=60", "no-cache", "max-age=60")
    ]
    assert outcomes == ["bypass", "miss", "bypass", "hit"]
    assert asked(upstream, question) == 3


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/v1/chat/completions", lambda body: body["error"]["code"]),
        ("/v1/messages", lambda body: body["error"]["details"]["error_code"]),
        ("/api/chat", lambda body: body["code"]),
    ],
)
def test_what_is_not_kept_is_a_504_in_every_dialect_where_nothing_else_will_do(
    server: LiveServer, upstream: FakeUpstream, path: str, told: Callable[[Any], str]
) -> None:
    question = QUESTION.format(f"a place without a name at {path}")
    body = json.dumps({"model": "main", "max_tokens": 5, "messages": [{"role": "user", "content": question}]})
    if path == "/api/chat":
        body = body.replace('"max_tokens": 5, ', "")
    status, answer, _ = server.request("POST", path, body.encode(), {"Cache-Control": "only-if-cached"})
    assert (status, told(answer)) == (504, "not_cached")
    assert asked(upstream, question) == 0


def test_an_idempotent_request_gets_the_same_answer_from_the_cache_and_again(
    server: LiveServer, upstream: FakeUpstream
) -> None:
    question = QUESTION.format("Biel")
    post(server, chat(question))
    answers = [post(server, chat(question), {"Idempotency-Key": "biel"}) for _ in range(2)]
    assert answers[0][1] == answers[1][1]
    assert [headers["x-millicent-cache"] for _, _, headers in answers] == ["hit", "hit"]
    assert answers[0][2]["x-millicent-receipt"] == answers[1][2]["x-millicent-receipt"]
    assert asked(upstream, question) == 1


def test_what_is_kept_survives_a_restart_until_it_is_purged(server: LiveServer, upstream: FakeUpstream) -> None:
    question = QUESTION.format("Davos")
    ann = {"X-Millicent-User": "ann"}
    post(server, chat(question), ann)
    assert server.get("/admin/cache")[1]["entries"] >= 1
    assert post(server, chat(question), ann)[2]["x-millicent-cache"] == "hit"
    server.stop()
    hits = json.loads(server.command("cache", "show", "--json"))["hits"]
    assert hits >= 1
    server.start()
    assert post(server, chat(question), ann)[2]["x-millicent-cache"] == "hit"
    assert server.get("/admin/cache")[1]["hits"] == hits + 1
    # Another model behind the same name: its answers are others.
    server.stop()
    config = server.home / "millicent.toml"
    config.write_text(config.read_text().replace("retries = 0", 'retries = 0\nmodel = "newer"'))
    server.start()
    assert post(server, chat(question), ann)[2]["x-millicent-cache"] == "miss"
    assert server.command("cache", "purge", "--user", "ann") == "2 answers forgotten."
    assert post(server, chat(question), ann)[2]["x-millicent-cache"] == "miss"
    status, purged, _ = server.request("DELETE", "/admin/cache?user=ann")
    assert (status, purged["purged"]) == (200, 1)
    assert server.request("DELETE", "/admin/cache?key=ann")[0] == 400
    server.command("ledger", "purge", "--user", "ann")
    assert server.request("DELETE", "/admin/cache")[0] == 200
    assert server.get("/admin/cache")[1]["entries"] == 0
    assert asked(upstream, question) == 3


def test_two_keys_never_get_each_others_answers_unless_a_feature_shares_them(
    server: LiveServer, upstream: FakeUpstream
) -> None:
    """Every call after this one needs a key, which the server's own calls then bring."""
    question = QUESTION.format("Visp")

    def key(**made: str) -> str:
        status, body, _ = server.request("POST", "/admin/keys", json.dumps(made).encode())
        assert status == 201
        return str(body["token"])

    server.token = key(scope="admin")
    keys, pinned = [key(), key()], key(feature="other")

    def outcome(token: str, **headers: str) -> str:
        return post(server, chat(question), headers, token=token)[2]["x-millicent-cache"]

    assert [outcome(token) for token in (*keys, *keys)] == ["miss", "miss", "hit", "hit"]
    assert [outcome(token, **{"X-Millicent-Feature": "faq"}) for token in keys] == ["miss", "hit"]
    # What is pinned to a key can't be overridden by a header: it doesn't reach the shared ones.
    assert (
        post(server, chat(question), {"X-Millicent-Feature": "faq"}, token=pinned)[2].get("x-millicent-cache") != "hit"
    )
    assert server.request("GET", "/admin/cache", headers={"Authorization": f"Bearer {keys[0]}"})[0] in {401, 403}
    assert asked(upstream, question) >= 3
