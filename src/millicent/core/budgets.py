"""Budgets: how much may be spent, by whom, in which period."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

import msgspec

from millicent.core.clock import NS_PER_HOUR
from millicent.core.money import Money
from millicent.core.periods import DAY_NS, month_of
from millicent.core.request import Attribution

Per = Literal["key", "user", "team", "feature", "tier", "run"]
PERS: tuple[Per, ...] = ("key", "user", "team", "feature", "tier", "run")


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
        if self is Every.MONTH:
            month = month_of(at_ns)
            return month.from_ns, month.to_ns
        long_ns, begins_ns = _PERIODS[self]
        start_ns = at_ns - (at_ns - begins_ns) % long_ns
        return start_ns, start_ns + long_ns


# How long, and when one began: the epoch was a Thursday.
_PERIODS = {Every.HOUR: (NS_PER_HOUR, 0), Every.DAY: (DAY_NS, 0), Every.WEEK: (7 * DAY_NS, 4 * DAY_NS)}


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
