"""Request bodies, bounded in size and time."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from millicent.core.errors import InvalidRequest, TooLarge

# Set in the scope once the whole body is here.
ARRIVED = "millicent.body_arrived"
_MB = 1 << 20
_DRAIN_LIMIT_BYTES = 64 * _MB
_CODINGS = frozenset({b"content-encoding", b"transfer-encoding"})
_AS_IT_IS = frozenset({b"", b"identity", b"chunked"})


async def read_body(scope: Scope, receive: Receive, *, max_mb: int, timeout_s: float) -> bytes:
    """The whole body. Raises TooLarge over `max_mb`, InvalidRequest when it doesn't arrive, ClientDisconnect.

    A body that is too large is read to its end up to 64 MB and thrown away, so that a client that writes all before
    it reads gets the answer; above that the answer comes at once.
    """
    limit = max_mb * _MB
    declared = 0
    for name, value in scope["headers"]:
        if name == b"content-length":
            declared = int(value)
        elif name in _CODINGS and value.strip().lower() not in _AS_IT_IS:
            coding = f"{name.decode()}: {value[:40].decode('latin-1')}"
            raise InvalidRequest(
                f"The body is compressed (`{coding}`): send it as it is.",
                param=name.decode(),
                code="unsupported_encoding",
            )
    if declared > _DRAIN_LIMIT_BYTES:
        raise _too_large(max_mb)
    if scope.get(ARRIVED):  # as nearly always: no timer is needed
        return await _gathered(receive, limit, max_mb)
    try:
        async with asyncio.timeout(timeout_s):
            return await _gathered(receive, limit, max_mb)
    except TimeoutError:
        raise InvalidRequest(
            f"The body did not arrive within {timeout_s:g} s: send it faster or smaller.", code="body_timeout"
        ) from None


async def _gathered(receive: Receive, limit: int, max_mb: int) -> bytes:
    pieces: list[bytes] = []
    seen = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        piece = message.get("body", b"")
        seen += len(piece)
        if seen > _DRAIN_LIMIT_BYTES:
            raise _too_large(max_mb)
        if seen <= limit:
            pieces.append(piece)
        else:
            pieces.clear()
        if not message.get("more_body", False):
            break
    if seen > limit:
        raise _too_large(max_mb)
    return b"".join(pieces)


def _too_large(max_mb: int) -> TooLarge:
    return TooLarge(f"The body is over {max_mb} MB ([server] max_body_mb): send less.")
