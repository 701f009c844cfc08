"""Receipts to rows and back."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from decimal import Decimal
from functools import cache

import msgspec

from millicent.core.money import Money
from millicent.core.receipts import (
    Accelerator,
    Attempt,
    Energy,
    Line,
    Meter,
    PriceSource,
    Receipt,
    Role,
    Status,
    Timing,
)
from millicent.core.request import Attribution
from millicent.core.usage import Provenance, Usage

_ATTRIBUTES = ("key", "team", "user", "feature", "tier", "conversation", "run")
# What the indices are made of: fixed when a receipt is opened, which keeps closing it cheap.
FIXED_COLUMNS = frozenset({"id", "created_at_ns", *_ATTRIBUTES})

_usage_decoder = msgspec.json.Decoder(Usage)
_strings_decoder = msgspec.json.Decoder(dict[str, str])
_nanousd_decoder = msgspec.json.Decoder(dict[str, int])


def receipt_row(receipt: Receipt) -> dict[str, object]:
    """Every column of `receipts` but `gateway` and `checkpointed_at_ns`."""
    attribution = receipt.attribution
    return {
        "id": receipt.id,
        "created_at_ns": receipt.created_at_ns,
        "settled_at_ns": receipt.settled_at_ns,
        "status": receipt.status,
        "model": receipt.model,
        "served_model": receipt.served_model,
        "placement": receipt.placement,
        "backend": receipt.backend,
        "dialect": receipt.dialect,
        "stream": receipt.stream,
        "finish_reason": receipt.finish_reason,
        **{name: getattr(attribution, name) for name in _ATTRIBUTES},
        "tags": _json(attribution.tags),
        **usage_columns(receipt.usage),
        "queue_ns": receipt.timing.queue_ns,
        "ttft_ns": receipt.timing.ttft_ns,
        "tpot_ns": receipt.timing.tpot_ns,
        "total_ns": receipt.timing.total_ns,
        **accelerator_columns(receipt.accelerator),
        **energy_columns(receipt.energy),
        "hold_nanousd": _nanousd(receipt.hold),
        "list_nanousd": _nanousd(receipt.list_price),
        "saved": _json({lever: amount.nanousd for lever, amount in receipt.saved.items()}),
        "basis": receipt.basis,
        "price_source": receipt.prices.source,
        "price_snapshot": _json(receipt.prices.snapshot),
        "policy": None if receipt.policy is None else _json(receipt.policy),
        "error": receipt.error,
        "useful": receipt.useful,
    }


def usage_columns(usage: Usage) -> dict[str, object]:
    return {"usage": _json(usage), "input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens}


def accelerator_columns(accelerator: Accelerator) -> dict[str, object]:
    return {
        "serving_ns": accelerator.serving_ns,
        "prefill_ns": accelerator.prefill_ns,
        "decode_ns": accelerator.decode_ns,
        "steps": accelerator.steps,
        "batch_sum": accelerator.batch_sum,
        "accelerator_provenance": accelerator.provenance,
        "recomputed_tokens": accelerator.recomputed_tokens,
        "step_time_version": accelerator.step_time_version,
        "drafted_tokens": accelerator.drafted_tokens,
        "accepted_tokens": accelerator.accepted_tokens,
    }


def energy_columns(energy: Energy) -> dict[str, object]:
    return {"joules": _text(energy.joules), "energy_provenance": energy.provenance}


def receipt_of(row: sqlite3.Row, lines: Iterable[Line] = (), attempts: Iterable[Attempt] = ()) -> Receipt:
    return Receipt(
        id=row["id"],
        created_at_ns=row["created_at_ns"],
        settled_at_ns=row["settled_at_ns"],
        status=None if row["status"] is None else Status(row["status"]),
        model=row["model"],
        served_model=row["served_model"],
        placement=row["placement"],
        backend=row["backend"],
        dialect=row["dialect"],
        stream=bool(row["stream"]),
        finish_reason=row["finish_reason"],
        attribution=Attribution(**{name: row[name] for name in _ATTRIBUTES}, tags=_strings_decoder.decode(row["tags"])),
        usage=_usage_decoder.decode(row["usage"]),
        timing=Timing(row["queue_ns"], row["ttft_ns"], row["tpot_ns"], row["total_ns"]),
        accelerator=Accelerator(
            row["serving_ns"],
            row["prefill_ns"],
            row["decode_ns"],
            row["steps"],
            row["batch_sum"],
            Provenance(row["accelerator_provenance"]),
            row["recomputed_tokens"],
            row["step_time_version"],
            row["drafted_tokens"],
            row["accepted_tokens"],
        ),
        energy=Energy(_decimal(row["joules"]), Provenance(row["energy_provenance"])),
        lines=tuple(lines),
        attempts=tuple(attempts),
        hold=_money(row["hold_nanousd"]),
        list_price=_money(row["list_nanousd"]),
        saved={lever: Money(amount) for lever, amount in _nanousd_decoder.decode(row["saved"]).items()},
        basis=row["basis"],
        prices=PriceSource(row["price_source"], _strings_decoder.decode(row["price_snapshot"])),
        policy=None if row["policy"] is None else _strings_decoder.decode(row["policy"]),
        error=row["error"],
        useful=None if row["useful"] is None else bool(row["useful"]),
    )


def line_row(receipt_id: str, ordinal: int, line: Line) -> dict[str, object]:
    return {
        "receipt": receipt_id,
        "ordinal": ordinal,
        "attempt": line.attempt,
        "role": line.role,
        "meter": line.meter,
        "quantity": _text(line.quantity),
        "unit": line.unit,
        "unit_price_usd": _text(line.unit_price_usd),
        "amount_nanousd": _nanousd(line.amount),
        "provenance": line.provenance,
        "incurred_at_ns": line.incurred_at_ns,
        "posted_at_ns": line.posted_at_ns,
        "book": line.book,
        "note": line.note,
        "id": line.id,
    }


def line_of(row: sqlite3.Row) -> Line:
    return Line(
        attempt=row["attempt"],
        role=Role(row["role"]),
        meter=Meter(row["meter"]),
        quantity=Decimal(row["quantity"]),
        unit=row["unit"],
        unit_price_usd=_decimal(row["unit_price_usd"]),
        amount=_money(row["amount_nanousd"]),
        provenance=Provenance(row["provenance"]),
        incurred_at_ns=row["incurred_at_ns"],
        posted_at_ns=row["posted_at_ns"],
        book=row["book"],
        note=row["note"],
        id=row["id"],
    )


def attempt_row(receipt_id: str, attempt: Attempt) -> dict[str, object]:
    return {"receipt": receipt_id, **msgspec.structs.asdict(attempt)}


def attempt_of(row: sqlite3.Row) -> Attempt:
    return Attempt(
        ordinal=row["ordinal"],
        backend=row["backend"],
        placement=row["placement"],
        model=row["model"],
        role=Role(row["role"]),
        started_at_ns=row["started_at_ns"],
        ended_at_ns=row["ended_at_ns"],
        status=None if row["status"] is None else Status(row["status"]),
        error=row["error"],
    )


def insert(table: str, columns: Iterable[str], conflict: str = "") -> str:
    """`INSERT` with one named parameter per column."""
    return _insert(table, tuple(columns), conflict)


def assignments(columns: Iterable[str]) -> str:
    return _assignments(tuple(columns))


# The same few statements are asked for with every receipt.
@cache
def settlement(columns: tuple[str, ...]) -> str:
    """`UPDATE` of all that closing a receipt may change."""
    changing = _assignments(tuple(name for name in columns if name not in FIXED_COLUMNS))
    return f"UPDATE receipts SET {changing} WHERE id = :id"  # noqa: S608 - our own names


@cache
def _insert(table: str, columns: tuple[str, ...], conflict: str) -> str:
    values = ", ".join(f":{name}" for name in columns)
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({values}) {conflict}"  # noqa: S608 - our own names


@cache
def _assignments(columns: tuple[str, ...]) -> str:
    return ", ".join(f"{name} = :{name}" for name in columns)


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _text(value: Decimal | None) -> str | None:
    return None if value is None else format(value, "f")


def _decimal(text: str | None) -> Decimal | None:
    return None if text is None else Decimal(text)


def _nanousd(amount: Money | None) -> int | None:
    return None if amount is None else amount.nanousd


def _money(nanousd: int | None) -> Money | None:
    return None if nanousd is None else Money(nanousd)
