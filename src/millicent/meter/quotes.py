"""What a request will cost, before it runs: predicted lengths and times, at a placement's prices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import Decimal

import msgspec

from millicent.core.money import Money
from millicent.core.quotes import CostInterval, Interval, Quote
from millicent.core.receipts import Receipt, Status
from millicent.core.usage import Leaf, Provenance, weakest
from millicent.meter.durations import DurationModel, Durations, Times
from millicent.meter.lengths import Length, OutputLengths
from millicent.meter.placements import Placement
from millicent.meter.prices import UNPRICED, PriceList, Prices
from millicent.meter.pricing import discounted
from millicent.step_time import Coefficients

# Money.of_time's: nanoseconds x dollars per hour, divided by this, is nano-dollars.
_HOUR_NS_PER_NANOUSD = 3600


# More than any prompt has.
ALL_INPUT = 1 << 62


class CachedInput(msgspec.Struct, frozen=True):
    """What a provider's cache makes of the input: tokens that are expected to be read from it and written to it, and
    what there may be at most where nothing is there yet. What the input hasn't got doesn't count."""

    expected: dict[Leaf, int]
    at_most: dict[Leaf, int]


class Asked(msgspec.Struct, frozen=True):
    """What is to be quoted. `limit` is the most output tokens there can be, over all choices; `batch` how many will run
    beside each other on the device, this one included. Input that was only guessed (assumed) may be half or twice as
    much."""

    model: str
    placement: Placement
    input_tokens: int
    input_provenance: Provenance
    limit: int | None
    feature: str | None
    batch: int = 1
    prices: Prices | None = None
    cached: CachedInput | None = None

    @property
    def input_interval(self) -> Interval:
        off = 2 if self.input_provenance is Provenance.ASSUMED else 1
        return Interval(self.input_tokens // off, self.input_tokens, self.input_tokens * off)


class Answered(msgspec.Struct, frozen=True):
    """What is learned from: one answer that came to its own end, or (`cut`) to its limit's. `cached_tokens` of the
    input took no time."""

    model: str
    feature: str | None
    input_tokens: int
    output_tokens: int
    cut: bool
    batch: int
    times: Times
    limit: int | None = None
    cached_tokens: int = 0
    placement: str = ""

    @classmethod
    def of(cls, receipt: Receipt, batch: int | None = None, limit: int | None = None) -> Answered | None:
        """None when the answer failed, was cancelled, or wasn't counted. `batch` None: as it was on average."""
        read, written = receipt.usage.input_tokens, receipt.usage.output_tokens
        if receipt.status is not Status.SUCCEEDED or read is None or written is None:
            return None
        ran, took = receipt.accelerator, receipt.timing
        known = ran.provenance is not Provenance.UNKNOWN
        return cls(
            model=receipt.model,
            feature=receipt.attribution.feature,
            input_tokens=read,
            output_tokens=written,
            cut=receipt.finish_reason == "length",
            batch=batch or max(1, ran.batch_sum // max(1, ran.steps)),
            times=Times(ran.serving_ns if known else None, took.ttft_ns, took.total_ns),
            limit=limit,
            cached_tokens=receipt.usage.tokens(Leaf.INPUT_CACHE_READ) or 0,
            placement=receipt.placement or "",
        )


class Quoter:
    """Learns from every answer, and forgets at the end of the process: the ledger holds what to learn from again.

    `fit` gives the step-time coefficients of a model at a placement, where there are any.
    """

    def __init__(self, fit: Callable[[str, str], Coefficients | None]) -> None:
        self._fit = fit
        self._lengths = OutputLengths()
        self._durations = DurationModel()

    def quote(self, asked: Asked) -> Quote:
        length = self._lengths.forecast(asked.model, asked.feature, asked.input_tokens, asked.limit)
        fit = self._fit(asked.model, asked.placement.name)
        durations = self._durations.predict(asked.model, fit, asked.input_tokens, length.tokens, asked.batch)
        if asked.placement.kind == "api":
            cost, known = _cost_of_tokens(asked, length)
            # How long a provider takes is known only from its own answers.
            timed = durations.provenance is not Provenance.ASSUMED
        else:
            cost, known = _cost_of_time(asked.placement, durations)
            timed = True
        return Quote(
            model=asked.model,
            placement=asked.placement.name,
            input_tokens=asked.input_tokens,
            output_tokens=length.tokens,
            ttft=durations.ttft if timed else None,
            total=durations.total if timed else None,
            cost=cost,
            provenance=known if cost is None else weakest((known, length.provenance, Provenance.ESTIMATED)),
            output_learned=length.provenance is Provenance.ESTIMATED,
        )

    def list_price(self, asked: Asked, output_tokens: int) -> Money | None:
        """What so much output would cost at list price without caches; None where there is no price, or where it is
        not known how long the model takes."""
        placement = asked.placement
        if placement.kind == "api":
            return _TokensCost(asked.input_tokens, asked.prices.standard if asked.prices else None)(output_tokens)
        output = Interval(output_tokens, output_tokens, output_tokens)
        fit = self._fit(asked.model, placement.name)
        took = self._durations.predict(asked.model, fit, asked.input_tokens, output, asked.batch)
        rate = placement.receipt_list_usd_per_hour
        if rate is None or took.provenance is Provenance.ASSUMED:
            return None
        return Money.of_time(took.serving.expected, rate)

    def learn_from(
        self, receipt: Receipt, batch: int | None = None, limit: int | None = None, quote: Quote | None = None
    ) -> None:
        """A closed receipt, and what it was quoted: see Answered.of."""
        answered = Answered.of(receipt, batch, limit)
        if answered is not None:
            self.learn(answered, None if quote is None or not quote.output_learned else quote.output_tokens)

    def learn(self, answered: Answered, promised: Interval | None = None) -> None:
        """Costs some 0.05 ms; more without the interval of its length that was `promised`."""
        if answered.output_tokens:  # embeddings say nothing of how long texts are
            self._lengths.learn(
                answered.model,
                answered.feature,
                answered.input_tokens,
                answered.output_tokens,
                answered.limit,
                cut=answered.cut,
                promised=promised,
            )
        fit = self._fit(answered.model, answered.placement)
        computed = max(0, answered.input_tokens - answered.cached_tokens)
        self._durations.learn(answered.model, fit, computed, answered.output_tokens, answered.batch, answered.times)


def serving_ns_within(cost: Money, usd_per_hour: Decimal) -> int:
    """The longest device time that costs no more than this, at a rate above 0."""
    return int(Decimal(cost.nanousd * _HOUR_NS_PER_NANOUSD) // usd_per_hour)


def output_tokens_within(cost: Money, asked: Asked, most: int) -> int:
    """The longest output, at most `most`, whose tokens cost no more than this together with all the input there may be;
    -1 when even the input costs more, or it has no price."""
    cost_of = _most_cost(asked)
    low, high = -1, most
    while low < high:
        middle = (low + high + 1) // 2
        spent = cost_of(middle)
        if spent is not None and spent <= cost:
            low = middle
        else:
            high = middle - 1
    return low


def most_cost(asked: Asked) -> Money | None:
    """What its tokens can cost at most; None where nothing limits the output, or something has no price."""
    return None if asked.limit is None else _most_cost(asked)(asked.limit)


def _cost_of_time(placement: Placement, durations: Durations) -> tuple[CostInterval | None, Provenance]:
    rate = placement.receipt_usd_per_hour
    if rate is None:
        return None, Provenance.UNKNOWN
    serving = durations.serving
    cost = CostInterval(*(Money.of_time(ns, rate) for ns in (serving.low, serving.expected, serving.high)))
    return cost, weakest((durations.provenance, placement.rate_provenance))


def _cost_of_tokens(asked: Asked, length: Length) -> tuple[CostInterval | None, Provenance]:
    read, written = asked.input_interval, length.tokens
    cached = {} if asked.cached is None else asked.cached.expected
    low = _own_cost(asked, read.low, cached)(written.low)
    expected = _own_cost(asked, read.expected, cached)(written.expected)
    high = _most_cost(asked)(written.high)
    if low is None or expected is None or high is None:
        return None, Provenance.UNKNOWN
    return CostInterval(low, expected, high), asked.input_provenance


def _own_cost(asked: Asked, input_tokens: int, cached: Mapping[Leaf, int]) -> _TokensCost:
    """At the service's prices, less the contract's discount."""
    return _TokensCost(input_tokens, asked.prices.service if asked.prices else None, asked.placement.discount, cached)


def _most_cost(asked: Asked) -> _TokensCost:
    """With all the input there may be."""
    return _own_cost(asked, asked.input_interval.high, {} if asked.cached is None else asked.cached.at_most)


class _TokensCost:
    """What output of any length costs together with the input, as `pricing.token_lines` has it; called with a number
    of tokens. None where something has no price."""

    def __init__(
        self,
        input_tokens: int,
        prices: PriceList | None,
        discount: Decimal = Decimal(0),
        cached: Mapping[Leaf, int] | None = None,
    ) -> None:
        tier = UNPRICED if prices is None else prices.tier(input_tokens)
        self._output = discounted(tier.per_token[Leaf.OUTPUT_TEXT], discount)
        known = []
        for leaf, tokens in (cached or {}).items():
            tokens = min(tokens, input_tokens)  # noqa: PLW2901
            input_tokens -= tokens
            known.append((tokens, tier.per_token[leaf]))
        known.append((input_tokens, tier.per_token[Leaf.INPUT_FRESH]))
        if tier.request_fee is not None:
            known.append((1, tier.request_fee))
        self._beside = [_amount(quantity, discounted(each, discount)) for quantity, each in known if quantity]

    def __call__(self, output_tokens: int) -> Money | None:
        lines = [*self._beside, _amount(output_tokens, self._output)] if output_tokens else self._beside
        amounts = [line for line in lines if line is not None]
        return Money.total(amounts) if amounts and len(amounts) == len(lines) else None


def _amount(quantity: int, each: Decimal | None) -> Money | None:
    return None if each is None else Money.price(quantity, each)
