"""Receipts to rows and back."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from decimal import Decimal
from functools import lru_cache
from itertools import chain, compress, groupby
from operator import itemgetter
from typing import Any

import msgspec

from millicent.core.money import Money
from millicent.core.prompts import unpacked
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
# Rows are tuples in the order of these. What the indices are made of is fixed when a receipt is opened, which keeps
# closing it cheap.
_FIXED = ("id", "created_at_ns", *_ATTRIBUTES, "request_digest", "segments")
_SETTLED = (
    "settled_at_ns", "status", "model", "served_model", "placement", "backend", "dialect", "stream", "finish_reason",
    "tags", "usage", "input_tokens", "output_tokens", "queue_ns", "ttft_ns", "tpot_ns", "total_ns", "serving_ns",
    "prefill_ns", "decode_ns", "steps", "batch_sum", "accelerator_provenance", "recomputed_tokens",
    "step_time_version", "drafted_tokens", "accepted_tokens", "joules", "energy_provenance", "hold_nanousd",
    "list_nanousd", "saved", "basis", "price_source", "price_snapshot", "policy", "error", "useful",
)  # fmt: skip
RECEIPT_COLUMNS = (*_SETTLED, *_FIXED)
LINE_COLUMNS = (
    "receipt", "ordinal", "attempt", "role", "meter", "quantity", "unit", "unit_price_usd", "amount_nanousd",
    "provenance", "incurred_at_ns", "posted_at_ns", "book", "note", "id",
)  # fmt: skip


def _insert(table: str, columns: Sequence[str]) -> str:
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"  # noqa: S608 - our own names


INSERT_RECEIPT = _insert("receipts", (*RECEIPT_COLUMNS, "gateway"))
# All that closing a receipt may change.
SETTLE_RECEIPT = f"UPDATE receipts SET {', '.join(f'{name} = ?' for name in _SETTLED)} WHERE id = ?"  # noqa: S608 - our own names
INSERT_LINE = _insert("lines", LINE_COLUMNS)
INSERT_ATTEMPT = _insert("attempts", ("receipt", *Attempt.__struct_fields__))

_encoder = msgspec.json.Encoder()
_usage_decoder = msgspec.json.Decoder(Usage)
_strings_decoder = msgspec.json.Decoder(dict[str, str])
_nanousd_decoder = msgspec.json.Decoder(dict[str, int])


def write_many(connection: sqlite3.Connection, sql: str, found: Iterable[tuple[object, ...]]) -> None:
    """Run the statement, with a `?` per value, for each row.

    sqlite3 asks each value that isn't plainly text or a number how it would be stored, which takes longer than storing
    it, and a third of a receipt is None: neighbours that lack the same values share a statement that says NULL there.
    """
    for shape, alike in groupby(map(_given, found), key=itemgetter(0)):
        connection.executemany(_shaped(sql, shape), map(itemgetter(1), alike))


def _given(row: tuple[object, ...]) -> tuple[tuple[bool, ...], tuple[object, ...]]:
    """Which values there are, and those, enumerations as their text."""
    plain = msgspec.to_builtins(row, builtin_types=(bytes,))
    shape = tuple([value is not None for value in plain])
    return shape, tuple(compress(plain, shape))


@lru_cache(256)
def _shaped(sql: str, shape: tuple[bool, ...]) -> str:
    values = ["?" if given else "NULL" for given in shape]
    return "".join(chain.from_iterable(zip(sql.split("?"), [*values, ""], strict=True)))


def opening_row(receipt: Receipt, gateway: str) -> tuple[object, ...]:
    """For INSERT_RECEIPT."""
    return (*_settled_values(receipt), *_fixed_values(receipt), gateway)


def receipt_columns(receipt: Receipt, names: Iterable[str]) -> dict[str, object]:
    """Some of what closing may change."""
    values = dict(zip(_SETTLED, _settled_values(receipt), strict=True))
    return {name: values[name] for name in names}


def settlement_row(receipt: Receipt) -> tuple[object, ...]:
    """For SETTLE_RECEIPT."""
    return (*_settled_values(receipt), receipt.id)


def _fixed_values(receipt: Receipt) -> tuple[object, ...]:
    given, prompt = receipt.attribution, receipt.prompt
    return (
        receipt.id,
        receipt.created_at_ns,
        given.key,
        given.team,
        given.user,
        given.feature,
        given.tier,
        given.conversation,
        given.run,
        None if prompt is None else prompt.digest,
        None if prompt is None else prompt.packed(),
    )


def _settled_values(receipt: Receipt) -> tuple[object, ...]:
    usage, timing, ran, energy = receipt.usage, receipt.timing, receipt.accelerator, receipt.energy
    return (
        receipt.settled_at_ns,
        receipt.status,
        receipt.model,
        receipt.served_model,
        receipt.placement,
        receipt.backend,
        receipt.dialect,
        receipt.stream,
        receipt.finish_reason,
        _object(receipt.attribution.tags),
        _json(usage),
        usage.input_tokens,
        usage.output_tokens,
        timing.queue_ns,
        timing.ttft_ns,
        timing.tpot_ns,
        timing.total_ns,
        ran.serving_ns,
        ran.prefill_ns,
        ran.decode_ns,
        ran.steps,
        ran.batch_sum,
        ran.provenance,
        ran.recomputed_tokens,
        ran.step_time_version,
        ran.drafted_tokens,
        ran.accepted_tokens,
        _text(energy.joules),
        energy.provenance,
        _nanousd(receipt.hold),
        _nanousd(receipt.list_price),
        _object({lever: amount.nanousd for lever, amount in receipt.saved.items()}),
        receipt.basis,
        receipt.prices.source,
        _object(receipt.prices.snapshot),
        None if receipt.policy is None else _json(receipt.policy),
        receipt.error,
        receipt.useful,
    )


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
        usage=usage_of(row["usage"]),
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
        saved={lever: Money(amount) for lever, amount in saved_of(row["saved"]).items()},
        basis=row["basis"],
        prices=PriceSource(row["price_source"], _strings_decoder.decode(row["price_snapshot"])),
        policy=None if row["policy"] is None else _strings_decoder.decode(row["policy"]),
        error=row["error"],
        useful=None if row["useful"] is None else bool(row["useful"]),
        prompt=None if row["segments"] is None else unpacked(row["request_digest"], row["segments"]),
    )


def usage_of(text: str) -> Usage:
    return _usage_decoder.decode(text)


def saved_of(text: str) -> dict[str, int]:
    """Nano-dollars by lever."""
    return _nanousd_decoder.decode(text)


def line_row(receipt_id: str, ordinal: int, line: Line) -> tuple[object, ...]:
    """For INSERT_LINE, in the order of LINE_COLUMNS."""
    return (
        receipt_id,
        ordinal,
        line.attempt,
        line.role,
        line.meter,
        _text(line.quantity),
        line.unit,
        _text(line.unit_price_usd),
        _nanousd(line.amount),
        line.provenance,
        line.incurred_at_ns,
        line.posted_at_ns,
        line.book,
        line.note,
        line.id,
    )


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


def attempt_row(receipt_id: str, attempt: Attempt) -> tuple[object, ...]:
    """For INSERT_ATTEMPT."""
    return (receipt_id, *msgspec.structs.astuple(attempt))


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
    """`INSERT` with one named parameter per column, for what is written seldom."""
    names = tuple(columns)
    return f"INSERT INTO {table} ({', '.join(names)}) VALUES ({', '.join(f':{name}' for name in names)}) {conflict}"  # noqa: S608 - our own names


def assignments(columns: Iterable[str]) -> str:
    return ", ".join(f"{name} = :{name}" for name in columns)


def _json(value: object) -> str:
    return _encoder.encode(value).decode()


def _object(value: dict[str, Any]) -> str:
    """Most are empty."""
    return _encoder.encode(value).decode() if value else "{}"


def _text(value: Decimal | None) -> str | None:
    return None if value is None else format(value, "f")


def _decimal(text: str | None) -> Decimal | None:
    return None if text is None else Decimal(text)


def _nanousd(amount: Money | None) -> int | None:
    return None if amount is None else amount.nanousd


def _money(nanousd: int | None) -> Money | None:
    return None if nanousd is None else Money(nanousd)
