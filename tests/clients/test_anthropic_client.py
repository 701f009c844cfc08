"""Anthropic's own client against a live server with a model that knows nothing."""

from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from support.live import LiveServer, live_server
from support.tiny_models import TinyLlama, write_tiny_model

HI: Any = [{"role": "user", "content": "hello there"}]
ASKED: Any = {
    "model": "tiny",
    "messages": HI,
    "max_tokens": 24,
    "system": "Be short.",
    "extra_body": {"temperature": 0},
}
TOOL: Any = {
    "name": "look_up",
    "description": "Looks something up.",
    "input_schema": {
        "type": "object",
        "properties": {"what": {"type": "string", "maxLength": 8}, "times": {"enum": [1, 2, 3]}},
        "required": ["what", "times"],
        "additionalProperties": False,
    },
    "cache_control": {"type": "ephemeral"},
}
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("anthropic")
    tiny = write_tiny_model(folder / "tiny", TinyLlama(context_tokens=8192))
    with live_server(folder / "home", [str(tiny)], "[limits]\nrequests_per_minute = 1000\n") as live:
        status, made, _ = live.request("POST", "/admin/keys", b'{"name": "tests", "scope": "admin"}')
        assert status == 201, made
        live.token = made["token"]
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key=server.token, max_retries=0) as made:
        yield made


def test_a_message_has_its_usage_its_cost_and_its_receipt(client: anthropic.Anthropic, server: LiveServer) -> None:
    raw = client.messages.with_raw_response.create(**ASKED, metadata={"user_id": "ada"})
    message = raw.parse()
    assert (message.type, message.role, message.model) == ("message", "assistant", "tiny")
    (block,) = message.content
    assert block.type == "text"
    assert block.text
    receipt = server.get(f"/v1/receipts/{raw.headers['x-millicent-receipt']}")[1]
    assert message._request_id == receipt["id"]
    assert message.id == receipt["id"].replace("rcpt_", "msg_")
    assert (receipt["dialect"], receipt["attribution"]["user"]) == ("anthropic.messages", "ada")
    usage = message.usage
    read = usage.input_tokens + (usage.cache_read_input_tokens or 0)
    assert read == sum(receipt["usage"][leaf]["tokens"] for leaf in ("input_fresh", "input_cache_read"))
    assert usage.output_tokens == receipt["usage"]["output_text"]["tokens"]
    assert usage.to_dict()["cost"] == pytest.approx(float(receipt["total_usd"]))
    assert raw.headers["x-millicent-cost-usd"] == receipt["total_usd"]
    assert raw.headers["anthropic-ratelimit-requests-limit"] == "1000"
    assert raw.headers["anthropic-ratelimit-requests-reset"].endswith("Z")


