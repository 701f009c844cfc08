"""What leaves the ledger leaves its sums; what is copied is whole; what an older version wrote keeps its totals."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from millicent.core.accounts import Checkpoint, DeviceSession, HourTime
from millicent.core.budgets import Budget, Every
from millicent.core.clock import NS_PER_HOUR, NS_PER_S, ManualClock
from millicent.core.errors import ConfigError, LedgerUnavailable, NotFound
from millicent.core.money import Money
from millicent.core.receipts import Accelerator, HourShare, Receipt, Role, Status, outside_line
from millicent.core.request import Attribution, OutsideCost
from millicent.core.usage import Provenance
from millicent.ledger import maintenance, tallies
from millicent.ledger.backup import back_up, restore
from millicent.ledger.budgets import put_budget, read_balances
from millicent.ledger.config import LedgerConfig
from millicent.ledger.maintenance import purge_user
from millicent.ledger.memory import MemoryLedger
from millicent.ledger.queries import GroupBy, LedgerQueries, ReceiptFilter
from millicent.ledger.schema import write_once
from millicent.ledger.sqlite import SqliteLedger

Make = Callable[..., Receipt]
T0 = ManualClock().now_ns()
DAY_NS = 24 * NS_PER_HOUR
SCHEMA_1 = Path(__file__).parent / "released" / "schema_1.sql"


def every_total(queries: LedgerQueries) -> dict[str, Any]:
    """But for runs and conversations, which aren't known of what was deleted or purged."""
    lasting = [by for by in get_args(GroupBy) if by not in {"run", "conversation"}]
    return {by: queries.totals(by, ReceiptFilter()) for by in lasting}


async def fill(ledger: SqliteLedger, opened: Make, closed: Make) -> None:
    """Nine receipts over nine hours, for three users; their device time in one session."""
    hours = tuple(HourTime(T0 + number * NS_PER_HOUR, NS_PER_HOUR) for number in range(9))
    session = DeviceSession(
        "sess_1", "gw_1", "cpu:0", "cpu", 1, None, Provenance.ASSUMED, T0, T0 + 9 * NS_PER_HOUR, False, True, hours
    )
    await ledger.checkpoint(Checkpoint(T0, (session,), ()))
    for number in range(9):
        whom = Attribution(user=f"u{number % 3}", feature="f", conversation="c", run="r", tags={"mail": "a@b"})
        receipt = opened(number, attribution=whom, created_at_ns=T0 + number * NS_PER_HOUR)
        share = HourShare(1, "sess_1", T0 + number * NS_PER_HOUR, 700)
        await ledger.close(closed(receipt, error="it said a@b"), (share,))


def run(path: Path, scenario: Callable[[SqliteLedger, ManualClock], Any], config: LedgerConfig | None = None) -> None:
    async def go() -> None:
        clock = ManualClock()
        ledger = SqliteLedger(path, config or LedgerConfig(), clock, "gw_1")
        await ledger.start()
        try:
            await scenario(ledger, clock)
        finally:
            await ledger.stop()

    asyncio.run(go())


def test_detail_that_outlived_its_retention_goes_and_every_sum_stays(
    tmp_path: Path, opened: Make, closed: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "_BATCH", 2)
    queries = LedgerQueries(tmp_path / "ledger.db")

    async def scenario(ledger: SqliteLedger, clock: ManualClock) -> None:
        await fill(ledger, opened, closed)
        await ledger.open(opened(99, created_at_ns=T0))
        before = every_total(queries), queries.totals("tier", ReceiptFilter(user="u1", feature="f"))
        accounts = queries.accounts(0, 2**62)
        clock.advance(DAY_NS + 5 * NS_PER_HOUR + 1)
        for _ in range(5):
            await ledger.maintain()
        left = [receipt.id for receipt in queries.receipts(ReceiptFilter()).receipts]
        assert left == ["rcpt_0008", "rcpt_0007", "rcpt_0006", "rcpt_0099"]
        assert (every_total(queries), queries.totals("tier", ReceiptFilter(user="u1", feature="f"))) == before
        assert queries.accounts(0, 2**62) == accounts
        assert queries.verify() == []

    run(tmp_path / "ledger.db", scenario, LedgerConfig(retain_days=1))


