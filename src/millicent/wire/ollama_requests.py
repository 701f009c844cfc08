"""Ollama's native requests: `POST /api/chat`, `/api/generate`, `/api/embed`. Answers stream unless told otherwise."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from millicent.core.errors import InvalidRequest
from millicent.core.request import (
    Embedding,
    Extra,
    ImagePart,
    Message,
    Part,
    Request,
    Sampling,
    TextPart,
    Thought,
    ToolCall,
)
from millicent.wire import ollama_common as common
from millicent.wire import openai_tools
from millicent.wire.attribution import read_attribution
from millicent.wire.decoding import decode_with_extra, json_text, refuse_unless_neutral
from millicent.wire.openai_common import ModelName
from millicent.wire.openai_generation import MAX_LOGPROBS

CHAT, GENERATE, EMBED = "ollama.chat", "ollama.generate", "ollama.embed"
_MAX_INPUTS = 2048
# What Ollama has defaults for that change something.
_DRAWN = ("temperature", "top_p", "top_k")

# A duration of nothing, as Go writes them: "0", "0s", "0h0m".
_NOTHING = re.compile(r"[-+]?(?:0|(?:(?:0+(?:\.0*)?|\.0+)(?:h|m|s|ms|us|µs|μs|ns))+)")

# How base64 of a picture begins.
_PICTURES = {"iVBOR": "image/png", "/9j/": "image/jpeg", "R0lGOD": "image/gif", "UklGR": "image/webp"}


class CalledFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    arguments: dict[str, msgspec.Raw] | None = None
    index: int | None = None
    description: str | None = None


class Called(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    function: CalledFunction
    id: str | None = None
    type: str | None = None


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: list[str] | None = None
    tool_calls: list[Called] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class _Common(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`keep_alive` is a hint, but for a load's 0: how long a model stays is the operator's to say, in [models.NAME]."""

    model: ModelName
    options: common.Options | None = None
    keep_alive: float | str | None = None


class _Answered(_Common, frozen=True, forbid_unknown_fields=True, kw_only=True):
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_LOGPROBS)] | None = None


class ChatBody(_Answered, frozen=True, forbid_unknown_fields=True, kw_only=True):
    messages: list[ChatMessage] | None = None
    tools: openai_tools.Tools | None = None


class GenerateBody(_Answered, frozen=True, forbid_unknown_fields=True, kw_only=True):
    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    images: list[str] | None = None
    # refused by name unless neutral
    suffix: Any = None
    template: Any = None
    context: Any = None


class EmbedBody(_Common, frozen=True, forbid_unknown_fields=True, kw_only=True):
    input: str | list[str]
    truncate: bool | None = None
    dimensions: Annotated[int, msgspec.Meta(ge=1, le=100_000)] | None = None


_NEUTRAL_TO_GENERATE: dict[str, tuple[Any, ...]] = {"suffix": ("",), "template": ("",), "context": ([],)}


class Load(msgspec.Struct, frozen=True):
    """A request that generates nothing: its model is to be loaded, or unloaded."""

    kind: str
    model: str
    stream: bool
    unloads: bool


class _Said(msgspec.Struct, frozen=True):
    prompt: str | None = None
    images: list[msgspec.Raw] | None = None
    messages: list[msgspec.Raw] | None = None


_said = msgspec.json.Decoder(_Said)
_chat = msgspec.json.Decoder(ChatBody)
_generate = msgspec.json.Decoder(GenerateBody)
_embed = msgspec.json.Decoder(EmbedBody)


def read_load(kind: str, body: bytes, headers: Mapping[str, str]) -> Load | None:
    """None where something is to be generated, and where that can't be told: decoding says what is wrong then.

    Raises InvalidRequest for a load with a field that would be refused beside a prompt.
    """
    try:
        said = _said.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if said.messages if kind == CHAT else said.prompt or said.images:
        return None
    if kind == CHAT:
        return _load(kind, headers, *decode_with_extra(body, _chat, ChatBody.__struct_fields__))
    asked, extra = decode_with_extra(body, _generate, GenerateBody.__struct_fields__)
    refuse_unless_neutral(asked, _NEUTRAL_TO_GENERATE)
    return _load(kind, headers, asked, extra)


def _load(kind: str, headers: Mapping[str, str], asked: _Answered, extra: dict[str, Extra]) -> Load:
    request = _request(kind, asked, headers, "", extra, messages=())
    request.refuse_foreign()
    return Load(kind, asked.model, request.stream, _unloads(asked.keep_alive))


def _unloads(keep_alive: float | str | None) -> bool:
    return bool(_NOTHING.fullmatch(keep_alive)) if isinstance(keep_alive, str) else keep_alive == 0


def decode_chat(body: bytes, headers: Mapping[str, str], receipt_id: str) -> tuple[Request, str]:
    """Raises InvalidRequest, as the others here do, naming the field."""
    asked, extra = decode_with_extra(body, _chat, ChatBody.__struct_fields__)
    if not asked.messages:
        raise InvalidRequest("`messages` is empty: send at least one message.", param="messages")
    tools = openai_tools.read_tools([tool.function for tool in asked.tools or ()])
    messages = _messages(asked.messages)
    return _request(CHAT, asked, headers, receipt_id, extra, messages=messages, tools=tools), CHAT


