"""A model that knows nothing, held to a form: asked with the official client."""

import json
import re
import threading
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pydantic
import pytest

from support.live import LiveServer, live_server
from support.tiny_models import TinyLlama, write_tiny_model

HI: Any = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("structured")
    tiny = write_tiny_model(folder / "tiny", TinyLlama(context_tokens=8192))
    with live_server(folder / "home", [str(tiny)]) as live:
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def asked(schema: dict[str, Any]) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}


SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object", "additionalProperties": False, "required": ["name", "tags", "at"],
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
            "at": {"type": "object", "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}},
                   "required": ["x"], "additionalProperties": False},
        },
    },
    {
        "type": "object", "additionalProperties": False, "required": ["node"],
        "properties": {"node": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "null"}]}},
        "$defs": {"leaf": {"type": "string", "pattern": "^[a-c]{2}[0-9]$"}},
    },
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("temperature", [0, 0.7, 2])
def test_every_answer_is_valid(client: openai.OpenAI, schema: dict[str, Any], temperature: float) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HI, n=6, temperature=temperature, response_format=asked(schema), max_tokens=400, seed=1
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), schema)


def test_a_stream_and_a_completion_say_the_same_in_form(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "response_format": asked(SCHEMAS[1]), "seed": 3, "max_tokens": 100}
    whole = client.chat.completions.create(messages=HI, **options).choices[0].message.content
    chunks = client.chat.completions.create(messages=HI, stream=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    form = {"response_format": {"type": "grammar", "syntax": "regex", "definition": "[a-c]{4}/x"}}
    text = client.completions.create(model="tiny", prompt="hi", max_tokens=20, extra_body=form).choices[0].text
    assert re.fullmatch("[a-c]{4}/x", text)


class Step(pydantic.BaseModel):
    verb: Literal["go", "stop"]
    times: int = pydantic.Field(ge=1, le=20)


class Plan(pydantic.BaseModel):
    steps: list[Step] = pydantic.Field(min_length=1, max_length=2)


def test_the_clients_own_parsing_works(client: openai.OpenAI) -> None:
    plan = client.chat.completions.parse(model="tiny", messages=HI, response_format=Plan, max_tokens=400, seed=1)
    assert isinstance(plan.choices[0].message.parsed, Plan)


def test_any_object_is_one_as_far_as_it_goes(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HI, response_format={"type": "json_object"}, max_tokens=60, temperature=1, seed=1
    ).choices[0]
    content = answer.message.content or ""
    assert content.startswith("{")
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(content), dict)


HOSTILE: list[Any] = [
    asked({"enum": [f"v{i}" for i in range(30_000)]}),
    asked({"type": "string", "pattern": "^(a{1000}){1000}$"}),
    asked({"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {"type": "null"}}} for j in range(4)]} for i in range(10)]}),
    asked({"type": "array", "uniqueItems": True}),
    asked({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
    {"type": "grammar", "syntax": "regex", "definition": "(((a{100}){100}){100}){100}"},
    {"type": "grammar", "syntax": "lark", "definition": "start: " + "(" * 20_000},
    {"type": "grammar", "syntax": "lark", "definition": "x" * 300_000},
    {"type": "xml"},
]


def test_hostile_forms_are_refused_while_others_are_served(server: LiveServer, client: openai.OpenAI) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 6000, "ignore_eos": True, "stream": True}
    seen, done = threading.Event(), []

    def read() -> None:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as response:
            for line in response.iter_lines():
                seen.set()
                done.append(line)

    reader = threading.Thread(target=read)
    reader.start()
    assert seen.wait(60)
    for form in HOSTILE:
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="tiny", messages=HI, response_format=form)
        assert (refused.value.param or "").startswith("response_format")
    deep = b'{"items":' * 5000 + b"{}" + b"}" * 5000
    form = b'{"type":"json_schema","json_schema":{"name":"x","schema":' + deep + b"}}"
    sent = b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"response_format":' + form + b"}"
    assert server.request("POST", "/v1/chat/completions", sent)[0] == 400
    reader.join(120)
    assert done[-2:] == ["data: [DONE]", ""]


def test_what_doesnt_go_together_is_refused(client: openai.OpenAI) -> None:
    for option in ({"ignore_eos": True}, {"min_tokens": 5}):
        with pytest.raises(openai.BadRequestError, match="doesn't go with"):
            client.chat.completions.create(
                model="tiny", messages=HI, response_format={"type": "json_object"}, extra_body=option
            )
