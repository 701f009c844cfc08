"""What each feature should cost and take, beside what it does."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Literal

import msgspec

from millicent.core.clock import NS_PER_MS
from millicent.core.money import Money
from millicent.core.tallies import Tally, count_at_most, percentile
from millicent.economics.tallied import tallied
from millicent.economics.unit import per
from millicent.ledger.queries import LedgerQueries, ReceiptFilter

Verdict = Literal["met", "missed", "unknown"]

# A latency target is met when at least so many in a hundred answers meet it: one slow answer in a thousand is no
# broken promise, and a mean would hide one in ten.
LATENCY_PERCENT = 95


class Aim(msgspec.Struct, frozen=True):
    """What a feature's configuration says of it."""

    owner: str | None = None
    cost: Money | None = None
    latency_ms: int | None = None


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A feature's answers beside its targets. `cost_share` is the part of its priced requests that cost at most the
    target, `latency_share` the part of its successful ones that came within it: the first token of a stream, the whole
    of another answer. Both are read from histograms, in which only the bucket that the target cuts is estimated.
    """

    feature: str
    owner: str | None
    requests: int
    cost_target: Money | None
    mean_cost: Money | None
    cost_share: Decimal | None
    cost_verdict: Verdict | None
    latency_target_ms: int | None
    latency_p95_ns: int | None
    latency_share: Decimal | None
    latency_verdict: Verdict | None


def targets(ledger: LedgerQueries, aims: Mapping[str, Aim], where: ReceiptFilter) -> list[Target]:
    """Of the features that have a target, in order of their names. The cost target is met when the mean cost of priced
    requests is at most that; the latency target when 95% of answers come within it."""
    aimed = [(name, aim) for name, aim in sorted(aims.items()) if aim.cost is not None or aim.latency_ms is not None]
    return [_target(name, aim, _tally(ledger, name, where)) for name, aim in aimed]


def _tally(ledger: LedgerQueries, feature: str, where: ReceiptFilter) -> Tally:
    if where.feature not in {None, feature}:
        return Tally()
    return tallied(ledger, (), msgspec.structs.replace(where, feature=feature)).get((), Tally())


def _target(name: str, aim: Aim, tally: Tally) -> Target:
    mean_cost = per(Money(tally.cost_nanousd), tally.priced)
    bound_ns = None if aim.latency_ms is None else aim.latency_ms * NS_PER_MS
    waited = sum(tally.wait.values())
    in_time = None if bound_ns is None or not waited else Decimal(count_at_most(tally.wait, bound_ns)) / waited
    within = None
    if aim.cost is not None and tally.priced:
        within = Decimal(count_at_most(tally.cost, aim.cost.nanousd)) / tally.priced
    return Target(
        feature=name,
        owner=aim.owner,
        requests=tally.requests,
        cost_target=aim.cost,
        mean_cost=mean_cost,
        cost_share=within,
        cost_verdict=None if aim.cost is None else _verdict(mean_cost and mean_cost <= aim.cost),
        latency_target_ms=aim.latency_ms,
        latency_p95_ns=percentile(tally.wait, LATENCY_PERCENT),
        latency_share=in_time,
        latency_verdict=None if aim.latency_ms is None else _verdict(in_time and in_time * 100 >= LATENCY_PERCENT),
    )


def _verdict(met: object) -> Verdict:
    return "unknown" if met is None else "met" if met else "missed"
