"""What may be kept and given again, and what a caller's `Cache-Control` says about it."""

from __future__ import annotations

import msgspec

from millicent.core.request import ImagePart, OtherPart, Request

# Fields of one dialect that decide the answer alone: with the same value they ask for the same again.
_UNDERSTOOD = frozenset({"verbosity", "reasoning_effort", "thinking", "output_config", "prediction"})


class Directives(msgspec.Struct, frozen=True):
    """`reads`: a kept answer will do, if it isn't older than `max_age_s`. `writes`: this answer may be kept.
    `only_kept`: nothing but a kept answer will do."""

    reads: bool = True
    writes: bool = True
    max_age_s: int | None = None
    only_kept: bool = False

    @classmethod
    def of(cls, cache_control: str | None) -> Directives:
        """As RFC 9111 has them in a request; others don't concern a cache of answers."""
        said = {}
        for directive in (cache_control or "").split(","):
            name, _, value = directive.partition("=")
            said[name.strip().lower()] = value.strip().strip('"')
        only_kept = "only-if-cached" in said
        if "no-store" in said:
            return cls(reads=False, writes=False, only_kept=only_kept)
        age = said.get("max-age", "")
        max_age_s = int(age) if age.isascii() and age.isdecimal() else None
        return cls(reads="no-cache" not in said and max_age_s != 0, max_age_s=max_age_s, only_kept=only_kept)


def why_not(request: Request, *, sampled: bool) -> str | None:
    """Why its answer can't be kept and given again; None where it can. One word for a program."""
    drawn = request.sampling.temperature > 0 and request.sampling.seed is None
    if drawn and request.embedding is None and not sampled:
        return "sampled"
    if any(extra.refusal is not None and field not in _UNDERSTOOD for field, extra in request.extra.items()):
        return "unknown_field"
    for message in request.messages or ():
        for part in message.content if isinstance(message.content, tuple) else ():
            # What lies at an address may be another thing the next time.
            if isinstance(part, OtherPart) or (isinstance(part, ImagePart) and part.url is not None):
                return "unknown_part"
    return None
