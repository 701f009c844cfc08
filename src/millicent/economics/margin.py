"""What is earned beside what is spent, by feature, tier or user, and what would mend it.

Every amount is counted once, under what it was recorded for; what isn't known by the thing that is asked for is a row
of its own, so that rows always sum to the same total. Revenue that was recorded stands instead of what the
configuration would make of that user, tier or feature in that month.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Literal

import msgspec

from millicent.core.entries import Entry
from millicent.core.money import ZERO, Money
from millicent.core.periods import Period, months_of
from millicent.economics.config import CostConfig, EarningsConfig, PlanConfig
from millicent.economics.plans import Mend, UserUse, allowance, bill, feature_mends, mends, needed, plans_by_tier
from millicent.ledger.queries import LedgerQueries, ReceiptFilter, Totals

By = Literal["feature", "tier", "user"]
# Rows of users that are told; all of them count.
MOST_USERS = 200


class Books(msgspec.Struct, frozen=True):
    """What the configuration says of money that comes in and goes out."""

    plans: dict[str, PlanConfig] = {}
    features: dict[str, EarningsConfig] = {}
    costs: dict[str, CostConfig] = {}


class MarginRow(msgspec.Struct, frozen=True, kw_only=True):
    """`margin` = revenue - AI cost - other costs; the shares are of revenue, None without any. `needed` is the least
    revenue that would leave the target's part. `unpriced` requests may have cost something nobody can price.

    Revenue is None where nobody said what is earned, the AI cost where no request has a price; the margin then, too. In
    the total, what is known counts.
    """

    group: str | None
    requests: int
    revenue: Money | None
    ai_cost: Money | None
    other_cost: Money
    margin: Money | None
    margin_share: Decimal | None
    ai_share: Decimal | None
    unpriced: int
    target: Decimal | None
    needed: Money | None


class PayingUser(msgspec.Struct, frozen=True, kw_only=True):
    """A user whose AI cost is more than the plan's target leaves for it; `losing` where it is more than they pay."""

    user: str
    tier: str
    paid: Money
    cost: Money
    allowed: Money
    losing: bool


class PlanMargin(msgspec.Struct, frozen=True, kw_only=True):
    """`users` made requests in the period; those who pay and made none aren't known here."""

    plan: str
    tier: str
    users: int
    revenue: Money
    ai_cost: Money
    other_cost: Money
    over: int
    losing: int
    mends: tuple[Mend, ...]


class MarginReport(msgspec.Struct, frozen=True):
    """Least margin first, then those of which it isn't known, the dearest first. `mends` says, by feature, what would
    bring one that earns something to its target. `over` are the users that cost more than their plan leaves, those who
    pay first, up to `MOST_USERS` of them."""

    by: By
    from_ns: int
    to_ns: int
    rows: tuple[MarginRow, ...]
    total: MarginRow
    mends: dict[str, tuple[Mend, ...]]
    plans: tuple[PlanMargin, ...]
    over: tuple[PayingUser, ...]


class _Posting(msgspec.Struct, frozen=True, kw_only=True):
    """An amount, and all that is known of what it is for."""

    revenue: Money | None = None
    cost: Money = ZERO
    feature: str | None = None
    tier: str | None = None
    user: str | None = None


class _Member(msgspec.Struct, frozen=True):
    """A user of a plan in `inside`, the part of one month that is asked for. `paid` is what was recorded of them, else
    what the plan bills."""

    plan: str
    tier: str
    use: UserUse
    paid: Money
    inside: Period
    month: Period


def margins(ledger: LedgerQueries, by: By, period: Period, books: Books) -> MarginReport:
    """Of the requests created in the period, and of what accrues in it."""
    plans = plans_by_tier(books.plans)
    entries = ledger.entries(None, period.from_ns, period.to_ns)
    members = list(_members(ledger, period, plans, entries))
    postings = _postings(ledger, period, books, entries, members)
    where = ReceiptFilter(from_ns=period.from_ns, to_ns=period.to_ns)
    spent = {each.group: each for each in ledger.totals(by, where)}
    posted: dict[str | None, list[_Posting]] = {group: [] for group in spent}
    for posting in postings:
        posted.setdefault(getattr(posting, by), []).append(posting)
    targets = _targets(by, books, members)
    rows = [_row(group, spent.get(group), ours, targets.get(group)) for group, ours in posted.items()]
    rows.sort(key=_place)
    total = _row(None, Totals.together(list(spent.values())), postings, None)
    return MarginReport(
        by,
        period.from_ns,
        period.to_ns,
        tuple(rows[:MOST_USERS] if by == "user" else rows),
        total,
        _feature_mends(rows, period) if by == "feature" else {},
        tuple(_plans(plans, members, postings)),
        tuple(_over(members, plans)[:MOST_USERS]),
    )


