"""`[cache]`: whether answers are kept to be given again, for how long, how many, and to whom."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Scope = Literal["tenant", "shared"]
_AtLeastOne = Annotated[int, msgspec.Meta(ge=1)]
_TtlS = Annotated[int, msgspec.Meta(ge=1, le=365 * 24 * 3600)]


class FeatureCacheConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is other for one feature's requests than `[cache]` says; what is left out is the same."""

    enabled: bool | None = None
    ttl_s: _TtlS | None = None
    scope: Scope | None = None
    sampled: bool | None = None


class CacheConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """With `enabled`, a complete answer is kept for `ttl_s` and given to whoever asks exactly the same again, whatever
    the dialect, as a stream or not. Only answers at temperature 0, with a seed, or to be embedded, unless `sampled`
    keeps others too. `scope` `tenant` gives each API key only what its own requests were answered; `shared` gives
    everyone everything. At most `max_entries` answers of `max_mb` MiB together are kept, in a file that survives a
    restart (`store` `disk`), or not (`memory`); the one that was used least recently goes first.
    `[cache.features.NAME]` says otherwise (`enabled`, `ttl_s`, `scope`, `sampled`) for one feature.
    """

    enabled: bool = False
    ttl_s: _TtlS = 3600
    max_mb: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = 256
    max_entries: _AtLeastOne = 100_000
    store: Literal["disk", "memory"] = "disk"
    scope: Scope = "tenant"
    sampled: bool = False
    features: dict[str, FeatureCacheConfig] = {}

    @property
    def is_used(self) -> bool:
        """By any feature."""
        return self.enabled or any(feature.enabled for feature in self.features.values())

    def of(self, feature: str | None) -> CacheConfig:
        """As it holds for the feature's requests."""
        other = None if feature is None else self.features.get(feature)
        if other is None:
            return self
        said = {name: value for name, value in msgspec.structs.asdict(other).items() if value is not None}
        return msgspec.structs.replace(self, **said)
