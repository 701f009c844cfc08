"""What a server elsewhere doesn't take."""

from __future__ import annotations

from millicent.core.errors import InvalidRequest
from millicent.core.request import Request


def not_taken(request: Request, who: str, field: str, what: str | None = None) -> InvalidRequest:
    """`what` says more than the field's name does. Names are those of OpenAI's chat (see `field_names`), but for how
    much to think, of which a dialect can have several."""
    if field == "reasoning_effort":
        name = request.thinking_field
        what, field = (what or f"`{field}`").replace(f"`{field}`", f"`{name}`"), name
    return InvalidRequest(
        f"{what or f'`{field}`'} is not something that {who} takes, where `{request.model}` runs: leave it out.",
        param=field,
        code="unsupported_parameter",
    )
