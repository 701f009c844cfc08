"""Who caused it: the members that have more of it now than at the same time a week, or a day, before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, Protocol

import msgspec

from millicent.core.clock import NS_PER_HOUR
from millicent.ledger.queries import GroupBy, ReceiptFilter, Sample, Totals
from millicent.watch.findings import Cause, Change, Measure
from millicent.watch.series import MOST_SAMPLES

_Dimension = Literal["feature", "key", "user", "model"]
_BY: tuple[_Dimension, ...] = ("feature", "key", "user", "model")
_DAY_NS = 24 * NS_PER_HOUR
# Who makes less than this is not named.
_LEAST_PERCENT = 30


class Ledger(Protocol):
    """Of `ledger.queries.LedgerQueries`."""

    def totals(self, by: GroupBy, where: ReceiptFilter) -> list[Totals]: ...

    def samples(self, where: ReceiptFilter, *, most: int) -> list[Sample]: ...


def earlier(now: ReceiptFilter) -> tuple[ReceiptFilter, ...]:
    """The same hours a week before, a day before, and those just before."""
    assert now.from_ns is not None
    assert now.to_ns is not None
    backs = (7 * _DAY_NS, _DAY_NS, now.to_ns - now.from_ns)
    return tuple(
        msgspec.structs.replace(now, from_ns=now.from_ns - back_ns, to_ns=now.to_ns - back_ns) for back_ns in backs
    )


def causes(ledger: Ledger, change: Change) -> tuple[Cause, ...]:
    """At most one of each dimension that isn't given, the largest first."""
    before = next((where for where in change.before if any(ledger.totals("status", where))), None)
    parts = _parts(ledger, change.measure, change.now, before)
    sign = 1 if change.rose else -1
    found: list[Cause] = []
    for by in _BY:
        if getattr(change.now, by) is not None:
            continue
        changes = {who: sign * part for who, part in parts(by).items()}
        whole = sum(part for part in changes.values() if part > 0)
        if len(changes) < 2 or not whole:
            continue  # who else could it be
        who, part = max(changes.items(), key=lambda item: item[1])
        percent = round(100 * part / whole)
        if percent >= _LEAST_PERCENT:
            found.append(Cause(by, who, percent))
    return tuple(sorted(found, key=lambda cause: -cause.percent))


def _parts(
    ledger: Ledger, measure: Measure, now: ReceiptFilter, before: ReceiptFilter | None
) -> Callable[[_Dimension], dict[str, float]]:
    """Of a dimension, what each member adds to the change."""
    if measure in _OF_A_RECEIPT:
        ones, others = ([] if where is None else ledger.samples(where, most=MOST_SAMPLES) for where in (now, before))
        return _of_samples(ones, others, _OF_A_RECEIPT[measure])
    if measure == "errors":
        now = msgspec.structs.replace(now, status="failed")
        before = None if before is None else msgspec.structs.replace(before, status="failed")

    def of(by: _Dimension) -> dict[str, float]:
        ones, others = ([] if where is None else ledger.totals(by, where) for where in (now, before))
        if measure in _PER_REQUEST:
            weigh = _PER_REQUEST[measure]
            requests = sum(group.requests for group in others)
            # Beyond what as many requests would have had before.
            usual = sum(map(weigh, others)) / requests if requests else 0.0
            return {group.group or "": weigh(group) - group.requests * usual for group in ones}
        weigh = _SUMS.get(measure, lambda group: group.requests)
        changes = {group.group or "": float(weigh(group)) for group in ones}
        for group in others:
            changes[group.group or ""] = changes.get(group.group or "", 0.0) - weigh(group)
        return changes

    return of


_SUMS: Mapping[Measure, Callable[[Totals], int]] = {
    "cost": lambda group: group.cost.nanousd,
    "unpriced": lambda group: group.unpriced,
}
_PER_REQUEST: Mapping[Measure, Callable[[Totals], int]] = {
    "request_cost": lambda group: group.cost.nanousd,
    "tokens": lambda group: group.input_tokens + group.output_tokens,
}
# A receipt's part of the sum that the figure is of, and of what that is divided by.
_OF_A_RECEIPT: Mapping[Measure, Callable[[Sample], tuple[int, int] | None]] = {
    "latency": lambda sample: None if sample.total_ns is None or sample.failed else (sample.total_ns, 1),
    "target": lambda sample: None if sample.met is None else (not sample.met, 1),
    "cache": lambda sample: (
        None
        if sample.cached_tokens is None or sample.input_tokens is None
        else (sample.cached_tokens, sample.input_tokens)
    ),
}


def _of_samples(
    now: Sequence[Sample], before: Iterable[Sample], measure: Callable[[Sample], tuple[int, int] | None]
) -> Callable[[_Dimension], dict[str, float]]:
    pairs = [pair for sample in before if (pair := measure(sample)) is not None]
    divided = sum(by for _, by in pairs)
    usual = sum(part for part, _ in pairs) / divided if divided else 0.0
    ones = [(sample, pair) for sample in now if (pair := measure(sample)) is not None]

    def of(by: _Dimension) -> dict[str, float]:
        changes: dict[str, float] = {}
        for sample, (part, whole) in ones:
            who = getattr(sample, by) or ""
            changes[who] = changes.get(who, 0.0) + part - whole * usual
        return changes

    return of
