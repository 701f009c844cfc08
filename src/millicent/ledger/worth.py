"""What was got for the money: useful outputs and what one costs, and the cost of predictivity, role by role."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from decimal import Decimal
from fractions import Fraction

import msgspec

from millicent.core.money import Money
from millicent.core.receipts import Role
from millicent.ledger.rollups import ROLE_MEASURES, verdict_sql

# What the figures below are made of, as sums of closed receipts.
USEFULNESS = ("requests", "priced", "cost_nanousd", "rated", "useful")
ROLE_COSTS = ("requests", "priced", "unpriced_lines", *ROLE_MEASURES.values())

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


def usefulness_of(group: str | None, figures: Sequence[int]) -> Usefulness:
    """From the sums of `USEFULNESS`."""
    requests, priced, nanousd, rated, useful = figures
    return Usefulness(group, requests, priced, Money(nanousd), rated, useful)


def in_time(
    connection: sqlite3.Connection, features: Iterable[str], where: str, values: Sequence[object]
) -> dict[str, tuple[int, int]]:
    """For each of these features: how many of its answers had a latency target, and how many met it."""
    chosen = f"status IS NOT NULL AND feature = ? AND policy IS NOT NULL AND {where}"
    met = "json_extract(policy, '$.latency_target_met')"
    sql = f"SELECT count({met}), coalesce(sum({met} = 'true'), 0) FROM receipts AS r WHERE {chosen}"  # noqa: S608 - our own text
    found = {}
    for feature in features:
        aimed, quick = connection.execute(sql, (feature, *values)).fetchone()
        found[feature] = (aimed, quick)
    return found


def role_costs_of(group: str | None, figures: Sequence[int]) -> RoleCosts | None:
    """From the sums of `ROLE_COSTS`; None where no receipt has a line. Roles that cost nothing are left out."""
    _, priced, unpriced_lines, *costs = figures
    if not priced and not unpriced_lines:
        return None
    found = {role: Money(nanousd) for role, nanousd in zip(ROLE_MEASURES, costs, strict=True) if nanousd}
    return RoleCosts(group, found, unpriced_lines)


def verdicts(connection: sqlite3.Connection, receipt_ids: Sequence[str]) -> dict[str, bool | None]:
    """Whether each is useful, as of now."""
    wanted = (msgspec.json.encode(receipt_ids).decode(),)
    sql = f"SELECT id, {verdict_sql()} FROM receipts AS r WHERE id IN (SELECT value FROM json_each(?))"  # noqa: S608 - our own text
    return {
        receipt_id: None if verdict is None else bool(verdict)
        for receipt_id, verdict in connection.execute(sql, wanted)
    }
