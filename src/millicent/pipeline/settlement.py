"""What a receipt says: when its first attempt opens, when another follows, while it runs, and when it closes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal

import msgspec

from millicent.core.accounts import Reading
from millicent.core.chunks import End, FinishReason
from millicent.core.clock import Clock
from millicent.core.errors import EngineCrashed, PaymentRequired
from millicent.core.money import ZERO, Money
from millicent.core.protocols import Call
from millicent.core.receipts import (
    Attempt,
    Line,
    Meter,
    PriceSource,
    Receipt,
    Status,
    Timing,
    outside_line,
    reported_line,
)
from millicent.core.request import Request
from millicent.core.usage import Provenance, Usage, weakest
from millicent.meter.placements import Placement
from millicent.meter.prices import UNPRICED
from millicent.meter.pricing import price, price_source
from millicent.meter.quotes import Asked
from millicent.pipeline.answer import Answer
from millicent.pipeline.attempts import Leg
from millicent.pipeline.estimates import Estimates
from millicent.pipeline.features import Features
from millicent.pipeline.holds import HoldOf
from millicent.pipeline.latency import policy_of, with_verdict
from millicent.pipeline.prompts import told_of

_UNFINISHED = (FinishReason.ERROR, FinishReason.CANCELLED)


class Bookkeeper:
    """Makes receipts of what happened; writes none. `answer.opened` is an answer's receipt with the lines of the
    attempts that have ended, and the one that runs last."""

    def __init__(
        self,
        placements: Mapping[str, Placement],
        estimates: Estimates,
        features: Features,
        hold: HoldOf,
        clock: Clock,
    ) -> None:
        self._placements = placements
        self._estimates = estimates
        self._features = features
        self._hold = hold
        self._clock = clock

    def placement(self, name: str, at_ns: int) -> Placement:
        return self._placements[name].at(at_ns)

    def opened(self, request: Request, leg: Leg, told: Mapping[str, str] | None) -> Receipt:
        """`told` is what its policy says of the choice of a model, where one made it."""
        now_ns = self._clock.now_ns()
        lines = tuple(outside_line(cost, now_ns) for cost in request.outside_costs)
        receipt = Receipt(
            id=request.id,
            created_at_ns=now_ns,
            model=request.model,
            dialect=request.dialect,
            stream=request.stream,
            attribution=request.attribution,
            lines=lines,
            policy=_policy(policy_of(request.latency_target_ms), told),
            prompt=request.hashed,
        )
        return self._with_attempt(receipt, leg, _total(lines), now_ns)

    def joined(self, opened: Receipt, leg: Leg, told: Mapping[str, str]) -> Receipt:
        """A receipt that was opened without an attempt, with its first; `told` as in `opened`."""
        receipt = msgspec.structs.replace(opened, policy=_policy(opened.policy, told))
        return self._with_attempt(receipt, leg, _total(opened.lines), self._clock.now_ns())

    def followed(self, answer: Answer, leg: Leg, end: End, reading: Reading) -> tuple[Receipt, Money]:
        """The receipt with its attempt ended and the next one begun; and what is reserved for attempts whose cost
        nobody knows."""
        ended = self.ended(answer, end, reading)
        fresh = [line for line in ended.lines[len(answer.opened.lines) :] if line.book == "actual"]
        reserved = answer.reserved
        if any(line.amount is None for line in fresh):
            reserved += max(ZERO, (answer.opened.hold or ZERO) - _total(answer.opened.lines) - answer.reserved)
        return self._with_attempt(ended, leg, _total(ended.lines) + reserved, self._clock.now_ns()), reserved

    def spent(self, answer: Answer, end: End, reading: Reading) -> Money | None:
        """What the attempts so far have cost, the one that just ended included; None where nobody knows."""
        lines = self.ended(answer, end, reading).lines
        ours = [line for line in lines if line.attempt > 0 and line.book == "actual"]
        return None if any(line.amount is None for line in ours) else _total(ours)

    def running(self, answer: Answer, reading: Reading) -> Receipt:
        """The receipt as it stands, priced so far."""
        return self._priced(answer, reading, None, self._clock.now_ns())

    def closed(self, answer: Answer, end: End, final: End, reading: Reading, notes: Mapping[str, str]) -> Receipt:
        """`end` is that of the last attempt, `final` that of the answer; `notes` are added to its policy."""
        status = status_of(final)
        ended = self.ended(answer, end, reading)
        now_ns = ended.attempts[-1].ended_at_ns
        if final is not end and answer.standing is not None:
            ended = _answered_before(ended, answer.standing)
        assert now_ns is not None
        closed = msgspec.structs.replace(
            ended,
            settled_at_ns=now_ns,
            status=status,
            served_model=final.served_model or ended.served_model,
            finish_reason=final.reason.value,
            timing=_timing(answer, reading, self._clock.monotonic_ns()),
            error=final.error.message if final.error else None,
            useful=self._verdict(answer, status),
        )
        return msgspec.structs.replace(closed, policy=_policy(with_verdict(closed), notes))

    def _with_attempt(self, receipt: Receipt, leg: Leg, before: Money, now_ns: int) -> Receipt:
        """One more attempt, held for beside what came `before`: other costs, and other attempts."""
        call = leg.plan.call
        placement = self.placement(call.placement, now_ns)
        hold = self._hold(leg.plan)
        backend = leg.lease.deployment.backend.name
        ordinal = len(receipt.attempts) + 1
        attempt = Attempt(ordinal, backend, call.placement, call.served_model, leg.role, now_ns)
        return msgspec.structs.replace(
            receipt,
            served_model=call.served_model,
            placement=call.placement,
            backend=backend,
            attempts=(*receipt.attempts, attempt),
            hold=None if hold is None else hold + before,
            prices=_prices_of(leg.plan.asked, placement),
            basis=placement.basis,
            policy=_policy(receipt.policy, told_of(leg.plan.marks)),
        )

    def ended(self, answer: Answer, end: End, reading: Reading) -> Receipt:
        """The receipt with its last attempt ended."""
        opened = answer.opened
        # Whatever the system clock was set to: lines posted later than this are late ones.
        posted_ns = [line.posted_at_ns for line in opened.lines]
        now_ns = max(self._clock.now_ns(), opened.created_at_ns, opened.attempts[-1].started_at_ns, *posted_ns)
        priced = self._priced(answer, reading, end, now_ns)
        attempt = msgspec.structs.replace(
            priced.attempts[-1],
            ended_at_ns=now_ns,
            status=status_of(end),
            error=end.error.message if end.error else None,
        )
        told = end.reported_cost
        reported = () if told is None else (reported_line(attempt, told, now_ns, end.upstream_id),)
        return msgspec.structs.replace(
            priced, attempts=(*priced.attempts[:-1], attempt), lines=(*priced.lines, *reported)
        )

    def _priced(self, answer: Answer, reading: Reading, end: End | None, now_ns: int) -> Receipt:
        """With the lines of the last attempt; `end` None while it runs."""
        receipt = answer.opened
        attempt = receipt.attempts[-1]
        at_ns = attempt.started_at_ns
        placement = self.placement(attempt.placement, at_ns)
        prices = self._estimates.prices(attempt.model, placement, at_ns)
        own = reading
        if len(answer.shown) > 1:
            known = answer.shown[-1] or Provenance.UNKNOWN
            own = msgspec.structs.replace(
                reading, accelerator=msgspec.structs.replace(reading.accelerator, provenance=known)
            )
        priced = price(own, (attempt,), placement, now_ns, prices)
        lines = priced.lines
        idle = not reading.usage.leaves and answer.shown[-1] in {None, Provenance.UNKNOWN}
        if end is not None and (not lines or (idle and end.reason in _UNFINISHED)):
            lines = (_line_of_nothing(attempt, end, reading.usage, now_ns),)
        return msgspec.structs.replace(
            receipt,
            usage=reading.usage,
            accelerator=msgspec.structs.replace(reading.accelerator, provenance=_device_time_known(answer, reading)),
            energy=reading.energy,
            lines=(*receipt.lines, *lines),
            list_price=priced.list_price,
            saved=priced.saved,
            prices=priced.prices,
            basis=priced.basis,
        )

    def _verdict(self, answer: Answer, status: Status) -> bool | None:
        """The feature's rule on the output; of several choices, one that is useful will do. A failed answer is of no
        use; of a cancelled one nobody knows."""
        feature = answer.opened.attribution.feature
        if status is Status.CANCELLED or not self._features.judges_output(feature):
            return None
        if status is not Status.SUCCEEDED:
            return False
        return any(self._features.output(feature, text) for text in answer.outputs())


def _prices_of(asked: Asked, placement: Placement) -> PriceSource:
    """Those that hold when an attempt begins: recovery prices one that was cut off by them."""
    if placement.kind != "api":
        return placement.prices
    prices = asked.prices
    return price_source(prices, UNPRICED if prices is None else prices.service.tier(asked.input_tokens), placement)


def status_of(end: End) -> Status:
    if end.reason is FinishReason.CANCELLED:
        return Status.CANCELLED
    if end.reason is not FinishReason.ERROR:
        return Status.SUCCEEDED
    return Status.INTERRUPTED if isinstance(end.error, EngineCrashed) else Status.FAILED


def cut_short(call: Call, end: End) -> End:
    """The money ran out: of a text there is the beginning; some of the vectors are no answer."""
    if call.max_output_tokens != 0:
        cut = {FinishReason.CANCELLED: FinishReason.LENGTH}
        choices = tuple(cut.get(reason, reason) for reason in end.choices)
        return msgspec.structs.replace(end, reason=FinishReason.LENGTH, choices=choices)
    message = "The budget or the maximum cost was reached before all inputs were read: send fewer, or allow more."
    return msgspec.structs.replace(end, reason=FinishReason.ERROR, error=PaymentRequired(message), choices=())


def _policy(*parts: Mapping[str, str] | None) -> dict[str, str] | None:
    told: dict[str, str] = {}
    for part in parts:
        if part:
            told |= part
    return told or None


def _answered_before(ended: Receipt, standing: Receipt) -> Receipt:
    """The answer is that of an attempt before the last, which only looked at it."""
    return msgspec.structs.replace(
        ended,
        served_model=standing.served_model,
        placement=standing.placement,
        backend=standing.backend,
        usage=standing.usage,
        list_price=standing.list_price,
        saved=standing.saved,
        prices=standing.prices,
        basis=standing.basis,
    )


def _line_of_nothing(attempt: Attempt, end: End, usage: Usage, at_ns: int) -> Line:
    """An attempt without any usage has a line too, so that a total neither forgets it nor is lost for it. Counted
    nothing costs nothing, and so, we assume, does a call that failed before any work; of others nobody knows."""
    if usage.leaves:
        known = weakest(count.provenance for count in usage.leaves.values())
    else:
        known = Provenance.ASSUMED if end.reason in _UNFINISHED else Provenance.UNKNOWN
    return Line(
        attempt=attempt.ordinal,
        role=attempt.role,
        meter=Meter.OTHER,
        quantity=Decimal(0),
        unit="call",
        unit_price_usd=None,
        amount=None if known is Provenance.UNKNOWN else ZERO,
        provenance=known,
        incurred_at_ns=attempt.started_at_ns,
        posted_at_ns=at_ns,
        note="no usage was reported" if known is Provenance.UNKNOWN else "nothing was used",
    )


def _device_time_known(answer: Answer, reading: Reading) -> Provenance:
    """Of all attempts; one that is paid by the token says nothing of device time."""
    told = [shown for shown in answer.shown if shown is not None]
    if len(answer.shown) < 2 or not told:
        return reading.accelerator.provenance
    return weakest(told)


def _total(lines: Iterable[Line]) -> Money:
    """Of those that are priced, in our own book."""
    return Money.total(line.amount or ZERO for line in lines if line.book == "actual")


def _timing(answer: Answer, reading: Reading, now_ns: int) -> Timing:
    """`now_ns` is monotonic, as all of it."""
    begun_ns, progress = answer.begun_ns, answer.progress
    first_ns, last_ns = progress.first_token_ns, progress.last_token_ns
    tpot_ns = None
    if first_ns is not None and last_ns is not None and progress.tokens > 1:
        tpot_ns = (last_ns - first_ns) // (progress.tokens - 1)
    return Timing(
        queue_ns=None if reading.first_step_ns is None else max(0, reading.first_step_ns - begun_ns),
        ttft_ns=None if first_ns is None else first_ns - begun_ns,
        tpot_ns=tpot_ns,
        total_ns=now_ns - begun_ns,
    )
