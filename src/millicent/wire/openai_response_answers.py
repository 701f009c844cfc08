"""Answers of `POST /v1/responses`: whole, and as a stream of typed events."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from millicent.core.chunks import CallPiece, FinishReason, Text, TokenLogprob
from millicent.core.clock import NS_PER_S
from millicent.core.errors import MillicentError
from millicent.core.receipts import Receipt
from millicent.core.usage import Leaf
from millicent.wire import openai_common as common
from millicent.wire.openai_logprobs import chat_logprobs
from millicent.wire.openai_response_items import SEALED, SIGNATURE
from millicent.wire.openai_responses import Shape, error_body
from millicent.wire.openai_tools import call_id
from millicent.wire.receipts import encode

_Status = Literal["in_progress", "completed", "incomplete"]

# Why an answer isn't complete.
_INCOMPLETE = {
    FinishReason.LENGTH: "max_output_tokens",
    FinishReason.CONTENT_FILTER: "content_filter",
    FinishReason.CANCELLED: "cancelled",
}


class _Kind(NamedTuple):
    """An item of text: where its only part stands, what that and its events are called."""

    prefix: str
    field: str
    part: str
    events: str
    part_events: str
    counter: str


_MESSAGE = _Kind("msg", "content", "output_text", "response.output_text", "response.content_part", "content_index")
_REASONING = _Kind(
    "rs", "content", "reasoning_text", "response.reasoning_text", "response.content_part", "content_index"
)
_SUMMARY = _Kind(
    "rs",
    "summary",
    "summary_text",
    "response.reasoning_summary_text",
    "response.reasoning_summary_part",
    "summary_index",
)


class _Prose:
    """A message, or what was thought."""

    def __init__(self, kind: _Kind, receipt: Receipt, index: int, *, logprobs: bool) -> None:
        self.kind = kind
        self.open = True
        self.seal: str | None = None
        self._id = f"{kind.prefix}_{receipt.id.removeprefix('rcpt_')}_{index}"
        self._index = index
        self._begun = False  # whether its part is there
        self._pieces: list[str] = []
        self._logprobs: list[dict[str, Any]] | None = [] if logprobs else None

    def begin(self) -> Iterator[dict[str, Any]]:
        """A thought that is only a seal has no part."""
        yield {"type": "response.output_item.added", "output_index": self._index, "item": self.body("in_progress")}

    def add(self, text: str, logprobs: Sequence[TokenLogprob]) -> Iterator[dict[str, Any]]:
        if not self._begun:
            self._begun = True
            yield self._event(f"{self.kind.part_events}.added", part=self._part("", []))
        if not text and not logprobs:
            return
        self._pieces.append(text)
        told = {}
        if self.kind is _MESSAGE:
            entries = (chat_logprobs(logprobs) or {"content": []})["content"]
            if self._logprobs is not None:
                self._logprobs += entries
            told = {"logprobs": entries}
        yield self._event(f"{self.kind.events}.delta", delta=text, **told)

    def close(self, status: _Status) -> Iterator[dict[str, Any]]:
        self.open = False
        if self._begun:
            text = "".join(self._pieces)
            told = {"logprobs": self._logprobs or []} if self.kind is _MESSAGE else {}
            yield self._event(f"{self.kind.events}.done", text=text, **told)
            yield self._event(f"{self.kind.part_events}.done", part=self._part(text, self._logprobs or []))
        yield {"type": "response.output_item.done", "output_index": self._index, "item": self.body(status)}

    def body(self, status: _Status) -> dict[str, Any]:
        parts = [self._part("".join(self._pieces), self._logprobs or [])] if self._begun else []
        if self.kind is _MESSAGE:
            return {"type": "message", "id": self._id, "status": status, "role": "assistant", "content": parts}
        item: dict[str, Any] = {"type": "reasoning", "id": self._id, "status": status, "summary": []}
        item[self.kind.field] = parts
        if self.seal is not None:
            item["encrypted_content"] = self.seal
        return item

    def _part(self, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        part: dict[str, Any] = {"type": self.kind.part, "text": text}
        return part | {"annotations": [], "logprobs": list(logprobs)} if self.kind is _MESSAGE else part

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        where = {"item_id": self._id, "output_index": self._index, self.kind.counter: 0}
        return {"type": kind, **where, **fields}


class _Call:
    """A call of a function. It stays open till the answer ends, since calls' pieces may come in turns."""

    open = True

    def __init__(self, receipt: Receipt, index: int, call: CallPiece) -> None:
        self._id = f"fc_{receipt.id.removeprefix('rcpt_')}_{index}"
        self._call_id = call_id(receipt, 0, call.index)
        self._index = index
        self._name = call.name
        self._pieces: list[str] = []

    def begin(self) -> Iterator[dict[str, Any]]:
        yield {"type": "response.output_item.added", "output_index": self._index, "item": self.body("in_progress")}

    def add(self, arguments: str) -> Iterator[dict[str, Any]]:
        if arguments:
            self._pieces.append(arguments)
            yield self._event("delta", delta=arguments)

    def close(self, status: _Status) -> Iterator[dict[str, Any]]:
        self.open = False
        yield self._event("done", name=self._name, arguments="".join(self._pieces))
        yield {"type": "response.output_item.done", "output_index": self._index, "item": self.body(status)}

    def body(self, status: _Status) -> dict[str, Any]:
        return {
            "type": "function_call",
            "id": self._id,
            "call_id": self._call_id,
            "name": self._name,
            "arguments": "".join(self._pieces),
            "status": status,
        }

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        kind = f"response.function_call_arguments.{kind}"
        return {"type": kind, "item_id": self._id, "output_index": self._index, **fields}