def test_without_retention_nothing_is_ever_deleted(tmp_path: Path, opened: Make, closed: Make) -> None:
    queries = LedgerQueries(tmp_path / "ledger.db")

    async def scenario(ledger: SqliteLedger, clock: ManualClock) -> None:
        await fill(ledger, opened, closed)
        clock.advance(10_000 * DAY_NS)
        await ledger.maintain()
        assert len(queries.receipts(ReceiptFilter()).receipts) == 9

    run(tmp_path / "ledger.db", scenario)


def test_a_purged_user_is_nowhere_in_the_file_and_every_amount_stays(
    tmp_path: Path, opened: Make, closed: Make
) -> None:
    path = tmp_path / "ledger.db"
    queries = LedgerQueries(path)

    async def scenario(ledger: SqliteLedger, clock: ManualClock) -> None:
        whom = Attribution(user="ada@example.org", conversation="ada-1", run="ada-2", tags={"mail": "ada@example.org"})
        for number in range(3):
            receipt = closed(opened(number, attribution=whom), error="for ada@example.org")
            share = HourShare(1, "sess_1", T0, 700)
            await ledger.close(receipt, (share,))
        await ledger.close(closed(opened(3, attribution=Attribution(user="bob"))), (HourShare(1, "sess_1", T0, 700),))
        await ledger.open(opened(4, attribution=whom))
        before = every_total(queries)
        assert write_once(path, LedgerConfig(), clock, lambda each: purge_user(each, "ada@example.org")) == 3
        after = every_total(queries)
        named = {each.group for each in after["user"]}
        assert "bob" in named
        assert [name for name in named if name and name.startswith("purged-")] == list(named - {"bob"})
        assert [each.cost for each in after["user"]] == [each.cost for each in before["user"]]
        assert after | {"user": None} == before | {"user": None}
        first = queries.receipt("rcpt_0000")
        assert first is not None
        assert (first.attribution.conversation, first.attribution.run, first.attribution.tags) == (None, None, {})
        assert first.prompt is None
        await ledger.close(closed(opened(4, attribution=whom)), (HourShare(1, "sess_1", T0, 700),))
        assert write_once(path, LedgerConfig(), clock, lambda each: purge_user(each, "ada@example.org")) == 1
        assert not [each for each in queries.verify() if "rollup" in each]

    run(path, scenario)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("PRAGMA journal_mode = DELETE")
    # Not the bare name: three letters may stand in a random one.
    assert not [word for word in (b"ada@", b"ada-1", b"ada-2") if word in path.read_bytes()]


def test_notes_that_came_with_the_request_and_alerts_forget_a_purged_user_too(opened: Make, closed: Make) -> None:
    async def story() -> None:
        ledger = MemoryLedger()
        whom = Attribution(user="ada")
        receipt = closed(opened(1, attribution=whom), accelerator=Accelerator())
        cost = OutsideCost("retrieval", "other", Decimal(2), "query", Money(500), note="for ada")
        brought = outside_line(cost, receipt.created_at_ns)
        await ledger.close(msgspec.structs.replace(receipt, lines=(brought, *receipt.lines)), ())
        await ledger.write(_alert("one", 'Budget "b" of user "ada" is gone.', "[]"))
        await ledger.write(_alert("two", "Cost rose.", '[{"dimension":"user","member":"ada","percent":60}]'))
        await ledger.write(lambda connection: purge_user(connection, "ada"))
        kept = ledger.queries.receipt(receipt.id)
        assert kept is not None
        assert [line.note for line in kept.lines] == [None, "a note"]
        alerts, messages = await ledger.write(_alerts)
        assert [name for name, _ in alerts] == ["two"]
        assert '"ada"' not in alerts[0][1]
        assert messages == []

    asyncio.run(story())


def _alert(name: str, title: str, causes: str) -> Callable[[sqlite3.Connection], None]:
    def write(connection: sqlite3.Connection) -> None:
        connection.execute(
            "INSERT INTO alerts VALUES (?, 'r', 'k', 'f', 'd', ?, ?, '{}', ?, 1, 1, 1, NULL, 1, '', '', 0, '{}')",
            (name, name, title, causes),
        )
        connection.execute(
            "INSERT INTO alert_messages (id, rule, body, created_at_ns, due_at_ns) VALUES (?, 'r', ?, 1, 1)",
            (name, f'{{"text":"...","footer":"{name}"}}'),
        )

    return write


