"""Budgets inside the ledger's transactions: a hold is taken in the commit that opens the receipt, and settled in the
one that closes it. Several gateways may share the ledger: what may be spent is decided here and nowhere else.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator

from millicent.core.budgets import PERS, Balance, Budget, Every
from millicent.core.clock import NS_PER_S, iso_utc
from millicent.core.errors import PaymentRequired
from millicent.core.money import ZERO, Money
from millicent.core.receipts import Receipt
from millicent.core.request import Attribution

_COLUMNS = "name, limit_nanousd, every, per, only_value, tier, hard, source"

# A hard budget gives only what it has: the insert finds no row where the hold would go beyond its limit.
_TAKE = """
    INSERT INTO holds (receipt, budget, subject, period_ns, held_nanousd)
    SELECT :receipt, b.name, :subject, :period_ns, :hold
    FROM budgets AS b LEFT JOIN budget_periods AS p
        ON p.budget = b.name AND p.subject = :subject AND p.period_ns = :period_ns
    WHERE b.name = :budget AND (
        NOT b.hard OR NOT :enforce OR coalesce(p.spent_nanousd + p.held_nanousd, 0) + :hold <= b.limit_nanousd)
"""

# The hard budgets of a receipt that lack what its hold is to grow by.
_LACKING = """
    SELECT 1 FROM holds AS h JOIN budgets AS b ON b.name = h.budget JOIN budget_periods AS p
        USING (budget, subject, period_ns)
    WHERE h.receipt = :receipt AND NOT h.settled AND h.held_nanousd < :hold AND b.hard
        AND p.spent_nanousd + p.held_nanousd + :hold - h.held_nanousd > b.limit_nanousd
"""
_EXTEND = "UPDATE holds SET held_nanousd = :hold WHERE receipt = :receipt AND NOT settled AND held_nanousd < :hold"


def reserve(connection: sqlite3.Connection, receipt: Receipt, *, enforce: bool = True) -> None:
    """Take the receipt's hold from every budget that applies.

    Raises PaymentRequired, naming the budget. `enforce` False books what was already spent.
    """
    hold = receipt.hold or ZERO
    for budget in _applying(connection, receipt.attribution):
        subject = budget.subject(receipt.attribution)
        if subject is None:
            continue
        period_ns, end_ns = budget.every.period_ns(receipt.created_at_ns)
        if budget.hard and receipt.hold is None and enforce:
            raise PaymentRequired(
                f"Budget `{budget.name}` is hard, and nobody can say what this request costs at most: set a price for "
                "the model's placement, or make the budget soft.",
                code="unpriced",
            )
        taken = connection.execute(
            _TAKE,
            {
                "receipt": receipt.id,
                "budget": budget.name,
                "subject": subject,
                "period_ns": period_ns,
                "hold": hold.nanousd,
                "enforce": enforce,
            },
        )
        if taken.rowcount == 0:
            raise _refusal(connection, budget, subject, period_ns, end_ns, hold, receipt.created_at_ns)


def is_bounded(connection: sqlite3.Connection, receipt_id: str) -> bool:
    """Whether a hard budget says how much this receipt may cost."""
    found = connection.execute(
        "SELECT 1 FROM holds JOIN budgets ON name = budget WHERE receipt = ? AND NOT settled AND hard", (receipt_id,)
    )
    return found.fetchone() is not None


def extend(connection: sqlite3.Connection, receipt_id: str, hold: Money) -> bool:
    """Raise what a running receipt holds to `hold`, in all its budgets at once; False, and nothing changed, where one
    lacks the money. One that was removed meanwhile lacks nothing."""
    wanted = {"receipt": receipt_id, "hold": hold.nanousd}
    if connection.execute(_LACKING, wanted).fetchone() is not None:
        return False
    connection.execute(_EXTEND, wanted)
    connection.execute(
        "UPDATE receipts SET hold_nanousd = ? WHERE id = ? AND status IS NULL", (hold.nanousd, receipt_id)
    )
    return True


def grow(connection: sqlite3.Connection, receipt: Receipt) -> bool:
    """Raise what a running receipt holds to its `hold`, for one more attempt; it never sinks. False where a hard budget
    lacks the money, or nobody can say what the attempt costs at most."""
    if receipt.hold is None:
        return not is_bounded(connection, receipt.id)
    return extend(connection, receipt.id, receipt.hold)


def any_budget(connection: sqlite3.Connection) -> bool:
    """Whether there is one: without, nothing is held and nothing has to be settled."""
    return connection.execute("SELECT 1 FROM budgets LIMIT 1").fetchone() is not None


def settle(connection: sqlite3.Connection, receipts: Iterable[Receipt]) -> None:
    """Release the receipts' holds and book what they cost; what nobody can price is booked at the hold, once."""
    connection.executemany(
        "UPDATE holds SET spent_nanousd = coalesce(?, held_nanousd), held_nanousd = 0, settled = 1"
        " WHERE receipt = ? AND NOT settled",
        [(None if receipt.total is None else receipt.total.nanousd, receipt.id) for receipt in receipts],
    )


