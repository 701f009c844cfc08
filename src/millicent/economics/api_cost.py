"""What a provider's API would charge for given usage. Exact: rational nano-dollars."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from decimal import Decimal
from fractions import Fraction

import msgspec

from millicent.core.money import NANOUSD_PER_USD
from millicent.core.usage import Leaf, Usage
from millicent.meter.prices import PriceList, TokenPrices
from millicent.meter.pricing import tier_of

_CACHED = (Leaf.INPUT_CACHE_READ, Leaf.INPUT_CACHE_WRITE_5M, Leaf.INPUT_CACHE_WRITE_1H)


class ApiCost(msgspec.Struct, frozen=True):
    """Nano-dollars of an average request: as often read from caches as it was here, and never."""

    per_request: Fraction
    uncached: Fraction


def tokens_of(usages: Iterable[Usage]) -> Counter[Leaf]:
    """How many of each kind, together."""
    tokens: Counter[Leaf] = Counter()
    for usage in usages:
        for leaf, count in usage.leaves.items():
            tokens[leaf] += count.tokens or 0
    return tokens


def api_cost(
    usages: Sequence[Usage], prices: PriceList, discount: Decimal = Decimal(0), tokens: Counter[Leaf] | None = None
) -> ApiCost | str:
    """The mean over these usages, each in the tier that its own length falls into; or what has no price. `tokens` are
    `tokens_of` them, where many prices are asked for the same.

    Input that was read from or written to a cache here is fresh input where the provider has no price for that.
    """
    by_tier: dict[int, tuple[TokenPrices, Counter[Leaf]]] = {}
    if not prices.long_context:
        by_tier[0] = (prices, tokens_of(usages) if tokens is None else tokens)
    for usage in usages if prices.long_context else ():
        tier = tier_of(prices, usage)
        by_tier.setdefault(id(tier), (tier, Counter()))[1].update(tokens_of([usage]))
    as_here = uncached = Fraction(0)
    for tier, counted in by_tier.values():
        for leaf, count in counted.items():
            here = tier.per_token[leaf]
            fresh = here
            if leaf in _CACHED:
                fresh = tier.per_token[Leaf.INPUT_FRESH]
                here = fresh if here is None else here
            if count and (here is None or fresh is None):
                return f"no price for {leaf.value.replace('_', ' ')}"
            as_here += count * Fraction(here or 0) * NANOUSD_PER_USD
            uncached += count * Fraction(fresh or 0) * NANOUSD_PER_USD
    kept = 1 - Fraction(discount)
    fee = Fraction(prices.request_fee or 0) * NANOUSD_PER_USD
    return ApiCost(
        *((Fraction(total, len(usages)) + fee) * kept if usages else fee * kept for total in (as_here, uncached))
    )