class _Output:
    """An answer's items as they come to be, and the events that tell of it."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._items: list[_Prose | _Call] = []
        self._calls: dict[int, _Call] = {}
        self._complete = True

    def bodies(self) -> list[dict[str, Any]]:
        """Only the last can have been cut off."""
        last = len(self._items) - 1
        return [
            item.body("in_progress" if item.open else self._status(index == last))
            for index, item in enumerate(self._items)
        ]

    def take(self, receipt: Receipt, text: Text) -> Iterator[dict[str, Any]]:
        thought = _SUMMARY if self._shape.summary else _REASONING
        if text.reasoning or text.signature:
            item = yield from self._prose(thought, receipt)
            if text.reasoning:
                yield from item.add(text.reasoning, ())
            if text.signature:
                item.seal = SIGNATURE + text.signature
                yield from item.close("completed")
        if text.sealed:
            yield from self._pause()
            item = yield from self._prose(thought, receipt)
            item.seal = SEALED + text.sealed
            yield from item.close("completed")
        if text.text or text.logprobs:
            item = yield from self._prose(_MESSAGE, receipt)
            yield from item.add(text.text, text.logprobs)
        for call in text.calls:
            if call.index not in self._calls:
                yield from self._pause()
                self._calls[call.index] = made = _Call(receipt, len(self._items), call)
                self._items.append(made)
                yield from made.begin()
            yield from self._calls[call.index].add(call.arguments)

    def close(self, receipt: Receipt, *, complete: bool) -> Iterator[dict[str, Any]]:
        """The end. An answer that says nothing is a message without text."""
        if not self._items:
            item = yield from self._prose(_MESSAGE, receipt)
            yield from item.add("", ())
        self._complete = complete
        last = len(self._items) - 1
        for index, each in enumerate(self._items):
            if each.open:
                yield from each.close(self._status(index == last))

    def break_off(self) -> None:
        """Nothing more comes: what is open stays cut off."""
        self._complete = False
        for item in self._items:
            item.open = False

    def _status(self, last: bool) -> _Status:
        return "incomplete" if last and not self._complete else "completed"

    def _prose(self, kind: _Kind, receipt: Receipt) -> Generator[dict[str, Any], None, _Prose]:
        """The item of this kind that is open, or a new one."""
        last = self._items[-1] if self._items else None
        if isinstance(last, _Prose) and last.open and last.kind is kind:
            return last
        yield from self._pause()
        item = _Prose(kind, receipt, len(self._items), logprobs=self._shape.logprobs)
        self._items.append(item)
        yield from item.begin()
        return item

    def _pause(self) -> Iterator[dict[str, Any]]:
        """Text ends where something else begins."""
        if self._items and self._items[-1].open and isinstance(self._items[-1], _Prose):
            yield from self._items[-1].close("completed")


def answer_body(receipt: Receipt, texts: Sequence[Text], reason: FinishReason, shape: Shape) -> dict[str, Any]:
    """A whole answer: what was thought, said and called, in the order it came."""
    output = _Output(shape)
    for text in texts:
        for _ in output.take(receipt, text):
            pass
    for _ in output.close(receipt, complete=reason not in _INCOMPLETE):
        pass
    return _ended(receipt, reason, shape, output)


class Stream:
    """The events of one streamed answer, numbered, in order: `start`, `text`..., then `end` or `failed`."""

    wants_usage = False

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._output = _Output(shape)
        self._events = 0
        self.response: dict[str, Any] | None = None  # the whole answer, once it has ended

    def start(self, receipt: Receipt) -> bytes:
        response = _response(receipt, self._shape, "in_progress", [])
        kinds = ("response.created", "response.in_progress")
        return b"".join(self._event({"type": kind, "response": response}) for kind in kinds)

    def text(self, receipt: Receipt, text: Text) -> bytes:
        return b"".join(self._event(event) for event in self._output.take(receipt, text))

    def end(self, receipt: Receipt, reasons: Sequence[FinishReason]) -> bytes:
        """Everything after the text: sent only once the receipt is durable."""
        complete = reasons[0] not in _INCOMPLETE
        closing = b"".join(self._event(event) for event in self._output.close(receipt, complete=complete))
        self.response = response = _ended(receipt, reasons[0], self._shape, self._output)
        return closing + self._event({"type": f"response.{response['status']}", "response": response}) + common.DONE

    def failed(self, receipt: Receipt, error: MillicentError) -> bytes:
        """What there is of it stands in the last event, beside what went wrong."""
        self._output.break_off()
        told = error_body(error)["error"]
        response = _response(receipt, self._shape, "failed", self._output.bodies())
        response["error"] = {"code": told["code"] or told["type"], "message": told["message"]}
        return self._event({"type": "response.failed", "response": response}) + common.DONE

    def _event(self, body: dict[str, Any]) -> bytes:
        numbered = {"type": body["type"], "sequence_number": self._events} | body
        self._events += 1
        return f"event: {body['type']}\ndata: ".encode() + encode(numbered) + b"\n\n"


def _ended(receipt: Receipt, reason: FinishReason, shape: Shape, output: _Output) -> dict[str, Any]:
    status = "incomplete" if reason in _INCOMPLETE else "completed"
    response = _response(receipt, shape, status, output.bodies())
    if reason in _INCOMPLETE:
        response["incomplete_details"] = {"reason": _INCOMPLETE[reason]}
    elif receipt.settled_at_ns is not None:
        response["completed_at"] = receipt.settled_at_ns // NS_PER_S
    response["usage"] = _usage(receipt)
    return response


def _response(receipt: Receipt, shape: Shape, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": "resp_" + receipt.id.removeprefix("rcpt_"),
        "object": "response",
        "created_at": common.created_s(receipt),
        "completed_at": None,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "model": receipt.model,
        "output": output,
        "service_tier": "default",
        "usage": None,
        **{field: msgspec.Raw(value.encode()) for field, value in shape.echo.items()},
    }


def _usage(receipt: Receipt) -> dict[str, Any]:
    """Chat's, under this dialect's names. Unknown is null, never 0."""
    usage = common.usage_body(receipt)
    written = [receipt.usage.tokens(leaf) for leaf in (Leaf.INPUT_CACHE_WRITE_5M, Leaf.INPUT_CACHE_WRITE_1H)]
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "cache_write_tokens": None if None in written else sum(filter(None, written)),
        },
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": usage["completion_tokens_details"]["reasoning_tokens"]},
        "total_tokens": usage["total_tokens"],
        "cost": usage["cost"],
        "cost_details": usage["cost_details"],
    }
