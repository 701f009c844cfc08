"""What levers that are on have really saved: requests with one, against the random part that goes without.

In each of the shares that were configured, both sides are samples of the same traffic. What was saved of a request is
the difference of their mean costs; the interval is the normal one, with the variance of means over what was drawn
together (a conversation's requests are alike, and count as one drawing).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from fractions import Fraction

from millicent.core.holdouts import HELD, Held
from millicent.core.money import Money
from millicent.economics.levers import Estimate, Measured
from millicent.ledger.queries import Drawn, LedgerQueries, ReceiptFilter

# Fewer drawings than these on a side say nothing.
LEAST = 30
_Z = Fraction(196, 100)


def measured(queries: LedgerQueries, where: ReceiptFilter) -> list[Measured]:
    """Of each lever that any request was drawn for."""
    found = [(lever, queries.drawn(lever, where)) for lever in HELD]
    return [compared(lever, drawn) for lever, drawn in found if drawn]


def compared(lever: Held, drawn: Iterable[Drawn]) -> Measured:
    """Shares on one of whose sides too few were drawn are left out."""
    shares: dict[str, tuple[list[Drawn], list[Drawn]]] = defaultdict(lambda: ([], []))
    unpriced = 0
    for each in drawn:
        unpriced += each.unpriced
        if each.requests:
            shares[each.share][each.without].append(each)
    sides = [each for each in shares.values() if min(map(len, each)) >= LEAST]
    expected, variance = Fraction(0), Fraction(0)
    for with_lever, without in sides:
        (usual, usual_variance), (less, less_variance) = _mean(without), _mean(with_lever)
        requests = _requests(with_lever)
        expected += requests * (usual - less)
        variance += requests**2 * (usual_variance + less_variance)
    either = round(_Z * math.isqrt(math.ceil(variance)))
    saved = Estimate(Money(round(expected)), Money(round(expected) - either), Money(round(expected) + either))
    return Measured(
        lever=lever,
        with_lever=sum(_requests(with_lever) for with_lever, _ in sides),
        without=sum(_requests(without) for _, without in sides),
        unpriced=unpriced,
        saved=saved if sides else None,
        reckoned=Money(sum(each.reckoned_nanousd for with_lever, _ in sides for each in with_lever)),
    )


def _mean(side: Sequence[Drawn]) -> tuple[Fraction, Fraction]:
    """A request's, in nano-dollars, and its variance: that of a ratio of sums over drawings."""
    requests, count = _requests(side), len(side)
    mean = Fraction(sum(each.nanousd for each in side), requests)
    squares = (
        sum(each.nanousd**2 for each in side)
        - 2 * mean * sum(each.nanousd * each.requests for each in side)
        + mean**2 * sum(each.requests**2 for each in side)
    )
    return mean, squares * Fraction(count, (count - 1) * requests**2)


def _requests(side: Sequence[Drawn]) -> int:
    return sum(each.requests for each in side)
