"""What every page is given, and how a page joins the others: see docs/pages.md, "How to add a page"."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import parse_qsl, urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from millicent.core.accounts import Account
from millicent.core.clock import NS_PER_HOUR, Clock, iso_utc
from millicent.core.errors import Forbidden, InvalidRequest, MillicentError, NotFound
from millicent.core.money import ZERO, Money
from millicent.core.receipts import Receipt, Status
from millicent.core.steps import SeenStep
from millicent.core.usage import weakest
from millicent.dashboard import figures, zones
from millicent.dashboard.charts import Chart, Drawing, draw
from millicent.dashboard.selection import FIELDS, GROUPS, RANGES, TIMES, Selection, parse
from millicent.dashboard.tables import Table, as_csv
from millicent.economics.forecast import Forecast
from millicent.ledger.queries import GroupBy, ReceiptFilter, ReceiptPage, Totals

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]
FormHandler = Callable[[Request, Mapping[str, str]], Awaitable[Response]]

# The entries of the navigation, in order. One is shown once a page stands under it.
NAV = (
    "Overview",
    "Features",
    "Users & keys",
    "Models & placements",
    "Requests",
    "Plan",
    "Alerts",
    "Settings",
    "Chat",
)
CSV = "csv"  # the parameter that asks for a page's table or chart as CSV
_MAX_FORM = 64 << 10

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

    def totals(self, by: GroupBy, where: ReceiptFilter, book: str = "actual", *, zone: str = "UTC") -> list[Totals]: ...

    def accounts(self, from_ns: int, to_ns: int) -> list[Account]: ...


class Visitor(Protocol):
    """Who looks at a page. `form_token` must come back with every form of theirs."""

    @property
    def key(self) -> str | None: ...

    @property
    def administers(self) -> bool: ...

    @property
    def form_token(self) -> str: ...


class Alone(NamedTuple):
    """Who there is where nobody signs in: without a server around the pages."""

    key: str | None = None
    administers: bool = True
    form_token: str = ""


class Page(NamedTuple):
    """`nav` is one of NAV. Pages under the same entry stand beside each other below it, by their titles; the first is
    where the entry leads. `period`: its address takes a time range, which is kept on the way to it."""

    nav: str
    title: str
    path: str
    routes: Sequence[Route]
    period: bool = True


class Shown(NamedTuple):
    """A chart or table in a template, for the macros `chart` and `table`."""

    of: Chart | Table
    table: Table
    drawing: Drawing | None
    csv: str


class Site:
    """The pages, together. `models` names those that can be chatted with, the default first; `refresh` asks the writer
    for a checkpoint, so that accounts reach up to now; `steps` are those of a receipt that are still remembered;
    `forecast` is the month's cost of what a filter selects; `demo`: nothing here really happened, and every page says
    so."""

    def __init__(
        self,
        queries: Queries,
        *,
        models: Callable[[], list[str]],
        clock: Clock,
        refresh: Callable[[], Awaitable[None]],
        visitor: Callable[[Scope], Visitor] = lambda _: Alone(),
        steps: Callable[[str], Sequence[SeenStep]] = lambda _: (),
        forecast: Callable[[ReceiptFilter], Forecast | None] = lambda _: None,
        demo: bool = False,
    ) -> None:
        self.queries = queries
        self.models = models
        self.clock = clock
        self.refresh = refresh
        self.visitor = visitor
        self.steps = steps
        self.forecast = forecast
        self.demo = demo
        self.pages: list[Page] = []
        self._templates = environment()

    def add(self, pages: Sequence[Page]) -> None:
        self.pages += sorted(pages, key=lambda page: NAV.index(page.nav))

    def get(self, path: str, handler: Handler) -> Route:
        return Route(path, self._told(handler), methods=["GET"], middleware=[Middleware(SecurityHeaders)])

    def post(self, path: str, handler: FormHandler) -> Route:
        """A form of a page: only admins', and only from a page of ours that was made for them."""

        async def handle(request: Request) -> Response:
            visitor = self.visitor(request.scope)
            if not visitor.administers:
                raise Forbidden("only admins may change this: sign in with an admin key", code="scope")
            form = await _form(request)
            if not hmac.compare_digest(form.get("form_token", "").encode(), visitor.form_token.encode()):
                raise Forbidden("this form wasn't made for this session: open its page again, and send it from there")
            return await handler(request, form)

        return Route(path, self._told(handle), methods=["POST"], middleware=[Middleware(SecurityHeaders)])

    async def read(self, question: Callable[[], T]) -> T:
        """Ask the ledger in a thread."""
        return await run_in_threadpool(question)

    def selection(self, request: Request, known: frozenset[str] = TIMES, *, default_range: str = "24h") -> Selection:
        """What the address asks for; a parameter that isn't `known` is refused by name."""
        asked = [(name, value) for name, value in request.query_params.multi_items() if name != CSV]
        return parse(asked, known, now_ns=self.clock.now_ns(), default_range=default_range)

    def exporting(self, request: Request) -> bool:
        """Whether a table is asked for whole, as CSV."""
        return CSV in request.query_params

    def answer(
        self, request: Request, template: str, *, shown: Sequence[Chart | Table] = (), status: int = 200, **values: Any
    ) -> Response:
        """The page; or, where the address has `csv=NAME`, what is `shown` by that name. Templates find these in `shown`
        by name, the visitor, and `now_ns`."""
        if wanted := request.query_params.get(CSV):
            return self._csv(wanted, shown)
        address = [(name, value) for name, value in request.query_params.multi_items() if value]
        by_name = {
            each.name: Shown(
                each,
                each.table(),
                draw(each) if isinstance(each, Chart) else None,
                f"{request.url.path}?{urlencode([*address, (CSV, each.name)])}",
            )
            for each in shown
        }
        visitor = self.visitor(request.scope)
        with zones.shown_in(values["selection"].zone if "selection" in values else "UTC"):
            page = self._templates.get_template(template).render(
                shown=by_name,
                visitor=visitor,
                demo=self.demo,
                path=request.url.path,
                navigation=self._navigation(request),
                beside=self._beside(request),
                now_ns=self.clock.now_ns(),
                **values,
            )
        return HTMLResponse(page, status)

    def redirect(self, path: str) -> Response:
        """After a form: the page is asked for anew, and reloading it sends nothing twice."""
        return RedirectResponse(path, 303)

    def _csv(self, wanted: str, shown: Sequence[Chart | Table]) -> Response:
        for each in shown:
            if each.name == wanted:
                name = f"{each.name}-{iso_utc(self.clock.now_ns())[:10]}.csv"
                headers = {"Content-Disposition": f'attachment; filename="{name}"'}
                return Response("".join(as_csv(each.table())), media_type="text/csv", headers=headers)
        names = ", ".join(each.name for each in shown) or "none"
        raise NotFound(f"this page has no table {wanted!r} to export: it has {names}")

    def _here(self, path: str) -> Page | None:
        """The page of this address: its own, or the one that it stands below."""
        found = [
            page for page in self.pages if path == page.path or (page.path != "/" and path.startswith(f"{page.path}/"))
        ]
        return max(found, key=lambda page: len(page.path), default=None)

    def _navigation(self, request: Request) -> list[tuple[str, str, bool]]:
        """Name, address and whether one is there, of each entry that has a page."""
        here = self._here(request.url.path)
        first: dict[str, Page] = {}
        for page in self.pages:
            first.setdefault(page.nav, page)
        return [(nav, _link(first[nav], request), here is not None and nav == here.nav) for nav in NAV if nav in first]

    def _beside(self, request: Request) -> list[tuple[str, str, bool]]:
        """The same of the pages under this page's entry, where there are several."""
        here = self._here(request.url.path)
        pages = [page for page in self.pages if here is not None and page.nav == here.nav]
        return [(page.title, _link(page, request), page is here) for page in pages] if len(pages) > 1 else []

    def _told(self, handler: Handler) -> Handler:
        """The handler, with our errors told on a page of their own."""

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except MillicentError as error:
                response = self._error(request, error)
                if error.retry_after_s is not None:
                    response.headers["Retry-After"] = str(error.retry_after_s)
                return response

        return handle

    def _error(self, request: Request, error: MillicentError) -> Response:
        if request.url.path.endswith(".json"):
            told = {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}
            return JSONResponse({"error": told}, error.status)
        if request.method == "POST":  # there is nothing to go back to but the form's page
            here = self._here(request.url.path)
            request = Request({**request.scope, "path": "/" if here is None else here.path})
        without_csv = Request({**request.scope, "query_string": b""})
        return self.answer(without_csv, "error.html", status=error.status, error=error)


