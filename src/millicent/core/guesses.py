"""Tokens that nobody has counted, guessed from a request's bytes."""

from __future__ import annotations

from millicent.core.prompts import BYTES_PER_TOKEN, PICTURE_BYTES
from millicent.core.request import ImagePart, Message, OtherPart, Request

# What a chat template adds around each message, about.
_TOKENS_PER_MESSAGE = 4


def guessed_input_tokens(request: Request) -> int:
    """All that a model would read, pictures and the parts of other kinds too."""
    tokens = guessed_text_tokens(request)
    if parts := _parts(request):
        others = sum(len(part.json) for part in parts if isinstance(part, OtherPart))
        tokens += _tokens(pictures_in(request) * PICTURE_BYTES + others)
    return tokens


def guessed_text_tokens(request: Request) -> int:
    """Its text, that of tools and of calls too."""
    if request.messages is None:
        texts = request.prompts if request.embedding is None else request.embedding.inputs
        return sum(map(_text_tokens, texts))
    tools = sum(_length(tool.name) + _length(tool.description) + _length(tool.parameters) for tool in request.tools)
    said = sum(_message_length(message) for message in request.messages)
    return _tokens(tools + said) + _TOKENS_PER_MESSAGE * len(request.messages)


def pictures_in(request: Request) -> int:
    return sum(isinstance(part, ImagePart) for part in _parts(request))


def _parts(request: Request) -> list[object]:
    contents = [message.content for message in request.messages or () if not isinstance(message.content, str)]
    return [part for content in contents for part in content]


def _message_length(message: Message) -> int:
    said = [message.text]
    for call in message.tool_calls:
        said += (call.name, call.arguments)
    said += [thought.text for thought in message.thoughts]
    return sum(map(_length, said))


def _text_tokens(text: str | tuple[int, ...]) -> int:
    return len(text) if isinstance(text, tuple) else _tokens(_length(text))


def _tokens(length: int) -> int:
    return -(-length // BYTES_PER_TOKEN)


def _length(text: str) -> int:
    """In bytes of UTF-8: where English has four characters to a token, Chinese has about one."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
