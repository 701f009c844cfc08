"""A key as it is shown: everything but what it is checked by."""

from __future__ import annotations

import msgspec

from millicent.control.keys import ApiKey
from millicent.core.clock import iso_utc


def key_body(key: ApiKey, now_ns: int) -> dict[str, object]:
    def moment(at_ns: int | None) -> str | None:
        return None if at_ns is None else iso_utc(at_ns)

    rates = msgspec.structs.asdict(key.rates)
    rates["usd_per_minute"] = None if key.rates.usd_per_minute is None else f"{key.rates.usd_per_minute:f}"
    return {
        "id": key.id,
        "object": "key",
        "name": key.name,
        "scope": key.scope,
        "state": key.state(now_ns),
        "created_at": iso_utc(key.created_at_ns),
        "expires_at": moment(key.expires_at_ns),
        "revoked_at": moment(key.revoked_at_ns),
        "old_secret_until": moment(key.old_until_ns),
        "pinned": {"user": key.user, "team": key.team, "feature": key.feature, "tier": key.tier},
        "models": key.models,
        **rates,
    }
