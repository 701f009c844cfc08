"""Whom a request is for: headers first, then the dialect's own `user` and `metadata`."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal, InvalidOperation

from millicent.core.errors import InvalidRequest
from millicent.core.money import Money
from millicent.core.request import Attribution, name_of

FIELDS = ("user", "team", "feature", "tier", "conversation", "run")
_PREFIX = "x-millicent-"
_HEADERS = {field: _PREFIX + field for field in FIELDS}
_TAGS = _PREFIX + "tags"
_MAX_TAGS = 16
_MAX_COST = "x-millicent-max-cost-usd"
_MOST_USD = 1_000_000

_LATENCY_TARGET = "x-millicent-latency-target-ms"
_MOST_TARGET_MS = 24 * 3600 * 1000


def read_attribution(
    headers: Mapping[str, str], *, user: str | None = None, metadata: Mapping[str, str] | None = None
) -> Attribution:
    """Headers `X-Millicent-{User,Team,Feature,Tier,Conversation,Run}` and `X-Millicent-Tags: k=v,...` beat the body.

    `metadata` entries with those names are attribution too; the others become tags. Raises InvalidRequest naming
    the header or field that is too long or malformed. Spaces around a name are none of it, and an empty one is none.
    """
    values: dict[str, str] = {}
    tags: dict[str, str] = {}
    for key, value in (metadata or {}).items():
        if key in FIELDS:
            values[key] = name_of(value, f"metadata.{key}")
        else:
            tags[name_of(key, "metadata")] = name_of(value, f"metadata.{key}")
    if user:
        values["user"] = name_of(user, "user")
    for field, name in _HEADERS.items():
        if header := headers.get(name):
            values[field] = name_of(_text(header), name)
    if header := headers.get(_TAGS):
        tags |= _parse_tags(_text(header))
    if len(tags) > _MAX_TAGS:
        raise InvalidRequest(f"{len(tags)} tags are too many: send at most {_MAX_TAGS}.", param="metadata")
    return Attribution(**{field: value for field, value in values.items() if value}, tags=tags)


def read_max_cost(headers: Mapping[str, str]) -> Money | None:
    """`X-Millicent-Max-Cost-USD` in dollars, to the nano-dollar below. Raises InvalidRequest."""
    header = headers.get(_MAX_COST)
    if header is None:
        return None
    try:
        usd = Decimal(header.strip())
    except InvalidOperation:
        usd = Decimal("NaN")
    if not (usd.is_finite() and 0 < usd <= _MOST_USD):
        raise InvalidRequest(
            f"Header `{_MAX_COST}` is `{header[:40]}`: send dollars above 0, such as 0.002.", param=_MAX_COST
        )
    nanousd = int(usd.scaleb(9))
    if nanousd == 0:
        raise InvalidRequest(f"Header `{_MAX_COST}` is below a billionth of a dollar: raise it.", param=_MAX_COST)
    return Money(nanousd)


def read_latency_target(headers: Mapping[str, str]) -> int | None:
    """`X-Millicent-Latency-Target-Ms`, whole milliseconds. Raises InvalidRequest."""
    header = headers.get(_LATENCY_TARGET)
    if header is None:
        return None
    text = header.strip()
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= _MOST_TARGET_MS):
        raise InvalidRequest(
            f"Header `{_LATENCY_TARGET}` is `{header[:40]}`: send whole milliseconds from 1 to {_MOST_TARGET_MS}.",
            param=_LATENCY_TARGET,
        )
    return int(text)


def _parse_tags(header: str) -> dict[str, str]:
    tags = {}
    for pair in filter(None, (piece.strip() for piece in header.split(","))):
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise InvalidRequest(f"Header `{_TAGS}` has `{pair[:40]}`: write it as `key=value,key=value`.", param=_TAGS)
        tags[name_of(key, _TAGS)] = name_of(value, _TAGS)
    return tags


def _text(header: str) -> str:
    """A header's bytes, which come as Latin-1, are UTF-8 where they can be: browsers send Latin-1, others UTF-8."""
    try:
        return header if header.isascii() else header.encode("latin-1").decode()
    except UnicodeDecodeError:
        return header
