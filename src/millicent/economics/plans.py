"""What users pay under a plan, and what would mend one that loses money: pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction

import msgspec

from millicent.core.errors import ConfigError
from millicent.core.money import Money
from millicent.core.periods import Period
from millicent.economics.config import PlanConfig

_CENT = 10**7  # nano-dollars


class UserUse(msgspec.Struct, frozen=True):
    """What one user did in a stretch of one month. `recorded` is the revenue that was recorded of them for it, which
    then stands instead of the plan's bill."""

    user: str
    requests: int
    tokens: int
    cost: Money
    recorded: Money | None = None


class Mend(msgspec.Struct, frozen=True):
    """One change that restores the target: `amount` is the new price or limit per month, `lines` belong in
    millicent.toml."""

    what: str
    amount: Money
    lines: tuple[str, ...]


def plans_by_tier(plans: Mapping[str, PlanConfig]) -> dict[str, tuple[str, PlanConfig]]:
    """Raises ConfigError where two plans are for one tier."""
    found: dict[str, tuple[str, PlanConfig]] = {}
    for name, plan in plans.items():
        tier = plan.tier or name
        if tier in found:
            raise ConfigError(f'[plans.{name}] tier = "{tier}": is that of [plans.{found[tier][0]}] already')
        found[tier] = (name, plan)
    return found


def bill(plan: PlanConfig, use: UserUse, period: Period, month: Period) -> Money:
    """What a user pays for `period`, a part of `month`: the price by time, and all that goes beyond what a whole month
    includes, in and out tokens together."""
    price = period.accrued(Money.from_usd(plan.price_usd_per_month), month)
    return price + usage_charge(plan, use.requests, use.tokens)


def usage_charge(plan: PlanConfig, requests: int, tokens: int) -> Money:
    more_tokens = max(0, tokens - plan.included_tokens)
    more_requests = max(0, requests - plan.included_requests)
    return Money.price(Decimal(more_tokens), plan.usd_per_1k_tokens / 1000) + Money.price(
        more_requests, plan.usd_per_request
    )


def allowance(revenue: Money, target: Decimal) -> Money:
    """What may be spent of this revenue so that the target's part is left, rounded down."""
    return Money(int(Fraction(revenue.nanousd) * (1 - Fraction(target)) // 1))


def needed(cost: Money, target: Decimal) -> Money:
    """The least revenue of which the target's part is left after this cost, rounded up."""
    return Money(-int(Fraction(-cost.nanousd) / (1 - Fraction(target)) // 1))


def smallest_price(costs: Money, charged: Money, user_months: Fraction, target: Decimal) -> Money | None:
    """The lowest price per user and month, in whole cents, that leaves the target's part after `costs`, beside what is
    `charged` by use. None where there are no users."""
    if user_months <= 0:
        return None
    missing = Fraction(needed(costs, target).nanousd - charged.nanousd)
    return Money(max(0, -int(-missing / user_months // _CENT)) * _CENT)


def largest_limit(costs: Sequence[Money], allowed: Money) -> Money | None:
    """The highest limit on each user's cost, in whole cents, under which all of them together cost at most `allowed`.
    None where no limit is needed; no money where not even that is enough."""
    left = allowed.nanousd
    if sum(cost.nanousd for cost in costs) <= left:
        return None
    remaining = len(costs)
    for cost in sorted(each.nanousd for each in costs):
        if cost * remaining > left:
            return Money(max(0, left // remaining // _CENT * _CENT))
        left -= cost
        remaining -= 1
    return None


def mends(
    name: str,
    plan: PlanConfig,
    uses: Sequence[UserUse],
    paid: Sequence[Money],
    outside: Money,
    part_of_month: Fraction,
) -> list[Mend]:
    """What would bring a plan to its target, had it been so: another price, and a limit on what each user may cost.
    `part_of_month` is how much of a month the uses are of; users who were limited are taken to pay what they paid."""
    costs = Money.total(use.cost for use in uses) + outside
    revenue = Money.total(paid)
    if costs.nanousd <= allowance(revenue, plan.margin_target).nanousd:
        return []
    charged = Money.total(usage_charge(plan, use.requests, use.tokens) for use in uses)
    found = []
    price = smallest_price(costs, charged, len(uses) * part_of_month, plan.margin_target)
    if price is not None:
        found.append(
            Mend(
                f"a price of ${price.usd:.2f} a month",
                price,
                (f"[plans.{_key(name)}]", f"price_usd_per_month = {price.usd:.2f}"),
            )
        )
    allowed = allowance(revenue, plan.margin_target) - outside
    limit = largest_limit([use.cost for use in uses], allowed) if allowed.nanousd > 0 else None
    monthly = None if limit is None else Money(int(limit.nanousd / part_of_month // _CENT) * _CENT)
    if monthly is not None and monthly.nanousd > 0:
        over = {use.user for use in uses if limit is not None and use.cost > limit}
        lines = [
            f"[budgets.{_key(f'{name}-users'.replace('/', '-')[:100])}]",
            'per = "user"',
            f"tier = {_text(plan.tier or name)}",
            'every = "month"',
            f"limit_usd = {monthly.usd:.2f}",
        ]
        text = f"a limit of ${monthly.usd:.2f} a month on each user ({len(over):,} would have reached it)"
        found.append(Mend(text, monthly, tuple(lines)))
    return found


def feature_mends(feature: str, missing: Money, requests: int, allowed: Money, months: Fraction) -> list[Mend]:
    """What would bring a feature to its target: so much more for each request, and at most `allowed` for its models
    over these months."""
    found = []
    if requests:
        more = Money(-(-missing.nanousd // requests))
        text = f"{more.human()} more for each request"
        found.append(Mend(text, more, (f"# [features.{_key(feature)}]", f"# revenue_usd_per_request: {more} more")))
    limit = Money(int(allowed.nanousd / months // _CENT) * _CENT)
    if limit.nanousd > 0:
        lines = [
            f"[budgets.{_key(f'{feature}-models'.replace('/', '-')[:100])}]",
            'per = "feature"',
            f"only = {_text(feature)}",
            'every = "month"',
            f"limit_usd = {limit.usd:.2f}",
        ]
        found.append(Mend(f"a limit of ${limit.usd:.2f} a month on what its models cost", limit, tuple(lines)))
    return found


def _key(name: str) -> str:
    return name if name.replace("-", "").replace("_", "").isalnum() and name.isascii() else _text(name)


def _text(value: str) -> str:
    """A TOML string, which JSON's are."""
    return msgspec.json.encode(value).decode()
