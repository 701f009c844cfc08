"""What grows too slowly to be an anomaly: a request's tokens and cost, against the week before and a fixed week."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Literal, NamedTuple, Protocol

from millicent.core.clock import NS_PER_HOUR, NS_PER_S
from millicent.core.money import Money
from millicent.ledger.queries import GroupBy, ReceiptFilter, Totals
from millicent.watch.config import AlertConfig
from millicent.watch.findings import Change, Finding, Measure, Subject
from millicent.watch.series import ALL, MOST_MEMBERS, QUARTER_NS

WEEK_NS = 7 * 24 * NS_PER_HOUR
_ENOUGH = 100
_BY: tuple[Literal["feature", "key"], ...] = ("feature", "key")


class Sums(Protocol):
    """Of `ledger.queries.LedgerQueries`."""

    def totals(self, by: GroupBy, where: ReceiptFilter) -> list[Totals]: ...


def drift_findings(rule: str, config: AlertConfig, sums: Sums, now_ns: int) -> list[Finding]:
    """`now_ns` is the end of the week that is looked at."""
    to_ns = now_ns - now_ns % QUARTER_NS
    since_ns = to_ns - WEEK_NS
    compared = [("the week before", since_ns - WEEK_NS)]
    if config.baseline is not None:
        start = datetime(config.baseline.year, config.baseline.month, config.baseline.day, tzinfo=UTC)
        fixed_ns = int(start.timestamp()) * NS_PER_S
        if fixed_ns + WEEK_NS <= since_ns:
            compared.insert(0, (f"the week from {config.baseline}", fixed_ns))
    now = _week(sums, since_ns)
    found: dict[Subject, Finding] = {}
    for name, from_ns in compared:
        before = _week(sums, from_ns)
        for (dimension, member), totals in now.items():
            was = before.get((dimension, member))
            if was is None or not config.covers(dimension, member):
                continue
            for ratio in _RATIOS:
                subject = Subject(rule, "drift", ratio.figure, dimension, member)
                one, other = ratio.per_request(totals), ratio.per_request(was)
                if subject in found or one is None or not other:
                    continue
                percent = round(100 * (one - other) / other)
                if abs(percent) >= config.drift_percent:
                    value, usual = ratio.told(one), ratio.told(other)
                    much = f"{abs(percent)}% {'more' if percent > 0 else 'less'}"
                    title = f"{ratio.what} of {subject.whose}: {value} in the last 7 days, {much} than in {name}."
                    facts = {"value": value, "before": usual, "change": f"{percent}%", "against": name}
                    weeks = (_receipts(dimension, member, start_ns) for start_ns in (since_ns, from_ns))
                    change = Change(ratio.measure, next(weeks), tuple(weeks), rose=percent > 0)
                    found[subject] = Finding(subject, title, facts, since_ns, abs(percent), change)
    return list(found.values())


def _receipts(dimension: str, member: str, from_ns: int) -> ReceiptFilter:
    """Of the week from then on."""
    whose = {} if dimension == ALL else {dimension: member}
    return ReceiptFilter(**whose, from_ns=from_ns, to_ns=from_ns + WEEK_NS)


def _week(sums: Sums, from_ns: int) -> dict[tuple[str, str], Totals]:
    """Those with enough requests to tell."""
    where = _receipts(ALL, "", from_ns)
    found: dict[tuple[str, str], Totals] = {}
    for dimension in _BY:
        groups = sorted(sums.totals(dimension, where), key=lambda group: -group.requests)
        if dimension == "feature" and groups:
            found[ALL, ""] = Totals.together(groups)
        if not any(group.group for group in groups):
            continue  # what has no key, where nothing has one, is everything
        for group in groups[:MOST_MEMBERS]:
            found[dimension, group.group or ""] = group
    return {who: totals for who, totals in found.items() if totals.requests >= _ENOUGH}


def _tokens(totals: Totals) -> Decimal | None:
    known = totals.requests - totals.unknown_usage
    return Decimal(totals.input_tokens + totals.output_tokens) / known if known >= _ENOUGH else None


def _cost(totals: Totals) -> Decimal | None:
    """In nano-dollars."""
    priced = totals.requests - totals.unpriced
    return Decimal(totals.cost.nanousd) / priced if priced >= _ENOUGH else None


class _Ratio(NamedTuple):
    figure: str
    measure: Measure
    what: str
    per_request: Callable[[Totals], Decimal | None]
    told: Callable[[Decimal], str]


_RATIOS = (
    _Ratio("tokens", "tokens", "The number of tokens per request", _tokens, lambda value: f"{value:,.0f}"),
    _Ratio("cost", "request_cost", "The cost per request", _cost, lambda value: Money(round(value)).human()),
)
