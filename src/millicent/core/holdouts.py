"""Random hold-outs: requests that go without a lever, so that what it saves is measured and not only reckoned."""

from __future__ import annotations

from decimal import Decimal
from hashlib import blake2b
from typing import Literal, get_args

import msgspec

Held = Literal["routing", "response_cache", "prompt_caching"]
HELD: tuple[Held, ...] = get_args(Held)

# Keys of a receipt's `policy`: which arm it is in, by lever, and the share that goes without.
ARM, SHARE = "holdout_{}", "holdout_share"
WITH, WITHOUT = "with", "without"

# What `Receipt.saved` calls what each of them saved.
SAVED_AS: dict[Held, str] = {
    "routing": "routing",
    "response_cache": "response_cache",
    "prompt_caching": "prefix_cache",
}


class Arm(msgspec.Struct, frozen=True):
    """The side that a request is on, of those that a lever is for. Both are told, for only they can be compared."""

    lever: Held
    share: Decimal
    without: bool

    @property
    def told(self) -> dict[str, str]:
        """What its receipt says of it."""
        return {ARM.format(self.lever): WITHOUT if self.without else WITH, SHARE: f"{self.share:f}"}


def told(arm: Arm | None) -> dict[str, str]:
    return {} if arm is None else arm.told


def drawn(lever: Held, share: Decimal, whose: str) -> Arm:
    """Without the lever for `share` of all `whose`, each lever's draw apart from the others'; the same again for the
    same."""
    digest = blake2b(f"{lever}\0{whose}".encode(), digest_size=8).digest()
    return Arm(lever, share, int.from_bytes(digest) < share * 2**64)
