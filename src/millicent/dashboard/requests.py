"""Receipts: a selection of them, one in full, and the selection exported."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from millicent.core.clock import iso_utc
from millicent.core.errors import NotFound
from millicent.dashboard import exports
from millicent.dashboard.overview import totals
from millicent.dashboard.search import SEARCH, search
from millicent.dashboard.selection import GROUPED, PAGED
from millicent.dashboard.site import Page, Site
from millicent.dashboard.timeline import steps_table, timeline
from millicent.ledger.queries import ReceiptPage, Totals

PAGE_ROWS = 50
EXPORT_ROWS = 500


def requests_page(site: Site) -> Page:
    receipts = _Receipts(site)
    routes = [
        site.get("/receipts", receipts.list),
        site.get("/receipts.csv", receipts.as_csv),
        site.get("/receipts.json", receipts.as_json),
        site.get(SEARCH, search(site)),
        site.get("/receipts/{id}", receipts.one),
    ]
    return Page("Requests", "Receipts", "/receipts", routes)


class _Receipts:
    def __init__(self, site: Site) -> None:
        self._site = site
        self._queries = site.queries

    async def list(self, request: Request) -> Response:
        selection = self._site.selection(request, GROUPED, default_range="all")

        def read() -> tuple[ReceiptPage, list[Totals]]:
            page = self._queries.receipts(selection.where, limit=selection.limit or PAGE_ROWS, after=selection.after)
            return page, totals(self._queries, selection.by, selection.where)

        page, groups = await self._site.read(read)
        return self._site.answer(
            request,
            "receipts.html",
            selection=selection,
            page=page,
            groups=groups,
            total=Totals.together(groups),
            models=self._site.models(),
        )

    async def one(self, request: Request) -> Response:
        selection = self._site.selection(request)
        receipt_id = request.path_params["id"]
        receipt = await self._site.read(lambda: self._queries.receipt(receipt_id))
        if receipt is None:
            raise NotFound(
                f"there is no receipt {receipt_id!r} in this ledger; check the identifier, or find it under Receipts"
            )
        steps = self._site.steps(receipt_id)
        line = await self._site.read(lambda: timeline(receipt_id, steps))
        shown = [steps_table(receipt_id, steps)]
        return self._site.answer(
            request, "receipt.html", shown=shown, receipt=receipt, timeline=line, selection=selection
        )

    async def as_csv(self, request: Request) -> Response:
        name = f'attachment; filename="receipts-{iso_utc(self._site.clock.now_ns())[:10]}.csv"'
        body = exports.as_csv(await self._export(request))
        return StreamingResponse(body, media_type="text/csv", headers={"Content-Disposition": name})

    async def as_json(self, request: Request) -> Response:
        return StreamingResponse(exports.as_json(await self._export(request)), media_type="application/json")

    async def _export(self, request: Request) -> Iterator[ReceiptPage]:
        """The selection's pages. The first is read at once, so that a ledger out of reach is told as an error."""
        selection = self._site.selection(request, PAGED, default_range="all")
        pages = exports.pages(
            lambda limit, after: self._queries.receipts(selection.where, limit=limit, after=after),
            after=selection.after,
            limit=selection.limit,
            size=EXPORT_ROWS,
        )
        first = await self._site.read(lambda: next(pages))
        return itertools.chain([first], pages)
