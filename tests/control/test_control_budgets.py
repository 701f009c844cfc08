"""Budgets under any schedule: each hold closes once, and spent + held never passes a hard budget."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from millicent.control.budgets import drop_budget, follow_config, set_budget, standing
from millicent.control.config import BudgetConfig
from millicent.core.budgets import Budget, Every
from millicent.core.clock import NS_PER_HOUR, ManualClock, SystemClock, parse_time_ns
from millicent.core.errors import ConfigError, Conflict, NotFound, PaymentRequired
from millicent.core.money import Money
from millicent.core.receipts import Attempt, Line, Meter, Receipt, Role, Status
from millicent.core.request import Attribution
from millicent.core.usage import Provenance
from millicent.ledger.budgets import extend, put_budget, remove_budget
from millicent.ledger.config import LedgerConfig
from millicent.ledger.memory import MemoryLedger
from millicent.ledger.queries import LedgerQueries
from millicent.ledger.recovery import recover
from millicent.ledger.schema import migrate
from millicent.ledger.sqlite import SqliteLedger
from millicent.ledger.store import close_receipt, open_receipt

T0 = ManualClock().now_ns()
SOFT = Budget(name="soft", limit=Money(10), every=Every.ONCE, hard=False)
TOTAL = Budget(name="total", limit=Money(100), every=Every.ONCE)
TEAM = Budget(name="team", limit=Money(60), every=Every.HOUR, per="team")
RED = Budget(name="red", limit=Money(40), every=Every.ONCE, per="team", only="red")


def opened(number: int, hold: int | None, *, team: str | None = None, at_ns: int = T0) -> Receipt:
    attempt = Attempt(1, "fake", "here", "fake", Role.INFERENCE, at_ns)
    return Receipt(
        id=f"rcpt_{number}",
        created_at_ns=at_ns,
        model="fake",
        placement="here",
        backend="fake",
        dialect="test",
        stream=False,
        attribution=Attribution(team=team),
        attempts=(attempt,),
        hold=None if hold is None else Money(hold),
    )


def line(amount: int | None, at_ns: int) -> Line:
    return Line(
        attempt=1,
        role=Role.INFERENCE,
        meter=Meter.OUTPUT,
        quantity=Decimal(1),
        unit="token",
        unit_price_usd=None,
        amount=None if amount is None else Money(amount),
        provenance=Provenance.MEASURED,
        incurred_at_ns=at_ns,
        posted_at_ns=at_ns,
    )


def closed(receipt: Receipt, cost: int | None, at_ns: int | None = None) -> Receipt:
    at_ns = receipt.created_at_ns if at_ns is None else at_ns
    attempt = msgspec.structs.replace(receipt.attempts[0], ended_at_ns=at_ns, status=Status.SUCCEEDED)
    return msgspec.structs.replace(
        receipt, status=Status.SUCCEEDED, settled_at_ns=at_ns, attempts=(attempt,), lines=(line(cost, at_ns),)
    )


def connect(*budgets: Budget) -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.execute("PRAGMA foreign_keys = ON")
    migrate(connection, ManualClock())
    for budget in budgets:
        put_budget(connection, budget)
    return connection


def balances(connection: sqlite3.Connection, now_ns: int = T0) -> dict[tuple[str, str], tuple[int, int]]:
    return {
        (budget.name, each.subject): (each.spent.nanousd, each.held.nanousd)
        for budget, found in standing(connection, now_ns)
        for each in found
    }


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    made = connect(SOFT, TOTAL, TEAM, RED)
    yield made
    made.close()


def attempt_open(connection: sqlite3.Connection, receipt: Receipt, gateway: str = "a") -> bool:
    """As the writer does it: a refusal is undone whole."""
    connection.execute("SAVEPOINT operation")
    try:
        open_receipt(connection, receipt, gateway)
    except PaymentRequired:
        connection.execute("ROLLBACK TO operation")
        return False
    finally:
        connection.execute("RELEASE operation")
    return True


def test_a_budget_that_is_removed_while_a_request_runs_no_longer_bounds_it() -> None:
    connection = connect(TOTAL)
    receipt = opened(1, TOTAL.limit.nanousd)
    assert attempt_open(connection, receipt, "a")
    assert not extend(connection, receipt.id, TOTAL.limit + Money(1))
    assert remove_budget(connection, TOTAL.name)
    assert extend(connection, receipt.id, TOTAL.limit + Money(1))
    close_receipt(connection, closed(receipt, 7, T0), (), "a")
    connection.close()


class Spending(RuleBasedStateMachine):
    """Two gateways open, extend, close, crash and are recovered in any order; a model keeps the books beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.connection = connect(SOFT, TOTAL, TEAM, RED)
        self.count = 0
        self.now_ns = T0
        self.running: dict[str, tuple[Receipt, str, int]] = {}
        self.done: list[tuple[Receipt, int]] = []
        self.booked: dict[tuple[str, str, int], int] = {}
        self.overdrawn: set[tuple[str, str, int]] = set()

    def teardown(self) -> None:
        self.connection.close()

    @staticmethod
    def sums(receipt: Receipt) -> list[tuple[Budget, tuple[str, str, int]]]:
        found = []
        for budget in (SOFT, TOTAL, TEAM, RED):
            subject = budget.subject(receipt.attribution)
            if subject is not None:
                found.append((budget, (budget.name, subject, budget.every.period_ns(receipt.created_at_ns)[0])))
        return found

    def held(self, sums: tuple[str, str, int]) -> int:
        return sum(hold for receipt, _, hold in self.running.values() for _, one in self.sums(receipt) if one == sums)

    def room(self, receipt: Receipt, more: int) -> bool:
        return all(
            not budget.hard or self.booked.get(sums, 0) + self.held(sums) + more <= budget.limit.nanousd
            for budget, sums in self.sums(receipt)
        )

    def book(self, receipt: Receipt, cost: int) -> None:
        for _, sums in self.sums(receipt):
            self.booked[sums] = self.booked.get(sums, 0) + cost

    @rule(hold=st.integers(0, 50), team=st.sampled_from([None, "red", "blue"]), gateway=st.sampled_from("ab"))
    def open(self, hold: int, team: str | None, gateway: str) -> None:
        self.count += 1
        receipt = opened(self.count, hold, team=team, at_ns=self.now_ns)
        expected = self.room(receipt, hold)
        assert attempt_open(self.connection, receipt, gateway) is expected
        if expected:
            self.running[receipt.id] = (receipt, gateway, hold)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), more=st.integers(1, 40))
    def extend(self, data: st.DataObject, more: int) -> None:
        receipt, gateway, hold = self.running[data.draw(st.sampled_from(sorted(self.running)))]
        expected = self.room(receipt, more)
        assert extend(self.connection, receipt.id, Money(hold + more)) is expected
        if expected:
            self.running[receipt.id] = (receipt, gateway, hold + more)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), share=st.integers(0, 100), times=st.integers(1, 3), unpriced=st.booleans())
    def close(self, data: st.DataObject, share: int, times: int, unpriced: bool) -> None:
        receipt, gateway, hold = self.running.pop(data.draw(st.sampled_from(sorted(self.running))))
        cost = hold * share // 100
        final = closed(receipt, None if unpriced else cost, self.now_ns)
        for _ in range(times):
            close_receipt(self.connection, final, (), gateway)
        self.book(receipt, hold if unpriced else cost)
        self.done.append((receipt, self.count))

    @rule(gateway=st.sampled_from("ab"), times=st.integers(1, 2))
    def crash_and_recover(self, gateway: str, times: int) -> None:
        """Nothing says what these cost (no rate, no steps seen): each is booked at its hold."""
        for _ in range(times):
            recover(self.connection, gateway, self.now_ns)
        for receipt, owner, hold in list(self.running.values()):
            if owner == gateway:
                del self.running[receipt.id]
                self.book(receipt, hold)

    @precondition(lambda self: self.done)
    @rule(data=st.data(), amount=st.integers(-20, 50))
    def post_late(self, data: st.DataObject, amount: int) -> None:
        receipt, _ = data.draw(st.sampled_from(self.done))
        self.count += 1
        self.connection.execute(
            "INSERT INTO lines VALUES"
            " (?, ?, 1, 'adjustment', 'other', '1', 'each', NULL, ?, 'measured', 0, 0, 'actual', NULL, NULL)",
            (receipt.id, self.count, amount),
        )
        self.book(receipt, amount)
        self.overdrawn |= {sums for _, sums in self.sums(receipt)}

    @rule()
    def an_hour_passes(self) -> None:
        self.now_ns += NS_PER_HOUR

    @invariant()
    def the_books_agree(self) -> None:
        found = {
            (budget, subject, period_ns): (spent, held)
            for budget, subject, period_ns, spent, held in self.connection.execute("SELECT * FROM budget_periods")
        }
        keys = set(found) | set(self.booked)
        assert {key: found.get(key, (0, 0)) for key in keys} == {
            key: (self.booked.get(key, 0), self.held(key)) for key in keys
        }
        limits = {budget.name: budget.limit.nanousd for budget in (TOTAL, TEAM, RED)}
        for key, (spent, held) in found.items():
            if key[0] in limits and key not in self.overdrawn:
                assert spent + held <= limits[key[0]]


