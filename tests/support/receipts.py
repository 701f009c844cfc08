"""Receipts to test with: one that is closed and priced, one that runs, one of which little is known."""

from decimal import Decimal

import msgspec

from millicent.core.clock import NS_PER_S
from millicent.core.money import Money
from millicent.core.receipts import (
    Accelerator,
    Attempt,
    Line,
    Meter,
    PriceSource,
    Receipt,
    Role,
    Status,
    Timing,
)
from millicent.core.request import Attribution
from millicent.core.usage import Count, Leaf, Provenance, Usage

START_NS = 1_767_225_600 * NS_PER_S  # 2026-01-01T00:00:00Z
END_NS = START_NS + 500_000_000


def running(receipt_id: str = "rcpt_0000000000000000000000000a") -> Receipt:
    return Receipt(
        id=receipt_id,
        created_at_ns=START_NS,
        model="tiny",
        served_model="tiny",
        placement="this-machine",
        backend="local",
        dialect="openai.chat",
        stream=False,
        attribution=Attribution(user="ada", feature="search", tags={"env": "prod"}),
        attempts=(Attempt(1, "local", "this-machine", "tiny", Role.INFERENCE, START_NS),),
    )


def settled(receipt_id: str = "rcpt_0000000000000000000000000a") -> Receipt:
    opened = running(receipt_id)
    line = Line(
        attempt=1,
        role=Role.INFERENCE,
        meter=Meter.ACCELERATOR,
        quantity=Decimal("0.25"),
        unit="second",
        unit_price_usd=Decimal("0.0001"),
        amount=Money(25_000),
        provenance=Provenance.ASSUMED,
        incurred_at_ns=END_NS,
        posted_at_ns=END_NS,
    )
    return msgspec.structs.replace(
        opened,
        settled_at_ns=END_NS,
        status=Status.SUCCEEDED,
        finish_reason="stop",
        usage=Usage.of(Provenance.MEASURED, input_fresh=12, output_text=3),
        timing=Timing(queue_ns=1_000_000, ttft_ns=120_000_000, tpot_ns=90_500_000, total_ns=500_000_000),
        accelerator=Accelerator(250_000_000, 100_000_000, 150_000_000, 4, 6, Provenance.MEASURED),
        lines=(line,),
        list_price=Money(25_000),
        prices=PriceSource("assumed", {"usd_per_hour": "0.36"}),
        attempts=(msgspec.structs.replace(opened.attempts[0], ended_at_ns=END_NS, status=Status.SUCCEEDED),),
    )


def unknown() -> Receipt:
    """Usage and device time unknown, the line unpriced."""
    closed = settled("rcpt_0000000000000000000000000c")
    return msgspec.structs.replace(
        closed,
        usage=Usage({Leaf.INPUT_FRESH: Count(None, Provenance.UNKNOWN)}),
        accelerator=Accelerator(),
        lines=(msgspec.structs.replace(closed.lines[0], amount=None, unit_price_usd=None),),
        list_price=None,
    )
