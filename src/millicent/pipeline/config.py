"""`[limits]`: how much is taken on at once. `[models.NAME]`: what is done when a model's deployments fail."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from millicent.control.config import Rates
from millicent.core.errors import ConfigError

_Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]


class LimitsConfig(Rates, frozen=True, forbid_unknown_fields=True):
    """Above `max_concurrent` requests at once, new ones get 429 with `Retry-After`. The rates hold for each key that
    doesn't have its own, and for all anonymous calls together: per minute, with a minute's worth at once.
    """

    max_concurrent: Annotated[int, msgspec.Meta(ge=1)] = 256


class BreakerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A deployment is left alone for `cooldown_s` after `failures` in a row, or when `failed_percent` of its latest
    `window_calls` calls failed, all within `window_s`; then one call tries it. Each further failure doubles the pause,
    up to 16 times."""

    failures: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 5
    failed_percent: Annotated[int, msgspec.Meta(ge=1, le=100)] = 50
    window_calls: Annotated[int, msgspec.Meta(ge=2, le=1000)] = 20
    window_s: _Seconds = 60
    cooldown_s: _Seconds = 10


class ModelPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A model with several deployments shares its calls among the healthy ones: in proportion to their weights
    (`weighted`), to the one with the fewest calls for its weight (`least_busy`), or to the cheapest by quote.

    A call that fails before any of its answer is out is made again, `retries` times at most; then `fallbacks`, other
    models of this file or of this server, get one call each, in order. `timeout_s` is for all of that together,
    `first_token_timeout_s` and `between_tokens_timeout_s` for each call; without them there is no limit here. `breaker`
    says when a deployment is left alone. With `prefix_affinity` a conversation goes on where its turn before was
    answered, and its beginning is in a cache, unless that deployment is much busier than another.
    """

    balance: Literal["weighted", "least_busy", "cheapest"] = "weighted"
    retries: Annotated[int, msgspec.Meta(ge=0, le=10)] = 2
    fallbacks: tuple[str, ...] = ()
    timeout_s: _Seconds | None = None
    first_token_timeout_s: _Seconds | None = None
    between_tokens_timeout_s: _Seconds | None = None
    breaker: BreakerConfig = BreakerConfig()
    prefix_affinity: bool = True

    def check(self, name: str) -> None:
        """Raises ConfigError for a chain that leads back or repeats itself."""
        if name in self.fallbacks or len(set(self.fallbacks)) < len(self.fallbacks):
            raise ConfigError(f"[models.{name}] fallbacks: names a model twice, or itself: name each other model once")