def _alerts(connection: sqlite3.Connection) -> tuple[list[tuple[str, str]], list[tuple[str]]]:
    found = connection.execute("SELECT id, causes FROM alerts").fetchall()
    return found, connection.execute("SELECT id FROM alert_messages").fetchall()


def test_what_is_settled_still_refuses_change_by_hand(tmp_path: Path, opened: Make, closed: Make) -> None:
    path = tmp_path / "ledger.db"
    run(path, lambda ledger, _: fill(ledger, opened, closed))
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for change in (
            "UPDATE receipts SET user = NULL",
            "UPDATE lines SET note = NULL",
            "DELETE FROM lines",
            "DELETE FROM attempts",
            "DELETE FROM device_time",
            "DELETE FROM receipts",
        ):
            with pytest.raises(sqlite3.IntegrityError, match=r"never|deleted"):
                connection.execute(change)


def test_a_backup_taken_while_the_gateway_writes_is_whole_and_can_be_restored_beneath_it(
    tmp_path: Path, opened: Make, closed: Make
) -> None:
    path, copy, kept = tmp_path / "ledger.db", tmp_path / "copy.db", tmp_path / "kept.db"
    queries = LedgerQueries(path)

    async def scenario(ledger: SqliteLedger, clock: ManualClock) -> None:
        await fill(ledger, opened, closed)
        then = every_total(queries)
        writing = asyncio.gather(*(ledger.open(opened(100 + number)) for number in range(50)))
        await asyncio.to_thread(back_up, path, copy)
        await writing
        await ledger.close(closed(opened(100)), (HourShare(1, "sess_1", T0, 700),))
        now = every_total(queries)
        assert now != then
        assert every_total(LedgerQueries(copy)) == then
        await asyncio.to_thread(restore, path, copy, kept, LedgerConfig(), clock)
        assert every_total(queries) == then
        assert every_total(LedgerQueries(kept)) == now
        # The gateway goes on, and what it had opened before is settled whole.
        await ledger.close(closed(opened(149)), (HourShare(1, "sess_1", T0, 700),))
        settled = queries.receipt("rcpt_0149")
        assert settled is not None
        assert settled.status is Status.SUCCEEDED
        assert queries.verify() == []

    run(path, scenario)
    assert not list(tmp_path.glob("*.restoring*")) + list(tmp_path.glob("*.partial*"))


