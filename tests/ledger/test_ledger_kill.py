"""Promise 1, against SIGKILL: what was acknowledged is there, once, and settled. (Loss of power cannot be tested here;
that commits are synced is, in test_ledger_writer.)"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from pathlib import Path

from millicent.core.clock import SystemClock
from millicent.core.receipts import Status
from millicent.ledger.config import LedgerConfig
from millicent.ledger.queries import LedgerQueries, ReceiptFilter
from millicent.ledger.sqlite import SqliteLedger

ROUNDS = 10
CHILD = Path(__file__).with_name("kill_child.py")


def killed_after(path: Path, seconds: float) -> tuple[set[str], list[str]]:
    """Receipts whose opening, and whose closing, was acknowledged before the kill."""
    with subprocess.Popen(
        [sys.executable, str(CHILD), str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"},
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        first = child.stdout.readline()
        assert first, child.stderr.read()
        time.sleep(seconds)
        child.kill()
        said = [first, *child.stdout]
    # The last line may have been cut off.
    words = [line.split() for line in said if line.endswith("\n")]
    return {name for verb, name in words if verb == "open"}, [name for verb, name in words if verb == "close"]


def recover(path: Path, number: int) -> None:
    async def scenario() -> None:
        ledger = SqliteLedger(path, LedgerConfig(), SystemClock(), f"gw_recovery_{number}")
        await ledger.start()
        await ledger.stop()

    asyncio.run(scenario())


def test_kills_at_random_instants_lose_double_and_leave_open_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    queries = LedgerQueries(path)
    opened: set[str] = set()
    closed: list[str] = []
    delays = random.Random(20_260_101)
    for number in range(ROUNDS):
        new_opened, new_closed = killed_after(path, delays.uniform(0.01, 0.3))
        opened |= new_opened
        closed += new_closed
        recover(path, number)
        assert queries.verify() == []
        assert queries.count_open() == 0
    receipts = {receipt.id: receipt for receipt in queries.receipts(ReceiptFilter(), limit=1_000_000).receipts}
    assert len(opened) >= ROUNDS
    assert len(closed) == len(set(closed))
    assert opened <= receipts.keys()
    assert {receipts[receipt_id].status for receipt_id in closed} == {Status.SUCCEEDED}
    assert {receipt.status for receipt in receipts.values()} <= {Status.SUCCEEDED, Status.INTERRUPTED}
    accounts = queries.accounts(0, 2**62)
    assert sum(account.serving_ns for account in accounts) == sum(
        receipt.accelerator.serving_ns for receipt in receipts.values()
    )
    for account in accounts:
        assert account.idle_ns >= 0
    (total,) = queries.totals("model", ReceiptFilter())
    amounts = [receipt.total for receipt in receipts.values()]
    assert total.requests == len(receipts)
    assert total.cost.nanousd == sum(amount.nanousd for amount in amounts if amount is not None)
