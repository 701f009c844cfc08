"""What the dialects of one maker have in common: how they tell of errors, of waiting and of limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from millicent.core.errors import MillicentError
from millicent.core.limits import Allowance


@dataclass(frozen=True)
class Family:
    """`error_body` gets the receipt's identifier where there is one, and `error_event` is that in a stream.

    `heartbeat` says in a stream that there is nothing to say yet. `rate_headers` gets the allowances and the time.
    `receipt_header` is the maker's own header for what names an answer; beside it ours is always sent.
    """

    error_body: Callable[[MillicentError, str | None], dict[str, Any]]
    error_event: Callable[[MillicentError, str | None], bytes]
    rate_headers: Callable[[Mapping[str, Allowance], int], dict[str, str]]
    heartbeat: bytes
    stream_type: bytes = b"text/event-stream; charset=utf-8"
    receipt_header: str | None = None
