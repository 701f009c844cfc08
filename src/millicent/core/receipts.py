"""The receipt and its parts: what the ledger keeps and everyone else shows."""

from __future__ import annotations

from decimal import Context, Decimal
from enum import StrEnum

import msgspec

from millicent.core.money import Money
from millicent.core.prompts import Prompt
from millicent.core.request import Attribution, OutsideCost
from millicent.core.usage import Leaf, Provenance, Usage


class Status(StrEnum):
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"  # cut off by a crash
    REFUSED = "refused"


class Role(StrEnum):
    INFERENCE = "inference"
    RETRY = "retry"
    FALLBACK = "fallback"
    VERIFICATION = "verification"
    RETRIEVAL = "retrieval"
    ADJUSTMENT = "adjustment"


class Meter(StrEnum):
    INPUT = "input"
    INPUT_CACHED = "input_cached"
    CACHE_WRITE = "cache_write"
    CACHE_STORAGE = "cache_storage"
    OUTPUT = "output"
    REASONING = "reasoning"
    ACCELERATOR = "accelerator"
    IMAGE = "image"
    AUDIO = "audio"
    REQUEST_FEE = "request_fee"
    TOOL_CALL = "tool_call"
    OTHER = "other"


# The meter that each kind of usage is charged on.
METERS = {
    Leaf.INPUT_FRESH: Meter.INPUT,
    Leaf.INPUT_CACHE_READ: Meter.INPUT_CACHED,
    Leaf.INPUT_CACHE_WRITE_5M: Meter.CACHE_WRITE,
    Leaf.INPUT_CACHE_WRITE_1H: Meter.CACHE_WRITE,
    Leaf.INPUT_IMAGE: Meter.IMAGE,
    Leaf.INPUT_AUDIO: Meter.AUDIO,
    Leaf.OUTPUT_TEXT: Meter.OUTPUT,
    Leaf.OUTPUT_REASONING: Meter.REASONING,
    Leaf.OUTPUT_IMAGE: Meter.IMAGE,
    Leaf.OUTPUT_AUDIO: Meter.AUDIO,
}


class Line(msgspec.Struct, frozen=True):
    """One priced quantity: attempt x role x meter. `amount` is None when unpriced, which is never zero.

    Times are UTC nanoseconds: `incurred_at_ns` when the cost arose, `posted_at_ns` when it was written. `id` is the
    caller's, on lines that a caller posted, so that posting one again changes nothing.
    """

    attempt: int
    role: Role
    meter: Meter
    quantity: Decimal
    unit: str
    unit_price_usd: Decimal | None
    amount: Money | None
    provenance: Provenance
    incurred_at_ns: int
    posted_at_ns: int
    book: str = "actual"
    note: str | None = None
    id: str | None = None


def device_line(
    attempt: int,
    role: Role,
    serving_ns: int,
    usd_per_hour: Decimal | None,
    provenance: Provenance,
    *,
    incurred_at_ns: int,
    posted_at_ns: int,
    note: str | None = None,
) -> Line:
    """Device time as a line, in seconds. No time costs nothing; time without a rate is unpriced.

    The amount comes from nanoseconds and the hourly rate with one rounding. The unit price shown is the rate / 3600,
    which needs infinitely many decimals, to the nearest 1e-18 dollars.
    """
    amount = None if usd_per_hour is None else Money.of_time(serving_ns, usd_per_hour)
    return Line(
        attempt=attempt,
        role=role,
        meter=Meter.ACCELERATOR,
        quantity=Decimal(serving_ns).scaleb(-9),
        unit="second",
        unit_price_usd=None if usd_per_hour is None else (usd_per_hour / 3600).quantize(Decimal("1e-18")).normalize(),
        amount=Money(0) if serving_ns == 0 else amount,
        provenance=provenance,
        incurred_at_ns=incurred_at_ns,
        posted_at_ns=posted_at_ns,
        note=note,
    )


# Unit prices that follow from an amount are for reading.
_SHOWN = Context(prec=18)


def outside_line(cost: OutsideCost, posted_at_ns: int) -> Line:
    """A cost that a caller told of, as a line. It belongs to no attempt of ours: 0 stands for that."""
    per_unit = _SHOWN.divide(cost.amount.usd, cost.quantity).normalize() if cost.quantity else None
    return Line(
        attempt=0,
        role=Role(cost.role),
        meter=Meter(cost.meter),
        quantity=cost.quantity,
        unit=cost.unit,
        unit_price_usd=per_unit,
        amount=cost.amount,
        provenance=Provenance.REPORTED,
        incurred_at_ns=posted_at_ns if cost.incurred_at_ns is None else cost.incurred_at_ns,
        posted_at_ns=posted_at_ns,
        note=cost.note,
        id=cost.id,
    )


# The book of what providers themselves say that an answer costs: beside ours, and in no total.
REPORTED_BOOK = "reported"


