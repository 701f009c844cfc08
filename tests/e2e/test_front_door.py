"""The HTTP interface of a live server with a tiny model: every promise to a client."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.live import LiveServer, live_server
from support.tiny_models import TinyLlama, write_tiny_model
from support.waiting import until

LONG = {"model": "tiny", "prompt": "once upon", "max_tokens": 100_000, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("front_door")
    tiny = write_tiny_model(folder / "tiny", TinyLlama(context_tokens=8192))
    with live_server(
        folder / "home", [str(tiny)], "[server]\nheartbeat_s = 1\n[features.scraped]\nowner = 'us'\n"
    ) as live:
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def test_the_official_client_gets_an_answer_with_its_receipt(server: LiveServer, client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=5,
        extra_headers={"X-Millicent-Feature": "greeting"}, user="ada",
    )  # fmt: skip
    completion = raw.parse()
    assert completion.usage is not None
    assert completion.usage.completion_tokens <= 5
    assert completion.usage.prompt_tokens_details is not None
    receipt = server.settled(raw.headers["x-millicent-receipt"])
    cached_tokens = completion.usage.prompt_tokens_details.cached_tokens
    assert cached_tokens == receipt["usage"]["input_cache_read"]["tokens"]
    assert receipt["status"] == "succeeded"
    assert receipt["total_usd"] == raw.headers["x-millicent-cost-usd"]
    assert receipt["attribution"]["feature"] == "greeting"
    assert receipt["attribution"]["user"] == "ada"
    assert receipt["usage"]["output_text"] == {"tokens": completion.usage.completion_tokens, "provenance": "measured"}
    assert receipt["accelerator"]["seconds"] > 0
    assert receipt["lines"][0]["provenance"] == "assumed"


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "messages": [{"role": "user", "content": "tell me"}], "temperature": 0, "max_tokens": 40,
    }  # fmt: skip
    whole = client.chat.completions.create(**asked)
    pieces, usage, reasons = [], None, []
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            reasons.append(choice.finish_reason)
    assert "".join(pieces) == whole.choices[0].message.content
    assert reasons[-1] == whole.choices[0].finish_reason
    assert usage is not None
    assert whole.usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)


def test_metrics_say_what_the_receipt_says(server: LiveServer, client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=5,
        extra_headers={"X-Millicent-Feature": "scraped"},
    )  # fmt: skip
    receipt = server.settled(raw.headers["x-millicent-receipt"])
    scraped = httpx.get(f"{server.url}/metrics", timeout=60).text
    told = {
        sample.name: sample.value
        for family in text_string_to_metric_families(scraped)
        for sample in family.samples
        if sample.labels.get("feature") == "scraped" and sample.labels.get("leaf", "output_text") == "output_text"
    }
    assert told["millicent_requests_total"] == 1
    assert told["millicent_cost_dollars_total"] == float(receipt["total_usd"])
    assert told["millicent_accelerator_seconds_total"] == receipt["accelerator"]["seconds"]
    assert told["millicent_tokens_total"] == receipt["usage"]["output_text"]["tokens"]
    assert 'millicent_device_seconds_total{device="cpu"' in scraped


def test_a_stream_ends_only_when_its_receipt_is_settled(server: LiveServer) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 3, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        for line in response.iter_lines():
            if '"finish_reason":"length"' in line:
                _, receipt = server.get(f"/v1/receipts/{response.headers['x-millicent-receipt']}")
                assert receipt["status"] == "succeeded"
                break
        else:
            raise AssertionError("no finish reason")


def test_running_usage_and_cost_grow_on_every_chunk(server: LiveServer) -> None:
    body = LONG | {"max_tokens": 20, "stream": True, "stream_options": {"continuous_usage_stats": True}}
    tokens, costs = [], []
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                usage = json.loads(line.removeprefix("data: "))["usage"]
                tokens.append(usage["completion_tokens"])
                costs.append(usage["cost"])
    assert tokens == sorted(tokens)
    assert tokens[-1] == 20
    assert costs == sorted(costs)
    assert costs[0] > 0


def test_thirty_two_at_once_all_finish_with_a_receipt_each_and_the_accounts_balance(
    server: LiveServer, client: openai.OpenAI
) -> None:
    def ask(i: int) -> str:
        raw = client.completions.with_raw_response.create(
            model="tiny", prompt=f"number {i}", max_tokens=10 + i, extra_body={"ignore_eos": True}
        )
        usage = raw.parse().usage
        assert usage is not None
        assert usage.completion_tokens == 10 + i
        return raw.headers["x-millicent-receipt"]

    with ThreadPoolExecutor(32) as pool:
        ids = list(pool.map(ask, range(32)))
    assert len(set(ids)) == 32
    assert all(server.settled(one)["status"] == "succeeded" for one in ids)
    server.check_accounts()


def test_options_are_honoured(client: openai.OpenAI) -> None:
    def ask(**options: Any) -> Any:
        return client.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=12, **options)

    assert ask(seed=1, temperature=1).choices[0].text == ask(seed=1, temperature=1).choices[0].text
    greedy = ask(temperature=0, extra_body={"ignore_eos": True}).choices[0]
    assert ask(temperature=1, extra_body={"ignore_eos": True, "top_k": 1}).choices[0].text == greedy.text
    stop = greedy.text[4:6]
    stopped = ask(temperature=0, stop=stop, extra_body={"ignore_eos": True}).choices[0]
    assert stopped.text == greedy.text[: greedy.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert greedy.finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_stops_the_work_and_leaves_a_receipt(server: LiveServer, stream: bool) -> None:
    marker = f"gone-{stream}"
    body = json.dumps(LONG | {"stream": stream}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nX-Millicent-Run: {marker}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + body)
        found = until(lambda: server.receipts(f"&run={marker}"))
    receipt = server.settled(found[0]["id"])
    assert receipt["status"] == "cancelled"
    assert receipt["usage"]["output_text"]["tokens"] < 8000
    server.check_accounts()


def test_a_client_that_goes_while_its_prompt_is_read_stops_that_too(server: LiveServer) -> None:
    body = json.dumps(LONG | {"prompt": [7] * 8000}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nX-Millicent-Run: early\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with server.engine_paused():
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head.encode() + body)
            found = until(lambda: server.receipts("&run=early"))
        time.sleep(0.5)  # so that it is told at once, when it goes on, that nobody waits
    assert server.settled(found[0]["id"])["status"] == "cancelled"


def test_one_prompt_over_the_context_is_refused_alone(server: LiveServer, client: openai.OpenAI) -> None:
    with ThreadPoolExecutor(4) as pool:
        fine = [pool.submit(client.completions.create, model="tiny", prompt="fine", max_tokens=30) for _ in range(3)]
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="tiny", prompt=[7] * 9000, max_tokens=5)
        assert caught.value.code == "context_length_exceeded"
        assert all(one.result().choices for one in fine)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"not json", 400), (b"", 400), (b"[]", 400), (b'{"model": 5}', 400), (b"[" * 200_000, 400),
        (b'{"model": "tiny", "prompt": "\xff\xfe"}', 400),
        (b'{"model": "tiny", "prompt": "x", "colour": 1}', 400),
        (b'{"model": "absent", "prompt": "x"}', 404),
        (b'{"model": "tiny", "prompt": [99999999]}', 400),
        (b'{"model": "tiny", "prompt": ""}', 400),
        (b'"' + b"x" * (50 << 20) + b'"', 413),
    ],
    ids=["not json", "empty", "array", "wrong type", "deep", "not utf-8", "unknown field", "no model", "no such token",
         "empty prompt", "50 MB"],
)  # fmt: skip
def test_garbage_gets_a_4xx_in_openais_shape(server: LiveServer, body: bytes, status: int) -> None:
    got, answer, _ = server.request("POST", "/v1/completions", body)
    assert got == status, answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405), ("GET", "/v1/receipts/rcpt_none", 404),
     ("GET", "/v1/receipts?colour=red", 400), ("GET", "/v1/receipts?limit=0", 400),
     ("GET", "/v1/accounts?from=soon", 400),
     ("GET", "/v1/receipts?after=%00", 400), ("GET", "/v1/models/none", 404)],
)  # fmt: skip
def test_a_wrong_address_or_parameter_is_told_in_openais_shape(
    server: LiveServer, method: str, path: str, status: int
) -> None:
    got, answer, _ = server.request(method, path)
    assert got == status, answer
    assert answer["error"]["message"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"Host": "evil.example"}, 403), ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403),
     ({"Host": "localhost"}, 200)],
)  # fmt: skip
def test_other_hosts_and_origins_are_refused(server: LiveServer, headers: dict[str, str], status: int) -> None:
    assert server.request("GET", "/v1/models", headers=headers)[0] == status


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "minilm"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_receipts_are_paged_and_filtered(server: LiveServer, client: openai.OpenAI) -> None:
    for _ in range(5):
        client.completions.create(model="tiny", prompt="x", max_tokens=1, extra_headers={"X-Millicent-Team": "pager"})
    _, first = server.get("/v1/receipts?team=pager&limit=2")
    assert len(first["data"]) == 2
    assert first["has_more"]
    _, second = server.get(f"/v1/receipts?team=pager&limit=3&after={first['next']}")
    ids = [one["id"] for one in first["data"] + second["data"]]
    assert len(set(ids)) == 5
    assert ids == sorted(ids, reverse=True)
    assert not second["has_more"]


def test_a_reader_that_pauses_gets_everything_in_the_end(server: LiveServer) -> None:
    body = LONG | {"max_tokens": 2000, "stream": True, "stream_options": {"include_usage": True}}
    tokens = None
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as response:
        lines = response.iter_lines()
        next(lines)
        server.settled(response.headers["x-millicent-receipt"])
        for line in lines:
            if line.startswith("data: {"):
                usage = json.loads(line.removeprefix("data: "))["usage"]
                tokens = usage["completion_tokens"] if usage else tokens
    assert tokens == 2000


def test_a_quote_is_given_and_a_request_keeps_within_its_maximum(server: LiveServer) -> None:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "tell me"}], "max_tokens": 2_000}
    asked["ignore_eos"] = True
    status, quotes, _ = server.request("POST", "/v1/quote", json.dumps(asked).encode())
    assert status == 200
    (quote,) = quotes["data"]
    assert quote["output_tokens"]["high"] == 2_000
    assert float(quote["cost_usd"]["low"]) <= float(quote["cost_usd"]["expected"]) <= float(quote["cost_usd"]["high"])

    def ask(maximum: str) -> tuple[int, Any, Any]:
        headers = {"X-Millicent-Max-Cost-USD": maximum}
        return server.request("POST", "/v1/chat/completions", json.dumps(asked).encode(), headers)

    status, refused, _ = ask("0.000000001")
    assert (status, refused["error"]["code"]) == (402, "max_cost_exceeded")
    assert refused["error"]["quote"]["model"] == "tiny"
    status, whole, headers = ask("1")
    receipt = server.settled(headers["x-millicent-receipt"])
    assert (status, whole["usage"]["completion_tokens"]) == (200, 2_000)
    assert receipt["hold_usd"] is not None
    fifth = f"{float(receipt['total_usd']) / 5:.9f}"
    status, part, headers = ask(fifth)
    stopped = server.settled(headers["x-millicent-receipt"])
    assert (status, part["choices"][0]["finish_reason"], stopped["status"]) == (200, "length", "succeeded")
    assert 0 < part["usage"]["completion_tokens"] < 2_000
    # Steps of a tiny model are shorter than the way of the stop to the engine: what they took beyond isn't charged.
    assert float(stopped["total_usd"]) <= float(fifth)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 2}),
    ],
)
def test_our_headers_mean_the_same_in_every_dialect(server: LiveServer, path: str, body: dict[str, Any]) -> None:
    asked = json.dumps({"model": "tiny", **body}).encode()
    for name, value in (("X-Millicent-Max-Cost-USD", "cheap"), ("X-Millicent-Lines", "{}")):
        status, answer, _ = server.request("POST", path, asked, {name: value})
        assert (status, answer["error"]["param"]) == (400, name.lower())
    status, _, _ = server.request("POST", path, asked, {"X-Millicent-Max-Cost-USD": "0.000000001"})
    assert status == 402
    line = json.dumps({"role": "retrieval", "meter": "other", "amount_usd": "0.0015"})
    _, _, headers = server.request("POST", path, asked, {"X-Millicent-Lines": line})
    receipt = server.settled(headers["x-millicent-receipt"])
    assert [(each["role"], each["attempt"]) for each in receipt["lines"]] == [("retrieval", 0), ("inference", 1)]


def test_a_stream_that_waits_for_the_same_one_beats_like_it_and_gives_the_same_text(server: LiveServer) -> None:
    body = LONG | {"max_tokens": 40, "stream": True}
    headers = {"Idempotency-Key": "twice"}
    beats = threading.Semaphore(0)

    def read() -> tuple[str, list[str]]:
        lines: list[str] = []
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=headers, timeout=60) as response:
            assert response.status_code == 200
            for line in response.iter_lines():
                if line.startswith(":") and not lines:
                    beats.release()
                lines.append(line)
            return response.headers["x-millicent-receipt"], lines

    with ThreadPoolExecutor(2) as pool:
        with server.engine_paused():
            readings = [pool.submit(read), pool.submit(read)]
            assert all(beats.acquire(timeout=60) for _ in readings)
        (receipt, lines), (again, repeated) = (reading.result() for reading in readings)
    assert (again, _spoken(repeated)) == (receipt, _spoken(lines))
    assert _spoken(lines)


def _spoken(lines: list[str]) -> str:
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return "".join(choice["text"] for event in events for choice in event["choices"])
