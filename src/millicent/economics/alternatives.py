"""`[features.NAME.alternative]`: what the same outcome costs without a model."""

from __future__ import annotations

from decimal import Decimal

import msgspec

from millicent.core.errors import ConfigError
from millicent.core.money import Money


class Alternative(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A person's `minutes` at `usd_per_hour`, what else an outcome costs (`usd`: running a rule, a form's postage), or
    both. `what` says what that is."""

    minutes: Decimal | None = None
    usd_per_hour: Decimal | None = None
    usd: Decimal | None = None
    what: str | None = None

    @property
    def cost(self) -> Money:
        """Of one outcome."""
        wage = (self.minutes or Decimal(0)) * (self.usd_per_hour or Decimal(0)) / 60
        return Money.from_usd(wage + (self.usd or Decimal(0)))


class AlternativeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A feature's half of `[features.NAME]` about doing without a model: `millicent plan standing` puts what an outcome
    then costs, a person's `minutes` at `usd_per_hour` or `usd` (or both), beside what a useful output does."""

    alternative: Alternative | None = None

    def check(self, name: str) -> None:
        """Raises ConfigError naming the setting."""
        given = self.alternative
        if given is None:
            return
        at = f"[features.{name}.alternative]"
        for field in ("minutes", "usd_per_hour", "usd"):
            value = getattr(given, field)
            if value is not None and not (value.is_finite() and value >= 0):
                raise ConfigError(f"{at} {field} = {value}: must be a number of 0 or more")
        if (given.minutes is None) != (given.usd_per_hour is None):
            missing = "minutes" if given.minutes is None else "usd_per_hour"
            raise ConfigError(f"{at} {missing}: missing; minutes and usd_per_hour go together")
        if given.minutes is None and given.usd is None:
            raise ConfigError(f"{at} usd: missing; say what an outcome costs, or the minutes that it takes a person")
