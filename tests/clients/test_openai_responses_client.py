"""OpenAI's own client speaking Responses: to a model that knows nothing, and through the gateway to one elsewhere."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from support.fake_upstream import USAGE, Call, chunk, events, fake_upstream_in_a_thread, split
from support.live import LiveServer, live_server
from support.tiny_models import TinyLlama, write_tiny_model

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
ASKED: Any = {
    "model": "tiny",
    "input": "hello there",
    "instructions": "Be brief.",
    "temperature": 0,
    "max_output_tokens": 4,
}
LOOK_UP: Any = {
    "type": "function",
    "name": "look_up",
    "description": "Looks something up.",
    "parameters": {
        "type": "object",
        "properties": {"what": {"type": "string", "maxLength": 8}},
        "required": ["what"],
        "additionalProperties": False,
    },
    "strict": True,
}
CONFIG = """
[placements.elsewhere]
kind = "api"
base_url = "{url}"

[models.far]
placement = "elsewhere"
"""


async def answer(call: Call) -> None:
    """Thinks and calls, then answers what came back; breaks off where it is asked to."""
    last = call.json["messages"][-1]
    if last["content"] == "break":
        await call.stream([events(chunk({"content": "Well"}), done=False)])
        return
    if last["role"] == "tool":
        told = [chunk({"content": f"It is {last['content']}."}), chunk({}, "stop"), chunk(usage=USAGE)]
    else:
        function = {"name": "look_up", "arguments": ""}
        told = [
            chunk({"reasoning_content": "I need "}),
            chunk({"reasoning_content": "to look."}),
            chunk({"content": "One moment."}),
            chunk({"tool_calls": [{"index": 0, "id": "call_x", "type": "function", "function": function}]}),
            chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"what": "R'}}]}),
            chunk({"tool_calls": [{"index": 0, "function": {"arguments": 'ome"}'}}]}),
            chunk({}, "tool_calls"),
            chunk(usage=USAGE),
        ]
    await call.stream(split(events(*told), 9))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("responses")
    tiny = write_tiny_model(folder / "tiny", TinyLlama(context_tokens=4096))
    with (
        fake_upstream_in_a_thread(answer) as upstream,
        live_server(folder / "home", [str(tiny)], CONFIG.format(url=upstream.url)) as live,
    ):
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def test_an_answer_has_its_usage_its_cost_and_its_receipt(client: openai.OpenAI, server: LiveServer) -> None:
    raw = client.responses.with_raw_response.create(**ASKED, safety_identifier="ada")
    response = raw.parse()
    Response.model_validate(response.to_dict())  # to the letter, not as leniently as the client reads
    _, receipt = server.get(f"/v1/receipts/{raw.headers['x-millicent-receipt']}")
    assert (receipt["dialect"], receipt["attribution"]["user"]) == ("openai.responses", "ada")
    assert response.id.removeprefix("resp_") == receipt["id"].removeprefix("rcpt_")
    assert response.output_text
    assert (response.status, response.incomplete_details and response.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )
    usage: Any = response.usage
    assert usage.output_tokens == receipt["usage"]["output_text"]["tokens"] == 4
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.cost == pytest.approx(float(receipt["total_usd"]))
    assert response.instructions == "Be brief."
    assert raw.parse().to_dict()["store"] is True


def test_a_stream_is_typed_numbered_and_adds_up(client: openai.OpenAI) -> None:
    whole = client.responses.create(**ASKED)
    told = list(client.responses.create(**ASKED, stream=True))
    for event in told:
        EVENT.validate_python(event.to_dict())
    assert [event.sequence_number for event in told] == list(range(len(told)))
    kinds = [event.type for event in told]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    assert "".join(event.delta for event in told if event.type == "response.output_text.delta") == whole.output_text
    last = told[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == whole.output_text


def test_the_streaming_helper_keeps_up(client: openai.OpenAI) -> None:
    asked: Any = {"model": "far", "input": "Rome?", "tools": [LOOK_UP]}
    with client.responses.stream(**asked) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    call = final.output[-1]
    assert call.type == "function_call"
    assert call.parsed_arguments == {"what": "Rome"}


class Plan(BaseModel):
    sure: bool
    kind: Literal["trip", "stay"]


def test_an_answer_is_parsed_by_its_schema(client: openai.OpenAI) -> None:
    response = client.responses.parse(model="tiny", input="plan", text_format=Plan, max_output_tokens=400)
    assert response.output_parsed is not None
    assert response.output_parsed.kind in {"trip", "stay"}


def test_enforced_calls_fit_and_the_conversation_goes_on(client: openai.OpenAI) -> None:
    choice: Any = {"type": "function", "name": "look_up"}
    asked: Any = {"model": "tiny", "tools": [LOOK_UP], "max_output_tokens": 300, "temperature": 0}
    first = client.responses.create(**asked, input="hello", tool_choice=choice, parallel_tool_calls=False)
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert len(json.loads(call.arguments)["what"]) <= 8
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "nothing"}
    items: Any = [{"role": "user", "content": "hello"}, *first.output, output]
    second = client.responses.create(**asked, input=items, tool_choice="none")
    assert second.output_text


def test_enforced_calls_are_streamed_to_the_letter(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "input": "hello", "tools": [LOOK_UP], "max_output_tokens": 300, "temperature": 0}
    told = list(client.responses.create(**asked, tool_choice="required", parallel_tool_calls=False, stream=True))
    for event in told:
        EVENT.validate_python(event.to_dict())
    pieces = [event.delta for event in told if event.type == "response.function_call_arguments.delta"]
    (done,) = [event for event in told if event.type == "response.function_call_arguments.done"]
    assert len(pieces) > 1
    assert "".join(pieces) == done.arguments
    last = told[-1]
    assert last.type == "response.completed"
    (call,) = last.response.output
    assert call.type == "function_call"
    assert (call.arguments, call.status) == (done.arguments, "completed")
    assert len(json.loads(call.arguments)["what"]) <= 8


@pytest.mark.parametrize("summary", [None, "auto"])
def test_thoughts_and_calls_cross_from_another_dialect_and_back(
    client: openai.OpenAI, server: LiveServer, summary: Any
) -> None:
    asked: Any = {"model": "far", "tools": [LOOK_UP], "store": True, "reasoning": {"summary": summary}}
    first = client.responses.create(**asked, input="Rome?")
    thought, message, call = first.output
    assert (thought.type, message.type, call.type) == ("reasoning", "message", "function_call")
    assert thought.type == "reasoning"
    parts: Any = thought.summary if summary else thought.content
    assert [part.text for part in parts] == ["I need to look."]
    assert first.output_text == "One moment."
    assert call.type == "function_call"
    assert (call.name, call.arguments) == ("look_up", '{"what": "Rome"}')
    usage: Any = first.usage
    assert (usage.input_tokens_details.cached_tokens, usage.output_tokens_details.reasoning_tokens) == (8, 4)
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    items: Any = [{"role": "user", "content": "Rome?"}, *first.output, output]
    second = client.responses.create(**asked, input=items)
    assert (second.output_text, second.status) == ("It is sunny.", "completed")
    receipt = f"rcpt_{first.id.removeprefix('resp_')}"
    assert server.get(f"/v1/receipts/{receipt}")[1]["useful"] is not False


def test_a_stream_that_breaks_off_says_what_went_wrong(client: openai.OpenAI) -> None:
    *_, last = client.responses.create(model="far", input="break", stream=True)
    assert last.type == "response.failed"
    assert last.response.error is not None
    assert (last.response.status, last.response.error.code) == ("failed", "upstream_garbled")
    assert last.response.output_text == "Well"
    with pytest.raises(openai.InternalServerError, match="middle"):
        client.responses.create(model="far", input="break")


@pytest.mark.parametrize(
    ("change", "error", "param", "word"),
    [
        ({"model": "nix"}, openai.NotFoundError, "model", "nix"),
        ({"previous_response_id": "resp_1"}, openai.BadRequestError, "previous_response_id", "input"),
        ({"background": True}, openai.BadRequestError, "background", "false"),
        ({"tools": [{"type": "web_search"}]}, openai.BadRequestError, "tools[0].type", "web_search"),
        ({"reasoning": {"effort": "high"}}, openai.BadRequestError, "reasoning.effort", "none"),
        ({"input": "word " * 9000}, openai.BadRequestError, "input", "tokens"),
        ({"input": [{"role": "user", "content": [
            {"type": "input_image", "image_url": "https://example.com/a.png", "detail": "auto"}]}]},
         openai.BadRequestError, "input", "image"),
        ({"extra_headers": {"x-millicent-max-cost-usd": "0.000000001"}}, openai.APIStatusError, None, "maximum"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused_by_name(
    client: openai.OpenAI, change: Any, error: type[openai.APIStatusError], param: str | None, word: str
) -> None:
    with pytest.raises(error) as caught:
        client.responses.create(**(ASKED | change))
    body: Any = caught.value.body
    assert word in body["message"]
    assert param is None or body["param"] == param


def test_a_repeated_request_gets_the_same_response(client: openai.OpenAI) -> None:
    asked: Any = ASKED | {"extra_headers": {"Idempotency-Key": "once"}}
    first, second = client.responses.create(**asked), client.responses.create(**asked)
    assert second.to_dict() == first.to_dict()


def test_log_probabilities_come_with_the_text(client: openai.OpenAI) -> None:
    response = client.responses.create(**ASKED, top_logprobs=2, include=["message.output_text.logprobs"])
    (item,) = response.output
    assert item.type == "message"
    part = item.content[0]
    assert part.type == "output_text"
    assert part.logprobs is not None
    assert [len(entry.top_logprobs) for entry in part.logprobs] == [2] * 4


@pytest.mark.model
def test_the_real_model_answers_and_a_stream_says_the_same(
    smollm2_path: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = f'[engine]\ndeterministic = true\n[models."smollm2:135m"]\npath = "{smollm2_path}"\n'
    home = tmp_path_factory.mktemp("real_responses") / "home"
    asked: Any = {"model": "smollm2:135m", "input": "What is the capital city of Japan?", "temperature": 0}
    with live_server(home, ["smollm2:135m"], config) as live:
        client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0)
        with client, client.responses.stream(**asked) as stream:
            whole = client.responses.create(**asked)
            final = stream.get_final_response()
    assert "Tokyo" in whole.output_text
    assert (final.output_text, final.status) == (whole.output_text, "completed")
