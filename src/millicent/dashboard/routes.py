"""All pages, as routes. Those that need only the ledger are listed here; others are handed in by the wiring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from starlette.middleware import Middleware
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Mount
from starlette.staticfiles import StaticFiles

from millicent.core.errors import MillicentError, NotFound
from millicent.dashboard.accounts import accounts_page
from millicent.dashboard.chat import chat_page
from millicent.dashboard.overview import overview_page
from millicent.dashboard.requests import requests_page
from millicent.dashboard.site import SECURITY_HEADERS, Alone, Page, SecurityHeaders, Site, environment

PageMaker = Callable[[Site], Page]

PAGES: tuple[PageMaker, ...] = (
    overview_page,
    chat_page,  # before the receipts: /receipts/rows is its own, not a receipt's
    requests_page,
    accounts_page,
)

_STATIC = Path(__file__).parent / "static"


def dashboard_routes(site: Site, more: Sequence[PageMaker] = ()) -> list[BaseRoute]:
    """The pages of this room, `more`, and `/static`. Under one entry of the navigation, `more` stand first."""
    pages = [make(site) for make in (*more, *PAGES)]
    site.add(pages)
    static = Mount("/static", StaticFiles(directory=_STATIC), middleware=[Middleware(SecurityHeaders)], name="static")
    return [*(route for page in pages for route in page.routes), static]


def missing_page(path: str) -> Response:
    """For a browser at an address where nothing is."""
    error = NotFound(f"there is nothing at {path[:100]!r}; the pages are in the navigation, the API is in docs/api.md")
    return _alone("error.html", 404, Alone(), error=error, path=path)


def sign_in_page(following: str, problem: MillicentError | None, signed_in: bool, form_token: str) -> Response:
    """Where a browser shows its key. `following` is where it wanted to go."""
    status = 200 if problem is None else problem.status
    visitor = Alone(form_token=form_token)
    return _alone("sign_in.html", status, visitor, following=following, problem=problem, signed_in=signed_in)


def _alone(template: str, status: int, visitor: Alone, **values: object) -> Response:
    """A page outside the site: nobody knows who asks, so that it has no navigation."""
    page = environment().get_template(template)
    html = page.render(visitor=visitor, navigation=[], beside=[], demo=False, **values)
    response = HTMLResponse(html, status)
    response.headers.update(SECURITY_HEADERS | {"Cache-Control": "no-store"})
    return response
