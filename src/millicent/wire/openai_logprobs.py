"""Log probabilities in OpenAI's two shapes."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from millicent.core.chunks import Candidate, TokenLogprob

_LEAST = -9999.0  # what OpenAI says for a token that cannot be; JSON has no infinity


def chat_logprobs(entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    if not entries:
        return None
    content = [
        _chat_token(entry.content, entry.logprob or 0.0)
        | {"top_logprobs": [_chat_token(one.content, one.logprob) for one in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _chat_token(content: bytes, logprob: float) -> dict[str, Any]:
    """`token` has U+FFFD for what is not a whole character; `bytes` are exact."""
    return {"token": content.decode("utf-8", "replace"), "logprob": max(logprob, _LEAST), "bytes": list(content)}


class CompletionLogprobs:
    """One choice's. Offsets count characters from the choice's beginning, over all of a stream's chunks."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0

    def body(self, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not entries:
            return None
        return {
            "tokens": [_completion_token(entry.content) for entry in entries],
            "token_logprobs": [None if entry.logprob is None else max(entry.logprob, _LEAST) for entry in entries],
            "top_logprobs": [_likeliest(entry) for entry in entries],
            "text_offset": [self._offset(entry.content) for entry in entries],
        }

    def _offset(self, content: bytes) -> int:
        start = self._characters
        self._characters += len(self._utf8.decode(content))
        return start


def _likeliest(entry: TokenLogprob) -> dict[str, float] | None:
    """By text, the token itself always among them. Of those with one text the likeliest counts."""
    if entry.logprob is None:
        return None
    found: dict[str, float] = {}
    for one in (*entry.top, Candidate(entry.content, entry.logprob)):
        found.setdefault(_completion_token(one.content), max(one.logprob, _LEAST))
    return found


def _completion_token(content: bytes) -> str:
    """Bytes that are no whole character are written out, so that different tokens stay different."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
