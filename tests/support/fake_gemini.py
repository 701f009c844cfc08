"""What Gemini's `streamGenerateContent?alt=sse` answers with, as its documentation writes it."""

from __future__ import annotations

import json
from typing import Any

USAGE = {
    "promptTokenCount": 300, "candidatesTokenCount": 12, "totalTokenCount": 352, "thoughtsTokenCount": 30,
    "toolUsePromptTokenCount": 10, "cachedContentTokenCount": 40,
    "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 42}, {"modality": "IMAGE", "tokenCount": 258}],
    "cacheTokensDetails": [{"modality": "TEXT", "tokenCount": 32}, {"modality": "IMAGE", "tokenCount": 8}],
}  # fmt: skip


def events(*bodies: dict[str, Any]) -> bytes:
    return b"".join(f"data: {json.dumps(body, ensure_ascii=False)}\r\n\r\n".encode() for body in bodies)


def chunk(*parts: dict[str, Any], reason: str | None = None, index: int = 0, **more: Any) -> dict[str, Any]:
    candidate: dict[str, Any] = {"content": {"parts": list(parts), "role": "model"}} if parts else {}
    if index:
        candidate["index"] = index  # a zero isn't written
    if reason is not None:
        candidate["finishReason"] = reason
    usage = {"promptTokenCount": 300, "totalTokenCount": 300}
    return {
        "candidates": [candidate], "usageMetadata": usage, "modelVersion": "gemini-2.5-pro", "responseId": "r-1",
        **more,
    }  # fmt: skip


def text(said: str, **more: Any) -> dict[str, Any]:
    return {"text": said, **more}


def thought(said: str) -> dict[str, Any]:
    return text(said, thought=True)


def called(name: str, args: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"functionCall": {"name": name, "args": args}, **more}


def answer(*parts: dict[str, Any], reason: str = "STOP", usage: dict[str, Any] | None = None) -> bytes:
    """A whole stream, a chunk for each part."""
    last = chunk(text(""), reason=reason, usageMetadata=USAGE if usage is None else usage)
    return events(*(chunk(part) for part in parts), last)
