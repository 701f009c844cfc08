"""What Anthropic's Messages answer with, as its documentation writes it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
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


def answer(
    blocks: list[dict[str, Any]], reason: str = "end_turn", stop: str | None = None, usage: dict[str, Any] = USAGE
) -> bytes:
    """A whole stream."""
    return events(
        {"type": "message_start", "message": message([], usage)},
        {"type": "ping"},
        *blocks,
        {"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": stop}, "usage": ENDED},
        {"type": "message_stop"},
    )


@dataclass
class PromptCache:
    """Anthropic's prompt cache: what a request's `usage` is, by its marks and what was sent before.

    Prefixes are cut at blocks, of tools, then the system prompt, then messages; a token is four bytes of text. A prefix
    is kept where a mark stands, if it has `least_tokens`, for the mark's time after it was last used, and found from a
    mark up to 20 blocks before it. At most four marks, longer-lived ones first.
    """

    least_tokens: int = 1024
    kept: dict[str, tuple[int, int]] = field(default_factory=dict)  # until when, and for how long after each use

    def usage(
        self, body: dict[str, Any], now_ns: int, writing: dict[str, tuple[int, int]] | None = None
    ) -> dict[str, Any]:
        """`writing` takes what will be kept, for those who keep it when the answer has ended."""
        kept = self.kept if writing is None else writing
        blocks = _blocks(body)
        ends, names = [], []
        name, length = hashlib.sha256(), 0
        for block, text_bytes in blocks:
            name.update(json.dumps(_unmarked(block), sort_keys=True).encode())
            length += text_bytes
            names.append(name.hexdigest())
            ends.append(length // 4)
        marks = [(i, _TTL_S[block["cache_control"].get("ttl", "5m")]) for i, (block, _) in enumerate(blocks)
                 if "cache_control" in block]  # fmt: skip
        assert len(marks) <= 4, "at most 4 blocks may have cache_control"
        assert [ttl for _, ttl in marks] == sorted((ttl for _, ttl in marks), reverse=True), (
            "ttl 1h must come before 5m"
        )
        marks = [(i, ttl_s) for i, ttl_s in marks if ends[i] >= self.least_tokens]
        hit = max((self._hit(names, i, now_ns) for i, _ in marks), default=-1)
        read = ends[hit] if hit >= 0 else 0
        if hit >= 0:
            ttl_ns = self.kept[names[hit]][1]
            self.kept[names[hit]] = (now_ns + ttl_ns, ttl_ns)
        written, so_far = {300: 0, 3600: 0}, read
        for i, ttl_s in marks:
            if i > hit:
                written[ttl_s] += ends[i] - so_far
                so_far = ends[i]
                kept[names[i]] = (now_ns + ttl_s * 10**9, ttl_s * 10**9)
        return {
            "input_tokens": (ends[-1] if ends else 0) - so_far,
            "cache_read_input_tokens": read,
            "cache_creation_input_tokens": sum(written.values()),
            "cache_creation": {
                "ephemeral_5m_input_tokens": written[300],
                "ephemeral_1h_input_tokens": written[3600],
            },
            "output_tokens": 1,
        }

    def _hit(self, names: list[str], mark: int, now_ns: int) -> int:
        found = (i for i in range(mark, max(-1, mark - 21), -1) if self.kept.get(names[i], (0, 0))[0] > now_ns)
        return next(found, -1)


_TTL_S = {"5m": 300, "1h": 3600}


def _blocks(body: dict[str, Any]) -> list[tuple[dict[str, Any], int]]:
    """With the bytes of text in each."""
    system = body.get("system", [])
    found = [*body.get("tools", []), *([{"type": "text", "text": system}] if isinstance(system, str) else system)]
    for message in body["messages"]:
        content = message["content"]
        found += [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [(block, len(str(block.get("text", json.dumps(_unmarked(block)))).encode())) for block in found]


def _unmarked(block: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in block.items() if name != "cache_control"}
