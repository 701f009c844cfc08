"""A request's prompt, cut into segments: the system prompt, the tools, each message."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b

import msgspec

from millicent.caching.canonical import request_digest
from millicent.core.prompts import (
    CHAIN_BYTES,
    KEPT_FIRST,
    KEPT_LAST,
    NUMBERS,
    PICTURE_BYTES,
    Prompt,
    Segment,
    SegmentKind,
)
from millicent.core.request import ImagePart, Message, OtherPart, Part, Request, TextPart, Tool

# What a client sends as a file may be anything: it counts as text up to here.
_MOST_FILE_BYTES = 1 << 16

_KINDS_OF_ROLES: dict[str, SegmentKind] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_encode = msgspec.msgpack.encode


def prompt_of(request: Request, secret: bytes) -> Prompt:
    """Hashes are keyed with the installation's `secret`. Marks for providers' caches don't count, and text is text
    whether it comes whole or in parts. Inputs of embeddings have no prefix in common: they have no segments."""
    pieces = list(_pieces(request))
    longer = len(pieces) > KEPT_FIRST + KEPT_LAST
    skipped = range(KEPT_FIRST, len(pieces) - KEPT_LAST) if longer else range(0)
    chain = blake2b(key=secret, digest_size=CHAIN_BYTES)
    segments, omitted_length = [], 0
    for i, (kind, length, body) in enumerate(pieces):
        # Neither another kind of segment nor another cut between two makes the same bytes.
        chain.update(b"%d %d\n%b" % (NUMBERS[kind], len(body), body))
        if i in skipped:
            omitted_length += length
        else:
            segments.append(Segment(kind, length, chain.copy().digest()))
    first = KEPT_FIRST if longer else len(segments)
    digest = request_digest(request, secret)
    return Prompt(digest, tuple(segments[:first]), len(skipped), omitted_length, tuple(segments[first:]))


def _pieces(request: Request) -> Iterator[tuple[SegmentKind, int, bytes]]:
    """Kind, length, and what is hashed."""
    for prompt in request.prompts:
        if isinstance(prompt, tuple):
            yield "tokens", len(prompt), _encode(prompt)
        else:
            body = prompt.encode("utf-8", "surrogatepass")
            yield "text", len(body), body
    if request.tools:
        body = _encode([_tool(tool) for tool in request.tools])
        yield "tools", len(body), body
    for message in request.messages or ():
        yield _message(message)


def _tool(tool: Tool) -> tuple[object, ...]:
    return tool.name, tool.description, tool.parameters, tool.strict


def _message(message: Message) -> tuple[SegmentKind, int, bytes]:
    kind = _KINDS_OF_ROLES.get(message.role, "user")
    parts = message.content
    plain = isinstance(parts, str) or all(isinstance(part, TextPart) for part in parts)
    text = (parts if isinstance(parts, str) else message.text).encode("utf-8", "surrogatepass")
    if plain and not (message.tool_calls or message.thoughts or message.name or message.tool_call_id or message.failed):
        return kind, len(text), text
    calls = [(call.id, call.name, call.arguments) for call in message.tool_calls]
    content = text if isinstance(parts, str) or plain else [_part(part) for part in parts]
    more = (message.name, calls, message.tool_call_id, message.thoughts, message.failed)
    spoken = sum(len(call.name) + len(call.arguments) for call in message.tool_calls)
    thought = sum(len(thought.text) for thought in message.thoughts)
    length = len(text) + spoken + thought + (0 if isinstance(parts, str) else _unread(parts))
    return kind, length, _encode((content, *more))


def _part(part: Part) -> Part:
    return part if isinstance(part, OtherPart) else msgspec.structs.replace(part, cache=None)


def _unread(parts: Iterable[Part]) -> int:
    """The length of what isn't text."""
    length = 0
    for part in parts:
        if isinstance(part, ImagePart):
            length += PICTURE_BYTES
        elif isinstance(part, OtherPart):
            length += min(len(part.json), _MOST_FILE_BYTES)
    return length
