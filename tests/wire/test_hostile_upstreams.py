"""Answers of servers elsewhere with anything in any place: understood, or said to be none; never a fault of ours."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from millicent.core.chunks import Text, merge_texts
from millicent.core.errors import MillicentError
from millicent.core.usage import Usage
from millicent.wire import (
    anthropic_upstream_answers,
    gemini_embeddings,
    gemini_upstream_answers,
    openai_upstream_answers,
)
from millicent.wire.upstream_answers import AnswerReader
from millicent.wire.upstream_errors import complaint_in, error_of
from support import fake_gemini
from support.anything import anything_anywhere
from support.fake_upstream import USAGE, chunk

CALL = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
LIKELY = {"token": "a", "logprob": -1.0, "bytes": [97]}
CHAT_LOGPROBS = {"content": [{**LIKELY, "top_logprobs": [LIKELY]}], "refusal": None}
TEXT_LOGPROBS = {"tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": [{"a": -1.0}], "text_offset": [0]}
PARTS = [{"type": "text", "text": "t"}, {"type": "thinking", "thinking": [{"type": "text", "text": "q"}]}]


def choice(**fields: Any) -> dict[str, Any]:
    return chunk({}) | {"choices": [{"index": 0, "finish_reason": None, **fields}]}


OPENAI = [
    chunk({"role": "assistant", "content": "x", "refusal": "no", "reasoning_content": "r", "tool_calls": [CALL]}),
    choice(delta={"content": "x"}, logprobs=CHAT_LOGPROBS),
    choice(text="x", logprobs=TEXT_LOGPROBS, finish_reason="stop"),
    chunk(usage=USAGE | {"cost": 0.1, "prompt_cache_hit_tokens": 3}),
    choice(message={"content": PARTS, "tool_calls": [CALL]}, finish_reason="tool_calls") | {"usage": USAGE},
    {"id": "1", "x_groq": {"usage": USAGE}, "choices": []},
    {"error": {"message": "m", "code": 429, "type": "t", "param": "p"}},
]  # fmt: skip
ANTHROPIC_USAGE = {
    "input_tokens": 3, "output_tokens": 1, "cache_read_input_tokens": 1, "cache_creation_input_tokens": 2,
    "cache_creation": {"ephemeral_5m_input_tokens": 1, "ephemeral_1h_input_tokens": 1},
    "output_tokens_details": {"thinking_tokens": 0},
}  # fmt: skip
BLOCKS = [
    {"type": "text", "text": "x"}, {"type": "tool_use", "id": "i", "name": "f", "input": {"a": 1}},
    {"type": "thinking", "thinking": "t", "signature": "s"}, {"type": "redacted_thinking", "data": "d"},
]  # fmt: skip
MESSAGE: dict[str, Any] = {"id": "m", "model": "c", "content": [], "stop_reason": None, "usage": ANTHROPIC_USAGE}
ANTHROPIC: list[dict[str, Any]] = [
    {"type": "message_start", "message": MESSAGE},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": "x"}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "x"}},
    {"type": "content_block_start", "index": 1, "content_block": {"type": "tool_use", "id": "i", "name": "f"}},
    {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": "{"}},
    {"type": "content_block_stop", "index": 1},
    {
        "type": "message_delta",
        "delta": {"stop_reason": "end_turn", "stop_sequence": "s"},
        "usage": {"output_tokens": 5},
    },
    {"type": "error", "error": {"type": "overloaded_error", "message": "m"}},
    {"type": "message", **MESSAGE, "content": BLOCKS, "stop_reason": "tool_use"},
]
GEMINI_TOKEN = {"token": "a", "logProbability": -1.0}
GEMINI_LOGPROBS = {"chosenCandidates": [GEMINI_TOKEN], "topCandidates": [{"candidates": [GEMINI_TOKEN]}]}
GEMINI = [
    fake_gemini.chunk(
        fake_gemini.text("x"), fake_gemini.thought("t"), fake_gemini.called("f", {"a": 1}, thoughtSignature="s"),
        reason="STOP", usageMetadata=fake_gemini.USAGE,
    ),
    {"candidates": [{"content": {"parts": [{"text": "x"}]}, "logprobsResult": GEMINI_LOGPROBS}]},
    {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": fake_gemini.USAGE},
    {"error": {"code": 429, "message": "m", "status": "X", "details": [{"retryDelay": "3.5s", "reason": "r"}]}},
]  # fmt: skip

READERS: list[tuple[Callable[[], AnswerReader], dict[str, Any]]] = [
    *((lambda: openai_upstream_answers.AnswerReader(1), body) for body in OPENAI),
    *((anthropic_upstream_answers.AnswerReader, body) for body in ANTHROPIC),
    *((lambda: gemini_upstream_answers.AnswerReader(1), body) for body in GEMINI),
]


@pytest.mark.parametrize(("reader_of", "body"), READERS)
def test_anything_in_an_answer_is_understood_or_said_to_be_none(
    reader_of: Callable[[], AnswerReader], body: dict[str, Any]
) -> None:
    reader_of().take(json.dumps(body).encode())
    for changed in anything_anywhere(body):
        reader, texts = reader_of(), list[Text]()
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            texts = reader.take(changed)
        for text in merge_texts(texts, in_order=True):
            assert msgspec.convert(msgspec.to_builtins(text), Text).choice == 0
        assert all((count.tokens or 0) < 2**31 for count in (reader.usage or Usage()).leaves.values())
        assert reader.reasons
        assert all(name is None or isinstance(name, str) for name in (reader.id, reader.served_model, reader.failed))


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "m", "type": "t", "code": "c", "param": "p"}}, {"error": "m", "error_type": "t"},
        {"object": "error", "message": "m", "code": 400}, {"detail": [{"loc": ["body"], "msg": "m"}]}, GEMINI[-1],
    ],
)  # fmt: skip
@pytest.mark.parametrize("status", [200, 302, 400, 404, 429, 500])
def test_anything_in_a_complaint_is_one_line(body: dict[str, Any], status: int) -> None:
    for changed in anything_anywhere(body):
        if (found := complaint_in(changed)) is not None:
            error = error_of("It", status, found)
            assert isinstance(error, MillicentError)
            assert error.message.isprintable()
            assert len(error.message) < 600


OPENAI_VECTORS = {"data": [{"embedding": [0.5], "index": 0}], "usage": {"prompt_tokens": 3, "cost": 0.1}, "model": "m"}
GEMINI_VECTORS = {"embeddings": [{"values": [0.5]}], "usageMetadata": {"promptTokenCount": 3}}


@pytest.mark.parametrize(
    ("reader", "body"),
    [(openai_upstream_answers.VectorsReader, OPENAI_VECTORS), (gemini_embeddings.VectorsReader, GEMINI_VECTORS)],
)
def test_anything_among_vectors_is_understood_or_said_to_be_none(reader: Any, body: dict[str, Any]) -> None:
    for changed in anything_anywhere(body):
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            found = reader(changed, 1)
            assert len(found.vectors[0].values) == 4
            assert (found.usage or Usage()).input_tokens in range(2**31)


@pytest.mark.parametrize("values", [b"[1e39]", b"[1e300]", b'"AAA="', b'["a"]', b"[]", b'""', b"[null]"])
def test_what_is_no_vector_is_said_to_be_none(values: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        openai_upstream_answers.VectorsReader(b'{"data":[{"index":0,"embedding":%s}]}' % values, 1)


def test_a_secret_is_hidden_also_where_the_line_ends() -> None:
    said = complaint_in(json.dumps({"error": {"message": "x" * 390 + " sk-secret-1234567890"}}).encode())
    assert "sk-" not in error_of("It", 500, said, secrets=["sk-secret-1234567890"]).message