def put_budget(connection: sqlite3.Connection, budget: Budget) -> None:
    """Add it, or change it. What was counted stays when its limit changes; one that applies to something else, or
    renews otherwise, starts from nothing."""
    connection.execute(
        "DELETE FROM budgets WHERE name = ? AND (every, per, only_value, tier) IS NOT (?, ?, ?, ?)",
        (budget.name, budget.every, budget.per, budget.only, budget.tier),
    )
    row = (
        budget.name,
        budget.limit.nanousd,
        budget.every,
        budget.per,
        budget.only,
        budget.tier,
        budget.hard,
        budget.source,
    )
    connection.execute(
        f"INSERT INTO budgets ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET"  # noqa: S608 - our own names
        " limit_nanousd = excluded.limit_nanousd, hard = excluded.hard, source = excluded.source",
        row,
    )


def remove_budget(connection: sqlite3.Connection, name: str) -> bool:
    """Forget it, with what was counted in it; receipts stay. False where there is none."""
    return connection.execute("DELETE FROM budgets WHERE name = ?", (name,)).rowcount > 0


def read_budgets(connection: sqlite3.Connection) -> list[Budget]:
    return [_budget(row) for row in connection.execute(f"SELECT {_COLUMNS} FROM budgets ORDER BY name")]  # noqa: S608 - our own names


def read_balances(connection: sqlite3.Connection, budget: Budget, at_ns: int) -> list[Balance]:
    """Every subject's standing in the period of `at_ns`, the dearest first; at most 1000."""
    period_ns, _ = budget.every.period_ns(at_ns)
    found = connection.execute(
        "SELECT subject, period_ns, spent_nanousd, held_nanousd FROM budget_periods"
        " WHERE budget = ? AND period_ns = ? ORDER BY spent_nanousd + held_nanousd DESC, subject LIMIT 1000",
        (budget.name, period_ns),
    )
    return [Balance(subject, start_ns, Money(spent), Money(held)) for subject, start_ns, spent, held in found]


def _applying(connection: sqlite3.Connection, attribution: Attribution) -> Iterator[Budget]:
    """Those without `only`, and those whose `only` is the request's value: found by index, however many there are."""
    values = [(per, getattr(attribution, per)) for per in PERS]
    named = [pair for pair in values if pair[1] is not None]
    either = " UNION ALL ".join(
        [
            f"SELECT {_COLUMNS} FROM budgets WHERE only_value IS NULL",  # noqa: S608 - our own names
            *[f"SELECT {_COLUMNS} FROM budgets WHERE per = ? AND only_value = ?"] * len(named),  # noqa: S608
        ]
    )
    for row in connection.execute(either, [part for pair in named for part in pair]).fetchall():
        yield _budget(row)


def _budget(row: tuple[str, int, str, str | None, str | None, str | None, int, str]) -> Budget:
    name, limit_nanousd, every, per, only, tier, hard, source = row
    return Budget(
        name=name,
        limit=Money(limit_nanousd),
        every=Every(every),
        per=per,  # type: ignore[arg-type] # the table checks it
        only=only,
        tier=tier,
        hard=bool(hard),
        source=source,
    )


def _refusal(
    connection: sqlite3.Connection,
    budget: Budget,
    subject: str,
    period_ns: int,
    end_ns: int | None,
    hold: Money,
    now_ns: int,
) -> PaymentRequired:
    found = connection.execute(
        "SELECT spent_nanousd + held_nanousd FROM budget_periods WHERE budget = ? AND subject = ? AND period_ns = ?",
        (budget.name, subject, period_ns),
    ).fetchone()
    left = budget.limit - Money(found[0] if found else 0)
    whose = f" of {budget.per} `{subject or 'unattributed'}`" if budget.per else ""
    renews = "it doesn't renew" if end_ns is None else f"it renews at {iso_utc(end_ns)[:19]}Z"
    return PaymentRequired(
        f"Budget `{budget.name}`{whose} has ${left} left of ${budget.limit} (holds of running requests counted), and "
        f"this request may cost up to ${hold}: ask for less output, or raise the budget; {renews}.",
        retry_after_s=None if end_ns is None else -(-(end_ns - now_ns) // NS_PER_S),
    )
