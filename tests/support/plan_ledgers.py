"""Ledgers on disk with traffic that a plan can be worked out for by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec

from millicent.core.accounts import Checkpoint, DeviceSession, HourTime
from millicent.core.clock import NS_PER_HOUR, NS_PER_MS, NS_PER_S, ManualClock
from millicent.core.fits import StepTimeFit
from millicent.core.money import Money
from millicent.core.receipts import Accelerator, Attempt, HourShare, Line, Meter, Receipt, Role, Status, Timing
from millicent.core.request import Attribution
from millicent.core.usage import Provenance, Usage
from millicent.ledger.config import LedgerConfig
from millicent.ledger.sqlite import SqliteLedger

T0 = ManualClock().now_ns()
RATE = Decimal(1)
# Two minutes of the device for an answer: thirty of them fill an hour.
BUSY = Accelerator(120 * NS_PER_S, 30 * NS_PER_S, 90 * NS_PER_S, 100, 400, Provenance.MEASURED)


def answer(number: int, at_ns: int, **changes: Any) -> Receipt:
    """1,000 tokens in and 500 from a cache, 100 out; a second's serving, $1/3600; answered within 900 ms."""
    line = Line(
        attempt=1,
        role=Role.INFERENCE,
        meter=Meter.ACCELERATOR,
        quantity=Decimal(1),
        unit="second",
        unit_price_usd=RATE / 3600,
        amount=Money.of_time(NS_PER_S, RATE),
        provenance=Provenance.MEASURED,
        incurred_at_ns=at_ns,
        posted_at_ns=at_ns,
    )
    receipt = Receipt(
        id=f"rcpt_{number:026d}",
        created_at_ns=at_ns,
        settled_at_ns=at_ns + NS_PER_S,
        status=Status.SUCCEEDED,
        model="small",
        served_model="small",
        placement="box",
        backend="local",
        dialect="openai",
        stream=False,
        finish_reason="stop",
        attribution=Attribution(feature="search", user="ada"),
        usage=Usage.of(Provenance.MEASURED, input_fresh=1000, input_cache_read=500, output_text=100),
        timing=Timing(queue_ns=0, ttft_ns=100 * NS_PER_MS, tpot_ns=8 * NS_PER_MS, total_ns=900 * NS_PER_MS),
        accelerator=Accelerator(NS_PER_S, NS_PER_S // 4, NS_PER_S - NS_PER_S // 4, 100, 400, Provenance.MEASURED),
        lines=(line,),
        attempts=(Attempt(1, "local", "box", "small", Role.INFERENCE, at_ns, at_ns + NS_PER_S, Status.SUCCEEDED),),
    )
    return msgspec.structs.replace(receipt, **changes)


def two_hours(**changes: Any) -> list[Receipt]:
    """30 requests in the first hour, 10 in the second: 14,600 a month, and a peak of 1.5."""
    starts = [T0 + each * NS_PER_S for each in range(30)] + [T0 + NS_PER_HOUR + each * NS_PER_S for each in range(10)]
    return [answer(number, at_ns, **changes) for number, at_ns in enumerate(starts)]


def write(home: Path, receipts: Sequence[Receipt], fits: Sequence[StepTimeFit] = (), hours: int = 2) -> ManualClock:
    """A ledger of these, with accounts of the placement `box`: so many whole hours at $1. The clock stands after."""
    clock = ManualClock(T0 + hours * NS_PER_HOUR)

    async def fill() -> None:
        ledger = SqliteLedger(home / "ledger.db", LedgerConfig(durability="process"), clock, "gw_1")
        await ledger.start()
        opened = [
            msgspec.structs.replace(
                each,
                status=None,
                settled_at_ns=None,
                lines=(),
                attempts=tuple(msgspec.structs.replace(one, ended_at_ns=None, status=None) for one in each.attempts),
            )
            for each in receipts
        ]
        session = DeviceSession(
            id="sess_1",
            gateway="gw_1",
            device="cpu",
            placement="box",
            accelerators=1,
            usd_per_hour=RATE,
            rate_provenance=Provenance.MEASURED,
            started_at_ns=T0,
            seen_at_ns=T0 + hours * NS_PER_HOUR,
            busy=False,
            closed=False,
            hours=tuple(HourTime(T0 + each * NS_PER_HOUR, NS_PER_HOUR) for each in range(hours)),
        )
        try:
            await ledger.checkpoint(Checkpoint(clock.now_ns(), (session,), ()))
            await ledger.save_fits(tuple(fits))
            await asyncio.gather(*(ledger.open(each) for each in opened))
            await asyncio.gather(*(ledger.close(each, _shares(each)) for each in receipts))
        finally:
            await ledger.stop()

    asyncio.run(fill())
    return clock


def _shares(receipt: Receipt) -> tuple[HourShare, ...]:
    hour_ns = receipt.created_at_ns - receipt.created_at_ns % NS_PER_HOUR
    if receipt.placement != "box":
        return ()
    return (HourShare(1, "sess_1", hour_ns, receipt.accelerator.serving_ns),)