Spending.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_spent_and_held_never_pass_a_hard_budget_under_any_schedule = Spending.TestCase


@pytest.mark.parametrize("gateways", [1, 2])
def test_64_opens_at_once_take_what_there_is_and_no_more(tmp_path: Path, gateways: int) -> None:
    """Also where two gateways share the file."""

    async def scenario() -> None:
        ledgers = [
            SqliteLedger(tmp_path / "ledger.db", LedgerConfig(busy_timeout_ms=20_000), SystemClock(), f"gw{number}")
            for number in range(gateways)
        ]
        for ledger in ledgers:
            await ledger.start()
        await ledgers[0].write(lambda connection: put_budget(connection, TOTAL))
        results = await asyncio.gather(
            *(ledgers[number % gateways].open(opened(number, 9)) for number in range(64)), return_exceptions=True
        )
        assert [result for result in results if isinstance(result, bool)] == [True] * 11
        assert all(isinstance(result, bool | PaymentRequired) for result in results)
        for ledger in ledgers:
            await ledger.stop()

    asyncio.run(scenario())
    queries = LedgerQueries(tmp_path / "ledger.db")
    [(_, [balance])] = queries.ask(lambda connection: standing(connection, T0)) or []
    assert (balance.spent, balance.held) == (Money(0), Money(99))
    assert queries.count_open() == 11


