"""What a request asks for, as a digest: the same for two requests that ask the same thing, in whatever dialect.

In it is what determines the answer. Left out is who asks (attribution), how the answer is to come (dialect, stream),
what it may cost and how soon it is wanted, marks for providers' prompt caches, and what our names for things are: the
identifiers of tool calls count only by which call each answer belongs to.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

import msgspec

from millicent.core.request import ImagePart, Message, OtherPart, Part, Request, Sampling, TextPart, Thinking

DIGEST_BYTES = 20

_encode = msgspec.msgpack.Encoder(decimal_format="string").encode
# At temperature 0 the likeliest token is taken: what narrows or seeds a draw decides nothing.
_OF_A_DRAW = ("top_p", "top_k", "min_p", "typical_p", "seed")
_TRIAL = "anthropic-beta"
_GREEDY = {field: getattr(Sampling(), field) for field in _OF_A_DRAW}


def request_digest(request: Request, secret: bytes) -> bytes:
    """Keyed with the installation's `secret`, so that it tells nobody else what was asked. `DIGEST_BYTES` long."""
    return blake2b(_encode(_canonical(request)), key=secret, digest_size=DIGEST_BYTES).digest()


def _canonical(request: Request) -> tuple[Any, ...]:
    """Only what msgpack writes in one way: no sets, and mappings as sorted pairs."""
    family = request.dialect.partition(".")[0]
    sampling, restated, assumed = request.sampling, set(request.restated), set(request.assumed)
    if sampling.temperature == 0:
        sampling = msgspec.structs.replace(sampling, **_GREEDY)
        restated.difference_update(_OF_A_DRAW)
        assumed.difference_update(_OF_A_DRAW)
    form = request.output_format
    if form is not None and form.kind == "json_schema":
        form = msgspec.structs.replace(form, source=_compact(form.source))
    limits = request.limits
    return (
        request.model,
        None if request.messages is None else _messages(request.messages, family),
        request.prompts,
        request.embedding,
        msgspec.structs.astuple(msgspec.structs.replace(sampling, logit_bias={})),
        sorted(sampling.logit_bias.items()),
        sorted(restated),
        sorted(assumed),
        (limits.max_tokens, _sorted(limits.stop), limits.ignore_eos, limits.min_tokens, _sorted(limits.stop_tokens)),
        form,
        [(tool.name, tool.description, _compact(tool.parameters), tool.strict) for tool in request.tools],
        (request.tool_choice, request.tool_name, request.parallel_tool_calls) if request.tools else None,
        request.choices,
        request.echo,
        request.truncate_prompt_tokens,
        None if request.thinking == Thinking() else request.thinking,
        request.continues,
        # What only one family knows means there what it means. A harmless hint has no refusal, and changes nothing: but
        # for a provider's name of a trial, which may.
        [
            (family, field, _compact(extra.json))
            for field, extra in sorted(request.extra.items())
            if extra.refusal is not None or field == _TRIAL
        ],
    )


def _messages(messages: Iterable[Message], family: str) -> list[tuple[Any, ...]]:
    """Tool calls by their number in the conversation, so that it doesn't matter what whoever made them called them."""
    numbers: dict[str | None, int] = {}
    found = []
    for message in messages:
        calls = [
            (numbers.setdefault(call.id, len(numbers)), call.name, _compact(call.arguments))
            for call in message.tool_calls
        ]
        answered = None if message.tool_call_id is None else numbers.setdefault(message.tool_call_id, len(numbers))
        content = _content(message.content, family)
        found.append((message.role, content, message.name, calls, answered, message.thoughts, message.failed))
    return found


def _content(content: str | tuple[Part, ...], family: str) -> Any:
    """Text is text, whether it comes as such or as the only part."""
    if isinstance(content, str):
        return content
    if len(content) == 1 and isinstance(content[0], TextPart):
        return content[0].text
    return [_part(part, family) for part in content]


def _part(part: Part, family: str) -> tuple[Any, ...]:
    match part:
        case TextPart(text=text):
            return ("text", text)
        case ImagePart():
            return ("image", part.media_type, part.data, part.url, part.detail)
        case OtherPart():
            return (family, part.kind, _compact(part.json))


def _compact(json: str) -> str:
    """The same JSON without what doesn't matter: blanks, and how characters are escaped. The order of members stays:
    it is that of the prompt, or of the answer."""
    try:
        return msgspec.json.encode(msgspec.json.decode(json)).decode()
    except msgspec.MsgspecError:
        return json


def _sorted(names: Iterable[Any]) -> list[Any]:
    return sorted(set(names))
