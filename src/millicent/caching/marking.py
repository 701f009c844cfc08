"""Marks for a provider's cache on a request: whether its caller set any, and setting them where it didn't."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from millicent.core.request import CacheMark, ImagePart, Message, OtherPart, Part, Request, TextPart

# The whole request's mark, which Anthropic's dialect also has.
_FIELD = "cache_control"


def longest_mark(request: Request) -> CacheMark | None:
    """Of those that its caller set, who decides then; None where there is none. What only the caller's dialect knows
    may be marked, too."""
    found = set(_marks(request))
    return "1h" if "1h" in found else "5m" if "5m" in found else None


def _marks(request: Request) -> Iterator[CacheMark | None]:
    if _FIELD in request.extra:
        yield _written_as(request.extra[_FIELD].json)
    yield from (tool.cache for tool in request.tools)
    for message in request.messages or ():
        parts: Sequence[Part] = () if isinstance(message.content, str) else message.content
        for part in parts:
            if isinstance(part, OtherPart):
                yield _written_as(part.json) if f'"{_FIELD}"' in part.json else None
            else:
                yield part.cache
        yield from (call.cache for call in message.tool_calls)


def _written_as(json: str) -> CacheMark:
    return "1h" if '"1h"' in json else "5m"


def can_mark(request: Request, number: int) -> bool:
    """Whether a segment, by its number in the whole prompt, ends with something that takes a mark: not with nothing,
    nor with what only its caller's dialect knows. The tools are the first, if there are any; then each message is one.
    """
    if request.tools and number == 0:
        return True
    message = (request.messages or ())[number - bool(request.tools)]
    if message.tool_calls:
        return True
    last = message.content[-1:] if isinstance(message.content, tuple) else (TextPart(message.content),)
    return any(isinstance(part, ImagePart) or (isinstance(part, TextPart) and part.text.strip()) for part in last)


def with_marks(request: Request, marks: Mapping[int, CacheMark]) -> Request:
    """`marks` is by the numbers of segments that can have one."""
    if not marks:
        return request
    tools, before = request.tools, bool(request.tools)
    if before and 0 in marks:
        tools = (*tools[:-1], msgspec.structs.replace(tools[-1], cache=marks[0]))
    messages = tuple(
        message if (mark := marks.get(i + before)) is None else _marked(message, mark)
        for i, message in enumerate(request.messages or ())
    )
    return msgspec.structs.replace(request, tools=tools, messages=messages)


def _marked(message: Message, mark: CacheMark) -> Message:
    """On its last block: calls come after what is said."""
    if message.tool_calls:
        *calls, call = message.tool_calls
        return msgspec.structs.replace(message, tool_calls=(*calls, msgspec.structs.replace(call, cache=mark)))
    parts: Sequence[Part] = (TextPart(message.content),) if isinstance(message.content, str) else message.content
    *before, last = parts
    assert not isinstance(last, OtherPart)
    return msgspec.structs.replace(message, content=(*before, msgspec.structs.replace(last, cache=mark)))
