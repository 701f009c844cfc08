"""Which family of dialects an address is talked to in: what its errors look like, above all."""

from __future__ import annotations

from starlette.types import Scope

from millicent.wire import anthropic_common, ollama_common, openai_common
from millicent.wire.family import Family

_ANTHROPIC_PATHS = ("/v1/messages", "/v1/messages/count_tokens")
_VERSION = anthropic_common.VERSION_HEADER.encode()


def is_anthropic(scope: Scope) -> bool:
    """Anthropic's clients say so where an address belongs to more than one."""
    return scope["path"] in _ANTHROPIC_PATHS or any(name == _VERSION for name, _ in scope["headers"])


def family_of(scope: Scope) -> Family:
    if scope["path"].startswith("/api/"):
        return ollama_common.FAMILY
    return anthropic_common.FAMILY if is_anthropic(scope) else openai_common.FAMILY
