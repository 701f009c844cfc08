"""Every client's dialect to Gemini and back: tools, pictures, thoughts and their seals; and what it costs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import anthropic
import openai
import pytest

from support import fake_gemini
from support.fake_upstream import Call, FakeUpstream, fake_upstream_in_a_thread, split
from support.live import LiveServer, live_server

CONFIG = """
[placements.google]
kind = "api"
provider = "google"
base_url = "{url}"

[models.pro]
placement = "google"
model = "gemini-2.5-pro"

[models.vectors]
placement = "google"
model = "gemini-embedding-001"

[models.next]
placement = "google"
model = "gemini-3-pro-preview"
"""
PIXEL = "iVBORw0KGgo="
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
LONG = {"promptTokenCount": 250_000, "candidatesTokenCount": 100, "thoughtsTokenCount": 50}


async def gemini(call: Call) -> None:
    if call.path.endswith(":batchEmbedContents"):
        vectors = [{"values": [3.0, 4.0]} for _ in call.json["requests"]]
        told = {"embeddings": vectors, "usageMetadata": {"promptTokenCount": 1000}}
        await call.whole(json.dumps(told).encode())
        return
    last = call.json["contents"][-1]["parts"][-1]
    if "functionResponse" in last:
        data = fake_gemini.answer(fake_gemini.text(f"It is {last['functionResponse']['response']['output']}."))
    elif last.get("text") == "long":
        data = fake_gemini.answer(fake_gemini.text("Short."), usage=LONG)
    else:
        data = fake_gemini.answer(
            fake_gemini.thought("Let me think."),
            fake_gemini.text("Looking."),
            fake_gemini.called("weather", {"city": "Rome"}, thoughtSignature="c2VhbA=="),
        )
    await call.stream(split(data, 5))


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    with fake_upstream_in_a_thread(gemini) as fake:
        yield fake


@pytest.fixture(scope="module")
def server(upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("gemini"), [], CONFIG.format(url=upstream.url)) as live:
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def test_openais_chat_and_back(client: openai.OpenAI, server: LiveServer, upstream: FakeUpstream) -> None:
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}
    asked: Any = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "What is it like there?"}, image]},
    ]
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
    sent: Any = {"model": "next", "tools": [tool], "reasoning_effort": "low"}
    raw = client.chat.completions.with_raw_response.create(messages=asked, **sent)
    (choice,) = raw.parse().choices
    assert (choice.message.content, choice.finish_reason) == ("Looking.", "tool_calls")
    assert choice.message.to_dict()["reasoning_content"] == "Let me think."
    call: Any = (choice.message.tool_calls or [])[0]
    assert json.loads(call.function.arguments) == {"city": "Rome"}
    told = [*asked, choice.message.to_dict(), {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    chunks = client.chat.completions.create(messages=told, **sent, stream=True)
    assert "".join(each.choices[0].delta.content or "" for each in chunks) == "It is sunny."
    first, second = (each.json for each in upstream.calls[-2:])
    assert first["systemInstruction"] == {"parts": [{"text": "Be kind."}]}
    assert first["contents"][0]["parts"][1] == {"inlineData": {"mimeType": "image/png", "data": PIXEL}}
    assert first["generationConfig"]["thinkingConfig"] == {"thinkingLevel": "low", "includeThoughts": True}
    # OpenAI's chat has no place for the seal: what Google documents for that stands in.
    _, model, answer = second["contents"]
    assert model["parts"][-1]["thoughtSignature"] == "skip_thought_signature_validator"
    assert answer["parts"][0]["functionResponse"]["id"] == model["parts"][-1]["functionCall"]["id"] == call.id
    _, receipt = server.get(f"/v1/receipts/{raw.headers['x-millicent-receipt']}")
    assert (receipt["backend"], receipt["placement"], receipt["status"]) == ("gemini", "google", "succeeded")
    assert {leaf: (count["tokens"], count["provenance"]) for leaf, count in receipt["usage"].items()} == {
        "input_fresh": (20, "reported"), "input_cache_read": (40, "reported"), "input_image": (250, "reported"),
        "output_text": (12, "reported"), "output_reasoning": (30, "reported"),
    }  # fmt: skip
    with pytest.raises(openai.BadRequestError, match="min_p"):
        client.chat.completions.create(messages=asked, model="pro", extra_body={"min_p": 0.1})


def test_a_seal_comes_back_to_its_maker_through_anthropics_dialect(server: LiveServer, upstream: FakeUpstream) -> None:
    tool: Any = {"name": "weather", "input_schema": PARAMETERS}
    asked: Any = [{"role": "user", "content": "What is it like there?"}]
    with anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0) as client:
        sent: Any = {"model": "pro", "max_tokens": 2048, "tools": [tool], "system": "Be kind."}
        sent["thinking"] = {"type": "enabled", "budget_tokens": 1024}
        with client.messages.stream(**sent, messages=asked) as stream:
            message = stream.get_final_message()
        call: Any = message.content[-1]
        assert (call.type, call.input) == ("tool_use", {"city": "Rome"})
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
        told: Any = [*asked, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
        second = client.messages.create(**sent, messages=told)
    assert [block.type for block in second.content] == ["text"]
    body = upstream.calls[-1].json
    assert body["contents"][1]["parts"][-1]["thoughtSignature"] == "c2VhbA=="
    assert body["generationConfig"] == {
        "maxOutputTokens": 2048, "thinkingConfig": {"thinkingBudget": 1024, "includeThoughts": True},
    }  # fmt: skip


def test_a_seal_comes_back_to_its_maker_through_responses(client: openai.OpenAI, upstream: FakeUpstream) -> None:
    tool: Any = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}
    sent: Any = {"model": "pro", "tools": [tool], "reasoning": {"effort": "low", "summary": "auto"}}
    with client.responses.stream(**sent, input="What is it like there?") as stream:
        first = stream.get_final_response()
    assert [item.type for item in first.output] == ["reasoning", "message", "reasoning", "function_call"]
    call: Any = first.output[-1]
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    items: Any = [{"role": "user", "content": "What is it like there?"}]
    items += [item.to_dict() for item in client.responses.create(**sent, input=items).output]
    items[-1]["call_id"] = call.call_id
    second = client.responses.create(**sent, input=[*items, output])
    assert second.output_text == "It is sunny."
    body = upstream.calls[-1].json
    assert body["contents"][1]["parts"] == [
        {"text": "Looking."},
        {"functionCall": {"id": call.call_id, "name": "weather", "args": {"city": "Rome"}},
         "thoughtSignature": "c2VhbA=="},
    ]  # fmt: skip
    assert body["toolConfig"] == {"functionCallingConfig": {"mode": "VALIDATED"}}


@pytest.mark.parametrize(("said", "expected"), [
    # $1.25 and $10 a million up to 200,000 tokens of prompt, a tenth for what is cached; above it $2.50 and $15.
    ("short", 270 * Decimal("1.25") + 40 * Decimal("0.125") + 42 * 10),
    ("long", 250_000 * Decimal("2.5") + 150 * 15),
])  # fmt: skip
def test_a_long_prompt_costs_what_long_prompts_do(
    client: openai.OpenAI, server: LiveServer, said: str, expected: Decimal
) -> None:
    asked: Any = [{"role": "user", "content": said}]
    raw = client.chat.completions.with_raw_response.create(model="pro", messages=asked)
    _, receipt = server.get(f"/v1/receipts/{raw.headers['x-millicent-receipt']}")
    assert abs(Decimal(receipt["total_usd"]) - expected / 1_000_000) < Decimal("5e-9")


@pytest.mark.parametrize("path", ["/v1/embeddings", "/api/embed"])
def test_texts_are_embedded_and_priced_in_both_dialects(server: LiveServer, path: str) -> None:
    body = json.dumps({"model": "vectors", "input": ["a", "b"]}).encode()
    status, told, headers = server.request("POST", path, body)
    assert status == 200, told
    vectors = told["embeddings"] if path == "/api/embed" else [each["embedding"] for each in told["data"]]
    assert vectors == [[pytest.approx(0.6), pytest.approx(0.8)]] * 2
    receipt = server.settled(headers["x-millicent-receipt"])
    # As published: $0.15 for a million tokens.
    assert Decimal(receipt["total_usd"]) == Decimal("0.00015")
    assert receipt["usage"]["input_fresh"] == {"tokens": 1000, "provenance": "reported"}
