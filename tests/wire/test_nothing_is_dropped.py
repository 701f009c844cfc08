"""Every field that the public clients document, in every dialect, to every kind of server: it changes what the server
is sent, or is refused by the name that the client knows it by, or is a hint that the documentation lists."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from millicent.core.errors import InvalidRequest
from millicent.core.request import Request
from millicent.wire import (
    anthropic_common,
    anthropic_messages,
    anthropic_upstream,
    gemini_embeddings,
    gemini_upstream,
    ollama_common,
    ollama_requests,
    openai_chat,
    openai_common,
    openai_completions,
    openai_embeddings,
    openai_responses,
    openai_upstream,
)
from millicent.wire.openai_servers import SERVERS

CLIENTS = Path(os.environ.get("MILLICENT_CLIENTS", Path(__file__).parents[2] / ".clients"))

SAY: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
FUNCTION = {"name": "f", "description": "d", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": FUNCTION}]
FLAT_TOOLS = [{"type": "function", **FUNCTION}]
CUSTOM_TOOLS = [{"name": "f", "description": "d", "input_schema": SCHEMA}]
PNG = "iVBORw0KGgo="
PICTURE: dict[str, Any] = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}

DECODERS: dict[str, Callable[..., tuple[Request, Any]]] = {
    "openai.chat": openai_chat.decode,
    "openai.completions": openai_completions.decode,
    "openai.responses": openai_responses.decode,
    "openai.embeddings": openai_embeddings.decode,
    "anthropic.messages": anthropic_messages.decode,
    "ollama.chat": ollama_requests.decode_chat,
    "ollama.generate": ollama_requests.decode_generate,
    "ollama.embed": ollama_requests.decode_embed,
}
FAMILIES = {
    "openai.responses": openai_responses.FAMILY,
    "anthropic.messages": anthropic_common.FAMILY,
    **dict.fromkeys(("ollama.chat", "ollama.generate", "ollama.embed"), ollama_common.FAMILY),
}
PLAIN: dict[str, dict[str, Any]] = {
    "openai.chat": {"messages": SAY},
    "openai.completions": {"prompt": "hi"},
    "openai.responses": {"input": "hi"},
    "openai.embeddings": {"input": "hi"},
    "anthropic.messages": {"max_tokens": 2000, "messages": SAY},
    "ollama.chat": {"messages": SAY},
    "ollama.generate": {"prompt": "hi"},
    "ollama.embed": {"input": "hi"},
}


def chat_turns(*more: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [*SAY, *more]}


def said(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


OPTIONS: dict[str, Any] = {
    "frequency_penalty": 0.5, "presence_penalty": 0.5, "repeat_penalty": 1.2, "seed": 5, "stop": ["x"],
    "temperature": 0.5, "top_k": 5, "top_p": 0.5, "typical_p": 0.5, "min_p": 0.1, "num_predict": 7, "tfs_z": 0.5,
    "mirostat": 1, "mirostat_eta": 0.5, "mirostat_tau": 2.0, "penalize_newline": False, "repeat_last_n": 5,
    "embedding_only": True, "logits_all": True, "vocab_only": True, "num_ctx": 100, "num_keep": 5, "f16_kv": True,
    "low_vram": True, "main_gpu": 1, "num_batch": 5, "num_gpu": 1, "num_thread": 2, "numa": True, "use_mlock": True,
    "use_mmap": False,
}  # fmt: skip
OF_OPTIONS = {f"options.{name}": {"options": {name: value}} for name, value in OPTIONS.items()}

# By dialect and field, or what of one: what is sent for it besides the plain request.
FIELDS: dict[str, dict[str, dict[str, Any]]] = {
    "openai.chat": {
        "audio": {"audio": {"voice": "a", "format": "wav"}},
        "frequency_penalty": {"frequency_penalty": 0.5},
        "function_call": {"function_call": {"name": "f"}},
        "functions": {"functions": [{"name": "f"}]},
        "logit_bias": {"logit_bias": {"5": 1}},
        "logprobs": {"logprobs": True},
        "max_completion_tokens": {"max_completion_tokens": 5},
        "max_tokens": {"max_tokens": 5},
        "messages.audio": said({"type": "input_audio", "input_audio": {"data": "aa", "format": "wav"}}),
        "messages.image": said(PICTURE),
        "messages.image.url": said({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}),
        "messages.name": {"messages": [{"role": "user", "content": "hi", "name": "bob"}]},
        "messages.assistant": chat_turns({"role": "assistant", "content": "x"}, *SAY),
        "messages.reasoning_content": chat_turns(
            {"role": "assistant", "content": "x", "reasoning_content": "hm"}, *SAY
        ),
        "messages.image.detail": said({**PICTURE, "image_url": {**PICTURE["image_url"], "detail": "high"}}),
        "messages.refusal": chat_turns({"role": "assistant", "content": None, "refusal": "no"}, *SAY),
        "messages.system": {"messages": [{"role": "system", "content": "s"}, *SAY]},
        "messages.tool_calls": {"tools": TOOLS}
        | chat_turns(
            {
                "role": "assistant",
                "tool_calls": [
                    {"id": f"c{i}", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
                    for i in range(2)
                ],
            },
            {"role": "tool", "tool_call_id": "c0", "content": "one"},
            {"role": "tool", "tool_call_id": "c1", "content": "two"},
        ),
        "metadata": {"metadata": {"a": "b"}},
        "modalities": {"modalities": ["audio"]},
        "moderation": {"moderation": {"model": "x"}},
        "n": {"n": 2},
        "parallel_tool_calls": {"tools": TOOLS, "parallel_tool_calls": False},
        "prediction": {"prediction": {"type": "content", "content": "x"}},
        "presence_penalty": {"presence_penalty": 0.5},
        "prompt_cache_key": {"prompt_cache_key": "k"},
        "prompt_cache_options": {"prompt_cache_options": {"mode": "x"}},
        "prompt_cache_retention": {"prompt_cache_retention": "24h"},
        "reasoning_effort": {"reasoning_effort": "high"},
        "response_format": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        "safety_identifier": {"safety_identifier": "u"},
        "seed": {"seed": 5},
        "service_tier": {"service_tier": "flex"},
        "stop": {"stop": ["x"]},
        "store": {"store": True},
        "stream": {"stream": True},
        "stream_options": {"stream": True, "stream_options": {"include_usage": True}},
        "temperature": {"temperature": 0.5},
        "tool_choice": {"tools": TOOLS, "tool_choice": "required"},
        "tool_choice.function": {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
        "tools": {"tools": TOOLS},
        "tools.strict": {"tools": [{"type": "function", "function": {**FUNCTION, "strict": True}}]},
        "top_logprobs": {"logprobs": True, "top_logprobs": 2},
        "top_p": {"top_p": 0.5},
        "user": {"user": "u"},
        "verbosity": {"verbosity": "low"},
        "web_search_options": {"web_search_options": {}},
    },
    "openai.completions": {
        "best_of": {"best_of": 2},
        "echo": {"echo": True},
        "frequency_penalty": {"frequency_penalty": 0.5},
        "logit_bias": {"logit_bias": {"5": 1}},
        "logprobs": {"logprobs": 2},
        "max_tokens": {"max_tokens": 5},
        "n": {"n": 2},
        "presence_penalty": {"presence_penalty": 0.5},
        "prompt": {"prompt": ["a", "b"]},
        "seed": {"seed": 1},
        "stop": {"stop": "x"},
        "stream": {"stream": True},
        "stream_options": {"stream": True, "stream_options": {"include_usage": True}},
        "suffix": {"suffix": "s"},
        "temperature": {"temperature": 0.5},
        "top_p": {"top_p": 0.5},
        "user": {"user": "u"},
    },
    "openai.embeddings": {
        "dimensions": {"dimensions": 3},
        "encoding_format": {"encoding_format": "base64"},
        "input": {"input": ["a", "b"]},
        "user": {"user": "u"},
    },
    "openai.responses": {
        "access_programs": {"access_programs": [{"a": 1}]},
        "background": {"background": True},
        "background_options": {"background_options": {"a": 1}},
        "context_management": {"context_management": [{"type": "compaction"}]},
        "conversation": {"conversation": "c"},
        "image": {"image": {"a": 1}},
        "include": {"include": ["message.output_text.logprobs"]},
        "input": {"input": [{"role": "user", "content": "ho"}]},
        "instructions": {"instructions": "i"},
        "max_output_tokens": {"max_output_tokens": 50},
        "max_tool_calls": {"max_tool_calls": 3},
        "metadata": {"metadata": {"a": "b"}},
        "moderation": {"moderation": {"model": "x"}},
        "parallel_tool_calls": {"tools": FLAT_TOOLS, "parallel_tool_calls": False},
        "previous_response_id": {"previous_response_id": "resp_1"},
        "prompt": {"prompt": {"id": "p"}},
        "prompt_cache_key": {"prompt_cache_key": "k"},
        "prompt_cache_options": {"prompt_cache_options": {"mode": "x"}},
        "prompt_cache_retention": {"prompt_cache_retention": "24h"},
        "reasoning": {"reasoning": {"effort": "high"}},
        "safety_identifier": {"safety_identifier": "u"},
        "service_tier": {"service_tier": "flex"},
        "store": {"store": False},
        "stream": {"stream": True},
        "stream_options": {"stream": True, "stream_options": {"include_obfuscation": False}},
        "temperature": {"temperature": 0.5},
        "text": {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}},
        "text.verbosity": {"text": {"verbosity": "low"}},
        "tool_choice": {"tools": FLAT_TOOLS, "tool_choice": "required"},
        "tools": {"tools": FLAT_TOOLS},
        "tools.strict": {"tools": [{**FLAT_TOOLS[0], "strict": True}]},
        "tools.type": {"tools": [{"type": "web_search"}]},
        "top_logprobs": {"top_logprobs": 2},
        "top_p": {"top_p": 0.5},
        "truncation": {"truncation": "auto"},
        "user": {"user": "u"},
    },
    "anthropic.messages": {
        "cache_control": {"cache_control": {"type": "ephemeral"}},
        "container": {"container": "c"},
        "diagnostics": {"diagnostics": {"a": 1}},
        "inference_geo": {"inference_geo": "us"},
        "max_tokens": {"max_tokens": 7},
        "mcp_servers": {"mcp_servers": [{"name": "x"}]},
        "messages.assistant": chat_turns({"role": "assistant", "content": [{"type": "text", "text": "x"}]}, *SAY),
        "messages.continued": chat_turns({"role": "assistant", "content": "I beg"}),
        "messages.document": said(
            {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x"}}
        ),
        "messages.image": said({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}),
        "messages.thinking": chat_turns(
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "c2VhbA=="},
                    {"type": "text", "text": "x"},
                ],
            },
            *SAY,
        ),
        "messages.tool_result": {"tools": CUSTOM_TOOLS}
        | chat_turns(
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": f"t{i}", "name": "f", "input": {"a": i}} for i in range(2)],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t0", "content": "one", "is_error": True},
                    {"type": "tool_result", "tool_use_id": "t1", "content": "two"},
                ],
            },
        ),
        "metadata": {"metadata": {"user_id": "u"}},
        "output_config": {"output_config": {"effort": "high"}},
        "output_config.format": {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        "service_tier": {"service_tier": "standard_only"},
        "speed": {"speed": "fast"},
        "stop_sequences": {"stop_sequences": ["x"]},
        "stream": {"stream": True},
        "system": {"system": "s"},
        "temperature": {"temperature": 0.5},
        "thinking": {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        "tool_choice": {"tools": CUSTOM_TOOLS, "tool_choice": {"type": "any"}},
        "tool_choice.disable_parallel_tool_use": {
            "tools": CUSTOM_TOOLS,
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        },
        "tools": {"tools": CUSTOM_TOOLS},
        "tools.strict": {"tools": [{**CUSTOM_TOOLS[0], "strict": True}]},
        "tools.type": {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        "top_k": {"top_k": 3},
        "top_p": {"top_p": 0.5},
        "user_profile_id": {"user_profile_id": "u"},
        "workspace_id": {"workspace_id": "w"},
    },
    "ollama.chat": {
        "format": {"format": SCHEMA},
        "keep_alive": {"keep_alive": "5m"},
        "logprobs": {"logprobs": True},
        "messages.images": {"messages": [{"role": "user", "content": "hi", "images": [PNG]}]},
        "messages.assistant": chat_turns({"role": "assistant", "content": "x"}, *SAY),
        "messages.thinking": chat_turns({"role": "assistant", "content": "x", "thinking": "hm"}, *SAY),
        "messages.tool_calls": {"tools": TOOLS}
        | chat_turns(
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
            {"role": "tool", "tool_name": "f", "content": "one"},
        ),
        "stream": {"stream": False},
        "think": {"think": "high"},
        "tools": {"tools": TOOLS},
        "top_logprobs": {"logprobs": True, "top_logprobs": 3},
        **OF_OPTIONS,
    },
    "ollama.generate": {
        "context": {"context": [1]},
        "format": {"format": "json"},
        "height": {"height": 5},
        "images": {"images": [PNG]},
        "keep_alive": {"keep_alive": 5},
        "logprobs": {"logprobs": True},
        "prompt": {"prompt": "ho"},
        "raw": {"raw": True},
        "steps": {"steps": 4},
        "stream": {"stream": False},
        "suffix": {"suffix": "s"},
        "system": {"system": "s"},
        "template": {"template": "t"},
        "think": {"think": "high"},
        "top_logprobs": {"logprobs": True, "top_logprobs": 2},
        "width": {"width": 5},
        **OF_OPTIONS,
    },
    "ollama.embed": {
        "dimensions": {"dimensions": 4},
        "input": {"input": ["a", "b"]},
        "keep_alive": {"keep_alive": 5},
        "options": {"options": {"num_ctx": 5}},
        "truncate": {"truncate": True},
    },
}

# What the gateway itself does with them (docs/api.md): how the answer comes, and whom the receipt is for.
OURS = {"stream", "stream_options", "user", "metadata", "encoding_format"}
# Hints that change nothing of an answer (docs/api.md, docs/backends.md).
HINTS = {
    "openai.chat": {"prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier"},
    "openai.responses": {
        "max_tool_calls", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier",
        "service_tier", "store",
    },
    "anthropic.messages": {"cache_control", "service_tier"},
    "ollama.chat": {"keep_alive"}, "ollama.generate": {"keep_alive"}, "ollama.embed": {"keep_alive", "options"},
}  # fmt: skip
HINTS_OF_OPTIONS = {
    "num_ctx", "num_keep", "f16_kv", "low_vram", "main_gpu", "num_batch", "num_gpu", "num_thread", "numa", "use_mlock",
    "use_mmap",
}  # fmt: skip
# What was thought before goes only to servers that read it; texts are cut where that is done anyway (docs/backends.md).
NOT_EVERYWHERE = {"messages.reasoning_content", "messages.thinking", "truncate"}
# What goes only with another field must change something beside that.
BESIDE = {
    "messages.reasoning_content": "messages.assistant",
    "messages.thinking": "messages.assistant",
    "parallel_tool_calls": "tools",
    "tool_choice": "tools",
    "tool_choice.disable_parallel_tool_use": "tools",
    "tool_choice.function": "tools",
    "tools.strict": "tools",
    "messages.tool_result.failed": "messages.tool_result",
    "top_logprobs": "logprobs",
}
# Two names of one wish, of which a refusal says the plainer.
ALSO = {"include": {"top_logprobs"}}


def to_local(request: Request) -> bytes:
    """What our engine's backend looks at: it has no use for what is only its dialect's."""
    request.refuse_foreign()
    request.refuse_thinking()
    request.refuse_images()
    return msgspec.json.encode(msgspec.structs.replace(request, dialect="", extra={}, stream=False))


def to_gemini(request: Request) -> bytes:
    encode = gemini_upstream.encode if request.embedding is None else gemini_embeddings.encode
    return encode(request, "gemini-2.5-pro", "It").body


def to_openai(server: str) -> Callable[[Request], bytes]:
    return lambda request: openai_upstream.encode(request, "there", SERVERS[server], "It").body


SERVERS_AND_US: dict[str, Callable[[Request], bytes]] = {
    "local": to_local,
    "anthropic": lambda request: anthropic_upstream.encode(request, "claude", "It").body,
    "gemini": to_gemini,
    **{server: to_openai(server) for server in SERVERS},
}


class Refused(NamedTuple):
    param: str | None
    message: str


def outcome(dialect: str, fields: dict[str, Any], server: str) -> bytes | Refused:
    body = {"model": "m"} | PLAIN[dialect] | fields
    try:
        request, _ = DECODERS[dialect](json.dumps(body).encode(), {}, "rcpt_1")
        return SERVERS_AND_US[server](request)
    except InvalidRequest as error:
        body = FAMILIES.get(dialect, openai_common.FAMILY).error_body(error, None)
        told = body if dialect.startswith("ollama.") else body["error"]
        return Refused(told["param"], str(told.get("message", told.get("error"))))


def is_named(refused: Refused, field: str, fields: set[str]) -> bool:
    """By a field that the client has sent."""
    return (refused.param or "").replace("[", ".").partition(".")[0] in fields | ALSO.get(field, set())


@pytest.mark.parametrize("server", SERVERS_AND_US)
@pytest.mark.parametrize("dialect", FIELDS)
def test_every_documented_field_arrives_or_is_refused_by_name_or_is_a_documented_hint(
    dialect: str, server: str
) -> None:
    dropped, unnamed = [], []
    for field, fields in FIELDS[dialect].items():
        plain = outcome(dialect, FIELDS[dialect].get(BESIDE.get(field, ""), {}), server)
        found = outcome(dialect, fields, server)
        root, _, rest = field.partition(".")
        if isinstance(found, Refused):
            if not is_named(found, field, {"model", *PLAIN[dialect], *fields}):
                unnamed.append((field, found))
        elif found == plain:
            hint = root in OURS | HINTS.get(dialect, set()) or (root == "options" and rest in HINTS_OF_OPTIONS)
            if not hint and field not in NOT_EVERYWHERE:
                dropped.append(field)
    assert not dropped
    assert not unnamed


def test_what_is_called_a_hint_is_in_the_documentation() -> None:
    told = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    for name in {each for hints in HINTS.values() for each in hints} | {"num_ctx", "num_gpu"} | OURS:
        assert f"`{name}`" in told, name


@pytest.mark.parametrize("dialect", sorted({"openai.chat", "openai.responses", "anthropic.messages", "ollama.chat"}))
@pytest.mark.parametrize("server", [each for each in SERVERS_AND_US if each != "local"])
def test_a_plain_request_of_any_client_reaches_any_server_with_nothing_that_it_did_not_say(
    dialect: str, server: str
) -> None:
    sent = outcome(dialect, {}, server)
    assert isinstance(sent, bytes), sent
    said = json.loads(sent)
    assert "hi" in json.dumps(said)
    told = {"model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "contents"}
    told |= {"service_tier", "generationConfig"}
    assert set(said) <= told
    assert set(said.get("generationConfig", {})) <= {"maxOutputTokens"}


DUMP = """
import json
import ollama._types as o
from anthropic.types import message_create_params as m
from openai.types import completion_create_params as t, embedding_create_params as e
from openai.types.chat import completion_create_params as c
from openai.types.responses import response_create_params as r

