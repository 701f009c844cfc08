"""What OpenAI's dialects share: usage with its cost, errors, finish reasons, server-sent events."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any

import msgspec

from millicent.core.chunks import FinishReason
from millicent.core.clock import NS_PER_MS, NS_PER_S
from millicent.core.errors import InvalidRequest, MillicentError, PaymentRequired
from millicent.core.limits import Allowance
from millicent.core.money import ZERO, Money
from millicent.core.receipts import REPORTED_BOOK, Receipt
from millicent.core.usage import Leaf, Provenance, Usage, weakest
from millicent.wire.family import Family
from millicent.wire.receipts import quote_body

# Decimals become JSON numbers: dollars in `usage.cost` are exact, never a float on the way.
_encoder = msgspec.json.Encoder(decimal_format="number")

ModelName = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]

DONE = b"data: [DONE]\n\n"


MAX_INPUTS = 2048  # as OpenAI's API description says of embeddings

TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
_Tokens = Annotated[tuple[TokenId, ...], msgspec.Meta(min_length=1)]


def read_inputs(given: str | list[Any], field: str) -> tuple[str | tuple[int, ...], ...]:
    """One text, a list of texts, one list of token ids, or a list of those. Raises InvalidRequest naming which."""
    if isinstance(given, str):
        return (given,)
    if not given:
        raise InvalidRequest(f"`{field}` is empty: send text or token ids.", param=field)
    if isinstance(given[0], int):
        given = [given]
    if len(given) > MAX_INPUTS:
        raise InvalidRequest(f"`{field}` holds {len(given)} texts: send at most {MAX_INPUTS} at once.", param=field)
    return tuple(_input(one, f"{field}[{index}]" if len(given) > 1 else field) for index, one in enumerate(given))


def _input(given: Any, where: str) -> str | tuple[int, ...]:
    if isinstance(given, str):
        return given
    try:
        return msgspec.convert(given, _Tokens)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"Invalid `{where}`: send a text or a list of token ids ({error}).", param=where) from None


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`continuous_usage_stats` puts the running usage, with its cost so far, on every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class StreamShape(msgspec.Struct, frozen=True):
    """What the caller asked to see in a stream."""

    usage: bool = False
    running_usage: bool = False
    choices: int = 1

    @classmethod
    def of(cls, *, stream: bool, options: StreamOptions | None, choices: int = 1) -> StreamShape:
        if options is None:
            return cls(choices=choices)
        if not stream:
            raise InvalidRequest(
                "`stream_options` goes only with `stream: true`: leave it out or stream.", param="stream_options"
            )
        return cls(
            usage=bool(options.include_usage), running_usage=bool(options.continuous_usage_stats), choices=choices
        )


def usage_body(receipt: Receipt) -> dict[str, Any]:
    """OpenAI's overlapping totals from our disjoint leaves, and the cost. Unknown is null, never 0."""
    usage, total = receipt.usage, receipt.total
    read, written = usage.input_tokens, usage.output_tokens
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": None if read is None or written is None else read + written,
        "prompt_tokens_details": {
            "cached_tokens": _cached_tokens(usage),
            "audio_tokens": usage.tokens(Leaf.INPUT_AUDIO),
        },
        "completion_tokens_details": {
            "reasoning_tokens": usage.tokens(Leaf.OUTPUT_REASONING),
            "audio_tokens": usage.tokens(Leaf.OUTPUT_AUDIO),
        },
        "cost": None if total is None else total.usd.normalize(),
        "cost_details": cost_details(receipt),
    }


def _cached_tokens(usage: Usage) -> int | None:
    """From a provider that reported the rest, no word of a cache is not a zero."""
    fresh = usage.leaves.get(Leaf.INPUT_FRESH)
    if Leaf.INPUT_CACHE_READ not in usage.leaves and fresh is not None and fresh.provenance is Provenance.REPORTED:
        return None
    return usage.tokens(Leaf.INPUT_CACHE_READ)


def cost_details(receipt: Receipt) -> dict[str, Any]:
    """Dollars per meter, and how the total is known: by its weakest line. A provider's own figure stands beside, with
    what it is more than ours."""
    by_meter: dict[str, Money | None] = {}
    lines = [line for line in receipt.lines if line.book != REPORTED_BOOK]
    for line in lines:
        before = by_meter.get(line.meter, ZERO)
        by_meter[line.meter] = None if before is None or line.amount is None else before + line.amount
    details: dict[str, Any] = {
        f"{meter}_cost": None if amount is None else amount.usd.normalize() for meter, amount in by_meter.items()
    }
    details["provenance"] = weakest(line.provenance for line in lines) if lines else "unknown"
    if len(lines) < len(receipt.lines) and (reported := receipt.reported) is not None:
        details["reported_cost"] = reported.usd.normalize()
        details["residual"] = None if receipt.residual is None else receipt.residual.usd.normalize()
    return details


def finish_reason(reason: str | None) -> str:
    """OpenAI knows no `cancelled`: a client that has gone doesn't read it, a server that stops says `stop`."""
    known = (FinishReason.LENGTH, FinishReason.TOOL_CALLS, FinishReason.CONTENT_FILTER)
    return next((each for each in known if reason == each), FinishReason.STOP)


def created_s(receipt: Receipt) -> int:
    return receipt.created_at_ns // NS_PER_S


def error_body(error: MillicentError, _: str | None = None) -> dict[str, Any]:
    """OpenAI's shape; a 402 also says what the request would have cost, where that can be told."""
    body: dict[str, Any] = {
        "message": error.message,
        "type": error.kind,
        "param": error.param,
        "code": error.code,
    }
    if isinstance(error, PaymentRequired) and error.quote is not None:
        body["quote"] = quote_body(error.quote)
    return {"error": body}


def rate_headers(allowances: Mapping[str, Allowance], _: int = 0) -> dict[str, str]:
    """`x-ratelimit-{limit,remaining,reset}-{requests,tokens}`, for those that are limited."""
    headers = {}
    for name, allowance in allowances.items():
        headers[f"x-ratelimit-limit-{name}"] = str(allowance.limit)
        headers[f"x-ratelimit-remaining-{name}"] = str(allowance.remaining)
        headers[f"x-ratelimit-reset-{name}"] = _duration(allowance.reset_ns)
    return headers


def _duration(ns: int) -> str:
    """As OpenAI writes it: `0s`, `120ms`, `1.5s`, `1m0s`; rounded up, so that waiting for it is enough."""
    ms = -(-ns // NS_PER_MS)
    if 0 < ms < 1000:
        return f"{ms}ms"
    minutes, ms = divmod(ms, 60_000)
    seconds = f"{Decimal(ms) / 1000:f}".rstrip("0").rstrip(".") if ms % 1000 else str(ms // 1000)
    return f"{minutes}m{seconds}s" if minutes else f"{seconds}s"


def encode(body: object) -> bytes:
    return _encoder.encode(body)


def event(body: object) -> bytes:
    """One server-sent event."""
    return b"data: " + _encoder.encode(body) + b"\n\n"


FAMILY = Family(
    error_body=error_body,
    error_event=lambda error, _: event(error_body(error)),
    rate_headers=rate_headers,
    heartbeat=b": waiting\n\n",
)
