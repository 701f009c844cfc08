"""OpenAI chat completions: `POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec

from millicent.core.chunks import FinishReason, Text
from millicent.core.errors import InvalidRequest
from millicent.core.receipts import Receipt
from millicent.core.request import Extra, Message, Part, Request, TextPart, Thinking, Thought
from millicent.wire import openai_common as common
from millicent.wire import openai_generation as generation
from millicent.wire import openai_parts, openai_tools
from millicent.wire.attribution import read_attribution
from millicent.wire.decoding import decode_with_extra, refuse_unless_neutral
from millicent.wire.openai_logprobs import chat_logprobs

DIALECT = "openai.chat"


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Clients send an assistant's message back as they got it, so the fields that came with it are known here."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[msgspec.Raw] | None = None
    name: str | None = None
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    tool_calls: list[openai_tools.Called] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None  # what was thought before an earlier answer; only some models want it back


class ChatBody(generation.GenerationFields, frozen=True, forbid_unknown_fields=True, kw_only=True):
    # honoured
    model: common.ModelName
    messages: list[ChatMessage]
    stream: bool | None = None
    stream_options: common.StreamOptions | None = None
    max_tokens: generation.Tokens | None = None
    max_completion_tokens: generation.Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=generation.MAX_LOGPROBS)] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    tools: openai_tools.Tools | None = None
    tool_choice: openai_tools.Choice | None = None
    parallel_tool_calls: bool | None = None
    service_tier: str | None = None  # what the placement is charged at decides
    reasoning_effort: Any = None
    # harmless hints: they ask for nothing that changes an answer; an upstream of this dialect gets them
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    # passed on to an upstream of this dialect; refused by name elsewhere, unless neutral
    prediction: Any = None
    verbosity: Any = None
    store: Any = None
    # refused by name unless neutral: what they ask for has no place in an answer here
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    web_search_options: Any = None


_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
_HINTS = ("prompt_cache_key", "prompt_cache_retention", "safety_identifier")
_PASSED_ON: dict[str, tuple[Any, ...]] = {
    "reasoning_effort": ("none",),
    "prediction": (),
    "verbosity": ("medium",),
    "store": (False,),
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
}
_NEUTRAL_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "refusal": (),
    "annotations": ([],),
    "audio": (),
    "function_call": (),
}

_decoder = msgspec.json.Decoder(ChatBody)
_KNOWN = frozenset(ChatBody.__struct_fields__) | frozenset(ChatMessage.__struct_fields__)


def decode(body: bytes, headers: Mapping[str, str], receipt_id: str) -> tuple[Request, common.StreamShape]:
    """Raises InvalidRequest, naming the field."""
    chat, unknown = decode_with_extra(body, _decoder, _KNOWN)
    refuse_unless_neutral(chat, _NEUTRAL)
    if not chat.messages:
        raise InvalidRequest("`messages` is empty: send at least one message.", param="messages")
    if chat.max_tokens and chat.max_completion_tokens and chat.max_tokens != chat.max_completion_tokens:
        raise InvalidRequest(
            "`max_tokens` and `max_completion_tokens` differ: send only the latter.", param="max_completion_tokens"
        )
    if chat.top_logprobs and not chat.logprobs:
        raise InvalidRequest("`top_logprobs` goes only with `logprobs: true`: send both.", param="top_logprobs")
    stream = bool(chat.stream)
    tools = openai_tools.read_tools([tool.function for tool in chat.tools or ()])
    tool_choice, tool_name = openai_tools.read_choice(chat.tool_choice, tools)
    request = Request(
        id=receipt_id,
        dialect=DIALECT,
        model=chat.model,
        messages=tuple(_message(message, f"messages[{i}]") for i, message in enumerate(chat.messages)),
        sampling=chat.sampling((chat.top_logprobs or 0) if chat.logprobs else None),
        limits=chat.limits(chat.max_completion_tokens or chat.max_tokens),
        output_format=chat.output_format(),
        tools=tools,
        tool_choice=tool_choice,
        tool_name=tool_name,
        parallel_tool_calls=chat.parallel_tool_calls is not False,
        stream=stream,
        choices=chat.n or 1,
        truncate_prompt_tokens=chat.truncate_prompt_tokens,
        priority=chat.priority or 0,
        attribution=read_attribution(headers, user=chat.user, metadata=chat.metadata),
        thinking=_thinking(chat, unknown.get("chat_template_kwargs")),
        extra=_extra(chat) | generation.known_elsewhere(unknown),
        restated=chat.restated(),
    )
    return request, common.StreamShape.of(stream=stream, options=chat.stream_options, choices=request.choices)


def _thinking(chat: ChatBody, template: Extra | None) -> Thinking | None:
    """As OpenAI's field says, or as vLLM's clients do: by the switch that models' chat templates have."""
    if chat.reasoning_effort in _EFFORTS:
        return Thinking(chat.reasoning_effort)
    if template is not None and msgspec.json.decode(template.json) == {"enable_thinking": False}:
        return Thinking("none")
    return None


