"""A caller's promise that a repeated request is the same one: one bill, one answer."""

from __future__ import annotations

import msgspec

from millicent.core.clock import NS_PER_HOUR

KEPT_NS = 24 * NS_PER_HOUR


class Claim(msgspec.Struct, frozen=True):
    """`key` is the caller's word for the request, `owner` the caller (its API key; "" for anonymous).

    `request_hash` tells whether a later request under the same key is the same.
    """

    owner: str
    key: str
    request_hash: bytes
