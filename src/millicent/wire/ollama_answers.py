"""Answers in Ollama's native dialect: whole, and as lines of JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from millicent.core.chunks import CallPiece, FinishReason, Text, merge_pieces
from millicent.core.clock import iso_utc
from millicent.core.receipts import Receipt
from millicent.wire.ollama_common import done, head, line
from millicent.wire.ollama_requests import CHAT, Load
from millicent.wire.openai_embeddings import numbers_of
from millicent.wire.openai_logprobs import chat_logprobs
from millicent.wire.tool_arguments import arguments_object


def answer_body(receipt: Receipt, text: Text, reason: FinishReason, kind: str) -> dict[str, Any]:
    return head(receipt) | _said(text, kind, _calls(text.calls)) | _logprobs(text) | done(receipt, reason)


def load_body(load: Load, model: str, created_at_ns: int) -> dict[str, Any]:
    """`model` by the name it is served under."""
    said = _said(Text("", 0), load.kind, [])
    ended = {"done": True, "done_reason": "unload" if load.unloads else "load"}
    return {"model": model, "created_at": iso_utc(created_at_ns)} | said | ended


def embed_body(receipt: Receipt, text: str) -> dict[str, Any]:
    """`text` has a line for each vector (`core.chunks.Vector.line`)."""
    ended = done(receipt, FinishReason.STOP)
    told = ("total_duration", "load_duration", "prompt_eval_count", "receipt", "cost", "cost_details")
    return {"model": receipt.model, "embeddings": numbers_of(text)} | {name: ended[name] for name in told}


class Stream:
    """The lines of one streamed answer. Calls of tools come whole, when they are."""

    wants_usage = False

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._calls: list[CallPiece] = []

    def start(self, receipt: Receipt) -> bytes:  # noqa: ARG002 - this dialect has no opening line
        return b""

    def text(self, receipt: Receipt, text: Text) -> bytes:
        self._calls += text.calls
        if not (text.text or text.reasoning or text.logprobs):
            return b""
        return line(head(receipt) | _said(text, self._kind, []) | _logprobs(text) | {"done": False})

    def end(self, receipt: Receipt, reasons: Sequence[FinishReason]) -> bytes:
        """Everything after the text: sent only once the receipt is durable."""
        nothing = Text("", 0)
        lines = b""
        if calls := _calls(merge_pieces(self._calls)):
            lines = line(head(receipt) | _said(nothing, self._kind, calls) | {"done": False})
        return lines + line(head(receipt) | _said(nothing, self._kind, []) | done(receipt, reasons[0]))


def _said(text: Text, kind: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    thinking = {"thinking": text.reasoning} if text.reasoning else {}
    if kind != CHAT:
        return {"response": text.text} | thinking
    message = {"role": "assistant", "content": text.text} | thinking
    return {"message": message | ({"tool_calls": calls} if calls else {})}


def _calls(calls: Sequence[CallPiece]) -> list[dict[str, Any]]:
    return [
        {"function": {"index": call.index, "name": call.name, "arguments": arguments_object(call.arguments)}}
        for call in calls
    ]


def _logprobs(text: Text) -> dict[str, Any]:
    told = chat_logprobs(text.logprobs)
    return {} if told is None else {"logprobs": told["content"]}
