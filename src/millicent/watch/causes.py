"""Who makes most of a change: the members that have more of it now than at the same time a week, or a day, before."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, Protocol

from millicent.core.clock import NS_PER_HOUR
from millicent.ledger.queries import GroupBy, ReceiptFilter, Sample, Totals
from millicent.watch.config import Figure
from millicent.watch.findings import Cause
from millicent.watch.series import MOST_SAMPLES

_Dimension = Literal["feature", "key", "user", "model"]
_BY: tuple[_Dimension, ...] = ("feature", "key", "user", "model")
_DAY_NS = 24 * NS_PER_HOUR
# A change of three hours is not told by what the last minute adds: nothing longer is compared.
_LONGEST_NS = 6 * NS_PER_HOUR
# Who makes less than this is not named.
_LEAST_PERCENT = 30
_NAMED = 4


class Ledger(Protocol):
    """Of `ledger.queries.LedgerQueries`."""

    def totals(self, by: GroupBy, where: ReceiptFilter) -> list[Totals]: ...

    def samples(self, where: ReceiptFilter, *, most: int) -> list[Sample]: ...


def causes(
    ledger: Ledger, figure: Figure, dimension: str, member: str, since_ns: int, to_ns: int, *, rose: bool
) -> tuple[Cause, ...]:
    """Of the change of one member's figure since then; at most one of each other dimension, the largest first."""
    from_ns = max(since_ns, to_ns - _LONGEST_NS)

    def window(back_ns: int) -> ReceiptFilter:
        fixed = {} if dimension == "all" else {dimension: member}
        return ReceiptFilter(**fixed, from_ns=from_ns - back_ns, to_ns=to_ns - back_ns)

    length_ns = to_ns - from_ns
    backs = (7 * _DAY_NS, _DAY_NS, length_ns)
    before = next((where for back_ns in backs if _any(ledger, where := window(back_ns))), window(length_ns))
    parts = _parts(ledger, figure, window(0), before)
    found: list[Cause] = []
    for by in _BY:
        if by == dimension:
            continue
        changes = parts(by)
        if len(changes) < 2:
            continue  # who else could it be
        sign = 1 if rose else -1
        whole = sum(change * sign for change in changes.values() if change * sign > 0)
        if not whole:
            continue
        who, change = max(changes.items(), key=lambda item: item[1] * sign)
        percent = min(100, round(100 * change * sign / whole))
        if percent >= _LEAST_PERCENT:
            found.append(Cause(by, who, percent))
    return tuple(sorted(found, key=lambda cause: -cause.percent)[:_NAMED])


def _any(ledger: Ledger, where: ReceiptFilter) -> bool:
    return any(group.requests for group in ledger.totals("status", where))


def _parts(
    ledger: Ledger, figure: Figure, now: ReceiptFilter, before: ReceiptFilter
) -> Callable[[_Dimension], dict[str, float]]:
    """Of a dimension, what each member adds to the change."""
    if figure in {"latency", "cache"}:
        return _of_samples(
            ledger.samples(now, most=MOST_SAMPLES), ledger.samples(before, most=MOST_SAMPLES), _measure(figure)
        )
    weigh: Callable[[Totals], int] = {
        "cost": lambda group: group.cost.nanousd,
        "tokens": lambda group: group.input_tokens + group.output_tokens,
    }.get(figure, lambda group: group.requests)
    if figure == "errors":
        now, before = (_failed(where) for where in (now, before))

    def of(by: _Dimension) -> dict[str, float]:
        ones, others = ledger.totals(by, now), ledger.totals(by, before)
        if figure == "tokens":
            # Beyond what as many requests would have had before.
            requests = sum(group.requests for group in others)
            usual = sum(map(weigh, others)) / requests if requests else 0.0
            return {group.group or "": weigh(group) - group.requests * usual for group in ones}
        changes = {group.group or "": float(weigh(group)) for group in ones}
        for group in others:
            changes[group.group or ""] = changes.get(group.group or "", 0.0) - weigh(group)
        return changes

    return of


def _failed(where: ReceiptFilter) -> ReceiptFilter:
    return ReceiptFilter(
        feature=where.feature,
        key=where.key,
        model=where.model,
        from_ns=where.from_ns,
        to_ns=where.to_ns,
        status="failed",
    )


def _measure(figure: Figure) -> Callable[[Sample], tuple[int, int] | None]:
    """A receipt's part of the sum that the figure is of, and of what that is divided by."""
    if figure == "latency":
        return lambda sample: None if sample.total_ns is None or sample.failed else (sample.total_ns, 1)
    return lambda sample: (
        None
        if sample.cached_tokens is None or sample.input_tokens is None
        else (sample.cached_tokens, sample.input_tokens)
    )


def _of_samples(
    now: Iterable[Sample], before: Iterable[Sample], measure: Callable[[Sample], tuple[int, int] | None]
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
