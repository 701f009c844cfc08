"""The response cache on a request's way: what a hit's receipt says, who waits for whom, and which answers are kept."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from typing import Any

import msgspec

from millicent.caching.cache import Lookup, Outcome, ResponseCache, worth_keeping
from millicent.caching.rules import Directives
from millicent.caching.store import CachedAnswer
from millicent.core import holdouts
from millicent.core.chunks import End, FinishReason, merge_texts
from millicent.core.clock import NS_PER_S, Clock
from millicent.core.errors import MillicentError, NotCached, UpstreamTimeout
from millicent.core.money import ZERO, Money
from millicent.core.receipts import (
    RESPONSE_CACHE,
    Accelerator,
    Energy,
    Line,
    Meter,
    Receipt,
    Role,
    Status,
    Timing,
    outside_line,
)
from millicent.core.request import Request
from millicent.core.usage import Provenance, Usage
from millicent.pipeline.answer import Answer
from millicent.pipeline.features import Features
from millicent.pipeline.latency import policy_of, with_verdict
from millicent.pipeline.routes import SAVED_PROVENANCE

# Beside `RESPONSE_CACHE`: the receipt whose answer was given, or why the cache was passed by.
FILLED_BY, WHY = "response_cache_filled_by", "response_cache_why"


class CachedAnswers:
    """Makes receipts of answers that no backend gave; writes none. Without a cache, nothing is ever found or kept."""

    def __init__(self, cache: ResponseCache | None, features: Features, clock: Clock) -> None:
        self._cache = cache
        self._features = features
        self._clock = clock

    def look(self, request: Request, cache_control: str | None, arm: holdouts.Arm | None) -> Lookup | None:
        """What there is for it, as `ResponseCache.look`. Raises NotCached where only that would do, and there is
        nothing."""
        lookup = None
        if self._cache is not None:
            allowed = self._features.placements(request.attribution.feature)
            lookup = self._cache.look(request, allowed, cache_control, arm)
        found = lookup is not None and lookup.answer is not None
        if cache_control and not found and Directives.of(cache_control).only_kept:
            raise NotCached(
                "No answer to this request is kept, and `Cache-Control: only-if-cached` asks for nothing else: leave "
                "it out to have the model run.",
                param="cache-control",
            )
        return lookup

    def opened(self, lookup: Lookup) -> Receipt:
        """Of a request that no backend has been asked for. It holds nothing but the costs that it came with, and has a
        line that says what the lookup costs."""
        request, now_ns = lookup.request, self._clock.now_ns()
        outside = tuple(outside_line(cost, now_ns) for cost in request.outside_costs)
        return Receipt(
            id=request.id,
            created_at_ns=now_ns,
            model=request.model,
            dialect=request.dialect,
            stream=request.stream,
            attribution=request.attribution,
            prompt=request.hashed,
            lines=(*outside, _lookup_line(now_ns)),
            hold=Money.total(line.amount or ZERO for line in outside),
            policy=(policy_of(request.latency_target_ms) or {}) | told(lookup),
        )

    def hit(self, answer: Answer, found: CachedAnswer) -> tuple[Receipt, End]:
        """The same usage, as it is the same answer; its cost is the lookup's. Saved is all that running it would have
        cost at list price, beside what routing would have saved of that."""
        opened, took_ns = answer.opened, self._clock.monotonic_ns() - answer.begun_ns
        saved: dict[str, Money] = {}
        policy = (opened.policy or {}) | {RESPONSE_CACHE: Outcome.HIT.value, FILLED_BY: found.receipt}
        if found.list_price is not None:
            routing = found.saved_by_routing or ZERO
            saved = {"routing": routing, RESPONSE_CACHE: found.list_price - routing}
            policy[SAVED_PROVENANCE] = Provenance.ESTIMATED.value
        end = End(FinishReason(found.finish_reason or FinishReason.STOP), found.usage, choices=found.reasons)
        closed = msgspec.structs.replace(
            opened,
            settled_at_ns=max(self._clock.now_ns(), opened.created_at_ns),
            status=Status.SUCCEEDED,
            served_model=found.served_model,
            backend=RESPONSE_CACHE,
            finish_reason=end.reason.value,
            usage=found.usage,
            timing=Timing(ttft_ns=took_ns, total_ns=took_ns),
            list_price=found.list_price,
            saved={lever: amount for lever, amount in saved.items() if amount.nanousd},
            policy=policy,
            useful=self._useful(opened.attribution.feature, found),
            **_NOTHING_RAN,
        )
        return msgspec.structs.replace(closed, policy=with_verdict(closed)), end

    def refused(self, answer: Answer, error: MillicentError | None) -> tuple[Receipt, End]:
        """It waited for an answer that didn't come: nobody wants it any more, or it can't be run."""
        opened = answer.opened
        reason = FinishReason.CANCELLED if error is None else FinishReason.ERROR
        closed = msgspec.structs.replace(
            opened,
            settled_at_ns=max(self._clock.now_ns(), opened.created_at_ns),
            status=Status.CANCELLED if error is None else Status.REFUSED,
            finish_reason=reason.value,
            timing=Timing(total_ns=self._clock.monotonic_ns() - answer.begun_ns),
            error=None if error is None else error.message,
            **_NOTHING_RAN,
        )
        return closed, End(reason, Usage(), error)

    async def wait(self, answer: Answer, timeout_s: float | None) -> None:
        """Until the lookup is a hit, its request is the one to run, alone or for others, or the answer is to end.
        Raises UpstreamTimeout where that takes longer than `timeout_s`."""
        cache, lookup = self._cache, answer.lookup
        assert cache is not None
        assert lookup is not None
        ends_at_ns = None if timeout_s is None else self._clock.monotonic_ns() + int(timeout_s * NS_PER_S)
        while lookup.follows is not None:
            left_s = None if ends_at_ns is None else (ends_at_ns - self._clock.monotonic_ns()) / NS_PER_S
            landed = asyncio.ensure_future(lookup.follows.landed.wait())
            ending = asyncio.ensure_future(answer.until_ending())
            try:
                await asyncio.wait({landed, ending}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                landed.cancel()
                ending.cancel()
            if answer.ending or not lookup.follows.landed.is_set():
                cache.leave(lookup)
                if not answer.ending:
                    raise UpstreamTimeout(
                        "An identical request whose answer this one waited for took longer than [models] timeout_s ="
                        f" {timeout_s:g}: retry, or allow more time."
                    )
            else:
                cache.arrived(lookup)

    def land(self, answer: Answer) -> None:
        """It is over: what is worth keeping is kept, and who waited for it is told."""
        if answer.lookup is not None:
            self._land(answer.lookup, self._kept(answer, answer.lookup), failed=not answer.cancelled)

    def withdraw(self, lookup: Lookup | None) -> None:
        """It was refused before it began."""
        if lookup is not None:
            self._land(lookup, None, failed=True)

    async def maintain(self) -> None:
        if self._cache is not None:
            await self._cache.maintain()

    async def close(self) -> None:
        if self._cache is not None:
            await self._cache.close()

    def _land(self, lookup: Lookup, kept: CachedAnswer | None, *, failed: bool) -> None:
        assert self._cache is not None
        self._cache.land(lookup, kept, failed=failed)

    def _kept(self, answer: Answer, lookup: Lookup) -> CachedAnswer | None:
        receipt = answer.settled
        if receipt is None or not lookup.writes or lookup.answer is not None:
            return None
        kept = CachedAnswer(
            receipt=receipt.id,
            created_at_ns=self._clock.now_ns(),
            texts=answer.texts(),
            reasons=answer.reasons,
            usage=receipt.usage,
            finish_reason=receipt.finish_reason,
            served_model=receipt.served_model,
            list_price=receipt.list_price,
            saved_by_routing=receipt.saved.get("routing"),
        )
        return kept if worth_keeping(lookup.request, receipt, kept, cut=answer.stopped_at_limit) else None

    def _useful(self, feature: str | None, found: CachedAnswer) -> bool | None:
        if not self._features.judges_output(feature):
            return None
        outputs = [text.text for text in merge_texts(found.texts)]
        return any(self._features.output(feature, output) for output in outputs)


def told(lookup: Lookup | None) -> dict[str, str]:
    """What a receipt says of the cache, beside what made it choose a model."""
    if lookup is None:
        return {}
    why = {} if lookup.why is None else {WHY: lookup.why}
    return {RESPONSE_CACHE: lookup.outcome.value} | why | holdouts.told(lookup.arm)


# Known, and nothing.
_NOTHING_RAN: dict[str, Any] = {
    "accelerator": Accelerator(provenance=Provenance.MEASURED),
    "energy": Energy(Decimal(0), Provenance.MEASURED),
}


def _lookup_line(at_ns: int) -> Line:
    """What a lookup costs us is nothing that could be told apart."""
    return Line(
        attempt=0,
        role=Role.INFERENCE,
        meter=Meter.OTHER,
        quantity=Decimal(1),
        unit="lookup",
        unit_price_usd=Decimal(0),
        amount=ZERO,
        provenance=Provenance.MEASURED,
        incurred_at_ns=at_ns,
        posted_at_ns=at_ns,
        note="response cache",
    )
