"""The pages' routes. Read only: they ask the ledger's queries and never the network; the browser's chat calls the
same public API as everyone else."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from millicent.core.accounts import Account
from millicent.core.clock import NS_PER_HOUR, Clock, hour_start_ns, iso_utc
from millicent.core.errors import LedgerUnavailable, MillicentError, NotFound
from millicent.core.money import ZERO, Money
from millicent.core.receipts import Receipt, Status
from millicent.core.usage import Provenance, weakest
from millicent.dashboard import exports, figures
from millicent.dashboard.selection import FIELDS, FILTERS, GROUPED, GROUPS, PAGED, RANGES, TIMES, Selection, parse
from millicent.ledger.queries import GroupBy, ReceiptFilter, ReceiptPage, Totals

LIVE_ROWS = 15
PAGE_ROWS = 50
EXPORT_ROWS = 500

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}

_HERE = Path(__file__).parent


class Queries(Protocol):
    """What the pages ask of the ledger: the methods of `ledger.queries.LedgerQueries`."""

    def receipt(self, receipt_id: str) -> Receipt | None: ...

    def receipts(self, where: ReceiptFilter, *, limit: int = 50, after: str | None = None) -> ReceiptPage: ...

    def totals(self, by: GroupBy, where: ReceiptFilter) -> list[Totals]: ...

    def accounts(self, from_ns: int, to_ns: int) -> list[Account]: ...


def dashboard_routes(
    queries: Queries, *, models: Callable[[], list[str]], clock: Clock, refresh: Callable[[], Awaitable[None]]
) -> list[BaseRoute]:
    """Routes for `/`, `/receipts`, `/accounts` and `/static`. `models` names those that can be chatted with, the
    default first; `refresh` asks the writer for a checkpoint, so that accounts reach up to now."""
    pages = _Pages(queries, models, clock, refresh)
    guarded = [Middleware(_SecurityHeaders)]

    def page(path: str, handler: Callable[[Request], Awaitable[Response]]) -> Route:
        return Route(path, pages.told(handler), methods=["GET"], middleware=guarded)

    return [
        page("/", pages.overview),
        page("/receipts", pages.receipts),
        page("/receipts.csv", pages.receipts_csv),
        page("/receipts.json", pages.receipts_json),
        page("/receipts/rows", pages.rows),
        page("/receipts/{id}", pages.receipt),
        page("/accounts", pages.accounts),
        Mount("/static", StaticFiles(directory=_HERE / "static"), middleware=guarded, name="static"),
    ]


def sign_in_page(following: str, problem: MillicentError | None, signed_in: bool) -> Response:
    """Where a browser shows its key. `following` is where it wanted to go."""
    page = _environment().get_template("sign_in.html")
    status = 200 if problem is None else problem.status
    response = HTMLResponse(page.render(following=following, problem=problem, signed_in=signed_in), status)
    response.headers.update(SECURITY_HEADERS | {"Cache-Control": "no-store"})
    return response


class _SecurityHeaders:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-cache")
            await send(message)

        await self._app(scope, receive, send_guarded)


class _Pages:
    def __init__(
        self, queries: Queries, models: Callable[[], list[str]], clock: Clock, refresh: Callable[[], Awaitable[None]]
    ) -> None:
        self._queries = queries
        self._models = models
        self._clock = clock
        self._refresh = refresh
        self._templates = _environment()

    def told(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """The handler, with our errors told on a page of their own."""

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except MillicentError as error:
                response = self._error(request.url.path, error)
                if error.retry_after_s is not None:
                    response.headers["Retry-After"] = str(error.retry_after_s)
                return response

        return handle

    def _error(self, path: str, error: MillicentError) -> Response:
        if path.endswith(".json"):
            told = {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}
            return JSONResponse({"error": told}, error.status)
        return self._render("error.html", status=error.status, error=error, path=path)

    async def overview(self, request: Request) -> Response:
        selection = self._selection(request, FILTERS, default_range="24h")
        live = await run_in_threadpool(self._live, selection)
        return self._render("overview.html", models=self._models(), origin=str(request.base_url).rstrip("/"), **live)

    async def rows(self, request: Request) -> Response:
        """The live part of the overview, alone: what its script asks for every two seconds."""
        selection = self._selection(request, FILTERS, default_range="24h")
        live = await run_in_threadpool(self._live, selection)
        return self._render("live.html", origin=str(request.base_url).rstrip("/"), **live)

    def _live(self, selection: Selection) -> dict[str, Any]:
        now_ns = self._clock.now_ns()
        by_feature = self._totals("feature", selection.where)
        page = self._queries.receipts(selection.where, limit=LIVE_ROWS)
        empty = not page.receipts and not self._queries.receipts(ReceiptFilter(), limit=1).receipts
        return {
            "selection": selection,
            "receipts": page.receipts,
            "more": page.next is not None,
            "by_feature": by_feature,
            "by_model": self._totals("model", selection.where),
            "total": _sum(by_feature),
            "assumed_rates": self._assumed_rates(now_ns),
            "empty": empty,
            "first_model": next(iter(self._models()), "MODEL"),
            "now_ns": now_ns,
        }

    def _assumed_rates(self, now_ns: int) -> list[Account]:
        """The latest account of each placement that runs at an assumed rate."""
        recent = self._queries.accounts(hour_start_ns(now_ns) - NS_PER_HOUR, now_ns + 1)
        latest = {account.placement: account for account in sorted(recent, key=lambda account: account.hour_ns)}
        return [account for account in latest.values() if account.rate_provenance is Provenance.ASSUMED]

    def _totals(self, by: GroupBy, where: ReceiptFilter) -> list[Totals]:
        return sorted(self._queries.totals(by, where), key=lambda group: (-group.cost.nanousd, -group.requests))

    async def receipts(self, request: Request) -> Response:
        selection = self._selection(request, GROUPED, default_range="all")

        def read() -> tuple[ReceiptPage, list[Totals]]:
            page = self._queries.receipts(selection.where, limit=selection.limit or PAGE_ROWS, after=selection.after)
            return page, self._totals(selection.by, selection.where)

        page, groups = await run_in_threadpool(read)
        return self._render(
            "receipts.html",
            selection=selection,
            page=page,
            groups=groups,
            total=_sum(groups),
            models=self._models(),
            now_ns=self._clock.now_ns(),
        )

    async def receipts_csv(self, request: Request) -> Response:
        name = f'attachment; filename="receipts-{iso_utc(self._clock.now_ns())[:10]}.csv"'
        body = exports.as_csv(await self._export(request))
        return StreamingResponse(body, media_type="text/csv", headers={"Content-Disposition": name})

    async def receipts_json(self, request: Request) -> Response:
        return StreamingResponse(exports.as_json(await self._export(request)), media_type="application/json")

    async def _export(self, request: Request) -> Iterator[ReceiptPage]:
        """The selection's pages. The first is read at once, so that a ledger out of reach is told as an error."""
        selection = self._selection(request, PAGED, default_range="all")
        pages = exports.pages(
            lambda limit, after: self._queries.receipts(selection.where, limit=limit, after=after),
            after=selection.after,
            limit=selection.limit,
            size=EXPORT_ROWS,
        )
        first = await run_in_threadpool(next, pages)
        return itertools.chain([first], pages)

    async def receipt(self, request: Request) -> Response:
        receipt_id = request.path_params["id"]
        receipt = await run_in_threadpool(self._queries.receipt, receipt_id)
        if receipt is None:
            raise NotFound(
                f"there is no receipt {receipt_id!r} in this ledger; check the identifier, or find it under Receipts"
            )
        return self._render("receipt.html", receipt=receipt, now_ns=self._clock.now_ns())

    async def accounts(self, request: Request) -> Response:
        selection = self._selection(request, TIMES, default_range="24h")
        stale = None
        try:
            await self._refresh()
        except LedgerUnavailable as error:
            stale = error.message
        now_ns = self._clock.now_ns()
        from_ns = hour_start_ns(selection.where.from_ns or 0)
        to_ns = now_ns + 1 if selection.where.to_ns is None else selection.where.to_ns
        accounts = await run_in_threadpool(self._queries.accounts, from_ns, to_ns)
        devices: dict[tuple[str, str], list[Account]] = {}
        for account in sorted(accounts, key=lambda account: (account.device, account.placement, -account.hour_ns)):
            devices.setdefault((account.device, account.placement), []).append(account)
        return self._render("accounts.html", selection=selection, devices=devices, stale=stale, now_ns=now_ns)

    def _selection(self, request: Request, known: frozenset[str], *, default_range: str) -> Selection:
        return parse(
            request.query_params.multi_items(), known, now_ns=self._clock.now_ns(), default_range=default_range
        )

    def _render(self, template: str, *, status: int = 200, **values: Any) -> HTMLResponse:
        return HTMLResponse(self._templates.get_template(template).render(**values), status_code=status)


