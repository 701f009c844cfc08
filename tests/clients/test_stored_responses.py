"""OpenAI's own client goes on from answers that are stored here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from support.fake_upstream import USAGE, Call, FakeUpstream, chunk, events, fake_upstream_in_a_thread
from support.live import LiveServer, live_server

CONFIG = """
[placements.elsewhere]
kind = "api"
base_url = "{url}"

[models.far]
placement = "elsewhere"
"""


async def answer(call: Call) -> None:
    """Says how often it was spoken to; thinks where it is asked to, and calls what it is given."""
    asked = call.json
    said = [message for message in asked["messages"] if message["role"] == "user"]
    told: list[Any] = [chunk({"content": f"That was {len(said)}."}), chunk({}, "stop")]
    if asked.get("tools") and asked["messages"][-1]["role"] == "user":
        function = {"name": "look_up", "arguments": "{}"}
        called = {"tool_calls": [{"index": 0, "id": "c", "type": "function", "function": function}]}
        told = [chunk({"reasoning_content": "Hm."}), chunk(called), chunk({}, "tool_calls")]
    await call.stream([events(*told, chunk(usage=USAGE))])


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    with fake_upstream_in_a_thread(answer) as made:
        yield made


@pytest.fixture(scope="module")
def server(upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    home = tmp_path_factory.mktemp("stored") / "home"
    with live_server(home, [], CONFIG.format(url=upstream.url)) as live:
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def heard(upstream: FakeUpstream) -> list[tuple[str, Any]]:
    """What the model was sent last."""
    return [(message["role"], message.get("content")) for message in upstream.calls[-1].json["messages"]]


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_goes_on_from_a_stored_answer(
    client: openai.OpenAI, upstream: FakeUpstream, stream: bool
) -> None:
    def ask(**fields: Any) -> Any:
        asked = {"model": "far", **fields}
        if not stream:
            return client.responses.create(**asked)
        *_, last = client.responses.create(**asked, stream=True)
        return last.response

    first = ask(input="One", instructions="Be brief.")
    second = ask(input=[{"role": "user", "content": "Two"}], previous_response_id=first.id)
    third = ask(input="Three", previous_response_id=second.id, instructions="Be long.")
    assert (first.store, third.previous_response_id) == (True, second.id)
    assert third.output_text == "That was 3."
    assert heard(upstream) == [
        ("system", "Be long."),  # instructions aren't handed down
        ("user", "One"), ("assistant", "That was 1."),
        ("user", "Two"), ("assistant", "That was 2."),
        ("user", "Three"),
    ]  # fmt: skip
    again = client.responses.retrieve(third.id)
    assert again.to_dict() == third.to_dict()
    items = client.responses.input_items.list(third.id, order="asc")
    assert [item.to_dict()["content"][0]["text"] for item in items] == [  # type: ignore[index]
        "One", "That was 1.", "Two", "That was 2.", "Three",
    ]  # fmt: skip
    paged = [item.id for item in client.responses.input_items.list(third.id, limit=2)]
    assert paged == [item.id for item in items][::-1]


def test_a_call_is_answered_without_being_sent_back(client: openai.OpenAI, upstream: FakeUpstream) -> None:
    tools: Any = [{"type": "function", "name": "look_up", "parameters": {"type": "object", "properties": {}}}]
    first = client.responses.create(model="far", input="Look", tools=tools)
    call = first.output[-1]
    assert call.type == "function_call"
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    second = client.responses.create(model="far", input=[output], previous_response_id=first.id, tools=tools)
    assert second.output_text == "That was 1."
    assert [role for role, _ in heard(upstream)] == ["user", "assistant", "tool"]
    assert upstream.calls[-1].json["messages"][1]["tool_calls"][0]["function"]["name"] == "look_up"
    # As clients do that keep no items themselves: each is named.
    named: Any = [{"role": "user", "content": "Look"}, *[{"type": "item_reference", "id": i.id} for i in first.output]]
    third = client.responses.create(model="far", input=[*named, output], tools=tools)
    assert third.output_text == "That was 1."
    assert [role for role, _ in heard(upstream)] == ["user", "assistant", "tool"]
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="far", input=[{"type": "item_reference", "id": "msg_nobodys_0"}])
    assert caught.value.param == "input[0].id"


def test_what_is_not_to_be_stored_or_is_deleted_is_not_there(client: openai.OpenAI) -> None:
    unstored = client.responses.create(model="far", input="One", store=False)
    assert unstored.to_dict()["store"] is False
    deleted = client.responses.create(model="far", input="One")
    client.responses.delete(deleted.id)
    for gone in (unstored.id, deleted.id):
        with pytest.raises(openai.NotFoundError, match="no response"):
            client.responses.retrieve(gone)
        with pytest.raises(openai.NotFoundError, match="no response"):
            client.responses.delete(gone)
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(model="far", input="Two", previous_response_id=gone)
        assert (caught.value.param, caught.value.code) == ("previous_response_id", "previous_response_not_found")


def test_a_repeated_request_is_stored_once_and_goes_on_from_the_same(client: openai.OpenAI) -> None:
    first = client.responses.create(model="far", input="One")
    asked: Any = {
        "model": "far", "input": "Two", "previous_response_id": first.id, "extra_headers": {"Idempotency-Key": "twice"},
    }  # fmt: skip
    told, again = client.responses.create(**asked), client.responses.create(**asked)
    assert again.to_dict() == told.to_dict()
    assert client.responses.retrieve(told.id).output_text == "That was 2."


def test_stored_answers_outlive_a_restart_belong_to_their_key_and_can_be_purged(
    upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.mktemp("stored_keys") / "home"
    with live_server(home, [], CONFIG.format(url=upstream.url)) as live:
        boss = live.token = live.command("keys", "create", "boss", "--scope", "admin")
        keys = [live.command("keys", "create", name) for name in ("ada", "bob")]
        ada, bob = (openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0) for key in keys)
        first = ada.responses.create(model="far", input="One", safety_identifier="person-1")
        live.kill()
        live.start()
        assert (
            ada.responses.create(model="far", input="Two", previous_response_id=first.id).output_text == "That was 2."
        )
        with pytest.raises(openai.BadRequestError):
            bob.responses.create(model="far", input="Two", previous_response_id=first.id)
        with pytest.raises(openai.NotFoundError):
            bob.responses.retrieve(first.id)
        live.token = boss
        status, body, _ = live.request("DELETE", "/admin/answers?user=person-1")
        assert (status, body["purged"]) == (200, 1)
        with pytest.raises(openai.NotFoundError):
            ada.responses.retrieve(first.id)


def test_where_nothing_is_to_be_stored_nothing_is(
    upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.mktemp("unstored") / "home"
    config = "[server]\nstored_responses_hours = 0\n" + CONFIG.format(url=upstream.url)
    with live_server(home, [], config) as live:
        client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0)
        first = client.responses.create(model="far", input="One", store=True)
        assert first.to_dict()["store"] is False
        with pytest.raises(openai.BadRequestError, match="send the whole conversation"):
            client.responses.create(model="far", input="Two", previous_response_id=first.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(first.id)
