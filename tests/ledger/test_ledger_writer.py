"""The disk: what is durable, and what happens when it says no."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from millicent.core.budgets import Budget, Every
from millicent.core.clock import ManualClock
from millicent.core.errors import LedgerUnavailable, PaymentRequired
from millicent.core.money import Money
from millicent.core.receipts import Accelerator, Receipt
from millicent.core.request import Attribution
from millicent.ledger import journal
from millicent.ledger.budgets import put_budget
from millicent.ledger.config import LedgerConfig
from millicent.ledger.queries import LedgerQueries, ReceiptFilter
from millicent.ledger.schema import migrate, open_writer, unavailable
from millicent.ledger.sqlite import SqliteLedger
from millicent.ledger.writer import Kind, Writer
from support.waiting import until_it

Make = Callable[..., Receipt]
BRIEF = LedgerConfig(busy_timeout_ms=0)


def ledger_at(path: Path, config: LedgerConfig = BRIEF, gateway: str = "gw_1") -> SqliteLedger:
    return SqliteLedger(path, config, ManualClock(), gateway)


@pytest.mark.parametrize(("durability", "synchronous"), [("power", 2), ("process", 1)])
def test_commits_reach_the_disk_as_configured(tmp_path: Path, durability: str, synchronous: int) -> None:
    connection = open_writer(tmp_path / "ledger.db", LedgerConfig(durability=durability))  # type: ignore[arg-type]
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (synchronous,)
    assert connection.execute("PRAGMA fullfsync").fetchone() == (int(durability == "power"),)
    connection.close()


def test_what_waits_together_shares_one_commit(tmp_path: Path, opened: Make) -> None:
    async def scenario() -> int:
        ledger = ledger_at(tmp_path / "ledger.db")
        await ledger.start()
        commits = 0

        def count(statement: str) -> None:
            nonlocal commits
            commits += statement == "COMMIT"

        ledger._writer._connection.set_trace_callback(count)  # type: ignore[union-attr]
        with ledger._writer._wake:  # so that all of them wait
            tasks = [asyncio.ensure_future(ledger.open(opened(number))) for number in range(200)]
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        await ledger.stop()
        return commits

    assert asyncio.run(scenario()) < 20
    assert LedgerQueries(tmp_path / "ledger.db").count_open() == 200


def test_one_bad_write_does_not_fail_its_neighbours(tmp_path: Path, opened: Make, closed: Make) -> None:
    async def scenario() -> list[object]:
        ledger = ledger_at(tmp_path / "ledger.db")
        await ledger.start()
        bad = closed(opened(2), accelerator=Accelerator(serving_ns=2**63))
        results = await asyncio.gather(
            ledger.open(opened(1)),
            ledger.close(bad, ()),
            ledger.close(closed(opened(3), accelerator=Accelerator()), ()),
            return_exceptions=True,
        )
        assert ledger.healthy() is None
        await ledger.stop()
        return list(results)

    first, second, third = asyncio.run(scenario())
    assert (first, third) == (False, None)
    assert isinstance(second, OverflowError)
    ids = [receipt.id for receipt in LedgerQueries(tmp_path / "ledger.db").receipts(ReceiptFilter()).receipts]
    assert ids == ["rcpt_0003", "rcpt_0001"]


def test_receipts_that_lack_different_values_are_written_together_each_as_it_is(
    tmp_path: Path, opened: Make, closed: Make
) -> None:
    fields = {
        "served_model": "s",
        "finish_reason": "stop",
        "policy": {"route": "cheapest"},
        "error": "it said so",
        "useful": True,
        "list_price": Money(2_000),
    }
    receipts = []
    for number in range(2 ** len(fields)):
        given = {name: value if number >> place & 1 else None for place, (name, value) in enumerate(fields.items())}
        whom = Attribution(user="u" if number & 1 else None, run="r" if number & 2 else None)
        receipts.append(closed(opened(number, attribution=whom), accelerator=Accelerator(), saved={}, **given))

    async def scenario() -> None:
        ledger = ledger_at(tmp_path / "ledger.db")
        await ledger.start()
        await asyncio.gather(*(ledger.open(opened(n, attribution=r.attribution)) for n, r in enumerate(receipts)))
        await asyncio.gather(*(ledger.close(receipt, ()) for receipt in receipts))
        await ledger.stop()

    asyncio.run(scenario())
    queries = LedgerQueries(tmp_path / "ledger.db")
    assert queries.receipts_of([receipt.id for receipt in receipts]) == receipts


def test_what_a_closing_frees_an_opening_in_the_same_commit_may_use(tmp_path: Path, opened: Make, closed: Make) -> None:
    budget = Budget(name="all", limit=Money(10**9), every=Every.ONCE, per=None, only=None, hard=True, source="cli")

    async def scenario() -> list[object]:
        ledger = ledger_at(tmp_path / "ledger.db")
        await ledger.start()
        await ledger.write(partial(put_budget, budget=budget))
        assert await ledger.open(opened(1))
        with ledger._writer._wake:
            writes = (
                ledger.open(opened(2, hold=Money(10**9 - 1500))),
                ledger.open(opened(3)),
                ledger.close(closed(opened(1), accelerator=Accelerator()), ()),
            )
            tasks = [asyncio.ensure_future(write) for write in writes]
            await asyncio.sleep(0)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await ledger.stop()
        return list(results)

    second, third, first = asyncio.run(scenario())
    assert (second, first) == (True, None)
    assert isinstance(third, PaymentRequired)
    assert LedgerQueries(tmp_path / "ledger.db").receipt("rcpt_0003") is None


def test_pages_are_copied_and_rollups_folded_beside_the_commits(
    tmp_path: Path, opened: Make, closed: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_WRITES", 20)
    path = tmp_path / "ledger.db"

    def unrolled() -> int:
        with closing(sqlite3.connect(path)) as connection:
            (count,) = connection.execute("SELECT count(*) FROM unrolled").fetchone()
        return int(count)

    async def scenario() -> None:
        ledger = ledger_at(path)
        await ledger.start()
        empty_bytes = path.stat().st_size
        # Should somebody read just then, its log is kept until the next copying.
        for start in range(0, 200, 50):
            await asyncio.gather(
                *(
                    ledger.close(closed(opened(number), accelerator=Accelerator()), ())
                    for number in range(start, start + 50)
                )
            )
        await until_it(lambda: unrolled() == 0)
        await until_it(lambda: path.stat().st_size > empty_bytes)
        assert ledger.healthy() is None
        await ledger.stop()

    asyncio.run(scenario())
    queries = LedgerQueries(path)
    assert [each.requests for each in queries.totals("model", ReceiptFilter())] == [200]
    assert not [each for each in queries.verify() if "rollup" in each]


@pytest.mark.parametrize(("writes", "piece"), [(3, 64), (300, 64), (5000, 512)])
def test_what_was_written_is_tidied_in_pieces_until_nothing_is_left(tmp_path: Path, writes: int, piece: int) -> None:
    asked: list[int] = []
    answers = [False]

    def tidy(_: sqlite3.Connection, most: int) -> bool:
        asked.append(most)
        return answers.pop()

    async def scenario() -> None:
        writer = Writer(tmp_path / "ledger.db", LedgerConfig(), ManualClock(), tidy)
        await writer.start()
        await until_it(lambda: not answers)  # what an earlier gateway may have left was asked for
        answers[:] = [False, True, True]
        nothing = Kind(lambda _, items: [None] * len(items))
        await asyncio.gather(*(writer.submit(nothing, None) for _ in range(writes)))
        await until_it(lambda: not answers)
        await writer.stop()

    asyncio.run(scenario())
    assert asked == [64, piece, 64, 64]


@pytest.mark.parametrize(("copied_after", "stays_short"), [(1, True), (10**9, False)])
def test_a_log_that_is_too_long_begins_anew(
    tmp_path: Path, opened: Make, monkeypatch: pytest.MonkeyPatch, copied_after: int, stays_short: bool
) -> None:
    monkeypatch.setattr(journal, "_WRITES", copied_after)
    monkeypatch.setattr(journal, "_TOO_LONG", 100)
    path = tmp_path / "ledger.db"

    def copied() -> bool:
        return all(thread.name != "ledger-journal" for thread in threading.enumerate())

    async def scenario() -> int:
        ledger = ledger_at(path)
        await ledger.start()
        for number in range(400):
            await ledger.open(opened(number))
            if number % 20 == 0:  # the copying may be slow, but not for ever
                await until_it(copied)
        longest = path.with_name("ledger.db-wal").stat().st_size
        await ledger.stop()
        return longest

    # Several pages each, were they all kept.
    assert (asyncio.run(scenario()) < 900 * 4096) is stays_short


def test_a_full_queue_refuses_at_once(tmp_path: Path, opened: Make) -> None:
    async def scenario() -> list[object]:
        ledger = ledger_at(tmp_path / "ledger.db", LedgerConfig(max_pending=3))
        await ledger.start()
        # The tasks queue before the writer thread can take anything: it needs this lock.
        with ledger._writer._wake:
            tasks = [asyncio.ensure_future(ledger.open(opened(number))) for number in range(5)]
            await asyncio.sleep(0)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await ledger.stop()
        return list(results)

    results = asyncio.run(scenario())
    assert results[:3] == [False] * 3
    assert all(isinstance(result, LedgerUnavailable) for result in results[3:])
    assert "wait for the disk" in str(results[4])


def test_a_locked_ledger_is_unavailable_until_it_is_let_go(tmp_path: Path, opened: Make) -> None:
    async def scenario() -> None:
        path = tmp_path / "ledger.db"
        ledger = ledger_at(path)
        await ledger.start()
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerUnavailable, match="another process holds its lock"):
            await ledger.open(opened(1))
        assert "another process holds its lock" in str(ledger.healthy())
        other.execute("ROLLBACK")
        other.close()
        await until_it(lambda: ledger.healthy() is None, "it didn't find out that writing works again")
        await ledger.open(opened(2))
        await ledger.stop()
        assert [receipt.id for receipt in LedgerQueries(path).receipts(ReceiptFilter()).receipts] == ["rcpt_0002"]

    asyncio.run(scenario())


def test_readers_do_not_wait_for_the_writer(tmp_path: Path, opened: Make) -> None:
    async def scenario() -> None:
        path = tmp_path / "ledger.db"
        ledger = ledger_at(path)
        await ledger.start()
        await ledger.open(opened(1))
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        assert LedgerQueries(path).receipt("rcpt_0001") is not None
        other.close()
        await ledger.stop()

    asyncio.run(scenario())


def test_a_full_disk_leaves_nothing_half_written_and_heals(tmp_path: Path) -> None:
    """The child limits its own file size, which fails writes as a full disk does."""
    child = textwrap.dedent("""
        import asyncio, resource, sys
        from pathlib import Path
        from millicent.core.clock import ManualClock
        from millicent.core.errors import LedgerUnavailable
        from millicent.core.receipts import Receipt
        from millicent.ledger.config import LedgerConfig
        from millicent.ledger.sqlite import SqliteLedger

        async def main(path):
            ledger = SqliteLedger(path, LedgerConfig(), ManualClock(), "gw_1")
            await ledger.start()
            kept = []
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
            for number in range(10_000):
                try:
                    await ledger.open(Receipt(id=f"rcpt_{number}", created_at_ns=number, model="m" * 900,
                                              dialect="d", stream=False))
                    kept.append(f"rcpt_{number}")
                except LedgerUnavailable as error:
                    assert ledger.healthy() == error.message, ledger.healthy()
                    print(error.message)
                    break
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            while ledger.healthy() is not None:
                await asyncio.sleep(0.05)
            await ledger.open(Receipt(id="rcpt_after", created_at_ns=0, model="m", dialect="d", stream=False))
            print(*kept, "rcpt_after")
            await ledger.stop()

        asyncio.run(main(Path(sys.argv[1])))
    """)
    path = tmp_path / "ledger.db"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", child, str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    message, kept = done.stdout.splitlines()
    assert str(path) in message
    assert "disk" in message
    queries = LedgerQueries(path)
    ids = {receipt.id for receipt in queries.receipts(ReceiptFilter(), limit=20_000).receipts}
    assert ids == set(kept.split())
    assert len(ids) > 10


def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(b"this was never a database" * 100)
    ledger = ledger_at(path)
    with pytest.raises(LedgerUnavailable, match="not a ledger: restore it from a backup"):
        asyncio.run(ledger.start())
    assert "not a ledger" in str(ledger.healthy())
    with pytest.raises(LedgerUnavailable, match="not a database"):
        LedgerQueries(path).receipt("rcpt_0001")
    assert path.read_bytes().startswith(b"this was never")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(LedgerUnavailable, match="ledger"):
        asyncio.run(ledger_at(tmp_path / "file" / "ledger.db").start())


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (sqlite3.SQLITE_FULL, "free some space"),
        (sqlite3.SQLITE_READONLY, "write permission"),
        (sqlite3.SQLITE_IOERR_WRITE, "check its space"),
        (sqlite3.SQLITE_CORRUPT, "restore it from a backup"),
    ],
)
def test_each_failure_says_what_to_do(code: int, advice: str) -> None:
    error = sqlite3.OperationalError("no")
    error.sqlite_errorcode = code
    message = unavailable("ledger.db", error).message
    assert advice in message
    assert "\n" not in message


def test_a_ledger_of_a_newer_version_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    connection = open_writer(path, BRIEF)
    migrate(connection, ManualClock())
    connection.execute("INSERT INTO migrations VALUES (99, '0099_later.sql', 0)")
    connection.close()
    with pytest.raises(LedgerUnavailable, match="upgrade Millicent"):
        asyncio.run(ledger_at(path).start())


def test_an_sqlite_without_strict_tables_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    with pytest.raises(LedgerUnavailable, match=r"3\.37\.0 is needed"):
        asyncio.run(ledger_at(tmp_path / "ledger.db").start())


def test_migrating_twice_changes_nothing(tmp_path: Path) -> None:
    connection = open_writer(tmp_path / "ledger.db", BRIEF)
    migrate(connection, ManualClock())
    before = connection.execute("SELECT * FROM migrations").fetchall()
    migrate(connection, ManualClock(start_ns=5))
    assert connection.execute("SELECT * FROM migrations").fetchall() == before
    connection.close()


def test_a_stopped_ledger_refuses_and_stopping_again_is_fine(tmp_path: Path, opened: Make) -> None:
    async def scenario() -> None:
        ledger = ledger_at(tmp_path / "ledger.db")
        with pytest.raises(LedgerUnavailable, match="not started"):
            await ledger.open(opened(1))
        await ledger.start()
        await ledger.stop()
        await ledger.stop()
        with pytest.raises(LedgerUnavailable, match="stopped"):
            await ledger.open(opened(1))

    asyncio.run(scenario())


def test_stopping_writes_what_is_queued(tmp_path: Path, opened: Make) -> None:
    async def scenario() -> None:
        ledger = ledger_at(tmp_path / "ledger.db")
        await ledger.start()
        tasks = [asyncio.ensure_future(ledger.open(opened(number))) for number in range(50)]
        await asyncio.sleep(0)
        await ledger.stop()
        await asyncio.gather(*tasks)

    asyncio.run(scenario())
    assert LedgerQueries(tmp_path / "ledger.db").count_open() == 50


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE receipts SET model = 'other'",
        "DELETE FROM receipts",
        "UPDATE lines SET amount_nanousd = 0",
        "DELETE FROM lines",
        "UPDATE attempts SET error = 'x'",
        "DELETE FROM attempts",
        "UPDATE device_time SET serving_ns = 0",
        "DELETE FROM device_time",
        "INSERT INTO device_time VALUES ('rcpt_0001', 2, 'sess_1', 0, 5)",
    ],
)
def test_what_is_settled_cannot_be_changed_even_by_hand(
    tmp_path: Path, opened: Make, closed: Make, shares: tuple[object, ...], statement: str
) -> None:
    path = tmp_path / "ledger.db"

    async def scenario() -> None:
        ledger = ledger_at(path)
        await ledger.start()
        await ledger.close(closed(opened(1)), shares)  # type: ignore[arg-type]
        await ledger.stop()

    asyncio.run(scenario())
    connection = sqlite3.connect(path, isolation_level=None)
    with pytest.raises(sqlite3.IntegrityError, match="never"):
        connection.execute(statement)
    connection.close()
