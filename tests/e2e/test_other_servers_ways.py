"""What clients of vLLM's and llama.cpp's servers expect of an address that they are pointed at."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from support.live import LiveServer, live_server
from support.tiny_models import TinyLlama, write_tiny_model

HI: Any = [{"role": "user", "content": "hello there"}]
COLOURS = ["red", "blue", 'it\'s "q"', "naïve 🤗"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("others")
    tiny = write_tiny_model(folder / "tiny", TinyLlama(context_tokens=2048))
    with live_server(folder / "home", [str(tiny)]) as live:
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def said(client: openai.OpenAI, **fields: Any) -> str:
    answer = client.chat.completions.create(model="tiny", messages=HI, max_tokens=60, seed=1, extra_body=fields)
    assert answer.choices[0].finish_reason == "stop"
    return answer.choices[0].message.content or ""


def post(server: LiveServer, path: str, **body: Any) -> Any:
    answer = httpx.post(server.url + path, json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refusal(server: LiveServer, path: str, **body: Any) -> Any:
    answer = httpx.post(server.url + path, json=body, timeout=30)
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


@pytest.mark.parametrize("field", ["structured_outputs", "guided_choice"])
def test_a_choice_is_one_of_those_given(client: openai.OpenAI, field: str) -> None:
    asked = {"structured_outputs": {"choice": COLOURS}} if field == "structured_outputs" else {field: COLOURS}
    assert said(client, **asked) in COLOURS


@pytest.mark.parametrize("asked", [{"structured_outputs": {"regex": "[ab]{3}/x"}}, {"guided_regex": "[ab]{3}/x"}])
def test_a_regular_expression_is_followed(client: openai.OpenAI, asked: dict[str, Any]) -> None:
    assert re.fullmatch("[ab]{3}/x", said(client, **asked))


@pytest.mark.parametrize(
    "asked",
    [
        {"structured_outputs": {"json": {"const": "42"}}},
        {"structured_outputs": {"json": '{"const": "42"}'}},
        {"guided_json": {"const": "42"}},
        {"json_schema": {"const": "42"}},
        {"response_format": {"type": "json_object", "schema": {"const": "42"}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": "42"}}}},
    ],
)
def test_a_schema_is_followed_by_whatever_name_it_comes(client: openai.OpenAI, asked: dict[str, Any]) -> None:
    assert json.loads(said(client, **asked)) == "42"


@pytest.mark.parametrize("field", ["grammar", "guided_grammar", "structured_outputs"])
def test_grammars_of_llama_cpp_are_followed(client: openai.OpenAI, field: str) -> None:
    grammar = 'root ::= item{2}\n# a comment\nitem ::= "- " [x-z]+ "\\n"'
    asked = {field: {"grammar": grammar}} if field == "structured_outputs" else {field: grammar}
    assert re.fullmatch(r"(- [x-z]+\n){2}", said(client, **asked, logit_bias={}, repetition_penalty=1.3))


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"structured_outputs": {"regex": {"1": "x"}}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"backend": "xgrammar"}}, "structured_outputs.backend"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_choice": []}, "guided_choice"),
        ({"structured_outputs": {"regex": "[.*"}}, "response_format"),
        ({"response_format": {"type": "json_object", "schema": {"type": "hiccup"}}}, "response_format"),
        ({"response_format": {"type": "sound"}}, "response_format.type"),
        ({"grammar": "root ::= there_is_no_such_rule"}, "response_format"),
        ({"grammar": 'root ::= "' + "(" * 40_000}, "response_format"),
        ({"grammar": "root ::= " + "(" * 20_000}, "response_format"),
    ],
)
def test_a_form_that_cannot_be_is_refused(server: LiveServer, asked: dict[str, Any], param: str) -> None:
    assert refusal(server, "/v1/chat/completions", model="tiny", messages=HI, **asked)["param"] == param


def test_fields_that_ask_for_what_is_done_anyway_are_taken(server: LiveServer) -> None:
    harmless = {
        "skip_special_tokens": True, "spaces_between_special_tokens": True, "use_beam_search": False, "bad_words": [],
        "include_stop_str_in_output": False, "prompt_logprobs": None, "return_token_ids": False, "cache_prompt": True,
        "structured_outputs": None, "guided_json": None, "length_penalty": 1.0,
    }  # fmt: skip
    post(server, "/v1/completions", model="tiny", prompt="hi", max_tokens=1, **harmless)
    chat = {"add_generation_prompt": True, "continue_final_message": False, "chat_template_kwargs": {}, "echo": False}
    post(server, "/v1/chat/completions", model="tiny", messages=HI, max_tokens=1, **harmless, **chat)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("skip_special_tokens", False),
        ("use_beam_search", True),
        ("bad_words", ["hello"]),
        ("allowed_token_ids", [1]),
        ("prompt_logprobs", 1),
        ("return_token_ids", True),
        ("continue_final_message", True),
        ("length_penalty", 2.0),
        ("skip_special_tokens", 1),
        ("chat_template", "{{ messages }}"),
    ],
)
def test_fields_that_cannot_be_honoured_are_refused_by_name(server: LiveServer, field: str, value: Any) -> None:
    told = refusal(server, "/v1/chat/completions", model="tiny", messages=HI, max_tokens=1, **{field: value})
    assert (told["param"], told["code"]) == (field, "unsupported_parameter")
    assert f"`{field}`" in told["message"]


@pytest.mark.parametrize("arguments", ["", " ", "{}"])
def test_a_call_without_arguments_can_be_sent_back(server: LiveServer, arguments: str) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": arguments}}
    turns = [*HI, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c1", "content": "12"}]
    post(server, "/v1/chat/completions", model="tiny", messages=turns, max_tokens=1)


def test_tokens_are_those_that_the_model_is_given(server: LiveServer) -> None:
    text = "hello 媽 🤗 world"
    found = post(server, "/tokenize", model="tiny", prompt=text)
    assert found["count"] == len(found["tokens"])
    assert found["max_model_len"] == 2048
    assert found["token_strs"] is None
    answer = post(server, "/v1/completions", model="tiny", prompt=text, max_tokens=1)
    assert answer["usage"]["prompt_tokens"] == found["count"]
    chat = post(server, "/tokenize", model="tiny", messages=HI, add_generation_prompt=True)
    answer = post(server, "/v1/chat/completions", model="tiny", messages=HI, max_tokens=1)
    assert answer["usage"]["prompt_tokens"] == chat["count"]


def test_tokens_go_back_to_the_text(server: LiveServer) -> None:
    text = "hello 媽 🤗 world"
    tokens = post(server, "/tokenize", content=text, add_special=False)["tokens"]
    for named in ({"model": "tiny"}, {}):
        found = post(server, "/detokenize", tokens=tokens, **named)
        assert found["prompt"] == found["content"] == text


def test_tokens_can_be_shown_with_their_texts(server: LiveServer) -> None:
    text = "hello 媽 world"
    pieces = post(server, "/tokenize", content=text, with_pieces=True, add_special=False)["tokens"]
    parts = [entry["piece"] for entry in pieces]
    assert b"".join(part.encode() if isinstance(part, str) else bytes(part) for part in parts).decode() == text
    told = post(server, "/tokenize", prompt="hello world", return_token_strs=True, add_special_tokens=False)
    assert "".join(told["token_strs"]) == "hello world"


def test_nothing_is_charged_for_tokens(server: LiveServer) -> None:
    before = httpx.get(server.url + "/v1/receipts", timeout=60).json()
    answer = httpx.post(server.url + "/tokenize", json={"prompt": "hello"}, timeout=60)
    assert "x-millicent-receipt" not in answer.headers
    assert httpx.get(server.url + "/v1/receipts", timeout=60).json() == before


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"model": "nobody", "prompt": "x"}, "model"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "foo": 1}, "foo"),
        ("/tokenize", {"messages": HI, "add_generation_prompt": False}, "add_generation_prompt"),
        ("/tokenize", {"prompt": [99_999_999]}, "prompt"),
        ("/detokenize", {"tokens": [99_999_999]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"model": "nobody", "tokens": [1]}, "model"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_what_has_no_tokens_is_refused(server: LiveServer, path: str, body: dict[str, Any], param: str) -> None:
    assert refusal(server, path, **body)["param"] == param


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_an_address_says_which_methods_it_has_not(server: LiveServer, method: str) -> None:
    answer = httpx.request(method, server.url + "/v1/chat/completions", timeout=60)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert answer.json()["error"]["code"] == "method_not_allowed"