class SecurityHeaders:
    """A strict policy on everything that a browser opens: nothing from elsewhere, nothing inline, in no frame."""

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


async def _form(request: Request) -> dict[str, str]:
    """What a form sent, each field once. Raises InvalidRequest."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-www-form-urlencoded":
        raise InvalidRequest("this address takes a form: send application/x-www-form-urlencoded")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _MAX_FORM:
            raise InvalidRequest(f"the form is larger than {_MAX_FORM >> 10} KB: leave something out")
    return dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True))


def _link(page: Page, request: Request) -> str:
    if not page.period:
        return page.path
    kept = [(name, value) for name, value in request.query_params.multi_items() if name in TIMES and value]
    return f"{page.path}?{urlencode(kept)}" if kept else page.path


def environment() -> Environment:
    """The templates, with what they use by name."""
    made = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        amount=figures.amount,
        count=figures.count,
        duration=figures.duration,
        percent=figures.percent,
        slot=figures.slot,
        seconds=figures.seconds,
        rate=figures.rate,
        usd_column=figures.usd_column,
        when=zones.when,
        when_hour=zones.when_hour,
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
    made.globals.update(
        when_short=zones.when_short,
        zone_name=zones.name,
        zone_choices=zones.CHOICES,
        share=figures.share,
        per_million=figures.TOKEN_PRICES,
        meanings=figures.MEANINGS,
        statuses=[status.value for status in Status],
        fields=FIELDS,
        group_names=GROUPS,
        ranges=RANGES,
        zero=ZERO,
        money_total=Money.total,
        hour_ns=NS_PER_HOUR,
    )
    return made
