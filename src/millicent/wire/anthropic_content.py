"""Blocks of Anthropic's messages, as parts, thoughts, calls and tools' answers of ours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import msgspec

from millicent.core.errors import InvalidRequest
from millicent.core.request import CacheMark, ImagePart, Message, OtherPart, Part, TextPart, Thought, ToolCall
from millicent.wire.decoding import decode_at, json_text, refuse_unless_neutral

MediaType = Literal["image/jpeg", "image/png", "image/gif", "image/webp"]


class CacheControl(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["ephemeral"]
    ttl: CacheMark = "5m"


class _Typed(msgspec.Struct, frozen=True):
    type: str


class TextBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    text: str
    cache_control: CacheControl | None = None
    citations: Any = None


class Base64Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="base64"):
    media_type: MediaType
    data: Annotated[str, msgspec.Meta(min_length=1)]


class UrlSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="url"):
    url: Annotated[str, msgspec.Meta(pattern="^https?://")]


class FileSource(msgspec.Struct, frozen=True, tag_field="type", tag="file"):
    """At Anthropic's: only an upstream there has it."""


class ImageBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    source: Base64Source | UrlSource | FileSource
    cache_control: CacheControl | None = None
    transformations: Any = None


class ToolUseBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    id: str
    name: str
    input: msgspec.Raw
    cache_control: CacheControl | None = None
    caller: Any = None
    toolset_name: Any = None


class ToolResultBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    tool_use_id: str
    content: str | list[msgspec.Raw] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None
    toolset_name: Any = None


class ThinkingBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    thinking: str
    signature: str = ""


class RedactedThinkingBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    data: str


Content = str | list[msgspec.Raw]

_typed = msgspec.json.Decoder(_Typed)
_text = msgspec.json.Decoder(TextBlock)
_image = msgspec.json.Decoder(ImageBlock)
_tool_use = msgspec.json.Decoder(ToolUseBlock)
_tool_result = msgspec.json.Decoder(ToolResultBlock)
_thinking = msgspec.json.Decoder(ThinkingBlock)
_redacted = msgspec.json.Decoder(RedactedThinkingBlock)
_object = msgspec.json.Decoder(dict[str, msgspec.Raw])

_NEUTRAL_IN_CALL: dict[str, tuple[Any, ...]] = {"caller": ({"type": "direct"},), "toolset_name": ()}


def cache_of(control: CacheControl | None) -> CacheMark | None:
    return None if control is None else control.ttl


def read_system(system: Content | None) -> tuple[Message, ...]:
    """The system prompt as the first message. Raises InvalidRequest, as all here do, naming the block."""
    if not system:
        return ()
    return (Message("system", _content(system, "system")),)


def read_messages(role: str, content: Content, where: str) -> Iterable[Message]:
    """One of Anthropic's messages, as ours: tools' answers, which stand in a user's, are messages of their own."""
    if role == "assistant":
        return _assistant(content, where)
    if role == "system" or isinstance(content, str):
        return (Message(role, _content(content, f"{where}.content")),)
    return _user(content, where)


def _user(blocks: Sequence[msgspec.Raw], where: str) -> Iterable[Message]:
    parts: list[Part] = []
    for i, raw in enumerate(blocks):
        at = f"{where}.content[{i}]"
        if _type_of(raw, at) != "tool_result":
            parts.append(_part(raw, at, tools_turn=False))
            continue
        if parts:
            yield Message("user", _plain(parts))
            parts = []
        yield _result(raw, at)
    if parts or not blocks:
        yield Message("user", _plain(parts))


def _assistant(content: Content, where: str) -> Iterable[Message]:
    """What was thought, said and called. A thought with a seal keeps its place: after text or a call it begins another
    message, because its maker takes it only where it stood."""
    if isinstance(content, str):
        yield Message("assistant", content)
        return
    thoughts: list[Thought] = []
    parts: list[Part] = []
    calls: list[ToolCall] = []
    for i, raw in enumerate(content):
        at = f"{where}.content[{i}]"
        match _type_of(raw, at):
            case "thinking" | "redacted_thinking" as kind:
                thought = _thought(raw, kind, at)
                if (parts or calls) and (thought.signature or thought.sealed):
                    yield Message("assistant", _plain(parts), tool_calls=tuple(calls), thoughts=tuple(thoughts))
                    thoughts, parts, calls = [], [], []
                thoughts.append(thought)
            case "tool_use":
                calls.append(_call(raw, at))
            case _:
                parts.append(_part(raw, at, tools_turn=False))
    yield Message("assistant", _plain(parts), tool_calls=tuple(calls), thoughts=tuple(thoughts))


def _thought(raw: msgspec.Raw, kind: str, where: str) -> Thought:
    if kind == "redacted_thinking":
        return Thought(sealed=decode_at(raw, _redacted, where).data)
    block = decode_at(raw, _thinking, where)
    return Thought(block.thinking, block.signature or None)


def _call(raw: msgspec.Raw, where: str) -> ToolCall:
    block = decode_at(raw, _tool_use, where)
    refuse_unless_neutral(block, _NEUTRAL_IN_CALL, where)
    decode_at(block.input, _object, f"{where}.input")
    return ToolCall(block.id, block.name, json_text(block.input, f"{where}.input"), cache_of(block.cache_control))


def _result(raw: msgspec.Raw, where: str) -> Message:
    """A mark on the whole of it is one on its last part, which ends there too."""
    block = decode_at(raw, _tool_result, where)
    refuse_unless_neutral(block, {"toolset_name": ()}, where)
    content = _content(block.content or "", f"{where}.content", tools_turn=True)
    mark = cache_of(block.cache_control)
    if mark is not None:
        parts: list[Part] = list(content) if isinstance(content, tuple) else [TextPart(content)]
        last = parts[-1]
        if not isinstance(last, OtherPart):
            parts[-1] = msgspec.structs.replace(last, cache=mark)
        content = tuple(parts)
    return Message("tool", content, tool_call_id=block.tool_use_id, failed=bool(block.is_error))


def _content(content: Content, where: str, *, tools_turn: bool = False) -> str | tuple[Part, ...]:
    if isinstance(content, str):
        return content
    return _plain([_part(raw, f"{where}[{i}]", tools_turn=tools_turn) for i, raw in enumerate(content)])


def _plain(parts: Sequence[Part]) -> str | tuple[Part, ...]:
    """Text alone is enough where it says it all."""
    if not parts:
        return ""
    first = parts[0]
    if len(parts) == 1 and isinstance(first, TextPart) and first.cache is None:
        return first.text
    return tuple(parts)


def _part(raw: msgspec.Raw, where: str, *, tools_turn: bool) -> Part:
    kind = _type_of(raw, where)
    if kind == "text":
        text = decode_at(raw, _text, where)
        if not text.citations:
            return TextPart(text.text, cache_of(text.cache_control))
    elif kind == "image":
        image = decode_at(raw, _image, where)
        if image.transformations is None and not isinstance(image.source, FileSource):
            cache = cache_of(image.cache_control)
            if isinstance(image.source, UrlSource):
                return ImagePart(url=image.source.url, cache=cache)
            return ImagePart(image.source.media_type, image.source.data, cache=cache)
    elif kind in {"tool_use", "tool_result", "thinking", "redacted_thinking"}:
        whose = "nowhere within a tool's answer" if tools_turn else "in a message of the other role"
        raise InvalidRequest(f"`{where}` is a `{kind}` block, which goes {whose}: move it.", param=where)
    return OtherPart(kind, json_text(raw, where), where)


def _type_of(raw: msgspec.Raw, where: str) -> str:
    return decode_at(raw, _typed, where).type
