"""A request's headers, read once."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import Scope

_HEADERS = "millicent.headers"


def headers_of(scope: Scope) -> Mapping[str, str]:
    """By lower-case name; of those that come twice, the first. Whoever looks at a request's headers shares it."""
    found: dict[str, str] | None = scope.get(_HEADERS)
    if found is None:
        found = {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(scope["headers"])}
        scope[_HEADERS] = found
    return found
