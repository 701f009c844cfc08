"""Kill a gateway under load, again and again, and ask its ledger what it still knows."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from millicent.core.clock import SystemClock
from millicent.core.receipts import Receipt, Status
from millicent.ledger.config import LedgerConfig
from millicent.ledger.queries import LedgerQueries, ReceiptFilter
from millicent.ledger.sqlite import SqliteLedger
from support.ports import free_port

GATEWAY = Path(__file__).with_name("fake_gateway.py")
RATE_PER_S = 200
_BODY = json.dumps({"model": "fake", "messages": [{"role": "user", "content": "hi"}]}).encode()
_REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(_BODY), _BODY)
)


def kill_rounds(home: Path, rounds: int, seed: int) -> tuple[int, int]:
    """Kill at random instants under about 200 requests/s, `rounds` times over one ledger. How many answers were
    complete, and how many receipts there are; AssertionError where one is missing, doubled or open."""
    delays = random.Random(seed)
    answered: list[str] = []
    for _ in range(rounds):
        answered += asyncio.run(_round(home, delays.uniform(0.05, 0.6)))
    asyncio.run(_settle(home))
    queries = LedgerQueries(home / "ledger.db")
    assert queries.verify() == []
    assert queries.count_open() == 0
    receipts = {receipt.id: receipt for receipt in _all(queries)}
    assert len(answered) == len(set(answered)), "an answer was given under another's receipt"
    for receipt_id in answered:
        assert receipt_id in receipts, f"{receipt_id} was answered and is missing"
        assert receipts[receipt_id].status is Status.SUCCEEDED, f"{receipt_id} was answered and isn't settled so"
    (total,) = queries.totals("model", ReceiptFilter())
    amounts = [receipt.total for receipt in receipts.values()]
    assert total.requests == len(receipts)
    assert total.cost.nanousd == sum(amount.nanousd for amount in amounts if amount is not None)
    serving_ns = sum(receipt.accelerator.serving_ns for receipt in receipts.values())
    assert sum(account.serving_ns for account in queries.accounts(0, 2**62)) == serving_ns
    return len(answered), len(receipts)


async def _round(home: Path, seconds: float) -> list[str]:
    port = free_port()
    gateway = subprocess.Popen(  # noqa: ASYNC220 - nothing else runs yet
        [sys.executable, str(GATEWAY), str(home), str(port)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
    )
    try:
        assert gateway.stdout is not None
        assert await asyncio.to_thread(gateway.stdout.readline) == b"ready\n"
        requests = [asyncio.create_task(_ask(port))]
        await requests[0]  # on a slow machine, too, one is answered
        start = time.monotonic()
        while (now := time.monotonic() - start) < seconds:
            due = int(now * RATE_PER_S) + 1
            requests += [asyncio.create_task(_ask(port)) for _ in range(due - len(requests))]
            await asyncio.sleep(1 / RATE_PER_S)
    finally:
        gateway.kill()
        await asyncio.to_thread(gateway.wait)
        if gateway.stdout is not None:
            gateway.stdout.close()
    return [receipt_id for receipt_id in await asyncio.gather(*requests) if receipt_id]


async def _ask(port: int) -> str | None:
    """The receipt of an answer that came whole; None when the kill was quicker."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(_REQUEST)
        answer = await reader.read()
        writer.close()
    except OSError:
        return None
    head, _, body = answer.partition(b"\r\n\r\n")
    headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
    if len(body) < int(headers.get(b"content-length", b"1")):
        return None
    assert head.startswith(b"HTTP/1.1 200"), answer
    return headers[b"x-millicent-receipt"].decode()


async def _settle(home: Path) -> None:
    clock = SystemClock()
    ledger = SqliteLedger(home / "ledger.db", LedgerConfig(), clock, "gw_settling")
    await ledger.start()
    await ledger.stop()


def _all(queries: LedgerQueries) -> list[Receipt]:
    receipts: list[Receipt] = []
    after = None
    while True:
        page = queries.receipts(ReceiptFilter(), limit=1000, after=after)
        receipts += page.receipts
        after = page.next
        if after is None:
            return receipts
