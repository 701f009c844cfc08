"""One struct, one JSON: money is a decimal string named `..._usd`, times are RFC 3339, ratios are numbers."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from decimal import Decimal
from enum import Enum
from functools import cache
from typing import Any, get_args, get_type_hints

import msgspec

from millicent.core.clock import iso_utc
from millicent.core.money import Money

_SHOWN = Decimal("1e-6")


def body_of(value: object) -> Any:
    """What a struct of this room says, for JSON. A null amount keeps its name: nobody knows it, and it is not zero."""
    if isinstance(value, Money):
        return str(value)
    if isinstance(value, Decimal):
        return value.quantize(_SHOWN).normalize() if value.is_finite() and abs(value) < 10**15 else str(value)
    if isinstance(value, msgspec.Struct):
        given = msgspec.structs.asdict(value)
        return dict(_named(name, each, name in _amounts(type(value))) for name, each in given.items())
    if isinstance(value, Mapping):
        return {str(key): body_of(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [body_of(each) for each in value]
    if isinstance(value, Enum):
        return value.value
    return value.isoformat() if isinstance(value, date) else value


def _named(name: str, value: object, amount: bool) -> tuple[str, Any]:
    if name in {"from_ns", "to_ns"} and isinstance(value, int):
        return name.removesuffix("_ns"), iso_utc(value)
    return (f"{name}_usd" if amount else name), body_of(value)


@cache
def _amounts(struct: type) -> frozenset[str]:
    """Fields that hold money, alone or in a mapping."""
    return frozenset(name for name, hint in get_type_hints(struct).items() if _holds_money(hint))


def _holds_money(hint: Any) -> bool:
    return hint is Money or any(_holds_money(part) for part in get_args(hint))