def of_users(
    ledger: LedgerQueries, spent: Sequence[Totals], period: Period, books: Books
) -> dict[str | None, MarginRow]:
    """What these users pay beside what they cost in the period: their rows of `margins`, without reading of others."""
    entries = ledger.entries(None, period.from_ns, period.to_ns)
    users = {each.group for each in spent}
    members = list(_members(ledger, period, plans_by_tier(books.plans), entries, users))
    posted: dict[str | None, list[_Posting]] = {}
    for posting in _postings(ledger, period, books, entries, members):
        posted.setdefault(posting.user, []).append(posting)
    return {each.group: _row(each.group, each, posted.get(each.group, ()), None) for each in spent}


def _postings(
    ledger: LedgerQueries, period: Period, books: Books, entries: Sequence[Entry], members: Sequence[_Member]
) -> list[_Posting]:
    return [
        *_recorded(ledger, entries, period),
        *_billed(members, entries),
        *_of_features(ledger, period, books.features, entries),
        *_running_costs(books.costs, period),
    ]


def _row(group: str | None, spent: Totals | None, postings: Sequence[_Posting], target: Decimal | None) -> MarginRow:
    requests, unpriced = (0, 0) if spent is None else (spent.requests, spent.unpriced)
    earned = [posting.revenue for posting in postings if posting.revenue is not None]
    revenue = Money.total(earned) if earned else None
    ai_cost = ZERO if spent is None else spent.known_cost
    other_cost = Money.total(posting.cost for posting in postings)
    left = None if revenue is None or ai_cost is None else revenue - ai_cost - other_cost
    least = None if target is None else needed((ai_cost or ZERO) + other_cost, target)
    return MarginRow(
        group=group,
        requests=requests,
        revenue=revenue,
        ai_cost=ai_cost,
        other_cost=other_cost,
        margin=left,
        margin_share=_part(left, revenue),
        ai_share=_part(ai_cost, revenue),
        unpriced=unpriced,
        target=target,
        needed=None if least is None or (revenue is not None and revenue >= least) else least,
    )


def _place(row: MarginRow) -> tuple[bool, int, bool, str]:
    worst = -(row.ai_cost or ZERO).nanousd if row.margin is None else row.margin.nanousd
    return row.margin is None, worst, row.group is None, row.group or ""


def _feature_mends(rows: Sequence[MarginRow], period: Period) -> dict[str, tuple[Mend, ...]]:
    months = sum(
        (Fraction(each.ns, month.ns) for month in months_of(period) if (each := period.common(month))), Fraction(0)
    )
    found = {}
    for row in rows:
        revenue = row.revenue or ZERO
        if row.group is not None and row.needed is not None and revenue > ZERO and months:
            allowed = allowance(revenue, row.target or Decimal(0)) - row.other_cost
            found[row.group] = tuple(feature_mends(row.group, row.needed - revenue, row.requests, allowed, months))
    return found


def _part(amount: Money | None, whole: Money | None) -> Decimal | None:
    return None if amount is None or whole is None or whole <= ZERO else Decimal(amount.nanousd) / whole.nanousd


def _members(
    ledger: LedgerQueries,
    period: Period,
    plans: Mapping[str, tuple[str, PlanConfig]],
    entries: Sequence[Entry],
    users: Collection[str | None] | None = None,
) -> Iterator[_Member]:
    """Who made requests, month by month, and is on a plan by the tier of their latest request in it; of these `users`
    only, where some are named."""
    if not plans:
        return
    for month in months_of(period):
        inside = period.common(month)
        if inside is None:
            continue
        totals = ledger.totals("user", ReceiptFilter(from_ns=inside.from_ns, to_ns=inside.to_ns))
        totals = [each for each in totals if users is None or each.group in users]
        recorded: dict[str, Money] = {}
        for entry in _revenue(entries, inside):
            if entry.user is not None:
                recorded[entry.user] = recorded.get(entry.user, ZERO) + inside.accrued(entry.amount, _time(entry))
        tiers = ledger.latest_tiers([each.group for each in totals if each.group is not None], inside.to_ns)
        for each in totals:
            tier = tiers.get(each.group or "")
            if each.group is None or tier is None or tier not in plans:
                continue
            name, plan = plans[tier]
            use = UserUse(
                each.group, each.requests, each.input_tokens + each.output_tokens, each.cost, recorded.get(each.group)
            )
            paid = bill(plan, use, inside, month) if use.recorded is None else use.recorded
            yield _Member(name, tier, use, paid, inside, month)