def test_a_stream_adds_up_to_the_whole_message(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(**ASKED)
    with client.messages.stream(**ASKED) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert [block.to_dict() for block in final.content] == [block.to_dict() for block in whole.content]
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")


def test_a_stream_begins_with_what_was_read(server: LiveServer) -> None:
    body = {"model": "tiny", "messages": HI, "max_tokens": 4, "stream": True}
    response = httpx.post(f"{server.url}/v1/messages", json=body, headers={"x-api-key": str(server.token)}, timeout=60)
    assert response.headers["content-type"].startswith("text/event-stream")
    first, start = response.text.split("\n")[:2]
    assert first == "event: message_start"
    assert '"input_tokens":null' not in start
    assert '"input_tokens":0,"cache_creation_input_tokens":0,"cache_read_input_tokens":0' not in start


def test_the_stop_sequence_that_ended_it_is_named(client: anthropic.Anthropic) -> None:
    message = client.messages.create(**ASKED)
    assert message.stop_reason in {"max_tokens", "end_turn"}
    (block,) = message.content
    assert block.type == "text"
    stop = block.text[3:5]
    cut = client.messages.create(**ASKED, stop_sequences=["never said", stop])
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", stop)
    with client.messages.stream(**ASKED, stop_sequences=["never said", stop]) as stream:
        streamed = stream.get_final_message()
    assert (streamed.stop_reason, streamed.stop_sequence) == ("stop_sequence", stop)
    assert [one.to_dict() for one in streamed.content] == [one.to_dict() for one in cut.content]


def test_a_tool_that_must_be_called_is_called_and_its_answer_goes_back(client: anthropic.Anthropic) -> None:
    asked: Any = {"model": "tiny", "max_tokens": 2000, "tools": [TOOL], "messages": HI,
                  "tool_choice": {"type": "tool", "name": "look_up", "disable_parallel_tool_use": True}}  # fmt: skip
    message = client.messages.create(**asked)
    assert message.stop_reason == "tool_use"
    (call,) = message.content
    assert call.type == "tool_use"
    assert call.id.startswith("toolu_")
    assert set(call.input) == {"what", "times"}
    with client.messages.stream(**asked) as stream:
        (streamed,) = stream.get_final_message().content
    assert streamed.type == "tool_use"
    assert set(streamed.input) == {"what", "times"}
    answer = {
        "type": "tool_result",
        "tool_use_id": call.id,
        "content": [{"type": "text", "text": "42"}],
        "is_error": True,
    }
    told: Any = [*HI, {"role": "assistant", "content": message.content}, {"role": "user", "content": [answer]}]
    after = client.messages.create(model="tiny", max_tokens=8, tools=[TOOL], messages=told)
    assert after.usage.output_tokens > 0


def test_an_answer_follows_its_schema(client: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    form: Any = {"format": {"type": "json_schema", "schema": schema}}
    message = client.messages.create(model="tiny", max_tokens=200, messages=HI, output_config=form)
    (block,) = message.content
    assert block.type == "text"
    assert block.text.replace(" ", "") in {'{"n":1}', '{"n":2}'}


def test_tokens_are_counted_as_they_are_read(client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(model="tiny", messages=HI, system="Be short.", tools=[TOOL])
    message = client.messages.create(model="tiny", messages=HI, system="Be short.", tools=[TOOL], max_tokens=1)
    usage = message.usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_models_are_listed_in_pages(client: anthropic.Anthropic) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "minilm"]
    assert [model.id for model in client.models.list(limit=1)] == ["tiny", "minilm"]
    assert [model.id for model in client.models.list(before_id="minilm")] == ["tiny"]
    assert client.models.retrieve("tiny").display_name == "tiny"


@pytest.mark.parametrize(
    ("change", "error", "kind", "word"),
    [
        ({"model": "nix"}, anthropic.NotFoundError, "not_found_error", "nix"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, anthropic.BadRequestError, "invalid_request_error",
         "thinking.budget_tokens"),
        ({"messages": [*HI, {"role": "assistant", "content": "Well"}]}, anthropic.BadRequestError,
         "invalid_request_error", "continue"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {
            "type": "base64", "media_type": "image/png", "data": PIXEL}}]}]}, anthropic.BadRequestError,
         "invalid_request_error", "image"),
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, anthropic.BadRequestError,
         "invalid_request_error", "messages[0].content[0]"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, anthropic.BadRequestError,
         "invalid_request_error", "web_search_20250305"),
        ({"extra_body": {"context_management": {"edits": []}}}, anthropic.BadRequestError, "invalid_request_error",
         "context_management"),
        ({"extra_headers": {"anthropic-version": "2023-01-01"}}, anthropic.BadRequestError, "invalid_request_error",
         "2023-01-01"),
        ({"extra_headers": {"x-millicent-max-cost-usd": "0.000000001"}}, anthropic.PaymentRequiredError,
         "billing_error", "maximum"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused_by_name(
    client: anthropic.Anthropic, change: Any, error: type[anthropic.APIStatusError], kind: str, word: str
) -> None:
    with pytest.raises(error) as caught:
        client.messages.create(**(ASKED | change))
    body: Any = caught.value.body
    assert body["error"]["type"] == kind
    assert word in body["error"]["message"]
    assert caught.value.error_code == body["error"]["details"]["error_code"]


def test_betas_and_hints_change_nothing(client: anthropic.Anthropic) -> None:
    plain = client.messages.create(**ASKED)
    hinted = client.messages.create(
        **ASKED, thinking={"type": "adaptive"}, service_tier="auto", cache_control={"type": "ephemeral"},
        extra_headers={"anthropic-beta": "interleaved-thinking-2025-05-14"},
    )  # fmt: skip
    assert hinted.content == plain.content


def test_without_a_good_key_the_error_is_in_anthropics_shape(server: LiveServer) -> None:
    with anthropic.Anthropic(base_url=server.url, api_key="mk_wrong", max_retries=0) as client:
        with pytest.raises(anthropic.AuthenticationError) as caught:
            client.messages.create(**ASKED)
        body: Any = caught.value.body
        assert (body["type"], body["error"]["type"]) == ("error", "authentication_error")
        with pytest.raises(anthropic.AuthenticationError):
            client.models.list()


def test_a_repeated_request_gets_the_same_message(client: anthropic.Anthropic) -> None:
    (block,) = client.messages.create(**ASKED).content
    assert block.type == "text"
    asked: Any = ASKED | {"stop_sequences": [block.text[3:5]], "extra_headers": {"Idempotency-Key": "once"}}
    first, second = client.messages.create(**asked), client.messages.create(**asked)
    assert second.to_dict() == first.to_dict()
    assert second.stop_sequence == block.text[3:5]
