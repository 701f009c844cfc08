"""`[plans.NAME]`, `[costs.NAME]`, and what a feature earns: what users pay, and what is spent beside the models."""

from __future__ import annotations

from datetime import date
from decimal import Decimal

import msgspec

from millicent.core.errors import ConfigError


class PlanConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a user of a `tier` (by default the plan's name) pays: `price_usd_per_month`, and what goes beyond what the
    price includes, per thousand tokens (in and out) and per request. `margin_target` is the part of what a user pays
    that should be left after the cost of the models: 0.75 leaves $5 of a $20 plan for them.
    """

    tier: str | None = None
    price_usd_per_month: Decimal = Decimal(0)
    included_tokens: int = 0
    usd_per_1k_tokens: Decimal = Decimal(0)
    included_requests: int = 0
    usd_per_request: Decimal = Decimal(0)
    margin_target: Decimal = Decimal(0)

    def check(self, name: str) -> None:
        """Raises ConfigError naming the setting."""
        at = f"[plans.{name}]"
        _not_below_zero(at, self)
        _fraction(at, self.margin_target)
        if self.included_tokens and not self.usd_per_1k_tokens:
            raise ConfigError(f"{at} included_tokens: says nothing without usd_per_1k_tokens, what more tokens cost")
        if self.included_requests and not self.usd_per_request:
            raise ConfigError(f"{at} included_requests: says nothing without usd_per_request, what more of them cost")


class CostConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is spent beside the models, each month: hosting, a vector database, people. Of one `feature` or `tier`, or
    of all together."""

    usd_per_month: Decimal
    feature: str | None = None
    tier: str | None = None

    def check(self, name: str) -> None:
        """Raises ConfigError naming the setting."""
        _not_below_zero(f"[costs.{name}]", self)


class EarningsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A feature's half of `[features.NAME]` about money: what it earns each month and with each request that succeeds,
    the part of that which should be left, and the first day of the week that its drift is measured from."""

    revenue_usd_per_month: Decimal = Decimal(0)
    revenue_usd_per_request: Decimal = Decimal(0)
    margin_target: Decimal = Decimal(0)
    baseline: date | None = None

    def check(self, name: str) -> None:
        """Raises ConfigError naming the setting."""
        _not_below_zero(f"[features.{name}]", self)
        _fraction(f"[features.{name}]", self.margin_target)


def _not_below_zero(at: str, config: msgspec.Struct) -> None:
    for field, value in msgspec.structs.asdict(config).items():
        if isinstance(value, Decimal | int) and (not Decimal(value).is_finite() or not 0 <= value <= 10**12):
            raise ConfigError(f"{at} {field} = {value}: must be a number of 0 or more")


def _fraction(at: str, target: Decimal) -> None:
    if target >= 1:
        raise ConfigError(f"{at} margin_target = {target}: must be a fraction below 1, such as 0.75")
