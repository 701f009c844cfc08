"""What an upstream complains of, in whatever shape its dialect has for that, as one of our errors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

import msgspec

from millicent.core.errors import InvalidRequest, MillicentError, RateLimited, UpstreamError, UpstreamTimeout, one_line

# More than is shown, so that a secret is found whole before the rest is cut off.
_MOST_KEPT = 4096
_BAD_KEY = "API_KEY_INVALID"  # Google says so with the status of a bad request

_CONTEXT = re.compile(
    r"context.?(length|window|size)|exceed_context_size|maximum context|prompt is too long|too many (input )?tokens"
    r"|input token count|tokens? exceeds? .*(limit|maximum|max_total_tokens)|`inputs` tokens \+",
    re.IGNORECASE,
)
_STATUS = re.compile(r"[1-5]\d\d", re.ASCII)
_WAIT = re.compile(r"(\d{1,5}(?:\.\d{1,9})?)s", re.ASCII)
# What names a kind of complaint where no status does.
_STATUS_BY_WORD = {
    "rate_limit": 429,
    "overloaded": 529,
    "context_length_exceeded": 400,
    "invalid_request": 400,
    "bad_request": 400,
    "validation": 422,
    "authentication": 401,
    "invalid_api_key": 401,
    "permission": 403,
    "not_found": 404,
    "timeout": 504,
}


class Complaint(msgspec.Struct, frozen=True):
    """`message` is the beginning of what was said. `status` is an HTTP status that it names itself, where it does."""

    message: str
    code: str | None = None
    kind: str | None = None
    param: str | None = None
    status: int | None = None
    retry_after_s: int | None = None


def complaint_in(body: bytes | Any) -> Complaint | None:
    """The complaint in an error's body, or in an event's JSON; None where there is none.

    OpenAI, Anthropic and most others: `{"error": {"message", "type", "code", "param"}}`; Google: that with `status` and
    `details`, a number as the `code`, and maybe in a list; TGI: `{"error": "...",
    "error_type"}`; older vLLM and Mistral: `{"object": "error", "message", "code"}`; FastAPI: `{"detail": ...}`.
    """
    if isinstance(body, bytes):
        try:
            body = msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
    if isinstance(body, list) and len(body) == 1:
        body = body[0]
    if not isinstance(body, dict):
        return None
    found = body.get("error")
    if isinstance(found, dict):
        return _of(found)
    if isinstance(found, str) and found:
        return _of({"message": found, "type": body.get("error_type")})
    if body.get("object") == "error" or body.get("type") == "error":
        return _of(body)
    if "detail" in body:
        return _of({"message": body["detail"]})
    return None


def _of(found: dict[str, Any]) -> Complaint:
    said = found.get("message") or found.get("detail") or found.get("type") or "it gave no reason"
    code, status = found.get("code"), None
    if isinstance(code, int | float) or (isinstance(code, str) and _STATUS.fullmatch(code)):
        status, code = int(code), None
    reason, after_s = _details(found.get("details"))
    return Complaint(
        (said if isinstance(said, str) else msgspec.json.encode(said).decode())[:_MOST_KEPT],
        code if isinstance(code, str) and code else reason,
        next((found[name] for name in ("type", "status") if isinstance(found.get(name), str)), None),
        found["param"] if isinstance(found.get("param"), str) else None,
        status if status is not None and HTTPStatus.BAD_REQUEST <= status <= 599 else None,
        after_s,
    )


def _details(details: Any) -> tuple[str | None, int | None]:
    """Google's: the reason, and how long to wait."""
    reason, after_s = None, None
    for detail in details if isinstance(details, list) else ():
        if isinstance(detail, dict):
            reason = detail["reason"] if isinstance(detail.get("reason"), str) else reason
            wait = _WAIT.fullmatch(str(detail.get("retryDelay")))
            after_s = after_s if wait is None else math.ceil(float(wait[1]))
    return reason, after_s


def error_of(
    who: str, status: int, complaint: Complaint | None, *, retry_after_s: int | None = None, secrets: Iterable[str] = ()
) -> MillicentError:
    """The error that a status and what came with it stand for. `who` is the upstream, as messages name it."""
    if status == HTTPStatus.OK and complaint is not None:  # a complaint inside an answer that began well
        status = complaint.status or _named_status(complaint)
    said = complaint.message if complaint is not None else "it gave no reason"
    for secret in secrets:
        said = said.replace(secret, "***")
    said = one_line(said)
    code = complaint.code if complaint is not None else None
    if status in {401, 403} or code == _BAD_KEY:
        # What it says may show parts of the key.
        message = f"{who} doesn't accept our key (HTTP {status}): check the placement's api_key_env or api_key_file."
        return UpstreamError(message, code="upstream_unauthorized", retryable=False)
    if status in {400, 413, 422}:
        param = complaint.param if complaint is not None else None
        named = f"{code or ''} {complaint.kind or ''} {said}" if complaint is not None else ""
        too_long = "context_length_exceeded" if _CONTEXT.search(named) else None
        return InvalidRequest(f"{who} refused the request: {said}", param=param, code=too_long)
    if retry_after_s is None and complaint is not None:
        retry_after_s = complaint.retry_after_s
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return RateLimited(f"{who} takes no more for now: {said}", retry_after_s=retry_after_s)
    if status in {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.GATEWAY_TIMEOUT}:
        return UpstreamTimeout(f"{who} took too long by its own limits (HTTP {status}): {said}")
    if 300 <= status < 400:
        message = f"{who} redirects elsewhere (HTTP {status}), which is not followed: correct the placement's base_url."
        return UpstreamError(message, code="upstream_redirected", retryable=False)
    if 400 <= status < 500:
        return UpstreamError(f"{who} refused (HTTP {status}): {said}", retryable=False)
    return UpstreamError(f"{who} failed (HTTP {status}): {said}", retry_after_s=retry_after_s)


def _named_status(complaint: Complaint) -> int:
    named = f"{complaint.code or ''} {complaint.kind or ''}".lower()
    if _CONTEXT.search(f"{named} {complaint.message}"):
        return 400
    return next((status for word, status in _STATUS_BY_WORD.items() if word in named), 500)
