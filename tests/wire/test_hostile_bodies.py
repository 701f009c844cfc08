"""Bodies with anything in any place: refused in one line, or understood; never a fault of ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from millicent.caching.canonical import request_digest
from millicent.core.errors import MillicentError
from millicent.wire import (
    anthropic_messages,
    control,
    ollama_requests,
    openai_chat,
    openai_completions,
    openai_embeddings,
    openai_responses,
    quotes,
    tokens,
)
from support.anything import anything_anywhere

Decode = Callable[[bytes], object]
PICTURE = "iVBORw0KGgo="
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
TOOL = {"type": "function", "function": FUNCTION}
FORM = {"type": "json_schema", "schema": {"type": "object"}}
ASKED = {"role": "user", "content": "x"}

CHAT: dict[str, Any] = {
    "model": "m", "stream": True, "stream_options": {"include_usage": True}, "stop": ["a"], "logprobs": True,
    "top_logprobs": 2, "logit_bias": {"1": 3}, "metadata": {"a": "b"}, "user": "u", "n": 2, "seed": 1,
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "name": "n", "content": [
            {"type": "text", "text": "x"},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}", "detail": "low"}},
            {"type": "file", "file": {"file_id": "f"}}]},
        {"role": "assistant", "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c", "content": "r"},
    ],
    "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}},
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
    "chat_template_kwargs": {"enable_thinking": False}, "prediction": {"type": "content"}, "top_a": 0.5,
}  # fmt: skip
COMPLETIONS: dict[str, Any] = {
    "model": "m", "prompt": "x", "stream": True, "stream_options": {"include_usage": True}, "stop": ["a"],
    "logprobs": 1, "logit_bias": {"1": 3}, "echo": False, "suffix": "", "best_of": 1, "max_tokens": 1,
}  # fmt: skip
EMBEDDINGS = {"model": "m", "input": ["a", [1, 2]], "dimensions": 3, "encoding_format": "base64", "user": "u"}
RESPONSES: dict[str, Any] = {
    "model": "m", "instructions": "i", "metadata": {"a": "b"}, "stream": True, "reasoning": {"effort": "low"},
    "input": [
        {"role": "user", "content": [
            {"type": "input_text", "text": "x"},
            {"type": "input_image", "image_url": f"data:image/png;base64,{PICTURE}", "detail": "low"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "x"},
        {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "s"}]},
        {"type": "message", "role": "assistant", "id": "m", "status": "completed",
         "content": [{"type": "output_text", "text": "t", "annotations": []}]},
    ],
    "tools": [{"type": "function", **FUNCTION}], "tool_choice": {"type": "function", "name": "f"},
    "text": {"format": {"name": "n", **FORM}, "verbosity": "medium"}, "include": ["message.output_text.logprobs"],
}  # fmt: skip
MESSAGES: dict[str, Any] = {
    "model": "m", "max_tokens": 2000, "stream": True, "stop_sequences": ["a"], "metadata": {"user_id": "u"},
    "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral", "ttl": "1h"}}],
    "messages": [
        {"role": "user", "content": [
            {"type": "text", "text": "x"},
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PICTURE}},
            {"type": "image", "source": {"type": "url", "url": "https://there/y.png"}},
            {"type": "document", "source": {"type": "text", "data": "d"}}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "t", "signature": "s"}, {"type": "redacted_thinking", "data": "d"},
            {"type": "tool_use", "id": "i", "name": "f", "input": {"a": 1}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "i", "content": [{"type": "text", "text": "r"}]}]},
    ],
    "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}}],
    "tool_choice": {"type": "tool", "name": "f"}, "thinking": {"type": "enabled", "budget_tokens": 1024},
    "output_config": {"effort": "low", "format": FORM},
}  # fmt: skip
COUNTED = {name: value for name, value in MESSAGES.items() if name in {"model", "system", "messages", "tools"}}
OLLAMA_CHAT: dict[str, Any] = {
    "model": "m", "format": {"type": "object"}, "stream": True, "think": True, "keep_alive": "5m", "tools": [TOOL],
    "messages": [
        {"role": "user", "content": "x", "images": [PICTURE]},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
        {"role": "tool", "tool_name": "f", "content": "x"},
    ],
    "options": {"temperature": 1, "num_predict": 3, "stop": ["a"], "seed": 1, "top_k": 3},
}  # fmt: skip
OLLAMA_GENERATE = {
    "model": "m",
    "prompt": "x",
    "system": "s",
    "images": [PICTURE],
    "format": "json",
    "options": {"seed": 1},
}
OLLAMA_EMBED = {"model": "m", "input": ["a", "b"], "truncate": True, "dimensions": 4, "options": {"num_ctx": 4}}
KEY = {
    "name": "n",
    "scope": "client",
    "expires_at": "2030-01-01",
    "models": ["m"],
    "usd_per_minute": 1,
    "concurrent": 2,
}
BUDGET = {"name": "n", "limit_usd": 3, "every": "month", "per": "user", "only": "x", "hard": True}


def asked(decode: Callable[[bytes, Mapping[str, str], str], object]) -> Decode:
    return lambda body: decode(body, {}, "rcpt_1")


def loading(kind: str) -> Decode:
    return lambda body: ollama_requests.read_load(kind, body, {})


BODIES: dict[str, tuple[Any, Decode]] = {
    "/v1/chat/completions": (CHAT, asked(openai_chat.decode)),
    "/v1/completions": (COMPLETIONS, asked(openai_completions.decode)),
    "/v1/embeddings": (EMBEDDINGS, asked(openai_embeddings.decode)),
    "/v1/responses": (RESPONSES, asked(openai_responses.decode)),
    "/v1/messages": (MESSAGES, asked(anthropic_messages.decode)),
    "/v1/messages/count_tokens": (COUNTED, asked(anthropic_messages.decode_count)),
    "/api/chat": (OLLAMA_CHAT, asked(ollama_requests.decode_chat)),
    "/api/generate": (OLLAMA_GENERATE, asked(ollama_requests.decode_generate)),
    "/api/chat, loading": (OLLAMA_CHAT | {"messages": []}, loading(ollama_requests.CHAT)),
    "/api/generate, loading": ({"model": "m", "keep_alive": "0s"}, loading(ollama_requests.GENERATE)),
    "/api/embed": (OLLAMA_EMBED, asked(ollama_requests.decode_embed)),
    "/v1/quote": ({"model": "m", "models": ["a"], "messages": [ASKED]}, asked(quotes.decode)),
    "/tokenize": ({"prompt": "x"}, lambda body: tokens.decode(body, {}, "rcpt_1", "m")),
    "/detokenize": ({"tokens": [1, 2], "model": "m"}, tokens.decode_tokens),
    "/admin/keys": (KEY, control.decode_key),
    "/admin/budgets": (BUDGET, control.decode_budget),
}


def refusal(decode: Decode, body: bytes) -> MillicentError | None:
    try:
        decode(body)
    except MillicentError as error:
        return error
    return None


@pytest.mark.parametrize("address", BODIES)
def test_anything_in_any_place_is_understood_or_refused_in_one_line(address: str) -> None:
    body, decode = BODIES[address]
    decode(json.dumps(body).encode())
    for changed in anything_anywhere(body):
        error = refusal(decode, changed)
        if error is None:
            found = decode(changed)
            if isinstance(found, tuple):  # what is asked for can be told to caches and engines
                assert request_digest(found[0], b"secret")
        else:
            assert error.status == 400
            assert error.message.isprintable()
            assert len(error.message) <= 1000
            assert len(error.param or "") <= 200
