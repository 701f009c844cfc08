"""What a page takes on a big ledger: made by `bench/ledger.py --ledger FILE`, and read as the gateway reads it.

    python bench/pages.py FILE [--record]

Each page is asked for five times over the application itself, without a network; its times, in milliseconds, are the
whole answer's, rendering included. The clock stands at the ledger's last receipt, so that "last 24 hours" has some.
`--record` appends them to bench/results/pages.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from pathlib import Path

import httpx
import results
from starlette.applications import Starlette

from millicent.core.clock import NS_PER_S, ManualClock
from millicent.dashboard.routes import dashboard_routes
from millicent.dashboard.site import Site
from millicent.ledger.queries import LedgerQueries, ReceiptFilter

ROUNDS = 5
PAGES = (
    "/",
    "/?range=30d",
    "/?range=all",
    "/?range=30d&zone=Asia/Kolkata",
    "/?feature=feature-3&range=30d",
    "/receipts",
    "/receipts?user=user-7",
    "/receipts?feature=feature-3&status=succeeded",
    "/receipts?range=24h&by=user",
    "/receipts/{}",
    "/accounts?range=24h",
    "/chat",
)


async def timed(ledger: Path) -> dict[str, float]:
    queries = LedgerQueries(ledger)
    [newest] = queries.receipts(ReceiptFilter(), limit=1).receipts
    clock = ManualClock(start_ns=newest.created_at_ns + NS_PER_S)

    async def refresh() -> None:
        return None

    site = Site(queries, models=lambda: ["one"], clock=clock, refresh=refresh)
    app = Starlette(routes=dashboard_routes(site))
    found = {}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        for page in PAGES:
            path = page.format(newest.id)
            times = []
            for _ in range(ROUNDS):
                start = time.perf_counter()
                answer = await client.get(path)
                times.append((time.perf_counter() - start) * 1000)
                assert answer.status_code == 200, (path, answer.text)
            found[page] = round(statistics.median(times), 1)
            print(f"{page:50} {found[page]:8.1f} ms (worst {max(times):.1f})")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ledger", type=Path)
    parser.add_argument("--record", action="store_true")
    asked = parser.parse_args()
    found = asyncio.run(timed(asked.ledger))
    if asked.record:
        count = sum(each.requests for each in LedgerQueries(asked.ledger).totals("feature", ReceiptFilter()))
        results.write("pages", results.environment() | {"receipts": count, "median_ms": found})


if __name__ == "__main__":
    main()
