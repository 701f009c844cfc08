"""One gateway, both official clients, both makers' servers: what one says reaches the other, and comes back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import anthropic
import openai
import pytest

from support import fake_anthropic
from support.fake_upstream import Call, FakeUpstream, chunk, events, fake_upstream_in_a_thread, split
from support.live import LiveServer, live_server

CONFIG = """
[placements.claude]
kind = "api"
provider = "anthropic"
base_url = "{claude}"

[placements.gpt]
kind = "api"
provider = "openai"
base_url = "{gpt}"

[models.sonnet]
placement = "claude"
model = "claude-sonnet-4-20250514"

[models.kept]
placement = "claude"
model = "claude-sonnet-4-5"

[models.gpt]
placement = "gpt"
model = "gpt-4o-mini"
"""
PIXEL = "iVBORw0KGgo="
THOUGHT = fake_anthropic.thought(0, "Let me think.", "c2VhbA==")
SAID = [*THOUGHT, *fake_anthropic.text(1, "Looking."), *fake_anthropic.called(2, "weather", '{"city": ', '"Rome"}')]


# Its prompts are cached as Anthropic's are; no time passes.
KEPT = fake_anthropic.PromptCache()


async def claude(call: Call) -> None:
    if call.path.endswith("/count_tokens"):
        await call.whole(b'{"input_tokens": 17}')
        return
    if call.json["model"] == "claude-sonnet-4-5":
        said = fake_anthropic.answer(fake_anthropic.text(0, "Yes."), usage=KEPT.usage(call.json, 0))
        await call.stream([said])
        return
    await call.stream(split(fake_anthropic.answer(SAID, "tool_use"), 5))


async def gpt(call: Call) -> None:
    function = {"name": "weather", "arguments": '{"city": "Rome"}'}
    bodies = [
        chunk({"role": "assistant", "content": "Looking."}),
        chunk({"tool_calls": [{"index": 0, "id": "call_x", "type": "function", "function": function}]}),
        chunk({}, "tool_calls"),
        chunk(usage={"prompt_tokens": 19, "completion_tokens": 10, "prompt_tokens_details": {"cached_tokens": 8}}),
    ]
    await call.stream(split(events(*bodies), 5))


@pytest.fixture(scope="module")
def upstreams() -> Iterator[tuple[FakeUpstream, FakeUpstream]]:
    with fake_upstream_in_a_thread(claude) as one, fake_upstream_in_a_thread(gpt) as other:
        yield one, other


@pytest.fixture(scope="module")
def server(
    upstreams: tuple[FakeUpstream, FakeUpstream], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    config = CONFIG.format(claude=upstreams[0].url, gpt=upstreams[1].url)
    with live_server(tmp_path_factory.mktemp("crossing"), [], config) as live:
        yield live


def test_openais_client_talks_to_anthropic(server: LiveServer, upstreams: tuple[FakeUpstream, FakeUpstream]) -> None:
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    asked: Any = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "What is it like there?"}, image]},
    ]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        raw = client.chat.completions.with_raw_response.create(
            model="sonnet", messages=asked, tools=[tool], reasoning_effort="low", max_completion_tokens=99
        )
        completion = raw.parse()
        choice = completion.choices[0]
        assert (choice.message.content, choice.finish_reason) == ("Looking.", "tool_calls")
        assert choice.message.tool_calls is not None
        call: Any = choice.message.tool_calls[0]
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Rome"})
        assert choice.message.to_dict()["reasoning_content"] == "Let me think."
        assert completion.usage is not None
        assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (43, 30)
        told = [*asked, choice.message.to_dict(), {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
        client.chat.completions.create(model="sonnet", messages=told, tools=[tool])
        with pytest.raises(openai.BadRequestError, match="`seed`"):
            client.chat.completions.create(model="sonnet", messages=asked, seed=1)
    first, second = (call.json for call in upstreams[0].calls[-2:])
    assert first["system"] == [{"type": "text", "text": "Be kind."}]
    assert first["messages"][0]["content"][1]["source"] == {
        "type": "base64", "media_type": "image/png", "data": PIXEL,
    }  # fmt: skip
    assert (first["thinking"], first["output_config"]) == ({"type": "adaptive"}, {"effort": "low"})
    used, answered = second["messages"][1]["content"][-1], second["messages"][2]["content"][0]
    assert (used["type"], answered["type"], used["id"]) == ("tool_use", "tool_result", answered["tool_use_id"])
    receipt = server.get(f"/v1/receipts/{raw.headers['x-millicent-receipt']}")[1]
    assert receipt["served_model"] == "claude-sonnet-4-20250514"
    usage = {leaf: (count["tokens"], count["provenance"]) for leaf, count in receipt["usage"].items()}
    assert usage == {
        "input_fresh": (12, "reported"), "input_cache_read": (7, "reported"), "input_cache_write_5m": (11, "reported"),
        "input_cache_write_1h": (13, "reported"), "output_text": (21, "reported"), "output_reasoning": (9, "reported"),
    }  # fmt: skip
    assert receipt["total_usd"] is not None


def test_anthropics_client_talks_to_openai(server: LiveServer, upstreams: tuple[FakeUpstream, FakeUpstream]) -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}}
    tool: Any = {"name": "weather", "input_schema": {"type": "object"}, "cache_control": {"type": "ephemeral"}}
    asked: Any = [{"role": "user", "content": [{"type": "text", "text": "What is it like there?"}, image]}]
    with anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0) as client:
        sent: Any = {"model": "gpt", "max_tokens": 99, "system": "Be kind.", "tools": [tool], "messages": asked}
        message = client.messages.create(**sent, extra_headers={"anthropic-beta": "x-2025-01-01"})
        with client.messages.stream(**sent) as stream:
            streamed = stream.get_final_message()
        assert message.stop_reason == streamed.stop_reason == "tool_use"
        said, call = message.content
        assert said.type == "text"
        assert call.type == "tool_use"
        assert (said.text, call.name, call.input) == ("Looking.", "weather", {"city": "Rome"})
        usage = message.usage
        assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (11, 8, 10)
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "none", "is_error": True}
        told: Any = [*asked, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
        client.messages.create(**(sent | {"messages": told}))
        with pytest.raises(anthropic.BadRequestError, match="assistant's"):
            client.messages.create(**(sent | {"messages": [*asked, {"role": "assistant", "content": "So"}]}))
    first, last = upstreams[1].calls[-3].json, upstreams[1].calls[-1].json
    assert "anthropic-beta" not in first
    assert [one["role"] for one in first["messages"]] == ["system", "user"]
    assert first["messages"][1]["content"][1]["image_url"]["url"] == f"data:image/png;base64,{PIXEL}"
    assert last["messages"][-1] == {"role": "tool", "tool_call_id": call.id, "content": "The call failed:\nnone"}


@pytest.mark.parametrize("model", ["gpt", "sonnet"])
def test_ollamas_client_talks_to_both_and_what_it_leaves_out_is_left_to_them(
    server: LiveServer, upstreams: tuple[FakeUpstream, FakeUpstream], model: str
) -> None:
    asked = {"model": model, "messages": [{"role": "user", "content": "Where?"}], "stream": False}
    status, told, _ = server.request("POST", "/api/chat", json.dumps(asked).encode())
    assert status == 200, told
    assert told["message"]["content"]
    assert told["done_reason"]
    sent = upstreams[0 if model == "sonnet" else 1].calls[-1].json
    assert not {"temperature", "top_p", "top_k"} & set(sent)
    limited = asked | {"options": {"temperature": 0.5, "top_k": 3}}
    status, told, _ = server.request("POST", "/api/chat", json.dumps(limited).encode())
    if model == "gpt":
        assert (status, told["param"]) == (400, "options.top_k")
        assert "`options.top_k`" in told["error"]
    else:
        assert status == 200
        sent = upstreams[0].calls[-1].json
        assert (sent["temperature"], sent["top_k"]) == (0.5, 3)


def test_a_sealed_thought_comes_back_to_its_maker(
    server: LiveServer, upstreams: tuple[FakeUpstream, FakeUpstream]
) -> None:
    asked: Any = [{"role": "user", "content": "Where?"}]
    with anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0) as client:
        sent: Any = {"model": "sonnet", "max_tokens": 2048, "thinking": {"type": "enabled", "budget_tokens": 1024}}
        message = client.messages.create(**sent, messages=asked)
        with client.messages.stream(**sent, messages=asked) as stream:
            streamed = stream.get_final_message()
        kinds = ["thinking", "text", "tool_use"]
        assert [one.type for one in message.content] == [one.type for one in streamed.content] == kinds
        told: Any = [*asked, {"role": "assistant", "content": message.content}, *asked]
        client.messages.create(**sent, messages=told)
    back = upstreams[0].calls[-1].json
    assert back["thinking"] == {"type": "enabled", "budget_tokens": 1024}
    assert back["messages"][1]["content"][0] == {
        "type": "thinking", "thinking": "Let me think.", "signature": "c2VhbA==",
    }  # fmt: skip


def test_the_maker_of_a_model_counts_its_tokens(server: LiveServer) -> None:
    asked: Any = {"messages": [{"role": "user", "content": "Where?"}]}
    with anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0) as client:
        assert client.messages.count_tokens(model="sonnet", **asked).input_tokens == 17
        with pytest.raises(anthropic.BadRequestError, match="Nobody here can count"):
            client.messages.count_tokens(model="gpt", **asked)


def test_a_long_conversation_is_marked_for_the_makers_cache_and_its_receipts_show_what_that_saved(
    server: LiveServer, upstreams: tuple[FakeUpstream, FakeUpstream]
) -> None:
    talk: list[dict[str, Any]] = [{"role": "system", "content": "x" * 20_000}]
    receipts = []
    for turn in range(20):
        talk.append({"role": "user", "content": f"And {turn}?"})
        body = json.dumps({"model": "kept", "messages": talk}).encode()
        status, answer, headers = server.request("POST", "/v1/chat/completions", body)
        assert status == 200, answer
        talk.append({"role": "assistant", "content": "Yes."})
        receipts.append(server.get(f"/v1/receipts/{headers['x-millicent-receipt']}")[1])
    saved = sum(Decimal(each["saved_usd"].get("prefix_cache", "0")) for each in receipts)
    cost = sum(Decimal(each["total_usd"]) for each in receipts)
    listed = sum(Decimal(each["list_usd"]) for each in receipts)
    # 20 x 5,000 tokens at $3 a million; once written at $3.75, and 18 times read at $0.30.
    assert Decimal("0.30") < listed < Decimal("0.35")
    assert saved == listed - cost
    assert Decimal("0.23") < saved < Decimal("0.25")
    marked = [json.dumps(call.json).count("cache_control") for call in upstreams[0].calls[-20:]]
    assert marked[0] == 0
    assert all(1 <= marks <= 4 for marks in marked[1:])


def test_long_prompts_that_begin_alike_have_one_cache_key_at_openai(
    server: LiveServer, upstreams: tuple[FakeUpstream, FakeUpstream]
) -> None:
    def sent(*texts: str, **more: Any) -> Any:
        messages = [{"role": "system" if i == 0 else "user", "content": text} for i, text in enumerate(texts)]
        body = json.dumps({"model": "gpt", "messages": messages, **more}).encode()
        assert server.request("POST", "/v1/chat/completions", body)[0] == 200
        return upstreams[1].calls[-1].json.get("prompt_cache_key")

    alike = {sent("x" * 5000, "one"), sent("x" * 5000, "two")}
    assert len(alike) == 1
    assert sent("y" * 5000, "one") not in alike
    assert sent("short", "one") is None
    assert sent("x" * 5000, "one", prompt_cache_key="mine") == "mine"
