"""The parts of `report` that say what was got for the money."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from millicent.cli import show

if TYPE_CHECKING:
    from decimal import Decimal

    from millicent.core.money import Money
    from millicent.ledger.worth import RoleCosts, Usefulness


def roles_body(costs: RoleCosts | None) -> dict[str, Any]:
    by_role = {} if costs is None else {role.value: str(amount) for role, amount in costs.costs.items()}
    return {"roles_usd": by_role}


def useful_body(found: Usefulness | None) -> dict[str, Any]:
    """Null where nothing was rated, which is not zero."""
    if found is None or found.rate is None or found.rate_interval is None:
        return {"rated": 0, "useful": None}
    low, high = found.cost_per_useful_interval
    return {
        "rated": found.rated,
        "useful": {
            "outputs": found.useful,
            "rate": round(found.rate, 6),
            "rate_interval": [round(end, 6) for end in found.rate_interval],
            "coverage": round(found.coverage, 6),
            "cost_per_useful_usd": _usd(found.cost_per_useful),
            "cost_per_useful_interval_usd": [_usd(low), _usd(high)],
        },
    }


def roles_table(by: str, groups: list[RoleCosts]) -> str:
    from millicent.core.money import ZERO

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
                _percent(each.coverage),
                "-" if each.rate is None else _percent(each.rate),
                *("no bound" if end is None and each.priced else show.amount(end) for end in ends),
            )
        )
    return show.table(header, rows, right=frozenset(header[1:]))


def _percent(part: Decimal) -> str:
    return f"{part * 100:.1f}%"


def _usd(amount: Money | None) -> str | None:
    return None if amount is None else str(amount)