def decode_generate(body: bytes, headers: Mapping[str, str], receipt_id: str) -> tuple[Request, str]:
    asked, extra = decode_with_extra(body, _generate, GenerateBody.__struct_fields__)
    refuse_unless_neutral(asked, _NEUTRAL_TO_GENERATE)
    text = asked.prompt or ""
    if not (text or asked.images):
        raise InvalidRequest("`prompt` is empty: send some text.", param="prompt")
    if asked.raw:
        for field in ("system", "images"):
            if getattr(asked, field):
                raise InvalidRequest(
                    f"`{field}` doesn't go with `raw`, which is the whole prompt: leave it out.", param=field
                )
        return _request(GENERATE, asked, headers, receipt_id, extra, prompt=text), GENERATE
    system = [Message("system", asked.system)] if asked.system else []
    prompt = Message("user", _content(text, asked.images, "images"))
    return _request(GENERATE, asked, headers, receipt_id, extra, messages=(*system, prompt)), GENERATE


def decode_embed(body: bytes, headers: Mapping[str, str], receipt_id: str) -> tuple[Request, str]:
    asked, extra = decode_with_extra(body, _embed, EmbedBody.__struct_fields__)
    inputs = (asked.input,) if isinstance(asked.input, str) else tuple(asked.input)
    if not inputs or not all(inputs):
        raise InvalidRequest("`input` is empty, or holds an empty text: send at least one text.", param="input")
    if len(inputs) > _MAX_INPUTS:
        raise InvalidRequest(f"`input` holds {len(inputs)} texts: send at most {_MAX_INPUTS} at once.", param="input")
    if asked.options is not None:
        asked.options.checked()
    request = Request(
        id=receipt_id,
        dialect=EMBED,
        model=asked.model,
        embedding=Embedding(inputs, asked.dimensions, None if asked.truncate is False else -1),
        assumed=("truncate_tokens",) if asked.truncate is None else (),
        attribution=read_attribution(headers),
        extra=extra,
    )
    return request, EMBED


def _request(
    dialect: str, asked: _Answered, headers: Mapping[str, str], receipt_id: str, extra: dict[str, Extra], **what: Any
) -> Request:
    if asked.top_logprobs and not asked.logprobs:
        raise InvalidRequest("`top_logprobs` goes only with `logprobs: true`: send both.", param="top_logprobs")
    options = (asked.options or common.Options()).checked()
    messages: tuple[Message, ...] = what.get("messages", ())
    return Request(
        id=receipt_id,
        dialect=dialect,
        model=asked.model,
        sampling=options.sampling((asked.top_logprobs or 0) if asked.logprobs else None),
        limits=options.limits(),
        output_format=common.read_format(asked.format),
        stream=asked.stream is not False,
        attribution=read_attribution(headers),
        thinking=common.read_think(asked.think),
        extra=extra,
        restated=_restated(options),
        assumed=tuple(field for field in _DRAWN if getattr(options, field) is None),
        continues=bool(messages) and messages[-1].role == "assistant",
        **what,
    )


def _restated(options: common.Options) -> tuple[str, ...]:
    """What was written out with the value that changes nothing."""
    told, neutral = options.sampling(), Sampling()
    return tuple(
        field
        for field in _DRAWN
        if getattr(options, field) is not None and getattr(told, field) == getattr(neutral, field)
    )


def _messages(given: list[ChatMessage]) -> tuple[Message, ...]:
    """Calls have no identifiers here: a tool's answer is that of the first call of its name, or of the first at all,
    that has none yet."""
    open_calls: list[ToolCall] = []
    read = []
    for i, message in enumerate(given):
        where = f"messages[{i}]"
        calls = tuple(
            _call(call, f"{where}.tool_calls[{j}]", f"call_{i}_{j}") for j, call in enumerate(message.tool_calls or ())
        )
        if calls and message.role != "assistant":
            raise InvalidRequest(
                f"`{where}.tool_calls` goes only with the role `assistant`: leave it out.", param=f"{where}.tool_calls"
            )
        open_calls += calls
        answered = _answered(message, open_calls, where) if message.role == "tool" else None
        thoughts = (Thought(message.thinking),) if message.thinking else ()
        content = _content(message.content or "", message.images, f"{where}.images")
        read.append(Message(message.role, content, None, calls, answered, thoughts))
    return tuple(read)


def _call(call: Called, where: str, name: str) -> ToolCall:
    arguments = {key: json_text(value, where) for key, value in (call.function.arguments or {}).items()}
    body = ",".join(f"{msgspec.json.encode(key).decode()}:{value}" for key, value in arguments.items())
    return ToolCall(call.id or name, call.function.name, f"{{{body}}}")


def _answered(message: ChatMessage, open_calls: list[ToolCall], where: str) -> str:
    for call in open_calls:
        named = message.tool_call_id in {None, call.id} and message.tool_name in {None, call.name}
        if named:
            open_calls.remove(call)
            return call.id
    raise InvalidRequest(
        f"`{where}` answers no call of an earlier message: send the assistant's message with its `tool_calls` first.",
        param=where,
    )


def _content(text: str, images: list[str] | None, where: str) -> str | tuple[Part, ...]:
    if not images:
        return text
    parts: list[Part] = [TextPart(text)] if text else []
    for i, data in enumerate(images):
        kind = next((kind for begin, kind in _PICTURES.items() if data.startswith(begin)), None)
        if kind is None:
            raise InvalidRequest(
                f"`{where}[{i}]` is no PNG, JPEG, GIF or WebP in base64: send one of these.", param=f"{where}[{i}]"
            )
        parts.append(ImagePart(kind, data))
    return tuple(parts)
