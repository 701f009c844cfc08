"""What Anthropic's Messages answer with, as its documentation writes it."""

from __future__ import annotations

import json
from typing import Any

USAGE = {
    "input_tokens": 12, "cache_creation_input_tokens": 24, "cache_read_input_tokens": 7,
    "cache_creation": {"ephemeral_5m_input_tokens": 11, "ephemeral_1h_input_tokens": 13},
    "output_tokens": 1, "service_tier": "standard",
}  # fmt: skip
ENDED = {"output_tokens": 30, "output_tokens_details": {"thinking_tokens": 9}}


def events(*bodies: dict[str, Any]) -> bytes:
    return b"".join(
        f"event: {body['type']}\ndata: {json.dumps(body, ensure_ascii=False)}\n\n".encode() for body in bodies
    )


def message(content: list[dict[str, Any]], usage: dict[str, Any], **ending: Any) -> dict[str, Any]:
    return {
        "id": "msg_01", "type": "message", "role": "assistant", "model": "claude-sonnet-4-20250514",
        "content": content, "stop_reason": None, "stop_sequence": None, "usage": usage, **ending,
    }  # fmt: skip


def block(index: int, opened: dict[str, Any], *deltas: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"type": "content_block_start", "index": index, "content_block": opened},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


def thought(index: int, text: str, signature: str) -> list[dict[str, Any]]:
    return block(
        index,
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "thinking_delta", "thinking": text},
        {"type": "signature_delta", "signature": signature},
    )


def text(index: int, *pieces: str) -> list[dict[str, Any]]:
    return block(index, {"type": "text", "text": ""}, *({"type": "text_delta", "text": piece} for piece in pieces))


def called(index: int, name: str, *pieces: str) -> list[dict[str, Any]]:
    opened = {"type": "tool_use", "id": f"toolu_{index}", "name": name, "input": {}}
    return block(index, opened, *({"type": "input_json_delta", "partial_json": piece} for piece in pieces))


def answer(blocks: list[dict[str, Any]], reason: str = "end_turn", stop: str | None = None) -> bytes:
    """A whole stream."""
    return events(
        {"type": "message_start", "message": message([], USAGE)},
        {"type": "ping"},
        *blocks,
        {"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": stop}, "usage": ENDED},
        {"type": "message_stop"},
    )
