"""From a word to receipts: one by its identifier, or all of a feature, a user, a model, a conversation."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import quote, urlencode

from starlette.requests import Request
from starlette.responses import Response

from millicent.dashboard import tables
from millicent.dashboard.selection import TIMES
from millicent.dashboard.site import Handler, Queries, Site
from millicent.dashboard.tables import Column, Table
from millicent.ledger.queries import GroupBy, ReceiptFilter

SEARCH = "/receipts/search"
# Names are looked through where sums are kept by them; of the others only whole ones are found, by their index.
_LOOKED_THROUGH: tuple[GroupBy, ...] = ("feature", "user", "team", "model", "key", "tier", "placement")
_EACH = 20
_MAX_QUERY = 256


class Match(NamedTuple):
    kind: str
    name: str
    cells: tuple[tables.Cell, ...]

    @property
    def href(self) -> str:
        return f"/receipts?{urlencode({self.kind: self.name})}"


def search(site: Site) -> Handler:
    async def show(request: Request) -> Response:
        selection = site.selection(request, TIMES | {"q"})
        words = selection.params.get("q", "")[:_MAX_QUERY]
        if words and await site.read(lambda: site.queries.receipt(words)) is not None:
            return site.redirect(f"/receipts/{quote(words)}")
        found = await site.read(lambda: matches(site.queries, words)) if words else []
        if len(found) == 1:
            return site.redirect(found[0].href)
        return site.answer(request, "search.html", shown=[_table(found)], selection=selection, words=words)

    return show


def matches(queries: Queries, words: str) -> list[Match]:
    """What is called so, or has it in its name; the dearest of each kind."""
    wanted = words.casefold()
    found: list[Match] = []
    for kind in _LOOKED_THROUGH:
        named = [each for each in queries.totals(kind, ReceiptFilter()) if wanted in (each.group or "").casefold()]
        named.sort(key=lambda each: (-each.cost.nanousd, -each.requests))
        found += [
            Match(kind, each.group or "", (tables.count(each.requests), tables.money(each.known_cost)))
            for each in named[:_EACH]
        ]
    for name, where in (
        ("conversation", ReceiptFilter(conversation=words)),
        ("run", ReceiptFilter(run=words)),
    ):
        if queries.receipts(where, limit=1).receipts:
            found.append(Match(name, words, (tables.text(None), tables.text(None))))
    return found


def _table(found: list[Match]) -> Table:
    rows = tuple((tables.text(each.name, each.href), tables.text(each.kind), *each.cells) for each in found)
    columns = (
        Column("Name", "name", number=False),
        Column("What it is", "kind", number=False),
        Column("Requests", "requests"),
        Column("Cost", "cost_usd"),
    )
    return Table(name="matches", title="Found, of all time", columns=columns, rows=rows, empty="Nothing is called so.")
