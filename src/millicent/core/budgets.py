"""Budgets: how much may be spent, by whom, in which period."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Literal

import msgspec

from millicent.core.clock import NS_PER_S
from millicent.core.money import Money
from millicent.core.request import Attribution

Per = Literal["key", "user", "team", "feature", "tier", "run"]
PERS: tuple[Per, ...] = ("key", "user", "team", "feature", "tier", "run")

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Every(StrEnum):
    """When a budget renews: at the UTC hour, day, week (Monday), month; or never."""

    HOUR = "hour"
    DAY = "day"
    WEEK = "week"
    MONTH = "month"
    ONCE = "once"

    def period_ns(self, at_ns: int) -> tuple[int, int | None]:
        """UTC nanoseconds: the start of the period that holds `at_ns`, and its end, None where there is none."""
        if self is Every.ONCE:
            return 0, None
        at = _EPOCH + timedelta(seconds=at_ns // NS_PER_S)
        start = at.replace(minute=0, second=0)
        if self is Every.HOUR:
            return _ns(start), _ns(start + timedelta(hours=1))
        start = start.replace(hour=0)
        if self is Every.DAY:
            return _ns(start), _ns(start + timedelta(days=1))
        if self is Every.WEEK:
            start -= timedelta(days=start.weekday())
            return _ns(start), _ns(start + timedelta(days=7))
        start = start.replace(day=1)
        return _ns(start), _ns((start + timedelta(days=31)).replace(day=1))


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """`limit` for each period of `every`. Without `per` it is one sum over everything; with it each value of that
    attribution has its own, what is unattributed too; `only` narrows it to one value, `tier` to requests of that tier.
    A hard budget refuses what may exceed it; a soft one counts. `source` says where it is from: `config` or `api`."""

    name: str
    limit: Money
    every: Every = Every.MONTH
    per: Per | None = None
    only: str | None = None
    tier: str | None = None
    hard: bool = True
    source: str = "api"

    def subject(self, attribution: Attribution) -> str | None:
        """Whose sum a request counts in; "" for everyone's or nobody's. None: this budget doesn't apply."""
        if self.per is None:
            return ""
        if self.tier is not None and attribution.tier != self.tier:
            return None
        value = getattr(attribution, self.per)
        if self.only is not None:
            return self.only if value == self.only else None
        return value or ""


class Balance(msgspec.Struct, frozen=True):
    """Where one subject of a budget stands in the period that starts at `period_ns`."""

    subject: str
    period_ns: int
    spent: Money
    held: Money


def _ns(moment: datetime) -> int:
    elapsed = moment - _EPOCH
    return (elapsed.days * 86_400 + elapsed.seconds) * NS_PER_S