def test_a_refusal_names_the_budget_what_is_left_and_when_it_renews(connection: sqlite3.Connection) -> None:
    assert attempt_open(connection, opened(1, 35, team="blue"))
    with pytest.raises(PaymentRequired) as caught:
        open_receipt(connection, opened(2, 30, team="blue"), "a")
    assert "Budget `team` of team `blue` has $0.000000025 left of $0.00000006" in caught.value.message
    assert "may cost up to $0.00000003" in caught.value.message
    assert "renews at 2026-01-01T01:00:00Z" in caught.value.message
    assert caught.value.retry_after_s == 3600
    assert (caught.value.status, caught.value.code) == (402, "budget_exceeded")


def test_a_refused_request_leaves_no_trace(connection: sqlite3.Connection) -> None:
    assert not attempt_open(connection, opened(1, 101))
    assert connection.execute("SELECT count(*) FROM receipts").fetchone() == (0,)
    assert connection.execute("SELECT count(*) FROM holds").fetchone() == (0,)
    assert all(spent == held == 0 for spent, held in balances(connection).values())


def test_a_hard_budget_refuses_what_nobody_can_bound(connection: sqlite3.Connection) -> None:
    with pytest.raises(PaymentRequired) as caught:
        open_receipt(connection, opened(1, None), "a")
    assert caught.value.code == "unpriced"


def test_a_soft_budget_takes_even_that() -> None:
    connection = connect(SOFT)
    assert open_receipt(connection, opened(1, None), "a") is False
    close_receipt(connection, closed(opened(1, None), 500), (), "a")
    assert balances(connection) == {("soft", ""): (500, 0)}
    connection.close()


def test_what_cost_more_than_its_hold_overdraws_and_the_next_is_refused(connection: sqlite3.Connection) -> None:
    assert attempt_open(connection, opened(1, 10))
    close_receipt(connection, closed(opened(1, 10), 150), (), "a")
    assert balances(connection)["total", ""] == (150, 0)
    assert not attempt_open(connection, opened(2, 0))


def test_what_was_spent_counts_where_the_request_began(connection: sqlite3.Connection) -> None:
    assert attempt_open(connection, opened(1, 50, team="blue"))
    later_ns = T0 + NS_PER_HOUR
    assert attempt_open(connection, opened(2, 50, team="blue", at_ns=later_ns))
    close_receipt(connection, closed(opened(1, 50, team="blue"), 40, later_ns), (), "a")
    assert balances(connection, T0)["team", "blue"] == (40, 0)
    assert balances(connection, later_ns)["team", "blue"] == (0, 50)


def test_unattributed_requests_share_one_sum_of_a_budget_per_team(connection: sqlite3.Connection) -> None:
    assert attempt_open(connection, opened(1, 40))
    assert not attempt_open(connection, opened(2, 21))
    assert attempt_open(connection, opened(3, 21, team="blue"))


