"""What a page takes on a big ledger: made by `bench/ledger.py --ledger FILE`, and read as the gateway reads it.

    python bench/pages.py FILE [--only WORD] [--record]

Every page, and every question of `millicent report` and `millicent plan`, five times over the application itself,
without a network; times are whole answers' milliseconds, rendering included. `first` is the first time, when nothing
that a page keeps is there yet. The clock stands at the ledger's last receipt, so that "last 24 hours" has some.
`--only` asks those with this word in them; `--record` appends all to bench/results/pages.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import results
from starlette.applications import Starlette

from millicent.config import Config, configured, economics_setting, plan_setup
from millicent.core.clock import NS_PER_S, ManualClock, iso_utc
from millicent.dashboard.alerts import alerts_page
from millicent.dashboard.changed import changes_page
from millicent.dashboard.earnings import margin_page
from millicent.dashboard.features import features_page
from millicent.dashboard.models import models_page
from millicent.dashboard.plan import Planning
from millicent.dashboard.plans import plan_pages
from millicent.dashboard.routes import dashboard_routes
from millicent.dashboard.site import Site
from millicent.dashboard.users import users_page
from millicent.economics.config import PlanConfig
from millicent.economics.forecast import month_end
from millicent.economics.reports import Reports
from millicent.economics.scenarios import Scenarios
from millicent.ledger.queries import LedgerQueries, ReceiptFilter
from millicent.meter.placements import PlacementConfig
from millicent.pipeline.features import FeatureConfig

ROUNDS = 5
PAGES = (
    "/",
    "/?range=1h",
    "/?range=7d",
    "/?range=30d",
    "/?range=all",
    "/?range=30d&zone=Asia/Kolkata",
    "/?feature=feature-3&range=30d",
    "/?user=user-7&range=30d",
    "/receipts",
    "/receipts?range=24h&by=user",
    "/receipts?range=30d&by=user",
    "/receipts?by=user",
    *(
        f"/receipts?{name}"
        for name in (
            "feature=feature-3",
            "model=model-2",
            "user=user-7",
            "team=team-1",
            "key=key-2",
            "tier=tier-1",
            "placement=cpu",
            "status=failed",
            "status=running",
            "status=refused",
            "none=feature",
            "none=user",
            "none=tier",
            "conversation=nobody",
            "run=nobody",
            "feature=nobody",
            "model=nobody",
            "placement=nobody",
            "feature=feature-3&status=succeeded",
            "feature=feature-3&status=interrupted",
            "feature=feature-3&user=user-7",
            "feature=feature-3&user=nobody",
            "model=model-2&user=user-7",
            "model=model-2&user=user-7&range=7d",
            "model=model-2&status=failed&tier=tier-1",
            "user=user-7&status=failed",
            "feature=feature-3&team=team-1",
            "from=2026-02-01T00:07&to=2026-02-01T11:13",
            "user=user-7&range=7d",
            "feature=feature-3&range=30d&by=user",
            "user=user-7&range=30d&by=model",
            "after={middle}",
            "after={oldest}",
            "feature=feature-3&after={middle}",
            "status=failed&after={oldest}",
            "user=user-900&after={oldest}",
        )
    ),
    "/receipts/{newest}",
    "/receipts/{middle}",
    "/receipts/search?q=feature-1",
    "/receipts/search?q=user-77",
    "/receipts/search?q=nothing-is-called-so",
    "/accounts?range=24h",
    "/accounts?range=30d",
    "/chat",
    "/users",
    "/users?range=all",
    "/models",
    "/models?range=all",
    "/features",
    "/features?range=24h",
    "/features?range=30d",
    "/features?range=all",
    "/features?range=30d&zone=Asia/Kolkata",
    "/features/feature-3",
    "/features/feature-3?range=30d",
    "/features/feature-3?range=all",
    "/margin",
    "/margin?by=tier",
    "/margin?by=user",
    "/margin?by=user&range=all",
    "/changes",
    "/plan",
    "/plan?range=all",
    "/plan?feature=feature-3",
    "/plan?latency_target_ms=2000&volume=1000000",
    "/plan/standing",
    "/plan/standing?range=all",
    "/plan/estimate",
    "/plan/estimate?users=1000&calls=10&input_tokens=900&output_tokens=200",
    "/alerts",
)


def application(queries: LedgerQueries, reports: Reports, config: Config, clock: ManualClock, home: Path) -> Starlette:
    async def refresh() -> None:
        return None

    site = Site(
        queries,
        models=lambda: ["one"],
        clock=clock,
        refresh=refresh,
        forecast=lambda where: month_end(queries, where, clock.now_ns()),
    )
    scenarios = Scenarios(home)
    planning = Planning(
        queries,
        clock,
        lambda: plan_setup(config, clock.now_ns()),
        scenarios,
        {"feature-3": 2000},
        lambda: configured(config, queries, scenarios),
        reports.setting.books,
        home,
    )
    # A machine without an engine; neither keys nor budgets.
    machine = config.placements["cpu"].placement("cpu")
    fleet: Any = SimpleNamespace(engines=list, deployments=list, placements=lambda: [machine])
    control: Any = SimpleNamespace(keys=list, budgets=list)
    more: list[Callable[[Site], Any]] = [
        *(partial(page, reports=reports) for page in (features_page, margin_page, changes_page)),
        partial(users_page, control=control, reports=reports),
        partial(models_page, fleet=fleet),
        partial(alerts_page, ask=queries.ask, rules=[], told=[]),
        *plan_pages(planning),
    ]
    return Starlette(routes=dashboard_routes(site, more))


def questions(queries: LedgerQueries, reports: Reports, now_ns: int) -> dict[str, Callable[[], object]]:
    """What the command line asks beside the pages' own."""
    month = ReceiptFilter(from_ns=now_ns - 30 * 86_400 * NS_PER_S)
    told = {"last 30 days": month, "all": ReceiptFilter(), "of a user": ReceiptFilter(user="user-7")}
    day = iso_utc(now_ns)[:10]
    week = iso_utc(now_ns - 7 * 86_400 * NS_PER_S)[:10]
    found: dict[str, Callable[[], object]] = {}
    for name, where in told.items():
        found |= {
            f"report, {name}": partial(queries.totals, "feature", where),
            f"report --by user, {name}": partial(queries.totals, "user", where),
            f"report --by hour, {name}": partial(queries.totals, "hour", where),
            f"report --by conversation, {name}": partial(queries.totals, "conversation", where),
            f"report --predictivity, {name}": partial(queries.role_costs, "feature", where),
            f"report --routing, {name}": partial(queries.coverage, where),
            f"report --cache, {name}": partial(queries.cache_use, where),
            f"report --waste, {name}": partial(queries.waste, where),
            f"report --units, {name}": partial(reports.units, "feature", where, "UTC"),
            f"report --units --by user, {name}": partial(reports.units, "user", where, "UTC"),
            f"report --targets, {name}": partial(reports.targets, where),
        }
    found |= {
        "report --margin": partial(reports.margins, "feature", None),
        "report --drift": lambda: reports.drifts(ReceiptFilter()),
        "report --change, a day": lambda: reports.answer("changes", {"before": week, "after": day}),
        "report --change, a month": lambda: reports.answer("changes", {"before": "2026-02", "after": "2026-03"}),
        "books": queries.books,
    }
    return found


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> tuple[float, float]:
    """Seconds of the clock, and of the processor: on a machine that others use, too, the first says little."""
    at = now()
    return at[0] - start[0], at[1] - start[1]