def _sum(groups: list[Totals]) -> Totals:
    return Totals(
        group=None,
        requests=sum(group.requests for group in groups),
        input_tokens=sum(group.input_tokens for group in groups),
        output_tokens=sum(group.output_tokens for group in groups),
        serving_ns=sum(group.serving_ns for group in groups),
        cost=Money.total(group.cost for group in groups),
        unpriced=sum(group.unpriced for group in groups),
        assumed=sum(group.assumed for group in groups),
        unknown_usage=sum(group.unknown_usage for group in groups),
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        amount=figures.amount,
        count=figures.count,
        duration=figures.duration,
        seconds=figures.seconds,
        rate=figures.rate,
        usd_column=figures.usd_column,
        when=figures.when,
        when_hour=figures.when_hour,
        iso=iso_utc,
        total_provenance=figures.total_provenance,
        usage_provenance=figures.usage_provenance,
        bar=figures.bar,
        timing_parts=figures.timing_parts,
        account_parts=figures.account_parts,
        balances=figures.balances,
        plural=figures.plural,
        price=figures.price,
        wall_sum=figures.wall_sum,
        weakest=weakest,
    )
    environment.globals.update(
        when_short=figures.when_short,
        meanings=figures.MEANINGS,
        provenances=list(Provenance),
        statuses=[status.value for status in Status],
        fields=FIELDS,
        group_names=GROUPS,
        ranges=RANGES,
        zero=ZERO,
        money_total=Money.total,
        hour_ns=NS_PER_HOUR,
    )
    return environment
