"""Small answers, sent without ceremony."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import Send

from millicent.core.errors import MillicentError
from millicent.wire.family import Family
from millicent.wire.receipts import encode

_JSON = b"application/json"


async def send_json(
    send: Send, body: bytes, *, status: int = 200, headers: Mapping[str, str] | None = None, media_type: bytes = _JSON
) -> None:
    await send({"type": "http.response.start", "status": status, "headers": _headers(headers, body, media_type)})
    await send({"type": "http.response.body", "body": body})


async def send_error(
    send: Send,
    family: Family,
    error: MillicentError,
    *,
    headers: Mapping[str, str] | None = None,
    receipt_id: str | None = None,
) -> None:
    """The error in the family's shape, with `Retry-After` where waiting helps."""
    extra = dict(headers or {})
    if error.retry_after_s is not None:
        extra["retry-after"] = str(error.retry_after_s)
    body = encode(family.error_body(error, receipt_id))
    await send_json(send, body, status=error.status, headers=extra)


def _headers(extra: Mapping[str, str] | None, body: bytes, media_type: bytes) -> list[tuple[bytes, bytes]]:
    headers = [(b"content-type", media_type), (b"content-length", str(len(body)).encode())]
    return headers + [(name.encode("latin-1"), value.encode("latin-1")) for name, value in (extra or {}).items()]
