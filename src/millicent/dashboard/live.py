"""What goes on now. The page is whole without its script, which only keeps it current."""

from __future__ import annotations

from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from millicent.dashboard.site import Page, Site
from millicent.watch.live import FIGURES


class Watched(Protocol):
    """`watch.live.Live`."""

    def now(self) -> dict[str, Any]: ...


def live_page(site: Site, *, live: Watched) -> Page:
    async def show(request: Request) -> Response:
        site.selection(request, frozenset())
        return site.answer(request, "now.html", figures=FIGURES, sample=live.now())

    return Page("Alerts", "Live", "/live", [site.get("/live", show)], period=False)
