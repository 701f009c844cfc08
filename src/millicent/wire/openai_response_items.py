"""Input items of OpenAI's Responses, as messages of ours: what was said, thought, called and answered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import msgspec

from millicent.core.errors import InvalidRequest
from millicent.core.request import CacheMark, ImagePart, Message, OtherPart, Part, TextPart, Thought, ToolCall
from millicent.wire import openai_parts
from millicent.wire.decoding import decode_at, refuse_unless_neutral
from millicent.wire.openai_tools import check_arguments, sent_back

# How a provider's seal on a thought, and a thought that it enciphered, are told apart in `encrypted_content`.
SIGNATURE = "signature:"
SEALED = "sealed:"

_Text = Annotated[str, msgspec.Meta(min_length=1)]
_Content = str | list[msgspec.Raw]


class _Typed(msgspec.Struct, frozen=True):
    type: str | None = None
    role: str | None = None


class MessageItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`id`, `status` and `phase` come back with an answer's items; nothing depends on them."""

    role: Literal["user", "assistant", "system", "developer"]
    content: _Content
    type: str | None = None
    id: str | None = None
    status: str | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class CallItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    call_id: _Text
    name: _Text
    arguments: str
    id: str | None = None
    status: str | None = None
    caller: Any = None
    namespace: Any = None
    asynchronous: Any = msgspec.field(default=None, name="async")


class OutputItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    call_id: _Text
    output: _Content
    id: str | None = None
    status: str | None = None
    caller: Any = None


