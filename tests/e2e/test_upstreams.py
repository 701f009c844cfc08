"""A gateway without models of its own: the official client, through it, to servers elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import openai
import pytest

from support.fake_upstream import Call, FakeUpstream, chunk, events, fake_upstream_in_a_thread, said, split
from support.live import LiveServer, live_server
from support.tiny_models import TinyLlama, write_tiny_model

KEY = "sk-not-to-be-shown"
CONFIG = """
[placements.elsewhere]
kind = "api"
provider = "openai"
base_url = "{url}"
api_key_env = "TEST_UPSTREAM_KEY"

[models.small]
placement = "elsewhere"
model = "gpt-4o-mini"
"""


ASKED: dict[str, Any] = {"model": "small", "messages": [{"role": "user", "content": "What is the capital of Japan?"}]}


async def answer(call: Call) -> None:
    if call.json["messages"][0]["content"] == "fail":
        await call.whole(b'{"error": {"message": "no, never"}}', status="400 Bad Request")
        return
    if call.json["messages"][0]["content"] == "wait":
        await call.stream([events(chunk({"content": "Well"}), done=False)], end=False)
        await call.until_gone()
        return
    await call.stream(split(said("The capital", " of Japan", " is Tōkyō."), 7))


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    with fake_upstream_in_a_thread(answer) as fake:
        yield fake


@pytest.fixture(scope="module")
def server(upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    home = tmp_path_factory.mktemp("upstreams")
    with live_server(home, [], CONFIG.format(url=upstream.url), {"TEST_UPSTREAM_KEY": KEY}) as live:
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def test_the_official_client_gets_an_answer_from_elsewhere_with_a_priced_receipt(
    server: LiveServer, client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    raw = client.chat.completions.with_raw_response.create(**ASKED, max_tokens=50)
    completion = raw.parse()
    assert completion.choices[0].message.content == "The capital of Japan is Tōkyō."
    assert completion.model == "small"
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (19, 10)
    call = upstream.calls[-1]
    assert call.path == "/v1/chat/completions"
    assert call.headers["authorization"] == f"Bearer {KEY}"
    assert call.json == {
        "model": "gpt-4o-mini", "stream": True, "stream_options": {"include_usage": True},
        "max_completion_tokens": 50, "messages": ASKED["messages"],
    }  # fmt: skip
    _, receipt = server.get(f"/v1/receipts/{raw.headers['x-millicent-receipt']}")
    assert (receipt["model"], receipt["served_model"]) == ("small", "gpt-4o-mini-2024-07-18")
    assert (receipt["placement"], receipt["backend"], receipt["status"]) == ("elsewhere", "openai", "succeeded")
    assert receipt["usage"] == {
        "input_fresh": {"tokens": 11, "provenance": "reported"},
        "input_cache_read": {"tokens": 8, "provenance": "reported"},
        "output_text": {"tokens": 6, "provenance": "reported"},
        "output_reasoning": {"tokens": 4, "provenance": "reported"},
    }
    # $0.15, $0.075 and $0.60 per million: 11 fresh, 8 cached, 10 out.
    expected = (11 * Decimal("0.15") + 8 * Decimal("0.075") + 10 * Decimal("0.60")) / 1_000_000
    assert abs(Decimal(receipt["total_usd"]) - expected) < Decimal("3e-9")
    assert receipt["timing_ms"]["ttft"] is not None
    assert KEY not in str(receipt)


def test_a_stream_from_elsewhere_is_a_stream_here(client: openai.OpenAI) -> None:
    pieces, usage = [], None
    for each in client.chat.completions.create(**ASKED, stream=True, stream_options={"include_usage": True}):
        usage = each.usage or usage
        pieces += [choice.delta.content or "" for choice in each.choices]
    assert "".join(pieces) == "The capital of Japan is Tōkyō."
    assert usage is not None
    assert usage.total_tokens == 29


def test_the_server_says_where_its_models_run(server: LiveServer, upstream: FakeUpstream) -> None:
    assert [model["id"] for model in server.get("/v1/models")[1]["data"]] == ["small"]
    _, ready = server.get("/ready")
    assert ready["engines"] == []
    assert ready["upstreams"] == [
        {"placement": "elsewhere", "server": "openai", "base_url": upstream.url, "models": ["small"]}
    ]
    assert '"model": "small"' in server.output


def test_an_error_there_is_the_client_s_own_kind_of_error_with_a_receipt(
    server: LiveServer, client: openai.OpenAI
) -> None:
    with pytest.raises(openai.BadRequestError, match="no, never") as caught:
        client.chat.completions.create(model="small", messages=[{"role": "user", "content": "fail"}])
    _, receipt = server.get(f"/v1/receipts/{caught.value.response.headers['x-millicent-receipt']}")
    assert (receipt["status"], receipt["error"]) == ("failed", caught.value.body["message"])  # type: ignore[index]


def test_a_client_that_leaves_stops_the_upstream_and_what_came_is_on_the_receipt(
    server: LiveServer, client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    stream = client.chat.completions.create(model="small", messages=[{"role": "user", "content": "wait"}], stream=True)
    receipt_id = stream.response.headers["x-millicent-receipt"]
    for each in stream:
        if each.choices[0].delta.content:
            break
    stream.close()
    receipt = server.settled(receipt_id)
    assert upstream.calls[-1].gone.is_set()
    assert receipt["status"] == "cancelled"
    assert receipt["usage"]["output_text"] == {"tokens": 1, "provenance": "estimated"}
    assert Decimal(receipt["total_usd"]) > 0


def test_what_openai_does_not_take_is_refused_before_anything_is_sent(
    client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    calls = len(upstream.calls)
    with pytest.raises(openai.BadRequestError, match="top_k"):
        client.chat.completions.create(**ASKED, extra_body={"top_k": 5})
    assert len(upstream.calls) == calls


def test_a_millicent_behind_a_millicent_tells_its_own_receipt_and_cost(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("chain")
    tiny = write_tiny_model(folder / "tiny", TinyLlama())
    with live_server(folder / "inner", [str(tiny)]) as inner:
        config = (
            f'[placements.inner]\nkind = "api"\nserver = "millicent"\nbase_url = "{inner.url}/v1"\n'
            '[models.outside]\nplacement = "inner"\nmodel = "tiny"\n'
            "[prices.tiny]\ninput = 1\ninput_cached = 1\noutput = 2\n"
        )
        with live_server(folder / "outer", [], config) as outer:
            client = openai.OpenAI(base_url=f"{outer.url}/v1", api_key="unused", max_retries=0)
            raw = client.chat.completions.with_raw_response.create(
                **(ASKED | {"model": "outside"}), max_tokens=9, extra_body={"ignore_eos": True, "top_k": 5}
            )
            usage = raw.parse().usage
            assert usage is not None
            assert usage.completion_tokens == 9
            _, ours = outer.get(f"/v1/receipts/{raw.headers['x-millicent-receipt']}")
            [reported] = [line for line in ours["lines"] if line["book"] == "reported"]
            _, theirs = inner.get(f"/v1/receipts/{reported['note']}")
            assert theirs["total_usd"] == reported["amount_usd"]
            assert {leaf: count["tokens"] for leaf, count in ours["usage"].items()} == {
                leaf: count["tokens"] for leaf, count in theirs["usage"].items()
            }
            details = usage.cost_details
            assert details["reported_cost"] == float(reported["amount_usd"])
            residual = Decimal(reported["amount_usd"]) - Decimal(ours["total_usd"])
            assert Decimal(str(details["residual"])) == residual
            client.close()


def test_the_key_is_in_no_log(server: LiveServer) -> None:
    assert KEY not in server.output
    assert all(KEY not in log.read_text() for log in (server.home / "logs").iterdir())
