"""Closed receipts of an invented business, and a ledger that holds them."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

from millicent.core.clock import NS_PER_MS, NS_PER_S, ManualClock
from millicent.core.money import Money
from millicent.core.receipts import Attempt, Line, Meter, Receipt, Role, Status, Timing
from millicent.core.request import Attribution
from millicent.core.usage import Provenance, Usage
from millicent.ledger.config import LedgerConfig
from millicent.ledger.memory import MemoryLedger
from millicent.ledger.schema import write_once
from millicent.ledger.store import close_receipt

DAY_NS = 86_400 * NS_PER_S
# Dollars per million tokens: input, input read from a cache, output.
PRICES = {"large": ("5", "0.5", "15"), "small": ("0.5", "0.05", "1.5")}


def answered(
    number: int,
    at_ns: int,
    *,
    feature: str | None = "chat",
    user: str | None = "ada",
    tier: str | None = None,
    conversation: str | None = None,
    model: str = "large",
    fresh: int = 1000,
    cached: int = 0,
    output: int = 100,
    retries_usd: str | None = None,
    priced: bool = True,
    prices: tuple[str, str, str] | None = None,
    total_ms: int = 1500,
    useful: bool | None = None,
) -> Receipt:
    """One that succeeded at a provider, priced per token."""
    counts = {Meter.INPUT: fresh, Meter.INPUT_CACHED: cached, Meter.OUTPUT: output}
    lines = []
    for (meter, count), per_million in zip(counts.items(), prices or PRICES[model], strict=True):
        if count:
            price = Decimal(per_million) / 10**6
            lines.append(_line(meter, Decimal(count), price, Money.price(count, price) if priced else None, at_ns))
    if retries_usd is not None:
        lines.append(_line(Meter.INPUT, Decimal(1), None, Money.from_usd(retries_usd), at_ns, Role.RETRY))
    end_ns = at_ns + total_ms * NS_PER_MS
    return Receipt(
        id=f"rcpt_{number:06d}",
        created_at_ns=at_ns,
        settled_at_ns=end_ns,
        status=Status.SUCCEEDED,
        model=model,
        served_model=model,
        placement="provider",
        backend="openai",
        dialect="openai.chat",
        stream=False,
        finish_reason="stop",
        attribution=Attribution(user=user, feature=feature, tier=tier, conversation=conversation),
        usage=Usage.of(Provenance.REPORTED, input_fresh=fresh, input_cache_read=cached, output_text=output),
        timing=Timing(
            queue_ns=NS_PER_MS,
            ttft_ns=total_ms * NS_PER_MS // 3,
            tpot_ns=total_ms * NS_PER_MS // 150,
            total_ns=total_ms * NS_PER_MS,
        ),
        lines=tuple(lines),
        attempts=(Attempt(1, "openai", "provider", model, Role.INFERENCE, at_ns, end_ns, Status.SUCCEEDED),),
        useful=useful,
    )


def _line(
    meter: Meter, count: Decimal, price: Decimal | None, amount: Money | None, at_ns: int, role: Role = Role.INFERENCE
) -> Line:
    known = Provenance.UNKNOWN if amount is None else Provenance.REPORTED
    return Line(1, role, meter, count, "token", price, amount, known, at_ns, at_ns)


def ledger_of(receipts: Sequence[Receipt]) -> MemoryLedger:
    ledger = MemoryLedger()

    async def fill() -> None:
        for receipt in receipts:
            await ledger.close(receipt, ())

    asyncio.run(fill())
    return ledger


def write_ledger(path: Path, receipts: Sequence[Receipt]) -> None:
    def fill(connection: sqlite3.Connection) -> None:
        for receipt in receipts:
            close_receipt(connection, receipt, (), "gw")

    write_once(path, LedgerConfig(), ManualClock(), fill)