class _Reasoned(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["reasoning_text", "summary_text", "text"]
    text: str


class ReasoningItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    summary: list[_Reasoned] = []
    content: list[_Reasoned] | None = None
    encrypted_content: str | None = None
    id: str | None = None
    status: str | None = None


class _Breakpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    mode: Literal["explicit"]
    ttl: Literal["30m", "12h"] = "30m"


class TextBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    prompt_cache_breakpoint: _Breakpoint | None = None


class RefusalBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    refusal: str


class ImageBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    image_url: str | None = None
    detail: str | None = None
    file_id: Any = None
    prompt_cache_breakpoint: _Breakpoint | None = None


class FileBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    file_data: str | None = None
    filename: str | None = None
    file_id: str | None = None
    file_url: Any = None
    detail: Any = None
    prompt_cache_breakpoint: _Breakpoint | None = None


_typed = msgspec.json.Decoder(_Typed)
_message = msgspec.json.Decoder(MessageItem)
_call = msgspec.json.Decoder(CallItem)
_output = msgspec.json.Decoder(OutputItem)
_reasoning = msgspec.json.Decoder(ReasoningItem)
_text = msgspec.json.Decoder(TextBlock)
_refusal = msgspec.json.Decoder(RefusalBlock)
_image = msgspec.json.Decoder(ImageBlock)
_file = msgspec.json.Decoder(FileBlock)

_DIRECT: tuple[Any, ...] = ({"type": "direct"},)
_NEUTRAL_IN_CALL: dict[str, tuple[Any, ...]] = {"caller": _DIRECT, "namespace": (), "asynchronous": (False,)}


class _Turn:
    """The assistant's turn that items are gathered into: what was thought, then said, then called. What can't come
    after what is there already begins another."""

    def __init__(self) -> None:
        self.thoughts: list[Thought] = []
        self.said: str | tuple[Part, ...] | None = None
        self.calls: list[ToolCall] = []

    def message(self) -> Iterator[Message]:
        if self.thoughts or self.calls or self.said is not None:
            calls, thoughts = tuple(self.calls), tuple(self.thoughts)
            yield Message("assistant", self.said or "", tool_calls=calls, thoughts=thoughts)


def read(items: Sequence[msgspec.Raw]) -> Iterator[Message]:
    """Raises InvalidRequest naming the item."""
    turn = _Turn()
    for i, raw in enumerate(items):
        where = f"input[{i}]"
        kind = decode_at(raw, _typed, where)
        match kind.type or ("message" if kind.role else "item_reference"):
            case "message":
                item = decode_at(raw, _message, where)
                content = _content(item.content, f"{where}.content", item.role)
                if item.role != "assistant" or turn.said is not None or turn.calls:
                    yield from turn.message()
                    turn = _Turn()
                if item.role == "assistant":
                    turn.said = content
                else:
                    yield Message("system" if item.role == "developer" else item.role, content)
            case "function_call":
                turn.calls.append(_tool_call(raw, where))
            case "function_call_output":
                yield from turn.message()
                turn = _Turn()
                answer = decode_at(raw, _output, where)
                refuse_unless_neutral(answer, {"caller": _DIRECT}, where)
                output = _content(answer.output, f"{where}.output", "tool")
                yield Message("tool", output, tool_call_id=answer.call_id)
            case "reasoning":
                if turn.said is not None or turn.calls:
                    yield from turn.message()
                    turn = _Turn()
                turn.thoughts.append(_thought(raw, where))
            case "item_reference":
                raise InvalidRequest(
                    f"`{where}` refers to an item, and none is kept here: send the item itself.",
                    param=where,
                    code="unsupported_parameter",
                )
            case other:
                raise InvalidRequest(
                    f"`{where}` is a `{other}`, which is not taken here: send messages, calls of functions with their "
                    "outputs, and reasoning.",
                    param=f"{where}.type",
                    code="unsupported_parameter",
                )
    yield from turn.message()


def _tool_call(raw: msgspec.Raw, where: str) -> ToolCall:
    item = decode_at(raw, _call, where)
    refuse_unless_neutral(item, _NEUTRAL_IN_CALL, where)
    arguments = sent_back(item.arguments)
    check_arguments(arguments, f"{where}.arguments")
    return ToolCall(item.call_id, item.name, arguments)


def _thought(raw: msgspec.Raw, where: str) -> Thought:
    """As it was answered: in full, or as what stands for a summary."""
    item = decode_at(raw, _reasoning, where)
    text = "".join(part.text for part in item.content or item.summary)
    seal = item.encrypted_content
    if not seal:
        return Thought(text)
    if seal.startswith(SIGNATURE):
        return Thought(text, seal.removeprefix(SIGNATURE))
    if seal.startswith(SEALED):
        return Thought(text, sealed=seal.removeprefix(SEALED))
    raise InvalidRequest(
        f"`{where}.encrypted_content` was sealed elsewhere, where alone it can be opened: leave the item out.",
        param=f"{where}.encrypted_content",
    )


def _content(content: _Content, where: str, role: str) -> str | tuple[Part, ...]:
    """Text alone where it says it all."""
    if isinstance(content, str):
        return content
    parts = tuple(_part(raw, f"{where}[{i}]", role) for i, raw in enumerate(content))
    if all(isinstance(part, TextPart) and part.cache is None for part in parts):
        return "".join(part.text for part in parts if isinstance(part, TextPart))
    return parts


def _part(raw: msgspec.Raw, where: str, role: str) -> Part:
    kind = decode_at(raw, _typed, where).type
    match kind:
        case "input_text" | "output_text" | "text":
            text = decode_at(raw, _text, where)
            return TextPart(text.text, _cache(text.prompt_cache_breakpoint))
        case "refusal" if role == "assistant":
            return TextPart(decode_at(raw, _refusal, where).refusal)
        case "input_image" if role in {"user", "tool"}:
            return _picture(decode_at(raw, _image, where), where)
        case "input_file" if role in {"user", "tool"}:
            return _document(decode_at(raw, _file, where), where)
        case "input_audio" if role == "user":
            return OtherPart(kind, bytes(raw).decode(), where)
        case _:
            raise InvalidRequest(
                f"`{where}` is a `{kind}`, which is not taken in {_whose(role)}: leave it out.",
                param=f"{where}.type",
                code="unsupported_parameter",
            )


def _whose(role: str) -> str:
    return "a function's output" if role == "tool" else f"a message of the {role}'s"


def _picture(block: ImageBlock, where: str) -> ImagePart:
    refuse_unless_neutral(block, {"file_id": ()}, where)
    if block.image_url is None:
        raise InvalidRequest(
            f"`{where}.image_url` is missing: send the picture's address, or its data.",
            param=f"{where}.image_url",
            code="missing_required_parameter",
        )
    detail = None if block.detail == "auto" else block.detail
    image = openai_parts.image(openai_parts.ImageUrl(block.image_url, detail), f"{where}.image_url")
    return msgspec.structs.replace(image, cache=_cache(block.prompt_cache_breakpoint))


def _document(block: FileBlock, where: str) -> OtherPart:
    """In chat's shape, which is how an upstream of OpenAI's gets it."""
    refuse_unless_neutral(block, {"file_url": (), "detail": ("auto",)}, where)
    fields = {name: getattr(block, name) for name in ("file_data", "filename", "file_id")}
    given = {name: value for name, value in fields.items() if value is not None}
    return OtherPart("input_file", msgspec.json.encode({"type": "file", "file": given}).decode(), where)


def _cache(mark: _Breakpoint | None) -> CacheMark | None:
    """The shortest that lasts as long as the shortest of theirs."""
    return None if mark is None else "1h"