def test_a_budget_of_a_tier_gives_each_of_its_users_the_limit_and_leaves_others_alone() -> None:
    connection = connect(Budget(name="pro", limit=Money(50), every=Every.ONCE, per="user", tier="pro"))

    def asked(number: int, user: str, tier: str | None, hold: int) -> bool:
        who = Attribution(user=user, tier=tier)
        return attempt_open(connection, msgspec.structs.replace(opened(number, hold), attribution=who))

    assert asked(1, "ada", "pro", 40)
    assert not asked(2, "ada", "pro", 20)
    assert asked(3, "bob", "pro", 20)
    assert asked(4, "eve", "free", 90)
    assert asked(5, "ada", None, 90)
    assert balances(connection) == {("pro", "ada"): (0, 40), ("pro", "bob"): (0, 20)}
    # Of another tier, it counts other requests.
    set_budget(connection, Budget(name="pro", limit=Money(50), every=Every.ONCE, per="user", tier="free"))
    assert balances(connection) == {}
    connection.close()


def test_opening_again_takes_nothing_more(connection: sqlite3.Connection) -> None:
    for _ in range(3):
        assert open_receipt(connection, opened(1, 30), "a") is True
    assert balances(connection)["total", ""] == (0, 30)


def test_a_receipt_written_whole_is_booked_although_the_budget_is_empty(connection: sqlite3.Connection) -> None:
    close_receipt(connection, closed(opened(1, None), 170), (), "a")
    assert balances(connection)["total", ""] == (170, 0)


def test_a_new_limit_keeps_what_was_spent_and_a_new_scope_does_not(connection: sqlite3.Connection) -> None:
    assert attempt_open(connection, opened(1, 30))
    set_budget(connection, msgspec.structs.replace(TOTAL, limit=Money(20)))
    assert balances(connection)["total", ""] == (0, 30)
    assert not attempt_open(connection, opened(2, 1))
    set_budget(connection, msgspec.structs.replace(TOTAL, every=Every.DAY))
    assert ("total", "") not in balances(connection)
    close_receipt(connection, closed(opened(1, 30), 5), (), "a")  # its hold went with the old budget


def test_budgets_of_the_configuration_follow_it(connection: sqlite3.Connection) -> None:
    follow_config(connection, {"monthly": BudgetConfig(limit_usd=Decimal(5))})
    with pytest.raises(Conflict, match=r"millicent\.toml"):
        drop_budget(connection, "monthly")
    follow_config(connection, {})
    assert [budget.name for budget, _ in standing(connection, T0)] == ["red", "soft", "team", "total"]
    drop_budget(connection, "red")
    with pytest.raises(NotFound):
        drop_budget(connection, "red")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"limit_usd": Decimal(-1)}, "limit_usd"),
        ({"limit_usd": Decimal("nan")}, "limit_usd"),
        ({"only": "x"}, "per"),
        ({"per": "user", "only": ""}, "only"),
        ({"tier": "pro"}, "tier"),
        ({"per": "tier", "tier": "pro"}, "tier"),
        ({"per": "user", "tier": ""}, "tier"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused_by_field(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        BudgetConfig(**({"limit_usd": Decimal(1)} | changes)).budget("x")


@pytest.mark.parametrize(
    ("every", "start", "end"),
    [
        (Every.HOUR, "2026-03-01T10:00:00", "2026-03-01T11:00:00"),
        (Every.DAY, "2026-03-01T00:00:00", "2026-03-02T00:00:00"),
        (Every.WEEK, "2026-02-23T00:00:00", "2026-03-02T00:00:00"),
        (Every.MONTH, "2026-03-01T00:00:00", "2026-04-01T00:00:00"),
    ],
)
def test_periods_are_those_of_the_utc_calendar(every: Every, start: str, end: str) -> None:
    at_ns = parse_time_ns("2026-03-01T10:59:59.999999")
    assert every.period_ns(at_ns) == (parse_time_ns(start), parse_time_ns(end))
    assert every.period_ns(parse_time_ns(end))[0] == parse_time_ns(end)


def test_every_month_is_followed_by_the_next() -> None:
    at_ns = parse_time_ns("2024-01-01")
    for month in range(1, 37):
        start_ns, end_ns = Every.MONTH.period_ns(at_ns)
        assert end_ns is not None
        assert datetime.fromtimestamp(start_ns / 1e9, UTC).month == (month - 1) % 12 + 1
        at_ns = end_ns


def test_a_damaged_sum_is_found_by_verify() -> None:
    async def scenario() -> list[str]:
        ledger = MemoryLedger()
        await ledger.write(lambda connection: put_budget(connection, TOTAL))
        await ledger.open(opened(1, 30))
        assert ledger.queries.verify() == []
        await ledger.write(lambda connection: connection.execute("UPDATE budget_periods SET held_nanousd = 7"))
        return ledger.queries.verify()

    [problem] = asyncio.run(scenario())
    assert problem.startswith("budget total of '' from 0 has 0 spent and 7 held, and its holds make 0 and 30")
