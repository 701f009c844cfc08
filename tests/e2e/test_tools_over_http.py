"""Tools with a model that knows nothing, asked with the official client: calls that are enforced are always right."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.lib.streaming.chat import ContentDoneEvent

from support.live import LiveServer, live_server
from support.tiny_models import TinyLlama, write_tiny_model

HI: Any = [{"role": "user", "content": "hello there"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks something up.",
            "parameters": {
                "type": "object",
                "properties": {"what": {"type": "string", "maxLength": 8}, "times": {"type": "integer", "maximum": 9,
                                                                                    "minimum": 1}},
                "required": ["what", "times"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "additionalProperties": False}}},
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("tools")
    tiny = write_tiny_model(folder / "tiny", TinyLlama(context_tokens=8192))
    with live_server(folder / "home", [str(tiny)]) as live:
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def check(call: Any) -> None:
    assert call.id.startswith("call_")
    assert call.type == "function"
    arguments = json.loads(call.function.arguments)
    if call.function.name == "now":
        assert arguments == {}
    else:
        assert call.function.name == "look_up"
        assert len(arguments["what"]) <= 8
        assert 1 <= arguments["times"] <= 9


def test_required_calls_are_made_and_their_arguments_fit(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HI, tools=TOOLS, tool_choice="required", n=4, seed=1, max_tokens=2000,
        parallel_tool_calls=False,
    )  # fmt: skip
    ids = set()
    for choice in answer.choices:
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        assert choice.message.tool_calls is not None
        (call,) = choice.message.tool_calls
        check(call)
        ids.add(call.id)
    assert len(ids) == 4


def test_a_stream_of_calls_adds_up_to_the_whole_answer(client: openai.OpenAI) -> None:
    asked: Any = {
        "model": "tiny", "messages": HI, "tools": TOOLS, "seed": 4, "max_tokens": 2000, "parallel_tool_calls": False,
        "tool_choice": {"type": "function", "function": {"name": "look_up"}},
    }  # fmt: skip
    whole = client.chat.completions.create(**asked).choices[0].message.tool_calls
    assert whole is not None
    check(whole[0])
    first, arguments, reason, pieces = None, "", None, 0
    for chunk in client.chat.completions.create(**asked, stream=True):
        choice = chunk.choices[0]
        reason = choice.finish_reason or reason
        for piece in choice.delta.tool_calls or ():
            assert piece.function is not None
            assert piece.index == 0
            first, pieces = first or piece, pieces + 1
            assert (piece.id is None) == (piece is not first)
            arguments += piece.function.arguments or ""
    assert first is not None
    assert first.function is not None
    assert (first.function.name, arguments, reason) == ("look_up", whole[0].function.arguments, "tool_calls")
    assert pieces > 1
    with client.chat.completions.stream(**asked) as stream:
        done = [event for event in stream if not isinstance(event, ContentDoneEvent)]
        assert done
        final = stream.get_final_completion().choices[0].message.tool_calls
    assert final is not None
    assert final[0].function.arguments == arguments


def test_a_model_left_free_says_what_it_likes(client: openai.OpenAI) -> None:
    for choice in ("auto", "none"):
        answer = client.chat.completions.create(
            model="tiny", messages=HI, tools=TOOLS, tool_choice=choice, max_tokens=20, temperature=0
        )
        assert answer.choices[0].message.tool_calls is None
        assert answer.choices[0].message.content


def test_a_result_goes_back_to_the_model(client: openai.OpenAI) -> None:
    called = client.chat.completions.create(
        model="tiny", messages=HI, tools=TOOLS, tool_choice="required", max_tokens=2000, parallel_tool_calls=False
    ).choices[0].message  # fmt: skip
    assert called.tool_calls is not None
    result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "42"}
    talk: Any = [*HI, called.model_dump(exclude_none=True), result]
    answer = client.chat.completions.create(model="tiny", messages=talk, tools=TOOLS, max_tokens=5)
    without = client.chat.completions.create(model="tiny", messages=HI, tools=TOOLS, max_tokens=5)
    assert answer.usage is not None
    assert without.usage is not None
    assert answer.usage.prompt_tokens > without.usage.prompt_tokens


def test_an_answer_given_again_has_the_same_calls(server: LiveServer) -> None:
    body = {"model": "tiny", "messages": HI, "tools": TOOLS, "tool_choice": "required", "max_tokens": 2000}
    answers = [
        httpx.post(f"{server.url}/v1/chat/completions", json=body, headers={"Idempotency-Key": "k"}, timeout=120)
        for _ in range(2)
    ]
    first, again = (answer.json()["choices"] for answer in answers)
    assert first[0]["message"]["tool_calls"]
    assert first == again


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "gone"}}}, "tool_choice"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]},
         "tools[0].function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "object", "properties":
            {"x": {"type": "strin"}}}}}], "tool_choice": "required"}, "tools"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function":
            {"name": "a", "arguments": "["}}]}]}, "messages[0].tool_calls[0].function.arguments"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(client: openai.OpenAI, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**({"model": "tiny", "messages": HI, "max_tokens": 5} | options))
    assert refused.value.param == param
