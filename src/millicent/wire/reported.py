"""What a provider says that an answer used: taken at its word, unless it says what can't be.

Nothing here raises: an answer that came is metered, however badly its provider counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import Decimal

from millicent.core.money import Money
from millicent.core.usage import Count, Leaf, Provenance, Usage

# A thousand times the longest contexts: who says more has not counted.
_MOST_TOKENS = 1 << 30
_MOST_USD = Decimal(1_000_000)


def tokens_told(said: int | None) -> int | None:
    """None where nothing was said, or what is no count."""
    return said if said is not None and 0 <= said <= _MOST_TOKENS else None


def cost_told(said: Decimal | None) -> Money | None:
    """None where nothing was said, or what is no price of an answer."""
    return Money.from_usd(said) if said is not None and said.is_finite() and 0 <= said <= _MOST_USD else None


def split(total: int | None, rest: Leaf, parts: Mapping[Leaf, int | None]) -> dict[Leaf, Count]:
    """A total and those parts of it that were told apart, as leaves that sum to it: parts that come to more are cut,
    the last first. Empty where the total is no count."""
    left = tokens_told(total)
    if left is None:
        return {}
    leaves: dict[Leaf, Count] = {}
    for leaf, said in parts.items():
        if (tokens := tokens_told(said)) is not None:
            leaves[leaf] = Count(min(tokens, left), Provenance.REPORTED)
            left -= min(tokens, left)
    return {rest: Count(left, Provenance.REPORTED), **leaves}


def completed(told: Usage | None, estimate: Callable[[], Usage]) -> Usage:
    """With the estimate for input, for output or for both, where nothing was told of that."""
    missing = [of_input for of_input in (True, False) if told is None or not told.tells(of_input=of_input)]
    if not missing:
        assert told is not None
        return told
    estimated = {leaf: count for leaf, count in estimate().leaves.items() if leaf.is_input in missing}
    return Usage(estimated | ({} if told is None else told.leaves))
