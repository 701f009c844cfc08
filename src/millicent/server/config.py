"""`[server]`: where and how Millicent listens."""

from __future__ import annotations

from typing import Annotated

import msgspec


class ServerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`allowed_hosts` and `allowed_origins` add to this machine's own names, which are always allowed.

    Bodies over `max_body_mb` are refused; `heartbeat_s` apart, a stream that has nothing to say yet sends a comment;
    at shutdown, what runs has `shutdown_grace_s` to finish before it is cancelled and settled. Answers of
    `/v1/responses` are stored for `stored_responses_hours` after their conversation was last gone on with, unless they
    are sent with `store: false`, and the oldest make room beyond `stored_responses_mb`; with 0 hours, none is stored.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 8080
    max_body_mb: Annotated[int, msgspec.Meta(ge=1, le=64)] = 32
    body_timeout_s: Annotated[int, msgspec.Meta(ge=1)] = 60
    heartbeat_s: Annotated[int, msgspec.Meta(ge=1)] = 10
    shutdown_grace_s: Annotated[int, msgspec.Meta(ge=0)] = 20
    stored_responses_hours: Annotated[int, msgspec.Meta(ge=0)] = 24
    stored_responses_mb: Annotated[int, msgspec.Meta(ge=1)] = 256
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