def _recorded(ledger: LedgerQueries, entries: Sequence[Entry], period: Period) -> Iterator[_Posting]:
    """As it accrues. What a user paid is of the tier of their latest request, where nothing else is said."""
    unknown = sorted({each.user for each in entries if each.user is not None and each.tier is None})
    tiers = ledger.latest_tiers(unknown, period.to_ns) if unknown else {}
    for each in entries:
        amount = period.accrued(each.amount, _time(each))
        tier = each.tier or tiers.get(each.user or "")
        yield _Posting(
            revenue=amount if each.kind == "revenue" else None,
            cost=amount if each.kind == "cost" else ZERO,
            feature=each.feature,
            tier=tier,
            user=each.user,
        )


def _billed(members: Sequence[_Member], entries: Sequence[Entry]) -> Iterator[_Posting]:
    recorded = {
        inside: {each.tier for each in _revenue(entries, inside) if each.user is None}
        for inside in {member.inside for member in members}
    }
    for member in members:
        if member.use.recorded is None and member.tier not in recorded[member.inside]:
            yield _Posting(revenue=member.paid, tier=member.tier, user=member.use.user)


def _of_features(
    ledger: LedgerQueries, period: Period, features: Mapping[str, EarningsConfig], entries: Sequence[Entry]
) -> Iterator[_Posting]:
    earning = {
        name: each for name, each in features.items() if each.revenue_usd_per_month or each.revenue_usd_per_request
    }
    for month in months_of(period) if earning else ():
        inside = period.common(month)
        if inside is None:
            continue
        where = ReceiptFilter(status="succeeded", from_ns=inside.from_ns, to_ns=inside.to_ns)
        answered = {each.group: each.requests for each in ledger.totals("feature", where)}
        recorded = {each.feature for each in _revenue(entries, inside)}
        for name, each in earning.items():
            if name not in recorded:
                fixed = inside.accrued(Money.from_usd(each.revenue_usd_per_month), month)
                yield _Posting(
                    revenue=fixed + Money.price(answered.get(name, 0), each.revenue_usd_per_request), feature=name
                )


def _running_costs(costs: Mapping[str, CostConfig], period: Period) -> Iterator[_Posting]:
    for each in costs.values():
        amount = Money.from_usd(each.usd_per_month)
        accrued = Money.total(period.accrued(amount, month) for month in months_of(period))
        yield _Posting(cost=accrued, feature=each.feature, tier=each.tier)


def _plans(
    plans: Mapping[str, tuple[str, PlanConfig]], members: Sequence[_Member], postings: Sequence[_Posting]
) -> Iterator[PlanMargin]:
    for tier, (name, plan) in plans.items():
        ours = [member for member in members if member.tier == tier]
        other = Money.total(posting.cost for posting in postings if posting.tier == tier)
        parts = sum((Fraction(member.inside.ns, member.month.ns) for member in ours), Fraction(0))
        over = [each for each in _over(ours, plans) if each.tier == tier]
        yield PlanMargin(
            plan=name,
            tier=tier,
            users=len({member.use.user for member in ours}),
            revenue=Money.total(posting.revenue or ZERO for posting in postings if posting.tier == tier),
            ai_cost=Money.total(member.use.cost for member in ours),
            other_cost=other,
            over=len(over),
            losing=sum(each.losing for each in over),
            mends=tuple(
                mends(
                    name,
                    plan,
                    [member.use for member in ours],
                    [member.paid for member in ours],
                    other,
                    parts / len(ours),
                )
            )
            if ours
            else (),
        )


def _over(members: Sequence[_Member], plans: Mapping[str, tuple[str, PlanConfig]]) -> list[PayingUser]:
    """The users that cost more than their plan's target leaves: those who pay something first, since of a free plan
    that is everybody, then those with the greatest excess."""
    sums: dict[tuple[str, str], tuple[Money, Money]] = {}
    for member in members:
        paid, cost = sums.get((member.use.user, member.tier), (ZERO, ZERO))
        sums[member.use.user, member.tier] = (paid + member.paid, cost + member.use.cost)
    found = []
    for (user, tier), (paid, cost) in sums.items():
        allowed = allowance(paid, plans[tier][1].margin_target)
        if cost > allowed:
            found.append(PayingUser(user=user, tier=tier, paid=paid, cost=cost, allowed=allowed, losing=cost > paid))
    return sorted(found, key=lambda each: (each.paid <= ZERO, each.allowed.nanousd - each.cost.nanousd, each.user))


def _targets(by: By, books: Books, members: Sequence[_Member]) -> dict[str | None, Decimal]:
    if by == "feature":
        return {name: each.margin_target for name, each in books.features.items()}
    if by == "tier":
        return {plan.tier or name: plan.margin_target for name, plan in books.plans.items()}
    return {member.use.user: books.plans[member.plan].margin_target for member in members}


def _revenue(entries: Sequence[Entry], inside: Period) -> Iterator[Entry]:
    return (each for each in entries if each.kind == "revenue" and inside.common(_time(each)) is not None)


def _time(entry: Entry) -> Period:
    return Period(entry.from_ns, entry.to_ns)