print(json.dumps({
    "openai.chat": [*c.CompletionCreateParamsBase.__annotations__],
    "openai.completions": [*t.CompletionCreateParamsBase.__annotations__],
    "openai.embeddings": [*e.EmbeddingCreateParams.__annotations__],
    "openai.responses": [*r.ResponseCreateParamsBase.__annotations__],
    "anthropic.messages": [*m.MessageCreateParamsBase.__annotations__],
    "ollama.chat": [*o.ChatRequest.model_fields],
    "ollama.generate": [*o.GenerateRequest.model_fields],
    "ollama.embed": [*o.EmbedRequest.model_fields],
    "options": [*o.Options.model_fields],
}))
"""


@pytest.mark.skipif(not (CLIENTS / "stamp").exists(), reason=f"no clients in {CLIENTS}: `make clients`")
def test_the_table_has_every_field_of_the_public_clients() -> None:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([str(CLIENTS / "bin" / "python"), "-c", DUMP], env=env, capture_output=True, check=True)
    documented: dict[str, list[str]] = json.loads(done.stdout)
    assert set(documented.pop("options")) <= set(OPTIONS)
    for dialect, fields in documented.items():
        there = {field.partition(".")[0] for field in FIELDS[dialect]}
        assert set(fields) <= there | {"model"}, dialect
