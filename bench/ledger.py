"""The ledger at scale: how fast receipts go in, what durability adds to a request, and what reports and pages cost.

    python bench/ledger.py [--receipts 1000000] [--folder DIR]

The big ledger is made by SQL (90 days, 1,000 users, 20 features, 5 teams, 8 models, 3 tiers; one line each) and taken
into the rollups by the ledger itself. Questions are asked on a connection of their own, each several times. Writes go
through `SqliteLedger` with durability across power loss. Medians and 99th percentiles go to bench/results/ledger.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import results

from millicent.core.clock import NS_PER_S, SystemClock
from millicent.core.identifiers import SystemIds
from millicent.core.money import Money
from millicent.core.receipts import Accelerator, Attempt, HourShare, Line, Meter, Receipt, Role, Status
from millicent.core.request import Attribution
from millicent.core.usage import Provenance, Usage
from millicent.ledger import rollups
from millicent.ledger.config import LedgerConfig
from millicent.ledger.queries import LedgerQueries, ReceiptFilter
from millicent.ledger.schema import migrate, open_writer
from millicent.ledger.sqlite import SqliteLedger

DAYS = 90
DAY_NS = 86_400 * NS_PER_S
FIRST_NS = 1_767_225_600 * NS_PER_S

_RECEIPTS = """
    WITH RECURSIVE n (i) AS (SELECT ? UNION ALL SELECT i + 1 FROM n WHERE i + 1 < ?)
    INSERT INTO receipts SELECT
        printf('rcpt_%026d', i), 'gw', ? + i * ?, NULL, ? + i * ? + 1, iif(i % 50, 'succeeded', 'failed'),
        'model-' || (i * 7919 % 8), 'm', 'gpu', 'local', 'openai', 1, 'stop',
        'key-' || (i * 7919 % 5), 'team-' || (i * 7919 % 5), 'user-' || (i * 104729 % 1000),
        'feature-' || (i * 7919 % 20), 'tier-' || (i % 3), NULL, NULL, '{}',
        '{"leaves":{"input_fresh":{"tokens":900,"provenance":"measured"}}}', 900, 200, 1, 2, 3, 4, 0, 0, 0, 9, 30,
        'measured', NULL, 'unknown', NULL, NULL, '{}', 'busy', 'placements.gpu', '{}', NULL, NULL, 0, NULL, NULL FROM n
"""
_LINES = """
    WITH RECURSIVE n (i) AS (SELECT ? UNION ALL SELECT i + 1 FROM n WHERE i + 1 < ?)
    INSERT INTO lines SELECT printf('rcpt_%026d', i), 0, 1, 'inference', 'accelerator', '0.5', 'second', '0.0001',
        50000 + i % 977, 'measured', ? + i * ?, ? + i * ?, 'actual', NULL, NULL FROM n
"""


def make(path: Path, receipts: int) -> float:
    """Seconds that the ledger took to take its receipts into the rollups."""
    connection = open_writer(path, LedgerConfig(durability="process"))
    migrate(connection, SystemClock())
    apart_ns = DAYS * DAY_NS // receipts
    connection.execute("PRAGMA synchronous = OFF")
    for start in range(0, receipts, 100_000):
        stop = min(receipts, start + 100_000)
        connection.execute("BEGIN")
        times = (FIRST_NS, apart_ns, FIRST_NS, apart_ns)
        connection.execute(_RECEIPTS, (start, stop, *times))
        connection.execute(_LINES, (start, stop, *times))
        connection.execute("COMMIT")
    # As if an older version had written them.
    connection.execute("UPDATE rollup_progress SET raw_before_ns = (SELECT max(created_at_ns) + 1 FROM receipts)")
    began = time.perf_counter()
    while not rollups.is_complete(connection):
        connection.execute("BEGIN")
        rollups.fold(connection)
        connection.execute("COMMIT")
    took = time.perf_counter() - began
    connection.close()
    return took


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
        "by day in Berlin": lambda: queries.totals("day", ReceiptFilter(), zone="Europe/Berlin"),
        "by hour of a feature, 7 days": lambda: queries.totals(
            "hour", msgspec.structs.replace(week, feature="feature-3")
        ),
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
        attempt = Attempt(1, "local", "cpu", "m", Role.INFERENCE, now_ns)
        receipt = Receipt(
            id=self.ids.new("rcpt"),
            created_at_ns=now_ns,
            model="m",
            placement="cpu",
            dialect="openai",
            stream=True,
            attempts=(attempt,),
            attribution=Attribution(user=f"user-{self.number % 1000}", feature=f"feature-{self.number % 20}"),
        )
        start = time.perf_counter()
        await self.ledger.open(receipt)
        line = Line(
            1, Role.INFERENCE, Meter.ACCELERATOR, Decimal("0.5"), "second", Decimal("0.0001"), Money(50_000),
            Provenance.MEASURED, now_ns, now_ns,
        )  # fmt: skip
        closed = msgspec.structs.replace(
            receipt,
            status=Status.SUCCEEDED,
            settled_at_ns=now_ns + 1,
            usage=Usage.of(Provenance.MEASURED, input_fresh=900, output_text=200),
            accelerator=Accelerator(500, 200, 300, 9, 30, Provenance.MEASURED),
            lines=(line,),
            attempts=(msgspec.structs.replace(attempt, ended_at_ns=now_ns + 1, status=Status.SUCCEEDED),),
        )
        await self.ledger.close(closed, (HourShare(1, "sess", now_ns - now_ns % (3600 * NS_PER_S), 500),))
        return time.perf_counter() - start


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
    start, added = time.perf_counter(), []
    for number in range(int(500 * seconds)):
        await asyncio.sleep(max(0.0, start + number / 500 - time.perf_counter()))
        added.append(asyncio.ensure_future(requests.one()))
    waits = sorted(await asyncio.gather(*added))
    await ledger.stop()
    return {
        "receipts_per_s": round(sum(counts) / took),
        "cpu_us_per_receipt": round(used / sum(counts) * 1e6, 1),
        "durability_ms_at_500_per_s": {
            "p50": round(waits[len(waits) // 2] * 1e3, 2),
            "p99": round(waits[len(waits) * 99 // 100] * 1e3, 2),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--receipts", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each way of writing")
    parser.add_argument("--folder", type=Path, help="where the ledgers are made; else a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        row: dict[str, Any] = {**results.environment(), "sqlite": sqlite3.sqlite_version, "receipts": options.receipts}
        row["writes"] = asyncio.run(write(Path(folder) / "new.db", options.seconds))
        path = Path(folder) / "ledger.db"
        row["backfill_receipts_per_s"] = round(options.receipts / make(path, options.receipts))
        row["bytes_per_receipt"] = round(path.stat().st_size / options.receipts)
        row["writes_into_it"] = asyncio.run(write(path, options.seconds))
        row["questions_ms"] = ask(LedgerQueries(path), options.receipts)
        row["load_1m_after"] = results.environment()["load_1m"]
    results.write("ledger", row)
    print(msgspec.json.format(msgspec.json.encode(row), indent=2).decode())


if __name__ == "__main__":
    main()
