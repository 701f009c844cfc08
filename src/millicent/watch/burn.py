"""Budgets that run out before their period does, and latency targets that are missed too often.

Both burn: a rate of 1 uses exactly what there is in exactly its time. A rate must be high over a long window, so that
it matters, and over a short one, so that it is still going on. A budget is told of only where it won't last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import NamedTuple, Protocol

from millicent.core.budgets import Balance, Budget, Every
from millicent.core.clock import NS_PER_HOUR, iso_utc
from millicent.core.money import Money
from millicent.ledger.queries import GroupBy, ReceiptFilter, Totals
from millicent.watch.causes import earlier
from millicent.watch.config import AlertConfig
from millicent.watch.findings import Change, Finding, Subject, named
from millicent.watch.series import QUARTER_NS

_DAY_NS = 24 * NS_PER_HOUR
_MINUTE_NS = NS_PER_HOUR // 60


class Spending(Protocol):
    """Of `ledger.queries.LedgerQueries`."""

    def totals(self, by: GroupBy, where: ReceiptFilter) -> list[Totals]: ...


class Window(NamedTuple):
    name: str
    long_ns: int
    short_ns: int
    rate: Decimal


# A fast one would use up a month in two days, a slow one in half its time.
_BUDGET_WINDOWS: Mapping[Every, Sequence[Window]] = {
    Every.MONTH: (
        Window("fast", NS_PER_HOUR, QUARTER_NS, Decimal("14.4")),
        Window("slow", _DAY_NS, 2 * NS_PER_HOUR, Decimal(2)),
    ),
    Every.WEEK: (
        Window("fast", NS_PER_HOUR, QUARTER_NS, Decimal(8)),
        Window("slow", 12 * NS_PER_HOUR, NS_PER_HOUR, Decimal(2)),
    ),
    Every.DAY: (
        Window("fast", NS_PER_HOUR, QUARTER_NS, Decimal(4)),
        Window("slow", 6 * NS_PER_HOUR, NS_PER_HOUR, Decimal("1.5")),
    ),
    Every.HOUR: (Window("fast", 2 * QUARTER_NS, QUARTER_NS, Decimal("1.5")),),
    Every.ONCE: (),
}
# Of what may miss its target. At an objective of 95% these are 30% and 15% of answers.
_LATENCY_WINDOWS = (
    Window("fast", NS_PER_HOUR, QUARTER_NS, Decimal(6)),
    Window("slow", 6 * NS_PER_HOUR, NS_PER_HOUR, Decimal(3)),
)
# Answers with a target, over a long window and over a short one.
_ENOUGH = 20
_ENOUGH_LATELY = 5


def budget_findings(
    rule: str, config: AlertConfig, budgets: Sequence[tuple[Budget, Sequence[Balance]]], spending: Spending, now_ns: int
) -> list[Finding]:
    found: list[Finding] = []
    for budget, balances in budgets:
        if config.budgets and budget.name not in config.budgets:
            continue
        for balance in balances:
            if not config.budgets and not config.covers(budget.per or "all", balance.subject):
                continue
            found += _spent(rule, config, budget, balance, now_ns)
            found += _burning(rule, budget, balance, spending, now_ns)
    return found


def _named(budget: Budget, balance: Balance) -> tuple[str, str]:
    """The member, and for a sentence."""
    if budget.per is None:
        return budget.name, named("Budget", budget.name)
    return f"{budget.name}/{balance.subject}", f"{named('Budget', budget.name)} of {named(budget.per, balance.subject)}"


def _receipts(budget: Budget, balance: Balance, from_ns: int, to_ns: int) -> ReceiptFilter:
    """What counts in it. Without a value everything counts; an empty one is what is unattributed."""
    whose = {} if budget.per is None else {budget.per: balance.subject}
    whose |= {} if budget.tier is None else {"tier": budget.tier}
    return ReceiptFilter(**whose, from_ns=from_ns, to_ns=to_ns)


def _spent(rule: str, config: AlertConfig, budget: Budget, balance: Balance, now_ns: int) -> list[Finding]:
    """Each share to tell of that was reached is an alert of its own, until the period ends."""
    spent, limit = balance.spent.nanousd, budget.limit.nanousd
    member, name = _named(budget, balance)
    facts = {"spent": balance.spent.human(), "limit": budget.limit.human()}
    return [
        Finding(
            Subject(rule, "budget", f"spent_{percent}", "budget", member),
            f"{name}: {balance.spent.human()} of {budget.limit.human()} is spent, {spent * 100 // limit}%.",
            facts,
            balance.period_ns,
            spent,
            Change("cost", _receipts(budget, balance, balance.period_ns, now_ns)),
        )
        for percent in config.spent_percent
        if limit and spent * 100 >= limit * percent
    ]


def _burning(rule: str, budget: Budget, balance: Balance, spending: Spending, now_ns: int) -> list[Finding]:
    start_ns, end_ns = budget.every.period_ns(now_ns)
    if end_ns is None or budget.per == "run" or balance.spent >= budget.limit:
        return []
    member, name = _named(budget, balance)
    for window in _BUDGET_WINDOWS[budget.every]:
        counted = _receipts(budget, balance, *_quarters(window.long_ns, now_ns))
        long, elapsed_ns = _spending(spending, counted, now_ns)
        # spent / elapsed over limit / period
        rate = Decimal(long.nanousd * (end_ns - start_ns)) / Decimal(max(1, budget.limit.nanousd * elapsed_ns))
        lasting = Decimal(balance.spent.nanousd) + Decimal(long.nanousd) * (end_ns - now_ns) / elapsed_ns
        if rate < window.rate or lasting <= budget.limit.nanousd:
            continue
        lately = _receipts(budget, balance, *_quarters(window.short_ns, now_ns))
        short, short_ns = _spending(spending, lately, now_ns)
        recent = Decimal(short.nanousd * (end_ns - start_ns)) / Decimal(max(1, budget.limit.nanousd * short_ns))
        if recent < window.rate:
            continue
        left_ns = int((budget.limit - balance.spent).nanousd * elapsed_ns / Decimal(long.nanousd))
        out_at = iso_utc(now_ns + left_ns)[:16].replace("T", " ")
        facts = {
            "rate": f"{rate:.1f}",
            "spent": balance.spent.human(),
            "limit": budget.limit.human(),
            "window": f"{elapsed_ns // _MINUTE_NS} minutes",
            "spent_in_window": long.human(),
        }
        title = (
            f"{name} burns {rate:.1f} times as fast as its {budget.every} allows: at this rate {budget.limit.human()} "
            f"is gone by {out_at} UTC."
        )
        change = Change("cost", counted, earlier(counted))
        subject = Subject(rule, "budget", "burn", "budget", member)
        return [Finding(subject, title, facts, now_ns - elapsed_ns, float(rate), change)]
    return []


def _quarters(window_ns: int, now_ns: int) -> tuple[int, int]:
    """Whole quarter-hours, so that rollups answer."""
    return now_ns - window_ns - (now_ns - window_ns) % QUARTER_NS, now_ns - now_ns % QUARTER_NS + QUARTER_NS


def _spending(spending: Spending, counted: ReceiptFilter, now_ns: int) -> tuple[Money, int]:
    """What was spent, and in how long."""
    assert counted.from_ns is not None
    return Money.total(each.cost for each in spending.totals("status", counted)), now_ns - counted.from_ns


class Target(NamedTuple):
    quarter_ns: int
    feature: str
    aimed: int
    met: int


def latency_findings(rule: str, config: AlertConfig, targets: Iterable[Target], to_ns: int) -> list[Finding]:
    """`targets` are of the quarter-hours up to `to_ns`, at least six hours of them."""
    by_feature: dict[str, list[Target]] = {}
    for target in targets:
        if target.quarter_ns < to_ns and config.covers("feature", target.feature):
            by_feature.setdefault(target.feature, []).append(target)
    allowed = Decimal(100 - config.latency_objective_percent) / 100
    found = []
    for feature, of_feature in sorted(by_feature.items()):
        for window in _LATENCY_WINDOWS:
            long = _missed(of_feature, to_ns - window.long_ns, _ENOUGH)
            short = _missed(of_feature, to_ns - window.short_ns, _ENOUGH_LATELY)
            if long is None or short is None or min(long, short) < window.rate * allowed:
                continue
            subject = Subject(rule, "latency", "target", "feature", feature)
            hours = window.long_ns // NS_PER_HOUR
            title = (
                f"{_percent(long)} of the answers of {subject.whose} missed their latency target in the last "
                f"{'hour' if hours == 1 else f'{hours} hours'}; at most {_percent(allowed)} should."
            )
            facts = {"missed": _percent(long), "missed_lately": _percent(short), "allowed": _percent(allowed)}
            now = ReceiptFilter(feature=feature, from_ns=to_ns - window.long_ns, to_ns=to_ns)
            change = Change("target", now, earlier(now))
            found.append(Finding(subject, title, facts, to_ns - window.long_ns, float(long), change))
            break
    return found


def _missed(targets: Sequence[Target], from_ns: int, enough: int) -> Decimal | None:
    """The share; None where there are too few to tell."""
    inside = [target for target in targets if target.quarter_ns >= from_ns]
    aimed = sum(target.aimed for target in inside)
    return None if aimed < enough else Decimal(aimed - sum(target.met for target in inside)) / aimed


def _percent(share: Decimal) -> str:
    return f"{100 * share:.0f}%"
