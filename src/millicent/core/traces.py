"""Which trace a request belongs to, as W3C Trace Context tells it from service to service.

Whoever takes a request sets it; it goes along with the task that answers. Without telemetry nobody sets it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from contextvars import ContextVar

import msgspec

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_NO_TRACE, _NO_SPAN = "0" * 32, "0" * 16


class Trace(msgspec.Struct):
    """`span_id` is of our span for the request, `parent_id` of the caller's, None where the trace begins here. `calls`
    are spans of calls that were made elsewhere for it, in order."""

    trace_id: str
    span_id: str
    parent_id: str | None
    sampled: bool
    state: str
    calls: list[str] = []

    def call_headers(self) -> dict[str, str]:
        """For one more call elsewhere."""
        span_id = secrets.token_hex(8)
        self.calls.append(span_id)
        found = {"traceparent": f"00-{self.trace_id}-{span_id}-{int(self.sampled):02x}"}
        return found | {"tracestate": self.state} if self.state else found


CURRENT: ContextVar[Trace | None] = ContextVar("millicent_trace", default=None)


def trace_of(headers: Mapping[str, str], *, sampled: bool) -> Trace:
    """The caller's, or a new one where it sent none that is valid; `sampled` decides for new ones."""
    found = _TRACEPARENT.fullmatch(headers.get("traceparent", "").strip())
    span_id = secrets.token_hex(8)
    # A later version may have more fields, the first has none.
    if (
        found is None
        or found[1] == "ff"
        or (found[1] == "00" and found[5])
        or found[2] == _NO_TRACE
        or found[3] == _NO_SPAN
    ):
        return Trace(secrets.token_hex(16), span_id, None, sampled, "")
    state = headers.get("tracestate", "")
    return Trace(found[2], span_id, found[3], bool(int(found[4], 16) & 1), state if len(state) <= 512 else "")