def reported_line(attempt: Attempt, amount: Money, posted_at_ns: int, upstream_id: str | None) -> Line:
    """A provider's own figure for an attempt, with its name for the answer."""
    return Line(
        attempt=attempt.ordinal,
        role=attempt.role,
        meter=Meter.OTHER,
        quantity=Decimal(1),
        unit="answer",
        unit_price_usd=amount.usd,
        amount=amount,
        provenance=Provenance.REPORTED,
        incurred_at_ns=attempt.started_at_ns,
        posted_at_ns=posted_at_ns,
        book=REPORTED_BOOK,
        note=upstream_id,
    )


class Attempt(msgspec.Struct, frozen=True):
    """One call to one backend. Open while `ended_at_ns` is None."""

    ordinal: int
    backend: str
    placement: str
    model: str
    role: Role
    started_at_ns: int
    ended_at_ns: int | None = None
    status: Status | None = None
    error: str | None = None


class Timing(msgspec.Struct, frozen=True):
    """Durations in nanoseconds; None where it didn't happen. `tpot_ns` is per output token after the first."""

    queue_ns: int | None = None
    ttft_ns: int | None = None
    tpot_ns: int | None = None
    total_ns: int | None = None


class HourShare(msgspec.Struct, frozen=True):
    """Serving nanoseconds that an attempt was given of one device in one UTC hour."""

    attempt: int
    session: str
    hour_ns: int
    serving_ns: int


class Accelerator(msgspec.Struct, frozen=True):
    """Device time attributed to a receipt. `prefill_ns + decode_ns == serving_ns`; batch_sum / steps is the mean batch.

    `recomputed_tokens` counts prompt tokens computed again after a preemption: their time is the request's own.
    `drafted_tokens` counts guesses of what comes next that were checked, `accepted_tokens` those that were right and
    became output: the time of all of them is the request's own too. `step_time_version` is the fit by which its last
    step was split, None where steps were split evenly. `provenance` is estimated at an engine elsewhere, which shows no
    steps; unknown, and every figure shown as null, where nobody can say.
    """

    serving_ns: int = 0
    prefill_ns: int = 0
    decode_ns: int = 0
    steps: int = 0
    batch_sum: int = 0
    provenance: Provenance = Provenance.UNKNOWN
    recomputed_tokens: int = 0
    step_time_version: str | None = None
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Energy(msgspec.Struct, frozen=True):
    joules: Decimal | None = None
    provenance: Provenance = Provenance.UNKNOWN


# Key of `Receipt.policy`: what the response cache did, where it is on: hit, miss, wait or bypass.
RESPONSE_CACHE = "response_cache"

# Key of `PriceSource.snapshot`: the dollars per accelerator-hour that the receipt's device time is priced at.
RATE_KEY = "rate_usd_per_hour"


class PriceSource(msgspec.Struct, frozen=True):
    """Where prices came from, and the values used, as they were: the snapshot stays on the row."""

    source: str = "none"
    snapshot: dict[str, str] = {}


class Feedback(msgspec.Struct, frozen=True):
    """What somebody thought of an answer, at any time after it. Not money. `score` is 0 to 1.

    `useful` is what the feature's rule made of it when it came; None where the rule says nothing of it.
    """

    receipt: str
    posted_at_ns: int
    score: Decimal | None = None
    label: str | None = None
    comment: str | None = None
    useful: bool | None = None
    id: str | None = None


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """Open while `status` is None; closed once, then only entries are added (lines with a later `posted_at_ns`).

    `useful` is the feature's rule applied to the output when it ended; None where no rule judges output. `prompt` is
    what was asked without its words, fixed when it is opened; None where nobody looked.
    """

    id: str
    created_at_ns: int
    settled_at_ns: int | None = None
    status: Status | None = None
    model: str
    served_model: str | None = None
    placement: str | None = None
    backend: str | None = None
    dialect: str
    stream: bool
    finish_reason: str | None = None
    attribution: Attribution = Attribution()
    usage: Usage = Usage()
    timing: Timing = Timing()
    accelerator: Accelerator = Accelerator()
    energy: Energy = Energy()
    lines: tuple[Line, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    hold: Money | None = None
    list_price: Money | None = None
    saved: dict[str, Money] = {}
    basis: str = "busy"
    prices: PriceSource = PriceSource()
    policy: dict[str, str] | None = None
    error: str | None = None
    useful: bool | None = None
    prompt: Prompt | None = None

    @property
    def total(self) -> Money | None:
        """The sum of the lines; None when a line is unpriced or there is none to price."""
        nanousd, priced = 0, False
        for line in self.lines:
            if line.book == "actual":
                if line.amount is None:
                    return None
                nanousd += line.amount.nanousd
                priced = True
        return Money(nanousd) if priced else None

    @property
    def reported(self) -> Money | None:
        """What providers say that they charge, over the attempts of which they say so; None where none does."""
        told = [line.amount for line in self.lines if line.book == REPORTED_BOOK and line.amount is not None]
        return Money.total(told) if told else None

    @property
    def residual(self) -> Money | None:
        """What providers report beyond what we make of the same attempts; None where either isn't known."""
        told = {line.attempt for line in self.lines if line.book == REPORTED_BOOK}
        ours = [line.amount for line in self.lines if line.book == "actual" and line.attempt in told]
        priced = [amount for amount in ours if amount is not None]
        if self.reported is None or len(priced) < len(ours) or not ours:
            return None
        return self.reported - Money.total(priced)