async def timed(ledger: Path, only: str) -> dict[str, list[float]]:
    """Of each: the first time, the median, the worst, and the median of the processor's."""
    queries = LedgerQueries(ledger)
    [newest] = queries.receipts(ReceiptFilter(), limit=1).receipts
    count = sum(each.requests for each in queries.totals("status", ReceiptFilter()))
    named = {"newest": newest.id, "middle": f"rcpt_{count // 2:026d}", "oldest": f"rcpt_{60:026d}"}
    clock = ManualClock(start_ns=newest.created_at_ns + NS_PER_S)
    config = Config(
        placements={"cpu": PlacementConfig(kind="rented", usd_per_hour=Decimal("0.35"))},
        features={"feature-3": FeatureConfig(cost_target_usd=Decimal("0.001"), latency_target_ms=2000)},
        plans={"tier-1": PlanConfig(price_usd_per_month=Decimal(20), margin_target=Decimal("0.75"))},
    )
    reports = Reports(queries, clock, economics_setting(config))
    found: dict[str, list[float]] = {}

    def note(name: str, times: list[tuple[float, float]]) -> None:
        wall, used = zip(*times, strict=True)
        figures = (wall[0], statistics.median(wall), max(wall), used[0], statistics.median(used))
        found[name] = [round(each * 1000, 1) for each in figures]
        first, median, worst, *processor = found[name]
        print(
            f"{name:62} first {first:8.1f}  median {median:8.1f}  worst {worst:8.1f}  processor {processor}", flush=True
        )

    with tempfile.TemporaryDirectory() as home:
        app = application(queries, reports, config, clock, Path(home))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", follow_redirects=True) as client:
            for page in PAGES:
                if only not in page:
                    continue
                times = []
                for _ in range(ROUNDS):
                    start = now()
                    answer = await client.get(page.format(**named))
                    times.append(since(start))
                    assert answer.status_code == 200, (page, answer.text)
                note(page, times)
    for name, question in questions(queries, reports, clock.now_ns()).items():
        if only in name:
            times = []
            for _ in range(ROUNDS):
                start = now()
                question()
                times.append(since(start))
            note(name, times)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ledger", type=Path)
    parser.add_argument("--only", default="", metavar="WORD")
    parser.add_argument("--record", action="store_true")
    asked = parser.parse_args()
    # A gateway has the ledger open all the while: without one, each question would set up the log's index anew.
    with closing(sqlite3.connect(asked.ledger)) as kept:
        kept.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        found = asyncio.run(timed(asked.ledger, asked.only))
    if asked.record:
        count = sum(each.requests for each in LedgerQueries(asked.ledger).totals("feature", ReceiptFilter()))
        row = results.environment() | {"receipts": count, "first_median_worst_ms": found}
        results.write("pages", row)


if __name__ == "__main__":
    main()
