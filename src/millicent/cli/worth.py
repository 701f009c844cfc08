"""The parts of `report` that say what was got for the money."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any

from millicent.cli import show
from millicent.core.clock import NS_PER_MS
from millicent.core.money import ZERO, Money, exact_usd

if TYPE_CHECKING:
    from millicent.ledger.queries import LedgerQueries, ReceiptFilter, Totals
    from millicent.ledger.worth import RoleCosts, Usefulness
    from millicent.pipeline.features import FeatureConfig


def roles_body(costs: RoleCosts | None) -> dict[str, Any]:
    by_role = {} if costs is None else {role.value: str(amount) for role, amount in costs.costs.items()}
    return {"roles_usd": by_role}


def useful_body(found: Usefulness | None) -> dict[str, Any]:
    """Null where nothing was rated, which is not zero."""
    if found is None or found.rate is None or found.rate_interval is None:
        return {"rated": 0, "useful": None}
    return {
        "rated": found.rated,
        "useful": {
            "outputs": found.useful,
            "rate": round(found.rate, 6),
            "rate_interval": [round(end, 6) for end in found.rate_interval],
            "coverage": round(found.coverage, 6),
            "cost_per_useful_usd": exact_usd(found.cost_per_useful),
            "cost_per_useful_interval_usd": [exact_usd(end) for end in found.cost_per_useful_interval],
        },
    }


def roles_table(by: str, groups: list[RoleCosts]) -> str:
    roles = sorted({role for each in groups for role in each.costs})
    header = (by.upper(), *(role.upper() for role in roles), "PREDICTIVITY", "UNPRICED LINES")
    rows = [
        (
            each.group if each.group is not None else "unattributed",
            *(each.costs.get(role, ZERO).human() for role in roles),
            each.total.human(),
            f"{each.unpriced:,}",
        )
        for each in groups
    ]
    return show.table(header, rows, right=frozenset(header[1:]))


def useful_table(by: str, groups: list[Usefulness]) -> str:
    """95% intervals."""
    header = (by.upper(), "RATED", "COVERAGE", "USEFUL", "COST PER USEFUL", "FROM", "TO")
    rows = []
    for each in groups:
        low, high = each.cost_per_useful_interval
        ends = (each.cost_per_useful, low, high)
        rows.append(
            (
                each.group if each.group is not None else "unattributed",
                f"{each.rated:,}",
                show.percent(each.coverage),
                show.percent(each.rate),
                *("no bound" if end is None and each.priced else show.amount(end) for end in ends),
            )
        )
    return show.table(header, rows, right=frozenset(header[1:]))


def aims_of(ledger: LedgerQueries, where: ReceiptFilter, totals: list[Totals]) -> dict[str | None, Aim]:
    """The features of the configuration that say whose they are or what they aim at, with how they do."""
    from millicent.cli.home import settings

    features = settings().features
    aimed = [name for name, feature in features.items() if feature.latency_target_ms is not None]
    quick = ledger.in_time(aimed, where) if aimed else {}
    by_name = {each.group: each for each in totals}
    return {
        name: Aim(feature, by_name.get(name), *quick.get(name, (0, 0)))
        for name, feature in features.items()
        if feature.owner or feature.cost_target_usd is not None or feature.latency_target_ms is not None
    }


class Aim:
    """What a feature should cost and take, and what it does. None where nothing was priced, or had a target."""

    def __init__(self, feature: FeatureConfig, totals: Totals | None, aimed: int, in_time: int) -> None:
        self.feature = feature
        priced = 0 if totals is None else totals.requests - totals.unpriced
        self.mean_cost = None if totals is None or not priced else Money(round(Decimal(totals.cost.nanousd) / priced))
        self.in_time = Decimal(in_time) / aimed if aimed else None

    def body(self) -> dict[str, Any]:
        target = self.feature.cost_target_usd
        return {
            "owner": self.feature.owner,
            "targets": {
                "cost_usd": None if target is None else format(target, "f"),
                "mean_cost_usd": exact_usd(self.mean_cost),
                "latency_ms": self.feature.latency_target_ms,
                "in_time": None if self.in_time is None else round(self.in_time, 6),
            },
        }


def aims_table(aims: dict[str | None, Aim]) -> str:
    header = ("FEATURE", "OWNER", "COST TARGET", "MEAN COST", "LATENCY TARGET", "IN TIME")
    rows = []
    for name, aim in aims.items():
        usd, latency_ms = aim.feature.cost_target_usd, aim.feature.latency_target_ms
        rows.append(
            (
                show.printable(name or ""),
                show.printable(aim.feature.owner or "-"),
                show.amount(None if usd is None else Money.from_usd(usd), "-"),
                show.amount(aim.mean_cost, "-"),
                "-" if latency_ms is None else show.duration(latency_ms * NS_PER_MS),
                show.percent(aim.in_time),
            )
        )
    return show.table(header, rows, right=frozenset(header[2:]))
