"""Pages without a server around them, and how they are read."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.testclient import TestClient

from millicent.core.clock import Clock
from millicent.dashboard.plan import Planning
from millicent.dashboard.routes import PageMaker, dashboard_routes
from millicent.dashboard.site import Queries, Site
from millicent.economics.capacity import Slots
from millicent.economics.margin import Books
from millicent.economics.scenarios import Scenarios
from millicent.economics.standing import Configured
from millicent.economics.where import Setup
from millicent.ledger.queries import LedgerQueries
from millicent.meter.prices import PriceBook

NO_SETUP = Setup({}, (), {}, PriceBook({}), Slots(8, 512))


async def nothing() -> None:
    """What a checkpoint is where nobody meters."""


def site_of(queries: Queries, clock: Clock, **more: Any) -> Site:
    given: dict[str, Any] = {"models": list, "refresh": nothing, **more}
    return Site(queries, clock=clock, **given)


def pages_of(site: Site, *makers: PageMaker) -> TestClient:
    """A browser that follows no redirect."""
    return TestClient(Starlette(routes=dashboard_routes(site, makers)), follow_redirects=False)


def planning_of(
    home: Path,
    clock: Clock,
    setup: Callable[[], Setup] = lambda: NO_SETUP,
    latency_targets_ms: dict[str, int] | None = None,
    configured: Callable[[], Configured] = Configured,
) -> Planning:
    """Of the ledger in a home, with nothing configured but what is said."""
    queries, targets = LedgerQueries(home / "ledger.db"), latency_targets_ms or {}
    return Planning(queries, clock, setup, Scenarios(home), targets, configured, Books(), home)


def words(page: str) -> str:
    """A page's text as a person reads it."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def exported(client: TestClient, path: str) -> list[dict[str, str]]:
    """A table's rows, as CSV has them."""
    return list(csv.DictReader(io.StringIO(client.get(path).text)))
