"""What was got for the money: useful outputs and what one costs, and the cost of predictivity, role by role."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction

import msgspec

from millicent.core.money import Money
from millicent.core.receipts import Role
from millicent.ledger.reading import select

# The latest verdict by feedback beats the one on the output.
VERDICT = """coalesce((SELECT f.useful FROM feedback AS f WHERE f.receipt = r.id AND f.useful IS NOT NULL
    ORDER BY f.posted_at_ns DESC, f.ordinal DESC LIMIT 1), r.useful)"""

_USEFULNESS = """
    WITH judged AS (
        SELECT r.*, {verdict} AS verdict,
            (SELECT CASE WHEN count(*) = count(amount_nanousd) THEN sum(amount_nanousd) END FROM lines AS l
                WHERE l.receipt = r.id AND l.book = 'actual') AS total_nanousd
        FROM receipts AS r WHERE status IS NOT NULL AND {where}
    )
    SELECT {group} AS grouped, count(*) AS requests, count(total_nanousd) AS priced,
        coalesce(sum(total_nanousd), 0) AS cost_nanousd, count(verdict) AS rated, coalesce(sum(verdict), 0) AS useful
    FROM judged GROUP BY grouped ORDER BY grouped
"""

_ROLES = """
    SELECT {group} AS grouped, role, coalesce(sum(amount_nanousd), 0) AS cost_nanousd,
        count(*) - count(amount_nanousd) AS unpriced
    FROM receipts AS r JOIN lines AS l ON l.receipt = r.id AND l.book = 'actual'
    WHERE status IS NOT NULL AND {where} GROUP BY grouped, role ORDER BY grouped
"""

_Z = Decimal("1.959963984540054")  # 95% of a normal distribution


class Usefulness(msgspec.Struct, frozen=True):
    """One group's closed receipts. `cost` is of the `priced` ones; `rated` have a verdict, `useful` a good one.

    Whether those who rate are like those who don't, nobody knows: hence `coverage` beside every figure.
    """

    group: str | None
    requests: int
    priced: int
    cost: Money
    rated: int
    useful: int

    @property
    def coverage(self) -> Decimal:
        """The rated part of all requests."""
        return Decimal(self.rated) / self.requests

    @property
    def rate(self) -> Decimal | None:
        """The useful part of those rated; None when nothing was."""
        return Decimal(self.useful) / self.rated if self.rated else None

    @property
    def rate_interval(self) -> tuple[Decimal, Decimal] | None:
        return wilson(self.useful, self.rated) if self.rated else None

    @property
    def cost_per_useful(self) -> Money | None:
        """Mean cost / useful rate among rated. None when nothing was rated or priced, or nothing was useful."""
        return self._per(Fraction(self.useful, self.rated)) if self.rated else None

    @property
    def cost_per_useful_interval(self) -> tuple[Money | None, Money | None]:
        """From the rate's interval; an upper end of None has no bound, or nothing is known."""
        if self.rate_interval is None:
            return None, None
        low, high = self.rate_interval
        return self._per(Fraction(high)), self._per(Fraction(low))

    def _per(self, rate: Fraction) -> Money | None:
        if not self.priced or rate <= 0:
            return None
        return Money(round(Fraction(self.cost.nanousd, self.priced) / rate))


class RoleCosts(msgspec.Struct, frozen=True):
    """One group's cost of predictivity: what it took to answer, by what it was for. `unpriced` counts lines."""

    group: str | None
    costs: dict[Role, Money]
    unpriced: int

    @property
    def total(self) -> Money:
        return Money.total(self.costs.values())


def wilson(successes: int, trials: int) -> tuple[Decimal, Decimal]:
    """Wilson's score interval of a proportion, 95% (Wilson 1927)."""
    n, z2 = Decimal(trials), _Z * _Z
    p = successes / n
    centre = p + z2 / (2 * n)
    half = _Z * (p * (1 - p) / n + z2 / (4 * n * n)).sqrt()
    low, high = ((centre + side) / (1 + z2 / n) for side in (-half, half))
    # At the ends rounding would leave a last digit.
    return (Decimal(0) if successes == 0 else low), (Decimal(1) if successes == trials else high)


def usefulness(connection: sqlite3.Connection, group: str, where: str, values: Sequence[object]) -> list[Usefulness]:
    """`group` and `where` are SQL of ours."""
    found = select(connection, _USEFULNESS.format(verdict=VERDICT, group=group, where=where), values)
    return [
        Usefulness(
            row["grouped"], row["requests"], row["priced"], Money(row["cost_nanousd"]), row["rated"], row["useful"]
        )
        for row in found
    ]


def in_time(
    connection: sqlite3.Connection, within_ns: Mapping[str, int], where: str, values: Sequence[object]
) -> dict[str, tuple[int, int]]:
    """For each of these features: how many of its closed receipts were answered, and how many of those in so long."""
    chosen = f"status = 'succeeded' AND feature = ? AND {where}"
    sql = f"SELECT count(total_ns), coalesce(sum(total_ns <= ?), 0) FROM receipts AS r WHERE {chosen}"  # noqa: S608 - our own text
    found = {}
    for feature, most_ns in within_ns.items():
        answered, quick = connection.execute(sql, (most_ns, feature, *values)).fetchone()
        found[feature] = (answered, quick)
    return found


def role_costs(connection: sqlite3.Connection, group: str, where: str, values: Sequence[object]) -> list[RoleCosts]:
    costs: dict[str | None, dict[Role, Money]] = {}
    unpriced: dict[str | None, int] = {}
    for row in select(connection, _ROLES.format(group=group, where=where), values):
        costs.setdefault(row["grouped"], {})[Role(row["role"])] = Money(row["cost_nanousd"])
        unpriced[row["grouped"]] = unpriced.get(row["grouped"], 0) + row["unpriced"]
    return [RoleCosts(name, costs[name], unpriced[name]) for name in costs]


def verdicts(connection: sqlite3.Connection, receipt_ids: Sequence[str]) -> dict[str, bool | None]:
    """Whether each is useful, as of now."""
    wanted = (msgspec.json.encode(receipt_ids).decode(),)
    sql = f"SELECT id, {VERDICT} FROM receipts AS r WHERE id IN (SELECT value FROM json_each(?))"  # noqa: S608 - our own text
    return {
        receipt_id: None if verdict is None else bool(verdict)
        for receipt_id, verdict in connection.execute(sql, wanted)
    }