def _extra(chat: ChatBody) -> dict[str, Extra]:
    """What only an upstream of this dialect makes something of."""
    extra = {
        field: Extra(msgspec.json.encode(getattr(chat, field)).decode(), None)
        for field in _HINTS
        if getattr(chat, field) is not None
    }
    for field, neutral in _PASSED_ON.items():
        value = getattr(chat, field)
        if value is None or (field == "reasoning_effort" and value in _EFFORTS):
            continue
        try:
            refuse_unless_neutral(chat, {field: neutral})
            refusal, code = None, "unsupported_parameter"
        except InvalidRequest as error:
            refusal, code = error.message, error.code
        extra[field] = Extra(msgspec.json.encode(value).decode(), refusal, code)
    return extra


def _message(message: ChatMessage, where: str) -> Message:
    refuse_unless_neutral(message, _NEUTRAL_IN_MESSAGE, where)
    role = "system" if message.role == "developer" else message.role
    if (role == "tool") != (message.tool_call_id is not None):
        raise InvalidRequest(
            f"`{where}.tool_call_id` goes with the role `tool`, and only with it: send both or neither.",
            param=f"{where}.tool_call_id",
        )
    calls = openai_tools.read_calls(message.tool_calls or (), where)
    if calls and role != "assistant":
        raise InvalidRequest(
            f"`{where}.tool_calls` goes only with the role `assistant`: leave it out.", param=f"{where}.tool_calls"
        )
    content = "" if calls and message.content is None else _content(message.content, where)
    thoughts = (Thought(message.reasoning_content),) if message.reasoning_content else ()
    return Message(role, content, message.name, calls, message.tool_call_id, thoughts)


def _content(content: str | list[msgspec.Raw] | None, where: str) -> str | tuple[Part, ...]:
    if isinstance(content, str):
        return content
    if content is None:
        raise InvalidRequest(
            f"`{where}.content` is missing: send the text.",
            param=f"{where}.content",
            code="missing_required_parameter",
        )
    parts = tuple(openai_parts.read(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    if all(isinstance(part, TextPart) for part in parts):
        return "".join(part.text for part in parts if isinstance(part, TextPart))
    return parts


def completion_id(receipt: Receipt) -> str:
    return "chatcmpl-" + receipt.id.removeprefix("rcpt_")


def answer_body(receipt: Receipt, texts: Sequence[Text], reasons: Sequence[FinishReason]) -> dict[str, Any]:
    """A whole answer: the text of each choice, in order, and why it ended."""
    return {
        "id": completion_id(receipt),
        "object": "chat.completion",
        "created": common.created_s(receipt),
        "model": receipt.model,
        "choices": [
            {
                "index": index,
                "message": _message_body(receipt, index, text),
                "logprobs": chat_logprobs(text.logprobs),
                "finish_reason": common.finish_reason(reason),
            }
            for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ],
        "usage": common.usage_body(receipt),
        "service_tier": "default",
        "system_fingerprint": None,
    }


def _message_body(receipt: Receipt, choice: int, text: Text) -> dict[str, Any]:
    body: dict[str, Any] = {"role": "assistant", "content": text.text, "refusal": None, "annotations": []}
    if text.reasoning:
        body["reasoning_content"] = text.reasoning
    if text.calls:
        body["content"] = text.text or None
        body["tool_calls"] = openai_tools.calls_body(receipt, choice, text.calls)
    return body


class Stream:
    """The events of one streamed answer, in order: `start`, `text`..., `end`."""

    def __init__(self, shape: common.StreamShape) -> None:
        self._shape = shape
        self.wants_usage = shape.running_usage

    def start(self, receipt: Receipt) -> bytes:
        opening = {"role": "assistant", "content": "", "refusal": None}
        return b"".join(self._chunk(receipt, index, opening) for index in range(self._shape.choices))

    def text(self, receipt: Receipt, text: Text) -> bytes:
        delta: dict[str, Any] = {}
        if text.reasoning:
            delta["reasoning_content"] = text.reasoning
        if text.text or not (text.calls or text.reasoning):
            delta["content"] = text.text
        if text.calls:
            delta["tool_calls"] = [openai_tools.piece_body(receipt, text.choice, piece) for piece in text.calls]
        return self._chunk(receipt, text.choice, delta, logprobs=chat_logprobs(text.logprobs))

    def end(self, receipt: Receipt, reasons: Sequence[FinishReason]) -> bytes:
        """Everything after the text: sent only once the receipt is durable."""
        events = b"".join(
            self._chunk(receipt, index, {}, common.finish_reason(reason)) for index, reason in enumerate(reasons)
        )
        if self._shape.usage:
            events += common.event(self._body(receipt) | {"choices": [], "usage": common.usage_body(receipt)})
        return events + common.DONE

    def _chunk(
        self,
        receipt: Receipt,
        index: int,
        delta: dict[str, Any],
        reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> bytes:
        body = self._body(receipt)
        body["choices"] = [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}]
        if self._shape.running_usage:
            body["usage"] = common.usage_body(receipt)
        elif self._shape.usage:
            body["usage"] = None
        return common.event(body)

    @staticmethod
    def _body(receipt: Receipt) -> dict[str, Any]:
        return {
            "id": completion_id(receipt),
            "object": "chat.completion.chunk",
            "created": common.created_s(receipt),
            "model": receipt.model,
            "service_tier": "default",
            "system_fingerprint": None,
        }
