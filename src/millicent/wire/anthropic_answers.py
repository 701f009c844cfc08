"""Answers of `POST /v1/messages`: whole, and as a stream of blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from millicent.core.chunks import CallPiece, FinishReason, Text
from millicent.core.receipts import Receipt
from millicent.wire.anthropic_common import event, usage_body
from millicent.wire.tool_arguments import arguments_object

_STOP_REASONS = {
    FinishReason.LENGTH: "max_tokens",
    FinishReason.TOOL_CALLS: "tool_use",
    FinishReason.CONTENT_FILTER: "refusal",
}


def answer_body(receipt: Receipt, texts: Sequence[Text], reason: FinishReason) -> dict[str, Any]:
    """A whole answer: what was thought, said and called, in the order it came."""
    content: list[dict[str, Any]] = []
    calls: dict[int, list[str]] = {}
    for text in texts:
        last = content[-1] if content else {"type": ""}
        if text.reasoning or text.signature:
            if last["type"] != "thinking" or last["signature"]:
                content.append(last := {"type": "thinking", "thinking": "", "signature": ""})
            last["thinking"] += text.reasoning
            last["signature"] = text.signature
        if text.sealed:
            content.append({"type": "redacted_thinking", "data": text.sealed})
        if text.text:
            if content and content[-1]["type"] == "text":
                content[-1]["text"] += text.text
            else:
                content.append({"type": "text", "text": text.text})
        for call in text.calls:
            if call.index not in calls:
                calls[call.index] = []
                content.append(_call_block(receipt, call))
            calls[call.index].append(call.arguments)
    blocks = [block for block in content if block["type"] == "tool_use"]
    for block, arguments in zip(blocks, calls.values(), strict=True):
        block["input"] = arguments_object("".join(arguments))
    stop = "".join(text.stop for text in texts)
    return _message(receipt) | {"content": content, "usage": usage_body(receipt)} | _ending(reason, stop)


def call_id(receipt: Receipt, index: int) -> str:
    """The same whenever the answer is given again."""
    return f"toolu_{receipt.id.removeprefix('rcpt_')}_{index}"


def _message(receipt: Receipt) -> dict[str, Any]:
    return {
        "id": "msg_" + receipt.id.removeprefix("rcpt_"),
        "type": "message",
        "role": "assistant",
        "model": receipt.model,
    }


def _ending(reason: FinishReason, stop: str) -> dict[str, Any]:
    """Anthropic knows no `cancelled`: a client that has gone doesn't read it, a server that stops ends the turn."""
    stopped = "stop_sequence" if stop else "end_turn"
    return {"stop_reason": _STOP_REASONS.get(reason, stopped), "stop_sequence": stop or None}


def _call_block(receipt: Receipt, call: CallPiece) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id(receipt, call.index), "name": call.name, "input": {}}


class Stream:
    """The events of one streamed answer. It begins with the first that there is to say, when what was read and cached
    is known; before that, heartbeats tell that somebody is at work."""

    def __init__(self, _: object) -> None:
        self._started = False
        self._blocks = 0  # how many there were
        self._open = ""  # the type of the last, while it is open
        self._call_blocks: dict[int, int] = {}
        self._stop = ""

    @property
    def wants_usage(self) -> bool:
        """Whether the next receipt should have what is known so far."""
        return not self._started

    def start(self, receipt: Receipt) -> bytes:  # noqa: ARG002 - nothing is known yet
        return b""

    def text(self, receipt: Receipt, text: Text) -> bytes:
        self._stop = text.stop or self._stop
        return b"".join([*self._begin(receipt), *self._parts(receipt, text)])

    def end(self, receipt: Receipt, reasons: Sequence[FinishReason]) -> bytes:
        """Everything after the text: sent only once the receipt is durable."""
        delta = {"type": "message_delta", "delta": _ending(reasons[0], self._stop), "usage": usage_body(receipt)}
        return b"".join([*self._begin(receipt), *self._close(), event(delta), event({"type": "message_stop"})])

    def _begin(self, receipt: Receipt) -> Iterator[bytes]:
        if not self._started:
            self._started = True
            head = _message(receipt) | {"content": [], "stop_reason": None, "stop_sequence": None}
            yield event({"type": "message_start", "message": head | {"usage": usage_body(receipt)}})

    def _parts(self, receipt: Receipt, text: Text) -> Iterator[bytes]:
        if text.reasoning or text.signature:
            yield from self._within({"type": "thinking", "thinking": "", "signature": ""})
            if text.reasoning:
                yield self._delta({"type": "thinking_delta", "thinking": text.reasoning})
            if text.signature:
                yield self._delta({"type": "signature_delta", "signature": text.signature})
                yield from self._close()
        if text.sealed:
            yield from self._within({"type": "redacted_thinking", "data": text.sealed})
            yield from self._close()
        if text.text:
            yield from self._within({"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": text.text})
        for call in text.calls:
            yield from self._call(receipt, call)

    def _call(self, receipt: Receipt, call: CallPiece) -> Iterator[bytes]:
        if call.index not in self._call_blocks:
            yield from self._close()
            yield from self._within(_call_block(receipt, call))
            self._call_blocks[call.index] = self._blocks - 1
        if call.arguments:
            delta = {"type": "input_json_delta", "partial_json": call.arguments}
            yield self._delta(delta, self._call_blocks[call.index])

    def _within(self, block: dict[str, Any]) -> Iterator[bytes]:
        """The block of this type that is open, or a new one."""
        if self._open == block["type"]:
            return
        yield from self._close()
        self._open = block["type"]
        yield event({"type": "content_block_start", "index": self._blocks, "content_block": block})
        self._blocks += 1

    def _delta(self, delta: dict[str, Any], index: int | None = None) -> bytes:
        at = self._blocks - 1 if index is None else index
        return event({"type": "content_block_delta", "index": at, "delta": delta})

    def _close(self) -> Iterator[bytes]:
        if self._open:
            self._open = ""
            yield event({"type": "content_block_stop", "index": self._blocks - 1})
