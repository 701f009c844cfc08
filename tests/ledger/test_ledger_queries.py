"""Questions to the file itself: before it exists, from many threads, and about its soundness."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from millicent.core.accounts import Checkpoint
from millicent.core.clock import NS_PER_HOUR, ManualClock
from millicent.core.errors import InvalidRequest, LedgerUnavailable
from millicent.core.receipts import HourShare, Receipt
from millicent.ledger.config import LedgerConfig
from millicent.ledger.queries import LedgerQueries, ReceiptFilter, ReceiptPage
from millicent.ledger.rollups import MEASURES, fold, sums_sql
from millicent.ledger.sqlite import SqliteLedger

Make = Callable[..., Receipt]
T0 = ManualClock().now_ns()


def fill(path: Path, *receipts: tuple[Receipt, tuple[HourShare, ...]]) -> None:
    async def scenario() -> None:
        ledger = SqliteLedger(path, LedgerConfig(), ManualClock(), "gw_1")
        await ledger.start()
        for receipt, shares in receipts:
            await ledger.close(receipt, shares)
        await ledger.checkpoint(Checkpoint(T0, (), ()))
        await ledger.stop()

    asyncio.run(scenario())


@pytest.mark.parametrize("empty_file", [False, True])
def test_a_ledger_that_does_not_exist_yet_answers_as_an_empty_one(tmp_path: Path, empty_file: bool) -> None:
    path = tmp_path / "ledger.db"
    if empty_file:
        path.touch()
    queries = LedgerQueries(path)
    assert queries.receipt("rcpt_1") is None
    assert queries.receipts(ReceiptFilter()) == ReceiptPage((), None)
    assert queries.totals("day", ReceiptFilter()) == []
    assert queries.accounts(0, 2**62) == []
    assert (queries.count_open(), queries.verify()) == (0, [])
    assert path.exists() == empty_file


def test_questions_can_come_from_many_threads(
    tmp_path: Path, opened: Make, closed: Make, shares: tuple[HourShare, ...]
) -> None:
    path = tmp_path / "ledger.db"
    fill(path, *((closed(opened(number)), shares) for number in range(20)))
    queries = LedgerQueries(path)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: queries.receipt(f"rcpt_{number:04d}"), list(range(20)) * 5))
    assert all(receipt == closed(opened(number % 20)) for number, receipt in enumerate(found))


def test_times_beyond_what_can_be_stored_are_only_far_away(tmp_path: Path, opened: Make, closed: Make) -> None:
    path = tmp_path / "ledger.db"
    fill(path, (closed(opened(1)), (HourShare(1, "sess_1", T0, 700),)))
    queries = LedgerQueries(path)
    assert len(queries.receipts(ReceiptFilter(from_ns=-(2**70), to_ns=2**70)).receipts) == 1
    assert queries.accounts(-(2**70), 2**70) == []


def test_questions_write_nothing(tmp_path: Path, opened: Make, closed: Make, shares: tuple[HourShare, ...]) -> None:
    path = tmp_path / "ledger.db"
    fill(path, (closed(opened(1)), shares))
    with LedgerQueries(path)._snapshot() as connection:
        assert connection is not None
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            connection.execute("UPDATE device_hours SET wall_ns = 0")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ("UPDATE device_hours SET serving_ns = 701", "700 ns by receipt and 701 ns in the account"),
        ("DELETE FROM device_sessions", "was never written: checkpoint before the first request"),
        ("UPDATE device_hours SET lost_ns = 9301", "accounts for 1 ns more than there are"),
        ("UPDATE device_sessions SET seen_at_ns = seen_at_ns + 5", "its hours hold 10000 ns"),
        ("UPDATE receipts SET serving_ns = 5", "shows 5 ns of device time and its entries 700 ns"),
        ("UPDATE attempts SET ended_at_ns = NULL", "is closed and its attempt 1 isn't"),
        ("UPDATE receipts SET status = 'interrupted', hold_nanousd = 3", "more than its hold of 3"),
        ("UPDATE receipts SET status = NULL, settled_at_ns = NULL", "gateway gw_1 is gone"),
        ("UPDATE receipts SET status = NULL, settled_at_ns = NULL", "is open and has a line already"),
        ("DELETE FROM receipts", "belongs to no row of receipts"),
        ("UPDATE lines SET amount_nanousd = 9", "the rollup by status of 2026-01-01T00:00:00.000000Z isn't the sum"),
        ("DELETE FROM rollup_groups WHERE cube = 'user'", "the rollup by user, status of 2026-01-01T00:00:00.000000Z"),
        ("UPDATE lines SET quantity = '7'", "has a line of 7 at $"),
        ("UPDATE lines SET unit_price_usd = '7'", "at $7 each for "),
        ("UPDATE receipts SET usage = '{}'", "tokens in and "),
        ("UPDATE receipts SET list_nanousd = 3, saved = '{}'", "was listed at 3 nano-dollars and saved 0"),
        ("INSERT INTO maintenance VALUES ('purge')", "a permit to change what is settled was left behind (purge)"),
        ("DELETE FROM tallies WHERE span_s = 3600", "the tally of 3600 s from 2026-01-01T00:00:00.000000Z isn't"),
        (
            "INSERT INTO unrolled SELECT id, NULL, NULL FROM receipts",
            "the rollup by status of 2026-01-01T00:00:00.0000",
        ),
        (
            "UPDATE rollups SET rated = 1 WHERE span_s = 2764800",
            "the rollup by user, status of 32 days from 2025-12-26T00:00:00.000000Z isn't the sum of its parts",
        ),
    ],
)
def test_the_doctor_finds_what_does_not_add_up(
    tmp_path: Path, opened: Make, closed: Make, shares: tuple[HourShare, ...], damage: str, problem: str
) -> None:
    path = tmp_path / "ledger.db"
    fill(path, (closed(opened(1)), shares))
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(
        "INSERT INTO device_sessions VALUES ('sess_1', 'gw_1', 'cpu:0', 'cpu', 1, '0.10', 'assumed', ?, ?, 0, 1)",
        (T0, T0 + 10_000),
    )
    connection.execute("UPDATE device_hours SET wall_ns = 10000")
    fold(connection)
    queries = LedgerQueries(path)
    assert queries.verify() == []
    for (trigger,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
        connection.execute(f"DROP TRIGGER {trigger}")
    connection.execute(damage)
    connection.close()
    assert any(problem in line for line in queries.verify()), queries.verify()


def test_the_doctor_finds_sums_that_are_wrong_before_they_reach_a_cube(
    tmp_path: Path, opened: Make, closed: Make
) -> None:
    path = tmp_path / "ledger.db"
    fill(path, (closed(opened(1)), ()))
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        assert connection.execute("UPDATE rollups_pending SET rated = 7").rowcount == 1
    assert any("the rollup by status of 2026-01-01" in line for line in LedgerQueries(path).verify())


def test_devices_whose_rate_changed_within_an_hour_have_an_account_for_each(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    fill(path)
    connection = sqlite3.connect(path, isolation_level=None)
    for session, rate, hour_ns in [
        ("a", "0.10", T0),
        ("b", "0.20", T0),
        ("c", "0.20", T0),
        ("d", "0.20", T0 - NS_PER_HOUR),
    ]:
        connection.execute(
            "INSERT INTO device_sessions VALUES (?, 'gw_1', 'cpu:0', 'cpu', 1, ?, 'measured', 0, 0, 0, 1)",
            (session, rate),
        )
        connection.execute(
            "INSERT INTO device_hours (session, hour_ns, wall_ns) VALUES (?, ?, 3600000)", (session, hour_ns)
        )
    connection.close()
    accounts = LedgerQueries(path).accounts(T0 - 1, T0 + 1)
    assert [(account.hour_ns - T0, str(account.usd_per_hour), account.wall_ns) for account in accounts] == [
        (-NS_PER_HOUR, "0.20", 3_600_000),
        (0, "0.10", 3_600_000),
        (0, "0.20", 7_200_000),
    ]
    assert [account.cost and account.cost.nanousd for account in accounts] == [200, 100, 400]


@pytest.mark.parametrize(
    ("fixed", "index"),
    [
        ({}, "receipts_created"),
        ({"user": "u", "feature": "f"}, "receipts_user"),
        ({"conversation": "c"}, "receipts_conversation"),
    ],
)
def test_what_rollups_cannot_answer_is_found_by_index(tmp_path: Path, fixed: dict[str, str], index: str) -> None:
    path = tmp_path / "ledger.db"
    fill(path)
    with LedgerQueries(path)._snapshot() as connection:
        assert connection is not None
        sql, values = sums_sql(connection, "tier", fixed, 1, 5, MEASURES)
        plan = " ".join(row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", values))
    assert f"SEARCH r USING INDEX {index} (" in plan


def test_a_ledger_of_an_older_version_is_not_read_but_says_how_it_can_be(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    fill(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("DELETE FROM migrations WHERE number > 1")
    with pytest.raises(LedgerUnavailable, match="millicent ledger upgrade"):
        LedgerQueries(path).totals("model", ReceiptFilter())


@pytest.mark.parametrize("zone", ["Nowhere/Atlantis", "../../etc/passwd", ""])
def test_a_zone_that_nobody_knows_is_refused_by_name(tmp_path: Path, zone: str) -> None:
    with pytest.raises(InvalidRequest, match="Europe/Berlin"):
        LedgerQueries(tmp_path / "none.db").totals("day", ReceiptFilter(), zone=zone)
