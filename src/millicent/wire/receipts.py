"""Our own JSON: receipts, quotes, accounts, lists. Money is a decimal string; times are RFC 3339 in UTC."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

import msgspec

from millicent.core.accounts import Account
from millicent.core.clock import NS_PER_MS, NS_PER_S, iso_utc
from millicent.core.money import Money
from millicent.core.quotes import CostInterval, Interval, Quote
from millicent.core.receipts import Accelerator, Attempt, Line, Receipt
from millicent.core.usage import Provenance

_encoder = msgspec.json.Encoder(decimal_format="number")


def encode(body: object) -> bytes:
    return _encoder.encode(body)


def receipt_body(receipt: Receipt) -> dict[str, Any]:
    """The receipt, schema 1. `status` and `settled_at` are null while it runs."""
    given = receipt.attribution
    timing = receipt.timing
    return {
        "id": receipt.id,
        "object": "receipt",
        "schema": 1,
        "created_at": iso_utc(receipt.created_at_ns),
        "settled_at": None if receipt.settled_at_ns is None else iso_utc(receipt.settled_at_ns),
        "status": receipt.status,
        "model": receipt.model,
        "served_model": receipt.served_model,
        "placement": receipt.placement,
        "backend": receipt.backend,
        "dialect": receipt.dialect,
        "stream": receipt.stream,
        "finish_reason": receipt.finish_reason,
        "error": receipt.error,
        "attribution": {
            "key": given.key,
            "team": given.team,
            "user": given.user,
            "feature": given.feature,
            "tier": given.tier,
            "conversation": given.conversation,
            "run": given.run,
            "tags": given.tags,
        },
        "usage": {
            leaf.value: {"tokens": count.tokens, "provenance": count.provenance}
            for leaf, count in receipt.usage.leaves.items()
        },
        "timing_ms": {
            "queue": _ms(timing.queue_ns),
            "ttft": _ms(timing.ttft_ns),
            "tpot": _ms(timing.tpot_ns),
            "total": _ms(timing.total_ns),
        },
        "accelerator": _accelerator(receipt.accelerator),
        "energy": {"joules": receipt.energy.joules, "provenance": receipt.energy.provenance},
        "lines": [_line(line) for line in receipt.lines],
        "total_usd": _usd(receipt.total),
        "reported_usd": _usd(receipt.reported),
        "residual_usd": _usd(receipt.residual),
        "list_usd": _usd(receipt.list_price),
        "saved_usd": {lever: str(amount) for lever, amount in receipt.saved.items()},
        "hold_usd": _usd(receipt.hold),
        "attempts": [_attempt(attempt) for attempt in receipt.attempts],
        "basis": receipt.basis,
        "prices": {"source": receipt.prices.source, "snapshot": receipt.prices.snapshot},
        "policy": receipt.policy,
        "useful": receipt.useful,
    }


def account_body(account: Account) -> dict[str, Any]:
    return {
        "object": "account",
        "device": account.device,
        "placement": account.placement,
        "hour": iso_utc(account.hour_ns),
        "accelerators": account.accelerators,
        "wall_ns": account.wall_ns,
        "serving_ns": account.serving_ns,
        "overhead_ns": account.overhead_ns,
        "lost_ns": account.lost_ns,
        "idle_ns": account.idle_ns,
        "down_ns": account.down_ns,
        "rate_usd_per_hour": None if account.usd_per_hour is None else f"{account.usd_per_hour:f}",
        "rate_provenance": account.rate_provenance,
        "cost_usd": _usd(account.cost),
        "unused_usd": _usd(account.unused_cost),
    }


def quote_body(quote: Quote) -> dict[str, Any]:
    cost = quote.cost
    return {
        "object": "quote",
        "model": quote.model,
        "placement": quote.placement,
        "input_tokens": quote.input_tokens,
        "output_tokens": msgspec.structs.asdict(quote.output_tokens),
        "ttft_ms": _interval_ms(quote.ttft),
        "total_ms": _interval_ms(quote.total),
        "cost_usd": None if cost is None else {name: str(amount) for name, amount in _fields(cost)},
        "provenance": quote.provenance,
    }


def list_body(data: Sequence[dict[str, Any]], following: str | None) -> dict[str, Any]:
    """`next` is the `after` of the following page."""
    return {"object": "list", "data": list(data), "has_more": following is not None, "next": following}


def _accelerator(accelerator: Accelerator) -> dict[str, Any]:
    if accelerator.provenance is Provenance.UNKNOWN:
        figures: dict[str, Any] = dict.fromkeys(("seconds", "prefill_seconds", "decode_seconds", "steps", "mean_batch"))
    else:
        figures = {
            "seconds": _seconds(accelerator.serving_ns),
            "prefill_seconds": _seconds(accelerator.prefill_ns),
            "decode_seconds": _seconds(accelerator.decode_ns),
            "steps": accelerator.steps,
            "mean_batch": round(accelerator.batch_sum / accelerator.steps, 3) if accelerator.steps else None,
        }
    if accelerator.recomputed_tokens:
        figures["recomputed_tokens"] = accelerator.recomputed_tokens
    if accelerator.drafted_tokens:
        figures |= {"drafted_tokens": accelerator.drafted_tokens, "accepted_tokens": accelerator.accepted_tokens}
    return figures | {"step_time_version": accelerator.step_time_version, "provenance": accelerator.provenance}


def _line(line: Line) -> dict[str, Any]:
    return {
        "attempt": line.attempt,
        "role": line.role,
        "meter": line.meter,
        "quantity": line.quantity,
        "unit": line.unit,
        "unit_price_usd": None if line.unit_price_usd is None else f"{line.unit_price_usd:f}",
        "amount_usd": _usd(line.amount),
        "provenance": line.provenance,
        "incurred_at": iso_utc(line.incurred_at_ns),
        "posted_at": iso_utc(line.posted_at_ns),
        "book": line.book,
        "note": line.note,
        **({} if line.id is None else {"id": line.id}),
    }


def _attempt(attempt: Attempt) -> dict[str, Any]:
    return {
        "attempt": attempt.ordinal,
        "backend": attempt.backend,
        "placement": attempt.placement,
        "model": attempt.model,
        "role": attempt.role,
        "started_at": iso_utc(attempt.started_at_ns),
        "ended_at": None if attempt.ended_at_ns is None else iso_utc(attempt.ended_at_ns),
        "status": attempt.status,
        "error": attempt.error,
    }


def _usd(amount: Money | None) -> str | None:
    return None if amount is None else str(amount)


def _interval_ms(interval: Interval | None) -> dict[str, Decimal] | None:
    return None if interval is None else {name: Decimal(ns) / NS_PER_MS for name, ns in _fields(interval)}


def _fields(interval: Interval | CostInterval) -> Iterable[tuple[str, Any]]:
    return msgspec.structs.asdict(interval).items()


def _ms(ns: int | None) -> Decimal | None:
    return None if ns is None else Decimal(ns) / NS_PER_MS


def _seconds(ns: int) -> Decimal:
    """All nine decimals, so that receipts add up to the nanosecond."""
    return Decimal(ns) / NS_PER_S
