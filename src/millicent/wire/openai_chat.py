"""OpenAI chat completions: `POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from millicent.core.errors import InvalidRequest
from millicent.core.receipts import Receipt
from millicent.core.request import Message, Request
from millicent.wire import openai_common as common
from millicent.wire.attribution import read_attribution, read_max_cost
from millicent.wire.decoding import decode_body, refuse_unless_neutral

DIALECT = "openai.chat"


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    text: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    refusal: str | None = None


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Clients send an assistant's message back as they got it, so the fields that came with it are known here."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    tool_calls: Any = None
    tool_call_id: Any = None


class ChatBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    # honoured
    model: common.ModelName
    messages: list[ChatMessage]
    stream: bool | None = None
    stream_options: common.StreamOptions | None = None
    temperature: common.Temperature | None = None
    top_p: common.TopP | None = None
    top_k: common.TopK | None = None
    seed: common.Seed | None = None
    stop: common.Stop | None = None
    max_tokens: common.Tokens | None = None
    max_completion_tokens: common.Tokens | None = None
    ignore_eos: bool | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    # harmless hints: they ask for nothing that changes an answer
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    # refused by name unless neutral
    n: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None
    response_format: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    store: Any = None
    web_search_options: Any = None


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "store": (False,),
    "web_search_options": (),
}
_NEUTRAL_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "refusal": (),
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
    "tool_call_id": (),
}

_decoder = msgspec.json.Decoder(ChatBody)
_KNOWN = frozenset(ChatBody.__struct_fields__) | frozenset(ChatMessage.__struct_fields__)


def decode(body: bytes, headers: Mapping[str, str], receipt_id: str) -> tuple[Request, common.StreamShape]:
    """Raises InvalidRequest, naming the field."""
    chat = decode_body(body, _decoder, _KNOWN)
    refuse_unless_neutral(chat, _NEUTRAL)
    if not chat.messages:
        raise InvalidRequest("`messages` is empty: send at least one message.", param="messages")
    if chat.max_tokens and chat.max_completion_tokens and chat.max_tokens != chat.max_completion_tokens:
        raise InvalidRequest(
            "`max_tokens` and `max_completion_tokens` differ: send only the latter.", param="max_completion_tokens"
        )
    stream = bool(chat.stream)
    request = Request(
        id=receipt_id,
        dialect=DIALECT,
        model=chat.model,
        messages=tuple(_message(message, f"messages[{i}]") for i, message in enumerate(chat.messages)),
        sampling=common.sampling_of(chat.temperature, chat.top_p, chat.top_k, chat.seed),
        limits=common.limits_of(chat.max_completion_tokens or chat.max_tokens, chat.stop, chat.ignore_eos),
        stream=stream,
        attribution=read_attribution(headers, user=chat.user, metadata=chat.metadata),
        max_cost=read_max_cost(headers),
    )
    return request, common.StreamShape.of(stream=stream, options=chat.stream_options)


def _message(message: ChatMessage, where: str) -> Message:
    refuse_unless_neutral(message, _NEUTRAL_IN_MESSAGE, where)
    if message.role in {"tool", "function"}:
        raise InvalidRequest(
            f"`{where}.role` is `{message.role}`: tools are not supported by this server.",
            param=f"{where}.role",
            code="unsupported_parameter",
        )
    role = "system" if message.role == "developer" else message.role
    return Message(role=role, content=_text(message.content, where), name=message.name)


def _text(content: str | list[Part] | None, where: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        raise InvalidRequest(
            f"`{where}.content` is missing: send the text.",
            param=f"{where}.content",
            code="missing_required_parameter",
        )
    for i, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise InvalidRequest(
                f"`{where}.content[{i}]` is a `{part.type}` part: this server takes only text parts.",
                param=f"{where}.content[{i}].type",
                code="unsupported_parameter",
            )
    return "".join(part.text or "" for part in content)


def completion_id(receipt: Receipt) -> str:
    return "chatcmpl-" + receipt.id.removeprefix("rcpt_")


def answer_body(receipt: Receipt, text: str) -> dict[str, Any]:
    """A whole answer."""
    return {
        "id": completion_id(receipt),
        "object": "chat.completion",
        "created": common.created_s(receipt),
        "model": receipt.model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, "refusal": None, "annotations": []},
                "logprobs": None,
                "finish_reason": common.finish_reason(receipt),
            }
        ],
        "usage": common.usage_body(receipt),
        "service_tier": "default",
        "system_fingerprint": None,
    }


class Stream:
    """The events of one streamed answer, in order: `start`, `text`..., `end`."""

    def __init__(self, shape: common.StreamShape) -> None:
        self._shape = shape

    def start(self, receipt: Receipt) -> bytes:
        return self._chunk(receipt, {"role": "assistant", "content": "", "refusal": None}, None)

    def text(self, receipt: Receipt, text: str) -> bytes:
        return self._chunk(receipt, {"content": text}, None)

    def end(self, receipt: Receipt) -> bytes:
        """Everything after the text: sent only once the receipt is durable."""
        events = self._chunk(receipt, {}, common.finish_reason(receipt))
        if self._shape.usage:
            events += common.event(self._body(receipt) | {"choices": [], "usage": common.usage_body(receipt)})
        return events + common.DONE

    def _chunk(self, receipt: Receipt, delta: dict[str, Any], reason: str | None) -> bytes:
        body = self._body(receipt)
        body["choices"] = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]
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
