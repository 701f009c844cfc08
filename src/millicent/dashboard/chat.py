"""A chat with a running meter, beside the receipts that it leaves behind."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from millicent.dashboard.overview import figures_of
from millicent.dashboard.selection import FILTERS
from millicent.dashboard.site import Page, Site

LIVE_ROWS = 15


def chat_page(site: Site) -> Page:
    async def answer(request: Request, template: str) -> Response:
        selection = site.selection(request, FILTERS)
        found = await site.read(lambda: figures_of(site, selection, LIVE_ROWS))
        origin = str(request.base_url).rstrip("/")
        return site.answer(request, template, models=site.models(), origin=origin, path_here="/chat", **found)

    async def show(request: Request) -> Response:
        return await answer(request, "chat.html")

    async def rows(request: Request) -> Response:
        """The live part alone: what its script asks for every two seconds."""
        return await answer(request, "live.html")

    return Page("Chat", "Chat", "/chat", [site.get("/chat", show), site.get("/receipts/rows", rows)], period=False)
