"""Bodies of `/v1/revenue` and `/v1/costs`, and the same as rows of a file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any

import msgspec

from millicent.core.clock import iso_utc
from millicent.core.entries import Entry, Kind
from millicent.core.errors import InvalidRequest
from millicent.core.money import Money
from millicent.core.periods import parse_period
from millicent.wire.decoding import decode_body
from millicent.wire.late import Name, Note

_MOST_USD = Decimal(10) ** 9
# What a file may call its columns; the first is the name in JSON.
_COLUMNS = {
    "id": ("id", "invoice", "invoice_id", "invoice id"),
    "period": ("period", "month", "date", "day", "week"),
    "amount_usd": ("amount_usd", "amount", "usd", "revenue", "revenue_usd", "cost", "cost_usd"),
    "feature": ("feature",),
    "user": ("user", "customer", "user_id", "customer_id"),
    "tier": ("tier", "plan"),
    "note": ("note", "description", "memo"),
}


class EntryBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`period` is what the amount is for: a month, a week, a day, or days: see `core.periods`."""

    id: Name
    amount_usd: Decimal
    period: Name
    feature: Name | None = None
    user: Name | None = None
    tier: Name | None = None
    note: Note | None = None


_one_decoder = msgspec.json.Decoder(EntryBody)
_several_decoder = msgspec.json.Decoder(Annotated[list[EntryBody], msgspec.Meta(min_length=1, max_length=1000)])


def decode_entries(body: bytes, kind: Kind, now_ns: int) -> tuple[tuple[Entry, ...], bool]:
    """The entries, and whether it was a list. Raises InvalidRequest naming the field."""
    several = body.lstrip()[:1] == b"["
    if several:
        given = decode_body(body, _several_decoder, EntryBody.__struct_fields__)
    else:
        given = [decode_body(body, _one_decoder, EntryBody.__struct_fields__)]
    return tuple(_entry(each, kind, f"[{i}]." if several else "", now_ns) for i, each in enumerate(given)), several


def entries_of_rows(rows: Sequence[Mapping[str, str]], kind: Kind, now_ns: int) -> list[Entry]:
    """The rows of a file. One without an identifier gets one of what it says, and which of several such rows it is, so
    that the same file again adds nothing. Raises InvalidRequest naming the row and the column."""
    seen: dict[str, int] = {}
    found = []
    for number, row in enumerate(rows, start=1):
        known = {name.strip().lower(): (value or "").strip() for name, value in row.items() if name}
        given = {
            field: value
            for field, names in _COLUMNS.items()
            if (value := next(filter(None, map(known.get, names)), ""))
        }
        for field in ("period", "amount_usd"):
            if field not in given:
                raise InvalidRequest(
                    f"row {number} has no {field}: name that column {_COLUMNS[field][0]}.", param=field
                )
        if "id" not in given:
            text = "\x1f".join(f"{field}={given[field]}" for field in sorted(given))
            seen[text] = seen.get(text, 0) + 1
            given["id"] = "row_" + hashlib.sha256(f"{text}\x1f{seen[text]}".encode()).hexdigest()[:32]
        try:
            amount = Decimal(given.pop("amount_usd").replace(",", "").replace("$", ""))
        except InvalidOperation:
            raise InvalidRequest(f"row {number}: the amount is no number: write dollars.", param="amount_usd") from None
        found.append(_entry(EntryBody(amount_usd=amount, **given), kind, f"row {number} ", now_ns))
    return found


def entry_body(entry: Entry) -> dict[str, Any]:
    return {
        "id": entry.id,
        "object": entry.kind,
        "amount_usd": str(entry.amount),
        "from": iso_utc(entry.from_ns),
        "to": iso_utc(entry.to_ns),
        "feature": entry.feature,
        "user": entry.user,
        "tier": entry.tier,
        "note": entry.note,
        "posted_at": iso_utc(entry.posted_at_ns),
    }


def _entry(given: EntryBody, kind: Kind, where: str, now_ns: int) -> Entry:
    if not given.amount_usd.is_finite() or abs(given.amount_usd) > _MOST_USD:
        raise InvalidRequest(
            f"Invalid `{where}amount_usd`: {str(given.amount_usd)[:40]}; send dollars up to a billion.",
            param=f"{where}amount_usd",
        )
    try:
        period = parse_period(given.period)
    except InvalidRequest as error:
        raise InvalidRequest(f"Invalid `{where}period`: {error.message}", param=f"{where}period") from None
    for name in ("id", "feature", "user", "tier"):
        value = getattr(given, name)
        if value is not None and not value.isprintable():
            raise InvalidRequest(f"`{where}{name}` holds control characters: remove them.", param=f"{where}{name}")
    return Entry(
        id=given.id,
        kind=kind,
        amount=Money.from_usd(given.amount_usd),
        from_ns=period.from_ns,
        to_ns=period.to_ns,
        feature=given.feature,
        user=given.user,
        tier=given.tier,
        note=given.note,
        posted_at_ns=now_ns,
    )
