"""Ollama's own client against a live server with models that know nothing."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import ollama
import pytest

from support.live import LiveServer, live_server
from support.tiny_encoders import write_tiny_encoder
from support.tiny_models import TinyLlama, write_tiny_model
from support.waiting import until

HI: Any = [{"role": "user", "content": "hello there"}]
SHORT: Any = {"temperature": 0, "num_predict": 16}
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks something up.",
        "parameters": {"type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]},
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("ollama")
    tiny = write_tiny_model(folder / "tiny", TinyLlama(context_tokens=4096))
    encoder = write_tiny_encoder(folder / "encoder")
    config = f'[models."tiny:1m"]\npath = "{tiny}"\n[models.encoder]\npath = "{encoder}"\n'
    env = {"MILLICENT_CACHE": str(folder / "cache")}
    with live_server(folder / "home", ["tiny:1m", "encoder"], config, env) as live:
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[ollama.Client]:
    with ollama.Client(host=server.url) as made:
        yield made


def test_a_chat_has_its_counts_its_durations_and_its_receipt(client: ollama.Client, server: LiveServer) -> None:
    response = httpx.post(
        f"{server.url}/api/chat",
        json={"model": "tiny", "messages": HI, "options": SHORT, "stream": False},
        headers={"x-millicent-user": "ada"},
        timeout=60,
    )
    answer = response.json()
    receipt = server.get(f"/v1/receipts/{response.headers['x-millicent-receipt']}")[1]
    assert (answer["receipt"], answer["model"]) == (receipt["id"], "tiny:1m")
    assert (receipt["dialect"], receipt["attribution"]["user"]) == ("ollama.chat", "ada")
    assert answer["eval_count"] == receipt["usage"]["output_text"]["tokens"]
    assert answer["total_duration"] == round(receipt["timing_ms"]["total"] * 1e6)
    assert answer["total_duration"] >= answer["load_duration"] + answer["prompt_eval_duration"]
    assert answer["cost"] == pytest.approx(float(receipt["total_usd"]))
    said = client.chat(model="tiny", messages=HI, options=SHORT)
    assert said.message.content == answer["message"]["content"]


@pytest.mark.parametrize("name", ["tiny:1m", "tiny", "tiny:latest"])
def test_a_model_is_known_with_and_without_its_tag(client: ollama.Client, name: str) -> None:
    assert client.chat(model=name, messages=HI, options=SHORT).model == "tiny:1m"


def test_a_stream_adds_up_to_the_whole_answer(client: ollama.Client) -> None:
    whole = client.chat(model="tiny", messages=HI, options=SHORT)
    parts = list(client.chat(model="tiny", messages=HI, options=SHORT, stream=True))
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert (parts[-1].eval_count, parts[-1].done_reason) == (whole.eval_count, whole.done_reason)


def test_a_stream_is_lines_of_json_unless_told_otherwise(server: LiveServer) -> None:
    body = {"model": "tiny", "prompt": "hello", "options": SHORT}
    response = httpx.post(f"{server.url}/api/generate", json=body, timeout=60)
    assert response.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert lines[-1]["done"]
    assert lines[-1]["prompt_eval_count"] > 0
    assert lines[-1]["receipt"] == response.headers["x-millicent-receipt"]


def test_text_is_generated_with_a_template_or_without(client: ollama.Client) -> None:
    templated = client.generate(model="tiny", prompt="hello", system="Be short.", options=SHORT)
    raw = client.generate(model="tiny", prompt="hello", raw=True, options=SHORT, logprobs=True, top_logprobs=2)
    assert (templated.prompt_eval_count or 0) > (raw.prompt_eval_count or 0)
    assert raw.logprobs is not None
    assert len(raw.logprobs) == raw.eval_count
    assert len(raw.logprobs[0].top_logprobs or ()) == 2


def test_an_answer_follows_its_schema(client: ollama.Client) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    answer = client.chat(model="tiny", messages=HI, format=schema, options={"num_predict": 200, "seed": 1})
    assert json.loads(answer.message.content or "")["n"] in {1, 2}


def test_a_conversation_with_tools_goes_on(client: ollama.Client) -> None:
    call = {"function": {"name": "look_up", "arguments": {"what": "weather"}}}
    told: Any = [*HI, {"role": "assistant", "content": "", "tool_calls": [call]},
                 {"role": "tool", "tool_name": "look_up", "content": "sunny"}]  # fmt: skip
    answer = client.chat(model="tiny", messages=told, tools=[TOOL], options=SHORT)
    assert answer.eval_count


def test_texts_become_vectors(client: ollama.Client) -> None:
    found = client.embed(model="encoder", input=["one", "two " * 5000])
    assert len(found.embeddings) == 2
    assert sum(number**2 for number in found.embeddings[0]) == pytest.approx(1, abs=1e-5)
    assert found.prompt_eval_count
    short = client.embed(model="encoder", input="one", dimensions=4)
    assert len(short.embeddings[0]) == 4
    with pytest.raises(ollama.ResponseError, match="tokens"):
        client.embed(model="encoder", input="two " * 5000, truncate=False)


def test_models_are_listed_and_shown(client: ollama.Client, server: LiveServer) -> None:
    client.chat(model="tiny", messages=HI, options=SHORT)
    assert {"tiny:1m", "encoder"} <= {model.model for model in client.list().models}
    assert "tiny:1m" in {model.model for model in client.ps().models}
    assert client.show("tiny").capabilities == ["completion", "tools"]
    assert client.show("encoder").capabilities == ["embedding"]
    assert server.get("/api/version")[1]["version"]
    with pytest.raises(ollama.ResponseError, match="nix"):
        client.show("nix")


def test_a_model_is_loaded_and_unloaded_by_saying_nothing(client: ollama.Client, server: LiveServer) -> None:
    def loaded() -> set[str | None]:
        return {model.model for model in client.ps().models}

    before = len(server.receipts())
    answers = [client.generate(model="tiny"), client.chat(model="encoder", messages=[])]
    assert [(answer.model, answer.done_reason) for answer in answers] == [("tiny:1m", "load"), ("encoder", "load")]
    assert loaded() == {"tiny:1m", "encoder"}
    (told,) = client.generate(model="tiny:latest", keep_alive=0, stream=True)
    assert (told.response, told.done, told.done_reason) == ("", True, "unload")
    until(lambda: loaded() == {"encoder"})
    assert client.chat(model="encoder", keep_alive="0s").done_reason == "unload"
    until(lambda: loaded() == set())
    with pytest.raises(ollama.ResponseError, match="nix") as caught:
        client.generate(model="nix", keep_alive=0)
    assert caught.value.status_code == 404
    assert len(server.receipts()) == before  # nobody pays for it
    assert client.chat(model="tiny", messages=HI, options=SHORT).eval_count
    assert loaded() == {"tiny:1m"}
    server.check_accounts()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model": "nix"}, "nix"),
        ({"options": {"mirostat": 1}}, "options.mirostat"),
        ({"options": {"temprature": 1}}, "options.temprature"),
        ({"options": {"repeat_last_n": 64}}, "options.repeat_last_n"),
        ({"think": "high"}, "think"),
        ({"messages": [*HI, {"role": "assistant", "content": "Well"}]}, "assistant's"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "x", "images": ["iVBORw0KGgo="]}]}, "image"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(client: ollama.Client, change: Any, word: str) -> None:
    asked: Any = {"model": "tiny", "messages": HI, "options": SHORT} | change
    with pytest.raises(ollama.ResponseError) as caught:
        client.chat(**asked)
    assert word in caught.value.error
    with pytest.raises(ollama.ResponseError):
        list(client.chat(**asked, stream=True))


def test_what_cannot_be_fetched_is_said_in_the_stream(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="nix"):
        client.pull("nix")
    with pytest.raises(ollama.ResponseError, match="nix"):
        list(client.pull("nix", stream=True))
