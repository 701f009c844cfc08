"""Before a request runs: what it will cost, what is held for it, and how it keeps within its caller's maximum."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from millicent.caching.prompt_caching import Marks
from millicent.core.errors import PaymentRequired
from millicent.core.guesses import guessed_input_tokens
from millicent.core.money import Money
from millicent.core.protocols import Backend, Call
from millicent.core.quotes import Quote
from millicent.core.receipts import Receipt
from millicent.core.request import Request
from millicent.core.usage import Provenance
from millicent.meter.placements import Placement
from millicent.meter.prices import PriceBook, Prices
from millicent.meter.quotes import Asked, CachedInput, Quoter, most_cost, output_tokens_within

MAX_COST_HEADER = "x-millicent-max-cost-usd"
_MOST_TOKENS = 1 << 24


class Plan(msgspec.Struct, frozen=True):
    """A request that may run: its call, what was quoted and what is held. `maximum` is the caller's, where it is kept
    while it runs; `marks` are those for the provider's cache."""

    call: Call
    asked: Asked
    quote: Quote
    hold: Money | None
    maximum: Money | None = None
    marks: Marks | None = None

    @property
    def most(self) -> Money | None:
        """What the longest answer that there can be costs; None where nobody knows, as of what is paid for by time."""
        return most_cost(self.asked)


class Estimates:
    """The quoter and the price book, as the pipeline asks them."""

    def __init__(self, quoter: Quoter, book: PriceBook) -> None:
        self._quoter = quoter
        self._book = book

    def prices(self, model: str, placement: Placement, at_ns: int) -> Prices | None:
        """None where device time is what is paid for, or nobody knows."""
        if placement.kind != "api":
            return None
        return self._book.find(model, at_ns, placement.service, placement.provider)

    def asked(
        self, request: Request, call: Call, placement: Placement, batch: int, at_ns: int, *, timed: bool = False,
        cached: CachedInput | None = None,
    ) -> Asked:  # fmt: skip
        """`timed`: its device time will be estimated, where the backend shows no steps."""
        if not call.sequences and not timed and placement.kind != "api":
            # Its device time, and so its cost, will not be known.
            placement = msgspec.structs.replace(placement, usd_per_hour=None, list_usd_per_hour=None)
        counted = call.input_tokens is not None
        return Asked(
            model=request.model,
            placement=placement,
            input_tokens=call.input_tokens if call.input_tokens is not None else guessed_input_tokens(request),
            input_provenance=Provenance.COUNTED if counted else Provenance.ASSUMED,
            limit=call.max_output_tokens,
            feature=request.attribution.feature,
            batch=batch,
            prices=self.prices(call.served_model, placement, at_ns),
            cached=cached,
        )

    def asked_elsewhere(self, request: Request, placement: Placement, others: Sequence[Asked], at_ns: int) -> Asked:
        """On a placement that nothing here can call: its tokens are about as many as another model's."""
        placement = placement.at(at_ns)
        counted = [other.input_tokens for other in others if other.input_provenance is Provenance.COUNTED]
        return Asked(
            model=request.model,
            placement=placement,
            input_tokens=counted[0] if counted else guessed_input_tokens(request),
            input_provenance=Provenance.ESTIMATED if counted else Provenance.ASSUMED,
            limit=None if request.limits.max_tokens is None else request.limits.max_tokens * request.answers,
            feature=request.attribution.feature,
            prices=self.prices(request.model, placement, at_ns),
        )

    def quote(self, asked: Asked) -> Quote:
        return self._quoter.quote(asked)

    def list_price(self, asked: Asked, output_tokens: int) -> Money | None:
        """What so much output would cost there at list price without caches; None where nobody knows. Estimated."""
        return self._quoter.list_price(asked, output_tokens)

    async def within(self, request: Request, backend: Backend, call: Call, asked: Asked) -> Plan:
        """How to run it so that the caller's maximum holds. Raises PaymentRequired, with the quote, when it can't.

        Where tokens have prices, the output is limited beforehand; where time is paid for, the device time is.
        """
        quote = self.quote(asked)
        held = None if quote.cost is None else quote.cost.high
        maximum = request.max_cost
        if maximum is None:
            return Plan(call, asked, quote, held)
        if quote.cost is None or held is None:
            raise _refusal(f"`{asked.model}` has no price on `{quote.placement}`, so no maximum can be kept", quote)
        if quote.cost.low > maximum:
            raise _refusal(f"this would cost at least ${quote.cost.low}, above the maximum of ${maximum}", quote)
        if asked.placement.kind == "api":
            most = output_tokens_within(maximum, asked, _MOST_TOKENS if asked.limit is None else asked.limit)
            each = most // request.answers
            if each < (0 if asked.limit == 0 else 1):
                what = "one token" if request.answers == 1 else f"one token of each of {request.answers} answers"
                raise _refusal(f"the maximum of ${maximum} doesn't pay for the input and {what}", quote)
            if asked.limit is None or most < asked.limit:
                limits = msgspec.structs.replace(request.limits, max_tokens=each)
                call = await backend.prepare(msgspec.structs.replace(request, limits=limits))
                asked = msgspec.structs.replace(asked, limit=each * request.answers)
                quote = self.quote(asked)
            return Plan(call, asked, quote, min(maximum, held))
        return Plan(call, asked, quote, min(maximum, held), maximum)

    def learn(self, receipt: Receipt | None, plan: Plan) -> None:
        """An answer was settled; None: it could not be."""
        if receipt is not None:
            self._quoter.learn_from(receipt, plan.asked.batch, plan.asked.limit, plan.quote)


def _refusal(what: str, quote: Quote) -> PaymentRequired:
    return PaymentRequired(
        f"{what[:1].upper()}{what[1:]}: raise `X-Millicent-Max-Cost-USD`, or ask for less.",
        param=MAX_COST_HEADER,
        code="max_cost_exceeded",
        quote=quote,
    )
