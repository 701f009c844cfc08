"""What Anthropic's dialect says besides answers: usage with its cost, errors, rates, models, events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from millicent.core.clock import NS_PER_S, iso_utc
from millicent.core.errors import InvalidRequest, MillicentError, PaymentRequired
from millicent.core.limits import Allowance
from millicent.core.receipts import Receipt
from millicent.core.usage import Leaf, Usage
from millicent.wire import openai_common
from millicent.wire.decoding import read_limit
from millicent.wire.family import Family
from millicent.wire.field_names import FieldNames
from millicent.wire.receipts import encode, quote_body

VERSION_HEADER = "anthropic-version"
# The newer one takes less: what only the older takes is taken under both.
_VERSIONS = ("2023-06-01", "2026-10-21")

_ERROR_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def check_version(headers: Mapping[str, str]) -> None:
    """Raises InvalidRequest where a version of the dialect is wanted that isn't spoken here."""
    version = headers.get(VERSION_HEADER)
    if version is not None and version not in _VERSIONS:
        raise InvalidRequest(
            f"Header `{VERSION_HEADER}` is `{version[:40]}`: this server speaks {' and '.join(_VERSIONS)}.",
            param=VERSION_HEADER,
            code="unsupported_parameter",
        )


def usage_body(receipt: Receipt) -> dict[str, Any]:
    """Anthropic's disjoint counts, and the cost. Unknown is null, never 0."""
    usage = receipt.usage
    short, long = usage.tokens(Leaf.INPUT_CACHE_WRITE_5M), usage.tokens(Leaf.INPUT_CACHE_WRITE_1H)
    return {
        "input_tokens": _sum(usage, Leaf.INPUT_FRESH, Leaf.INPUT_IMAGE, Leaf.INPUT_AUDIO),
        "cache_creation_input_tokens": _sum(usage, Leaf.INPUT_CACHE_WRITE_5M, Leaf.INPUT_CACHE_WRITE_1H),
        "cache_read_input_tokens": usage.tokens(Leaf.INPUT_CACHE_READ),
        "cache_creation": {"ephemeral_5m_input_tokens": short, "ephemeral_1h_input_tokens": long},
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"thinking_tokens": usage.tokens(Leaf.OUTPUT_REASONING)},
        "service_tier": "standard",
        "cost": None if receipt.total is None else receipt.total.usd.normalize(),
        "cost_details": openai_common.cost_details(receipt),
    }


def _sum(usage: Usage, *leaves: Leaf) -> int | None:
    tokens = [usage.tokens(leaf) for leaf in leaves]
    return None if None in tokens else sum(count for count in tokens if count is not None)


_NAMES = FieldNames(
    {
        "stop": "stop_sequences",
        "response_format": "output_config.format",
        "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    }
)


def error_body(error: MillicentError, receipt_id: str | None = None) -> dict[str, Any]:
    """Anthropic's shape, with the field to blame beside the message."""
    kind = "invalid_request_error" if error.status < 500 else "api_error"
    message, param = _NAMES.told(error)
    told: dict[str, Any] = {
        "type": _ERROR_TYPES.get(error.status, kind),
        "message": message,
        "param": param,
        "details": {"error_code": error.code},
    }
    if isinstance(error, PaymentRequired) and error.quote is not None:
        told["quote"] = quote_body(error.quote)
    return {"type": "error", "error": told, "request_id": receipt_id}


def rate_headers(allowances: Mapping[str, Allowance], now_ns: int) -> dict[str, str]:
    """`anthropic-ratelimit-{requests,tokens}-{limit,remaining,reset}`, for those that are limited; the reset is a time,
    rounded up."""
    headers = {}
    for name, allowance in allowances.items():
        reset_s = -(-(now_ns + allowance.reset_ns) // NS_PER_S)
        headers[f"anthropic-ratelimit-{name}-limit"] = str(allowance.limit)
        headers[f"anthropic-ratelimit-{name}-remaining"] = str(allowance.remaining)
        headers[f"anthropic-ratelimit-{name}-reset"] = time_text(reset_s)
    return headers


def time_text(utc_s: int) -> str:
    return iso_utc(utc_s * NS_PER_S).partition(".")[0] + "Z"


def model_body(model: str, created_s: int) -> dict[str, Any]:
    return {
        "type": "model",
        "id": model,
        "display_name": model,
        "created_at": time_text(created_s),
        "lifecycle": "active",
    }


def model_list(models: Sequence[str], created_s: int, query: Mapping[str, str]) -> dict[str, Any]:
    """A page of models: at most `limit`, after `after_id` or before `before_id`. Raises InvalidRequest."""
    limit = read_limit(query, 20, 1000)
    found = list(models)
    for name in ("after_id", "before_id"):
        if name in query and query[name] not in found:
            raise InvalidRequest(f"`{name}` is `{query[name][:100]}`, which is no model here.", param=name)
    if "after_id" in query:
        found = found[found.index(query["after_id"]) + 1 :]
    backwards = "before_id" in query
    if backwards:
        found = found[: found.index(query["before_id"])]
    page = found[-limit:] if backwards else found[:limit]
    return {
        "data": [model_body(model, created_s) for model in page],
        "has_more": len(page) < len(found),
        "first_id": page[0] if page else None,
        "last_id": page[-1] if page else None,
    }


def event(body: Mapping[str, Any]) -> bytes:
    """One server-sent event, named by its type."""
    return f"event: {body['type']}\ndata: ".encode() + encode(body) + b"\n\n"


FAMILY = Family(
    error_body=error_body,
    error_event=lambda error, receipt_id: event(error_body(error, receipt_id)),
    rate_headers=rate_headers,
    heartbeat=event({"type": "ping"}),
    receipt_header="request-id",
)
