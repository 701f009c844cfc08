from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import msgspec
import pytest

from millicent.core.clock import ManualClock
from millicent.core.money import Money
from millicent.core.prompts import Prompt, Segment
from millicent.core.receipts import (
    Accelerator,
    Attempt,
    Energy,
    HourShare,
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

T0 = ManualClock().now_ns()


def make_open(number: int, *, attribution: Attribution | None = None, model: str = "smol", **changes: Any) -> Receipt:
    attempt = Attempt(1, "local", "cpu", model, Role.INFERENCE, T0 + number)
    receipt = Receipt(
        id=f"rcpt_{number:04d}",
        created_at_ns=T0 + number,
        model=model,
        served_model=model,
        placement="cpu",
        backend="local",
        dialect="openai",
        stream=True,
        attribution=attribution or Attribution(),
        attempts=(attempt,),
        hold=Money(1_000_000_000),
        prompt=Prompt(bytes(20), (Segment("system", 40, b"system01"), Segment("user", number, b"%08d" % number))),
    )
    return msgspec.structs.replace(receipt, **changes)


def make_closed(receipt: Receipt, *, nanousd: int | None = 1_500, serving_ns: int = 700, **changes: Any) -> Receipt:
    line = Line(
        attempt=1,
        role=Role.INFERENCE,
        meter=Meter.ACCELERATOR,
        quantity=Decimal("0.000000700"),
        unit="second",
        unit_price_usd=None if nanousd is None else (Decimal(nanousd) / 700).quantize(Decimal("1e-18")),
        amount=None if nanousd is None else Money(nanousd),
        provenance=Provenance.UNKNOWN if nanousd is None else Provenance.MEASURED,
        incurred_at_ns=receipt.created_at_ns,
        posted_at_ns=receipt.created_at_ns + 1_000,
        note="a note",
    )
    attempt = msgspec.structs.replace(
        receipt.attempts[0], ended_at_ns=receipt.created_at_ns + 900, status=Status.SUCCEEDED
    )
    closed = msgspec.structs.replace(
        receipt,
        status=Status.SUCCEEDED,
        settled_at_ns=receipt.created_at_ns + 1_000,
        finish_reason="stop",
        usage=Usage.of(Provenance.MEASURED, input_fresh=12, output_text=3),
        timing=Timing(1, 2, 3, 4),
        accelerator=Accelerator(serving_ns, serving_ns - 200, 200, 4, 9, Provenance.MEASURED, 2, None, 7, 5),
        energy=Energy(Decimal("0.125"), Provenance.ESTIMATED),
        lines=(line,),
        attempts=(attempt,),
        list_price=None if nanousd is None else Money(nanousd + 500),
        saved={} if nanousd is None else {"routing": Money(500)},
        prices=PriceSource("placements.cpu", {"rate_usd_per_hour": "0.10"}),
        policy={"route": "cheapest"},
    )
    return msgspec.structs.replace(closed, **changes)


def unknown_usage() -> Usage:
    return Usage({Leaf.INPUT_FRESH: Count(None, Provenance.UNKNOWN)})


@pytest.fixture
def opened() -> Callable[..., Receipt]:
    """An open receipt by number; later keyword arguments replace fields."""
    return make_open


@pytest.fixture
def closed() -> Callable[..., Receipt]:
    """An open receipt settled."""
    return make_closed


@pytest.fixture
def shares() -> tuple[HourShare, ...]:
    return (HourShare(1, "sess_1", T0, 700),)


@pytest.fixture
def unknown() -> Usage:
    return unknown_usage()
