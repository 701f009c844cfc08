"""Bodies of `/admin/keys` and `/admin/budgets`."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Literal

import msgspec

from millicent.core.budgets import Balance, Budget, Every, Per
from millicent.core.clock import iso_utc
from millicent.wire.decoding import decode_body

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_PerMinute = Annotated[int, msgspec.Meta(ge=1)]


class KeyBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: _Name | None = None
    scope: Literal["admin", "viewer", "client"] = "client"
    expires_at: str | None = None
    user: _Name | None = None
    team: _Name | None = None
    feature: _Name | None = None
    tier: _Name | None = None
    models: list[_Name] | None = None
    requests_per_minute: _PerMinute | None = None
    tokens_per_minute: _PerMinute | None = None
    usd_per_minute: Decimal | None = None
    concurrent: _PerMinute | None = None
    priority: Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)] | None = None


class RotateBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    overlap_s: Annotated[int, msgspec.Meta(ge=0, le=30 * 86_400)] = 86_400


class BudgetBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: _Name
    limit_usd: Decimal
    every: Every = Every.MONTH
    per: Per | None = None
    only: str | None = None
    tier: str | None = None
    hard: bool = True


_key_decoder = msgspec.json.Decoder(KeyBody)
_rotate_decoder = msgspec.json.Decoder(RotateBody)
_budget_decoder = msgspec.json.Decoder(BudgetBody)


def decode_key(body: bytes) -> KeyBody:
    return decode_body(body, _key_decoder, KeyBody.__struct_fields__)


def decode_rotation(body: bytes) -> RotateBody:
    """An empty body asks for the default overlap of a day."""
    return decode_body(body or b"{}", _rotate_decoder, RotateBody.__struct_fields__)


def decode_budget(body: bytes) -> BudgetBody:
    return decode_body(body, _budget_decoder, BudgetBody.__struct_fields__)


def budget_body(budget: Budget, balances: list[Balance], now_ns: int) -> dict[str, object]:
    """`balances` are those of the running period."""
    _, end_ns = budget.every.period_ns(now_ns)
    return {
        "name": budget.name,
        "object": "budget",
        "limit_usd": str(budget.limit),
        "every": budget.every,
        "per": budget.per,
        "only": budget.only,
        "tier": budget.tier,
        "hard": budget.hard,
        "source": budget.source,
        "renews_at": None if end_ns is None else iso_utc(end_ns),
        "balances": [
            {
                "subject": balance.subject or None,
                "spent_usd": str(balance.spent),
                "held_usd": str(balance.held),
                "left_usd": str(budget.limit - balance.spent - balance.held),
            }
            for balance in balances
        ],
    }
