"""The live page in a real browser: what it shows, and that it keeps no more of many samples than of few."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from millicent.core.clock import SystemClock
from millicent.dashboard.live import live_page
from millicent.dashboard.routes import dashboard_routes
from millicent.dashboard.site import Queries
from millicent.watch.live import FIGURES, KEPT, Live
from support.pages import site_of
from support.watched_gateway import Engines, StandInGateway

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

pytestmark = pytest.mark.browser

# Ten times what the page keeps, sent as fast as it reads.
MANY = 10 * KEPT


def sample(number: int) -> bytes:
    body = {
        "at": "2026-01-01T00:00:00Z",
        "figures": dict.fromkeys(FIGURES, number % 97 + 0.5),
        "trouble": "the engine is restarting" if number % 2 else None,
        "engines": [{"device": "cpu", "state": "ready"}] * (1 + number % 3),
        "deployments": [{"model": "tiny", "placement": "<b>far</b>", "available": bool(number % 2)}],
        "budgets": [{"name": "team", "used": "$1.00", "limit": "$2.00", "percent": 50}] * (number % 4),
    }
    return f"event: sample\ndata: {json.dumps(body)}\n\n".encode()


async def stream() -> AsyncIterator[bytes]:
    yield b'event: history\ndata: {"figures": []}\n\n'
    for start in range(0, MANY, 200):
        yield b"".join(sample(number) for number in range(start, min(start + 200, MANY)))
    yield sample(3)
    await asyncio.sleep(60)


async def events(_: Request) -> Response:
    return StreamingResponse(stream(), media_type="text/event-stream")


@pytest.fixture
def origin(queries: Queries, serving: Callable[[Starlette], AbstractContextManager[str]]) -> Iterator[str]:
    clock = SystemClock()
    live = Live(StandInGateway(), Engines(), lambda _: [], clock)
    pages = dashboard_routes(site_of(queries, clock), [lambda site: live_page(site, live=live)])
    with serving(Starlette(routes=[*pages, Route("/live/events", events)])) as address:
        yield address


def test_a_page_that_stays_open_is_no_larger_than_one_that_was_just_opened(origin: str, browser: Any) -> None:
    elements = "document.querySelectorAll('*').length"
    page = browser.new_page(viewport={"width": 390, "height": 800})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(f"{origin}/live")
    sync_api.expect(page.locator("#now-state")).to_have_text("live", timeout=60_000)
    early = page.evaluate(elements)
    # The last sample's figures, of 3 and a half.
    sync_api.expect(page.locator("#now .number").first).to_have_text("3.5", timeout=60_000)
    page.wait_for_function("document.querySelectorAll('#now-budgets-rows tr').length === 3")
    assert abs(page.evaluate(elements) - early) < 40
    points = page.evaluate("document.querySelector('#now polyline').getAttribute('points').split(' ').length")
    assert points == KEPT
    assert page.locator("#now-trouble").inner_text() == "the engine is restarting"
    assert "tiny at <b>far</b>" in page.locator("#now-engines-rows").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert problems == []
