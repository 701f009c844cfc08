"""The ledger at scale: how fast receipts go in, what durability adds to a request, and what reports and pages cost.

    python bench/ledger.py [--receipts 1000000] [--folder DIR] [--ledger FILE] [--verify]

The big ledger (90 days; 1,000 users, some of whom ask more; 20 features of 5 teams, 8 models, 3 tiers; an attempt and a
line each, a tenth with a retrieval line, one in 25 rated) is made of the ledger's own rows, and taken into the rollups
by the ledger itself; ten million take 14 GB and a quarter of an hour. With `--ledger` it is kept there, and not made
again. Questions are asked on a connection of their own, each five times. Folding is told by its processor time. Writes
go through `SqliteLedger`, durable across loss of power: 512 clients that never wait, then 500 requests/s that come when
they come. Beside them stands what the machine takes for a commit of one row. Medians and 99th percentiles go to
bench/results/ledger.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sqlite3
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import results

from millicent.core.clock import NS_PER_S, SystemClock
from millicent.core.identifiers import SystemIds
from millicent.core.money import Money
from millicent.core.periods import Period
from millicent.core.prompts import Prompt, Segment
from millicent.core.receipts import Accelerator, Attempt, HourShare, Line, Meter, Receipt, Role, Status
from millicent.core.request import Attribution
from millicent.core.usage import Provenance, Usage
from millicent.economics.changes import changes
from millicent.economics.config import PlanConfig
from millicent.economics.margin import Books, margins
from millicent.economics.unit import units
from millicent.ledger import rollups, rows, tallies
from millicent.ledger.config import LedgerConfig
from millicent.ledger.queries import LedgerQueries, ReceiptFilter
from millicent.ledger.schema import migrate, open_writer
from millicent.ledger.sqlite import SqliteLedger
from millicent.ledger.store import Closing, Opening, close_receipts, open_receipts

BOOKS = Books(plans={"tier-1": PlanConfig(price_usd_per_month=Decimal(20), margin_target=Decimal("0.75"))})
DAYS = 90
FOLDED_AT_ONCE = (1, 64, 512, 4_096)
DAY_NS = 86_400 * NS_PER_S
FIRST_NS = 1_767_225_600 * NS_PER_S


def make(path: Path, receipts: int) -> dict[str, float]:
    """A ledger as if an older version had written it: rows from the ledger's own code, indices and rollups afterwards.
    Seconds that each part took."""
    connection = open_writer(path, LedgerConfig(durability="process"))
    migrate(connection, SystemClock())
    for pragma in ("journal_mode = OFF", "synchronous = OFF", "foreign_keys = OFF", "secure_delete = OFF"):
        connection.execute(f"PRAGMA {pragma}")
    kept = connection.execute("SELECT name, sql FROM sqlite_schema WHERE type IN ('index', 'trigger') AND sql > ''")
    statements = kept.fetchall()
    for name, sql in statements:
        connection.execute(f"DROP {'INDEX' if ' INDEX ' in sql.split('(')[0] else 'TRIGGER'} {name}")
    took = {"rows": timed(lambda: _fill(connection, receipts))}
    took["indices"] = timed(lambda: [connection.execute(sql) for _, sql in statements])
    for progress in ("rollup_progress", "tally_progress"):
        connection.execute(f"UPDATE {progress} SET raw_before_ns = (SELECT max(created_at_ns) + 1 FROM receipts)")
    took["rollups"] = timed(lambda: _take_in(connection))
    connection.execute("PRAGMA journal_mode = WAL")
    connection.close()
    return {name: round(seconds, 1) for name, seconds in took.items()}


def _fill(connection: sqlite3.Connection, receipts: int) -> None:
    apart_ns = DAYS * DAY_NS // receipts
    chance = random.Random(1)
    for start in range(0, receipts, 50_000):
        tables: dict[str, list[tuple[object, ...]]] = defaultdict(list)
        for number in range(start, min(receipts, start + 50_000)):
            _rows(tables, number, FIRST_NS + number * apart_ns, chance)
        connection.execute("BEGIN")
        for table, found in tables.items():
            connection.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(found[0]))})", found)
        connection.execute("COMMIT")


def _rows(tables: dict[str, list[tuple[object, ...]]], number: int, at_ns: int, chance: random.Random) -> None:
    """One closed receipt; a tenth have a retrieval line, and one in 25 was rated."""
    columns, receipt, attempt, line = _pattern()
    feature, user = chance.randrange(20), int(1000 * chance.random() ** 2)
    receipt_id = f"rcpt_{number:026d}"
    receipt.update(
        id=receipt_id,
        created_at_ns=at_ns,
        settled_at_ns=at_ns + 1,
        status="failed" if number % 50 == 0 else "succeeded",
        model=f"model-{chance.randrange(8)}",
        feature=f"feature-{feature}",
        team=f"team-{feature % 5}",
        key=f"key-{feature % 5}",
        user=f"user-{user}",
        tier=f"tier-{user % 3}",
    )
    tables["receipts"].append(tuple(map(receipt.get, columns)))
    tables["attempts"].append((receipt_id, *attempt))
    tables["lines"].append(
        (receipt_id, 0, 1, "inference", *line, 50_000 + number % 977, "measured", at_ns, at_ns, *_END)
    )
    if number % 10 == 0:
        tables["lines"].append((receipt_id, 1, 0, "retrieval", *line, 9_000, "reported", at_ns, at_ns, *_END))
    if number % 25 == 0:
        tables["feedback"].append((receipt_id, 0, None, at_ns, None, None, None, int(number % 100 != 0)))
    tables["device_time"].append((receipt_id, 1, "sess", at_ns - at_ns % (3600 * NS_PER_S), 500))


# The book, note and identifier of a line.
_END = ("actual", None, None)


@cache
def _pattern() -> tuple[tuple[str, ...], dict[str, object], tuple[object, ...], tuple[object, ...]]:
    """The table's columns, and a closed receipt, its attempt and line as the ledger's own code writes them."""
    receipt = _closed(_opened("rcpt", FIRST_NS, 1), FIRST_NS)
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as empty:
        migrate(empty, SystemClock())
        columns = tuple(name for _, name, *_ in empty.execute("PRAGMA table_info(receipts)"))
    written = dict(zip((*rows.RECEIPT_COLUMNS, "gateway"), rows.opening_row(receipt, "gw"), strict=True))
    attempt = rows.attempt_row(receipt.id, receipt.attempts[0])[1:]
    meter_to_price = slice(rows.LINE_COLUMNS.index("meter"), rows.LINE_COLUMNS.index("amount_nanousd"))
    return columns, written, attempt, rows.line_row(receipt.id, 0, receipt.lines[0])[meter_to_price]


def _take_in(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA cache_size = -1048576")
    while not (rollups.is_complete(connection) and tallies.is_complete(connection)):
        connection.execute("BEGIN")
        rollups.backfill(connection, 50_000)
        tallies.backfill(connection, 50_000)
        connection.execute("COMMIT")


def ask(queries: LedgerQueries, receipts: int) -> dict[str, float]:
    """Milliseconds of each question: the median of five, after none to warm up."""
    end_ns = FIRST_NS + DAYS * DAY_NS
    week = ReceiptFilter(from_ns=end_ns - 7 * DAY_NS - 12_345)
    middle = f"rcpt_{receipts // 2:026d}"
    questions: dict[str, Callable[[], Any]] = {
        "by feature, all": lambda: queries.totals("feature", ReceiptFilter()),
        "by feature, 7 days": lambda: queries.totals("feature", week),
        "by user, all": lambda: queries.totals("user", ReceiptFilter()),
        "by user, 7 days": lambda: queries.totals("user", week),
        "by model of a feature": lambda: queries.totals("model", ReceiptFilter(feature="feature-3")),
        "by feature of a user": lambda: queries.totals("feature", ReceiptFilter(user="user-3")),
        "by user of a feature, 7 days": lambda: queries.totals(
            "user", msgspec.structs.replace(week, feature="feature-3")
        ),
        "by feature of a user, 7 days": lambda: queries.totals("feature", msgspec.structs.replace(week, user="user-3")),
        "by user of a feature, all": lambda: queries.totals("user", ReceiptFilter(feature="feature-3")),
        "roles by feature, 7 days": lambda: queries.role_costs("feature", week),
        "roles by user, all": lambda: queries.role_costs("user", ReceiptFilter()),
        "useful by feature, all": lambda: queries.usefulness("feature", ReceiptFilter()),
        "useful by user, 7 days": lambda: queries.usefulness("user", week),
        "by day": lambda: queries.totals("day", ReceiptFilter()),
        "by day in Berlin": lambda: queries.totals("day", ReceiptFilter(), zone="Europe/Berlin"),
        "by hour of a feature, 7 days": lambda: queries.totals(
            "hour", msgspec.structs.replace(week, feature="feature-3")
        ),
        "waste, all": lambda: queries.waste(ReceiptFilter()),
        "waste of a feature, 7 days": lambda: queries.waste(msgspec.structs.replace(week, feature="feature-3")),
        "unit economics by feature, 7 days": lambda: units(queries, "feature", week, end_ns),
        "unit economics by user, 7 days": lambda: units(queries, "user", week, end_ns),
        "why it changed, 7 days": lambda: changes(
            queries, Period(end_ns - 14 * DAY_NS, end_ns - 7 * DAY_NS), Period(end_ns - 7 * DAY_NS, end_ns)
        ),
        "margin by user, 7 days": lambda: margins(queries, "user", Period(end_ns - 7 * DAY_NS, end_ns), BOOKS),
        "newest page": lambda: queries.receipts(ReceiptFilter()),
        "page in the middle": lambda: queries.receipts(ReceiptFilter(), after=middle),
        "page of a user": lambda: queries.receipts(ReceiptFilter(user="user-3")),
        "one receipt": lambda: queries.receipt(middle),
    }
    return {
        name: round(statistics.median(timed(question) for _ in range(5)) * 1e3, 2)
        for name, question in questions.items()
    }


def timed(body: Callable[[], Any]) -> float:
    start = time.perf_counter()
    body()
    return time.perf_counter() - start


_PROMPT = Prompt(bytes(20), tuple(Segment("user", 900, bytes([i]) * 8) for i in range(4)))


def _opened(receipt_id: str, now_ns: int, number: int) -> Receipt:
    return Receipt(
        id=receipt_id,
        created_at_ns=now_ns,
        model="m",
        placement="cpu",
        dialect="openai",
        stream=True,
        attempts=(Attempt(1, "local", "cpu", "m", Role.INFERENCE, now_ns),),
        attribution=Attribution(user=f"user-{number % 1000}", feature=f"feature-{number % 20}"),
        prompt=_PROMPT,
    )


def _closed(receipt: Receipt, now_ns: int) -> Receipt:
    line = Line(
        1, Role.INFERENCE, Meter.ACCELERATOR, Decimal("0.5"), "second", Decimal("0.0001"), Money(50_000),
        Provenance.MEASURED, now_ns, now_ns,
    )  # fmt: skip
    ended = msgspec.structs.replace(receipt.attempts[0], ended_at_ns=now_ns + 1, status=Status.SUCCEEDED)
    return msgspec.structs.replace(
        receipt,
        status=Status.SUCCEEDED,
        settled_at_ns=now_ns + 1,
        usage=Usage.of(Provenance.MEASURED, input_fresh=900, output_text=200),
        accelerator=Accelerator(500, 200, 300, 9, 30, Provenance.MEASURED),
        lines=(line,),
        attempts=(ended,),
    )


class Requests:
    """Opens and closes receipts as the pipeline does."""

    def __init__(self, ledger: SqliteLedger) -> None:
        self.ledger = ledger
        self.clock = SystemClock()
        self.ids = SystemIds(self.clock)
        self.number = 0

    async def one(self) -> float:
        """Seconds that durability added: the wait for the opening and for the closing commit."""
        self.number += 1
        now_ns = self.clock.now_ns()
        receipt = _opened(self.ids.new("rcpt"), now_ns, self.number)
        start = time.perf_counter()
        await self.ledger.open(receipt)
        share = HourShare(1, "sess", now_ns - now_ns % (3600 * NS_PER_S), 500)
        await self.ledger.close(_closed(receipt, now_ns), (share,))
        return time.perf_counter() - start


def folding(folder: Path) -> dict[int, float]:
    """Microseconds of processor time to fold a receipt, by how many are folded at a time: the least of three pieces.
    A thousand users, twenty features, one quarter-hour; their sums are there already."""
    took: dict[int, float] = {}
    for size in FOLDED_AT_ONCE:
        with closing(open_writer(folder / f"fold-{size}.db", LedgerConfig(durability="process"))) as connection:
            migrate(connection, SystemClock())
            receipts = [_opened(f"rcpt_{number:026d}", FIRST_NS + number, number) for number in range(1_000 + 3 * size)]
            connection.execute("BEGIN")
            open_receipts(connection, [Opening(each, "gw_bench") for each in receipts])
            close_receipts(
                connection, [Closing(_closed(each, each.created_at_ns), (), "gw_bench") for each in receipts]
            )
            connection.execute("COMMIT")
            pieces = []
            for most in (1_000, size, size, size):
                start = time.thread_time()
                connection.execute("BEGIN")
                rollups.fold_some(connection, most)
                connection.execute("COMMIT")
                pieces.append((time.thread_time() - start) / most * 1e6)
            took[size] = round(min(pieces[1:]), 1)
    return took


def bare_commits(folder: Path) -> dict[str, float]:
    """Milliseconds of a commit of one row, synced as the ledger's are, with nothing else in the file: what the machine
    itself takes at that moment. A receipt waits for at least two."""
    with closing(open_writer(folder / "bare.db", LedgerConfig())) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS rows (number INTEGER)")
        commits = [timed(lambda: connection.execute("INSERT INTO rows VALUES (1)")) for _ in range(500)]
    return percentiles(commits)


def percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "p50": round(ordered[len(ordered) // 2] * 1e3, 2),
        "p99": round(ordered[len(ordered) * 99 // 100] * 1e3, 2),
    }


async def write(path: Path, seconds: float) -> dict[str, Any]:
    """Receipts/s with 512 clients that never wait, then what 500 requests/s wait for durability."""
    ledger = SqliteLedger(path, LedgerConfig(), SystemClock(), "gw_bench")
    await ledger.start()
    requests = Requests(ledger)

    async def client(until: float) -> int:
        count = 0
        while time.perf_counter() < until:
            await requests.one()
            count += 1
        return count

    cpu, start = time.process_time(), time.perf_counter()
    counts = await asyncio.gather(*(client(start + seconds) for _ in range(512)))
    took, used = time.perf_counter() - start, time.process_time() - cpu
    before = bare_commits(path.parent)
    start, added = time.perf_counter(), []
    for number in range(int(500 * seconds)):
        await asyncio.sleep(max(0.0, start + number / 500 - time.perf_counter()))
        added.append(asyncio.ensure_future(requests.one()))
    waits = await asyncio.gather(*added)
    await ledger.stop()
    return {
        "receipts_per_s": round(sum(counts) / took),
        "cpu_us_per_receipt": round(used / sum(counts) * 1e6, 1),
        "durability_ms_at_500_per_s": percentiles(waits),
        "bare_commit_ms": {"before": before, "after": bare_commits(path.parent)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--receipts", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each way of writing")
    parser.add_argument("--folder", type=Path, help="where the ledgers are made; else a temporary one")
    parser.add_argument("--ledger", type=Path, help="ask this one, made here before, or make it")
    parser.add_argument("--verify", action="store_true", help="as `millicent doctor --ledger` does, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        row: dict[str, Any] = {**results.environment(), "sqlite": sqlite3.sqlite_version}
        path = options.ledger or Path(folder) / "ledger.db"
        row["receipts"] = receipts = options.receipts
        if not path.exists():
            row["made_in_s"] = make(path, receipts)
        row["bytes_per_receipt"] = round(path.stat().st_size / receipts)
        row["questions_ms"] = ask(LedgerQueries(path), receipts)
        if options.verify:
            start = time.perf_counter()
            row["problems"] = len(LedgerQueries(path).verify())
            row["verified_in_s"] = round(time.perf_counter() - start, 1)
        row["fold_us_per_receipt"] = folding(Path(folder))
        row["writes"] = asyncio.run(write(Path(folder) / "new.db", options.seconds))
        if options.ledger is None:
            row["writes_into_it"] = asyncio.run(write(path, options.seconds))
        row["load_1m_after"] = results.environment()["load_1m"]
    results.write("ledger", row)
    print(msgspec.json.format(msgspec.json.encode(row), indent=2).decode())


if __name__ == "__main__":
    main()
