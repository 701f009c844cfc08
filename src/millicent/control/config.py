"""`[budgets.NAME]`, and the rates of `[limits]` and of keys."""

from __future__ import annotations

from decimal import Decimal
from functools import lru_cache
from typing import Annotated

import msgspec

from millicent.core.budgets import Budget, Every, Per
from millicent.core.errors import ConfigError
from millicent.core.money import Money

_AtLeastOne = Annotated[int, msgspec.Meta(ge=1)]


class Rates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one key may ask for, on each gateway: per minute, with a minute's worth at once; and running at a time.

    `priority` is the best (lowest) that its requests may have; 0 where nothing is said.
    """

    requests_per_minute: _AtLeastOne | None = None
    tokens_per_minute: _AtLeastOne | None = None
    usd_per_minute: Decimal | None = None
    concurrent: _AtLeastOne | None = None
    priority: int | None = None

    def or_else(self, default: Rates) -> Rates:
        """These, and the default's where nothing is said."""
        return _joined(self, default)

    def check(self, at: str) -> None:
        """Raises ConfigError, `at` saying where this was written."""
        usd = self.usd_per_minute
        if usd is not None and (not usd.is_finite() or usd <= 0):
            raise ConfigError(f"{at} usd_per_minute = {usd}: must be above 0")


@lru_cache(maxsize=1024)
def _joined(rates: Rates, default: Rates) -> Rates:
    """It is asked for at every request, and hardly ever differs."""
    ours, theirs = msgspec.structs.astuple(rates), msgspec.structs.astuple(default)
    return Rates(*(there if here is None else here for here, there in zip(ours, theirs[: len(ours)], strict=True)))


class BudgetConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """At most `limit_usd` in every `hour`, `day`, `week`, `month`, or `once`. `per` gives each key, user, team,
    feature, tier or run its own; `only` narrows that to one of them, `tier` to requests of that tier: each user of a
    plan, say. `hard` refuses what may exceed it; otherwise it only counts.
    """

    limit_usd: Decimal
    every: Every = Every.MONTH
    per: Per | None = None
    only: str | None = None
    tier: str | None = None
    hard: bool = True

    def budget(self, name: str, source: str = "config") -> Budget:
        """Checked. Raises ConfigError naming the field."""
        at = f"[budgets.{name}]"
        if not name or len(name) > 128 or not name.isprintable() or "/" in name:
            raise ConfigError(f"{at}: a name has 1 to 128 printable characters and no slash")
        if not self.limit_usd.is_finite() or not 0 <= self.limit_usd <= 10**9:
            raise ConfigError(f"{at} limit_usd = {self.limit_usd}: must be 0 to a billion")
        if self.only is not None and self.per is None:
            raise ConfigError(f'{at} only = "{self.only}": needs per, which says what it is one of')
        if not self.only and self.only is not None:
            raise ConfigError(f'{at} only = "": name a {self.per}, or leave it out')
        if self.tier is not None and (not self.tier or self.per in {None, "tier"}):
            raise ConfigError(f'{at} tier = "{self.tier}": narrows a budget per key, user, team, feature or run')
        return Budget(
            name=name,
            limit=Money.from_usd(self.limit_usd),
            every=self.every,
            per=self.per,
            only=self.only,
            tier=self.tier,
            hard=self.hard,
            source=source,
        )