def test_a_backup_that_fails_leaves_nothing(
    tmp_path: Path, opened: Make, closed: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk left the journal of the copy."""
    path, copy = tmp_path / "ledger.db", tmp_path / "copies" / "copy.db"
    copy.parent.mkdir()
    run(path, lambda ledger, _: fill(ledger, opened, closed))

    def full(written: Path) -> None:
        written.with_name(f"{written.name}-journal").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("millicent.ledger.backup.flush", full)
    with pytest.raises(LedgerUnavailable):
        back_up(path, copy)
    assert not list(copy.parent.iterdir())


def test_backups_overwrite_nothing_and_only_ledgers_are_restored(tmp_path: Path, opened: Make, closed: Make) -> None:
    path, copy, kept = tmp_path / "ledger.db", tmp_path / "copy.db", tmp_path / "kept.db"
    clock, config = ManualClock(), LedgerConfig()
    with pytest.raises(NotFound, match="no ledger"):
        back_up(path, copy)
    with pytest.raises(NotFound, match="no backup"):
        restore(path, copy, kept, config, clock)
    run(path, lambda ledger, _: fill(ledger, opened, closed))
    before = path.read_bytes()
    back_up(path, copy)
    with pytest.raises(ConfigError, match="never overwrites"):
        back_up(path, copy)
    sqlite3.connect(tmp_path / "other.db").close()
    (tmp_path / "text.db").write_text("this is no database at all" * 100)
    with closing(sqlite3.connect(tmp_path / "other.db")) as other:
        other.execute("CREATE TABLE receipts_of_my_shop (id)")
    with pytest.raises(ConfigError, match="no ledger"):
        restore(path, tmp_path / "other.db", kept, config, clock)
    kept.unlink()
    with pytest.raises(LedgerUnavailable, match="not a database"):
        restore(path, tmp_path / "text.db", kept, config, clock)
    assert path.read_bytes() == before


def released(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(SCHEMA_1.read_text())


def made_up(problems: list[str]) -> list[str]:
    """But for those of their lines: these ledgers' amounts were made up, and are no products."""
    return [each for each in problems if " at $" not in each and " was listed at " not in each]


def test_a_ledger_of_schema_1_is_brought_up_to_date_with_its_totals_unchanged(tmp_path: Path) -> None:
    """The expected figures were read by the version that wrote the file."""
    path = tmp_path / "ledger.db"
    released(path)
    ledger = SqliteLedger(path, LedgerConfig(), ManualClock(), "gw_2")
    queries = LedgerQueries(path)

    def figures(by: GroupBy) -> list[tuple[Any, ...]]:
        where = ReceiptFilter(to_ns=T0 + 11 * 700 * NS_PER_S)  # the last was open: recovery settles it
        found = [msgspec.structs.astuple(total) for total in queries.totals(by, where)]
        return [(*each[:5], each[5].nanousd, *each[6:]) for each in found]

    async def scenario() -> None:
        await ledger.start()
        for _ in range(2):
            assert figures("feature") == [
                ("search", 5, 48, 12, 3500, 1_000_000_004_500, 2, 1, 1),
                (None, 6, 72, 18, 4200, 9_000, 0, 0, 0),
            ]
            assert figures("user") == [
                ("user3", 2, 24, 6, 1400, 1_000_000_001_500, 1, 1, 0),
                (None, 3, 36, 9, 2100, 4_500, 0, 0, 0),
                ("user2", 3, 36, 9, 2100, 4_500, 0, 0, 0),
                ("user1", 3, 24, 6, 2100, 3_000, 1, 0, 1),
            ]
            assert figures("hour") == [
                ("2026-01-01T00:00:00Z", 6, 60, 15, 4200, 6_000, 2, 0, 1),
                ("2026-01-01T01:00:00Z", 5, 60, 15, 3500, 1_000_000_007_500, 0, 1, 0),
            ]
            assert made_up(queries.verify()) == []
            # Before what it wrote is taken into the rollups, and after.
            await ledger.checkpoint(Checkpoint(T0, (), ()))
        await ledger.stop()

    asyncio.run(scenario())


def test_a_ledger_of_schema_5_keeps_its_totals_and_learns_roles_and_ratings_of_what_is_left(tmp_path: Path) -> None:
    """The expected totals were read by the version that wrote the file. Of ten receipts it had deleted the detail of
    four, which no cube, role or rating can be made of again."""
    path = tmp_path / "ledger.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript((SCHEMA_1.parent / "schema_5.sql").read_text())
    queries = LedgerQueries(path)

    async def scenario() -> None:
        ledger = SqliteLedger(path, LedgerConfig(), ManualClock(), "gw_2")
        await ledger.start()
        for _ in range(3):
            totals = [msgspec.structs.astuple(each) for each in queries.totals("user", ReceiptFilter())]
            assert [(*each[:5], each[5].nanousd, *each[6:]) for each in totals] == [
                ("u2", 3, 36, 9, 2100, 5015, 0, 0, 0),
                ("u0", 3, 36, 9, 2100, 4509, 0, 0, 0),
                ("u1", 4, 48, 12, 2800, 4505, 1, 0, 0),
            ]
            hours = [(each.group, each.cost.nanousd) for each in queries.totals("hour", ReceiptFilter())]
            assert [cost for _, cost in hours] == [1500, 1501, 1502, 1503, 1504, 1505, 1506, 0, 2008, 1500]
            roles = {
                each.group: ({role: cost.nanousd for role, cost in each.costs.items()}, each.unpriced)
                for each in queries.role_costs("user", ReceiptFilter())
            }
            assert roles == {
                "u0": ({Role.INFERENCE: 1506}, 0),
                "u1": ({Role.INFERENCE: 3004}, 1),
                "u2": ({Role.INFERENCE: 3013, Role.RETRIEVAL: 500}, 0),
            }
            rated = {
                each.group: (each.requests, each.priced, each.rated, each.useful)
                for each in queries.usefulness("user", ReceiptFilter())
            }
            assert rated == {"u0": (3, 3, 0, 0), "u1": (4, 3, 1, 0), "u2": (3, 3, 1, 1)}
            assert made_up(queries.verify()) == []
            # Before what it wrote is taken into the rollups, and after.
            await ledger.checkpoint(Checkpoint(T0, (), ()))
        await ledger.stop()

    asyncio.run(scenario())


def test_a_ledger_of_schema_20_keeps_its_tallies_while_they_are_taken_into_wide_ones_day_by_day(tmp_path: Path) -> None:
    """The expected figures were read by the version that wrote the file: a request every other day, 14 in all."""
    path = tmp_path / "ledger.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript((SCHEMA_1.parent / "schema_20.sql").read_text())
    queries = LedgerQueries(path)

    def figures(by: GroupBy) -> dict[str | None, tuple[int, int, int]]:
        found = queries.tallies([by], ReceiptFilter())
        assert found is not None
        return {of: (each.requests, each.cost_nanousd, sum(each.total.values())) for (of,), each in found.items()}

    async def scenario() -> None:
        ledger = SqliteLedger(path, LedgerConfig(), ManualClock(), "gw_2")
        await ledger.start()
        before_ns = []
        for _ in range(14):
            assert figures("feature") == {"chat": (4, 4521, 4), "search": (5, 7530, 5), None: (5, 7535, 5)}
            assert figures("model") == {"m": (7, 10542, 7), "n": (7, 9044, 7)}
            assert made_up(queries.verify()) == []
            before_ns.append(queries.ask(tallies.wide_before_ns))
            await ledger.checkpoint(Checkpoint(T0, (), ()))
        # The fourteenth is of the newest quarter-hour, and goes to wide tallies at once when that is over.
        assert before_ns == [T0 + 25 * DAY_NS, *(T0 + day * DAY_NS for day in range(24, -1, -2))]
        assert queries.ask(tallies.wide_before_ns) == -(2**63)
        await ledger.stop()

    asyncio.run(scenario())


def test_an_upgrade_that_fails_leaves_the_ledger_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    released(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE rollups (mine)")
        connection.commit()
        before = connection.execute("SELECT sql FROM sqlite_schema ORDER BY name").fetchall()
        with pytest.raises(LedgerUnavailable, match="rollups already exists"):
            asyncio.run(SqliteLedger(path, LedgerConfig(), ManualClock(), "gw_2").start())
        assert connection.execute("SELECT sql FROM sqlite_schema ORDER BY name").fetchall() == before
        assert connection.execute("SELECT count(*) FROM migrations").fetchone() == (1,)


def test_budgets_keep_what_was_spent_when_detail_goes_and_forget_a_purged_user(
    tmp_path: Path, opened: Make, closed: Make
) -> None:
    path = tmp_path / "ledger.db"
    queries = LedgerQueries(path)
    budget = Budget(name="each", limit=Money(10**9), every=Every.MONTH, per="user", only=None, hard=False, source="cli")

    def balances() -> dict[str, int]:
        found = queries.ask(lambda connection: read_balances(connection, budget, T0))
        return {each.subject: each.spent.nanousd for each in found or []}

    async def scenario(ledger: SqliteLedger, clock: ManualClock) -> None:
        await ledger.write(lambda connection: put_budget(connection, budget))
        await fill(ledger, opened, closed)
        assert balances() == {"u0": 4_500, "u1": 4_500, "u2": 4_500}
        clock.advance(DAY_NS + 5 * NS_PER_HOUR + 1)
        await ledger.maintain()
        assert len(queries.receipts(ReceiptFilter()).receipts) == 3
        assert balances() == {"u0": 4_500, "u1": 4_500, "u2": 4_500}
        assert made_up(queries.verify()) == []
        await ledger.write(lambda connection: purge_user(connection, "u1"))
        assert "u1" not in balances()
        assert sorted(balances().values()) == [4_500] * 3
        assert queries.verify() == []

    run(path, scenario, LedgerConfig(retain_days=1))
