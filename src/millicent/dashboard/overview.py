"""What everything costs, and what to know about these figures."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, date, datetime, timedelta
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response

from millicent.core.accounts import Account
from millicent.core.clock import NS_PER_HOUR, Clock, hour_start_ns
from millicent.core.money import Money
from millicent.core.usage import Provenance
from millicent.core.zones import find_zone
from millicent.dashboard.charts import Chart, Series
from millicent.dashboard.selection import FILTERS, Selection
from millicent.dashboard.site import Page, Queries, Site
from millicent.ledger.queries import GroupBy, ReceiptFilter, Totals

LATEST = 10
_MAX_POINTS = 400
_HOUR = timedelta(hours=1)

# What is asked first, and where the answer is.
QUESTIONS = (
    ("Which feature loses money?", "/margin"),
    ("Why did the cost change?", "/changes"),
    ("Does a machine of our own pay?", "/plan"),
    ("What breaks at ten times the traffic?", "/plan/scale"),
    ("What would make it cheaper?", "/plan/cheaper"),
)


def overview_page(site: Site) -> Page:
    async def show(request: Request) -> Response:
        selection = site.selection(request, FILTERS)
        found = await site.read(lambda: figures_of(site, selection))
        by: GroupBy = "hour" if _hourly(selection) else "day"
        forecast = await site.read(lambda: site.forecast(selection.where))
        times = await site.read(lambda: site.queries.totals(by, selection.where, zone=selection.zone))
        origin = str(request.base_url).rstrip("/")
        return site.answer(
            request,
            "overview.html",
            shown=over_time(times, by, selection),
            origin=origin,
            path_here="/",
            forecast=forecast,
            estimated=Provenance.ESTIMATED,
            questions=[(words, path) for words, path in QUESTIONS if path in {page.path for page in site.pages}],
            **found,
        )

    return Page("Overview", "Overview", "/", [site.get("/", show)])


def figures_of(site: Site, selection: Selection, latest: int = LATEST) -> dict[str, Any]:
    """What the overview and the chat show beside each other: totals, and the latest receipts."""
    by_feature = totals(site.queries, "feature", selection.where)
    page = site.queries.receipts(selection.where, limit=latest)
    empty = not page.receipts and not site.queries.receipts(ReceiptFilter(), limit=1).receipts
    return {
        "selection": selection,
        "receipts": page.receipts,
        "more": page.next is not None,
        "by_feature": by_feature,
        "by_model": totals(site.queries, "model", selection.where),
        "total": Totals.together(by_feature),
        "assumed_rates": assumed_rates(site.queries, site.clock),
        "empty": empty,
        "first_model": next(iter(site.models()), "MODEL"),
    }


def totals(queries: Queries, by: GroupBy, where: ReceiptFilter) -> list[Totals]:
    return sorted(queries.totals(by, where), key=lambda group: (-group.cost.nanousd, -group.requests))


def assumed_rates(queries: Queries, clock: Clock) -> list[Account]:
    """The latest account of each placement that runs at an assumed rate."""
    now_ns = clock.now_ns()
    recent = queries.accounts(hour_start_ns(now_ns) - NS_PER_HOUR, now_ns + 1)
    latest = {account.placement: account for account in sorted(recent, key=lambda account: account.hour_ns)}
    return [account for account in latest.values() if account.rate_provenance is Provenance.ASSUMED]


def _hourly(selection: Selection) -> bool:
    """Up to two days are told by the hour."""
    start, end = selection.where.from_ns, selection.where.to_ns
    if selection.range is not None:
        return selection.range in ("1h", "24h")
    return start is not None and end is not None and end - start <= 48 * NS_PER_HOUR


def over_time(times: list[Totals], by: GroupBy, selection: Selection) -> list[Chart]:
    """Cost and requests by hour or day, with those in which nothing happened."""
    found = {each.group: each for each in times if each.group is not None}
    steps = _steps(sorted(found), by, selection.zone)
    links = tuple(
        f"/receipts?{urlencode({**selection.fields, **_bounds(label, by, selection.zone)})}" for label in steps
    )
    short = Counter(label[:16] for label in steps)
    # An hour that the clocks show twice is told apart by its offset.
    labels = tuple(f"{label[:16]}{label[19:] if short[label[:16]] > 1 else ''}".replace("T", " ") for label in steps)
    x_title = f"{by.capitalize()} ({selection.zone})"

    def chart(name: str, title: str, unit: str, values: tuple[Money | int, ...], what: str) -> Chart:
        return Chart(
            name=name,
            title=title,
            kind="bar",
            x_title=x_title,
            x=labels,
            series=(Series(name=what, values=values),),
            unit=unit,
            links=links,
        )

    nothing = Money(0)
    costs = tuple(found[label].cost if label in found else nothing for label in steps)
    requests = tuple(found[label].requests if label in found else 0 for label in steps)
    return [
        chart("cost-over-time", f"Cost by {by}", "usd", costs, "Cost"),
        chart("requests-over-time", f"Requests by {by}", "requests", requests, "Requests"),
    ]


def _steps(labels: list[str], by: GroupBy, zone: str) -> list[str]:
    """All days or hours from the first to the last, unless there are too many to draw. Hours are counted in elapsed
    time: a day on which clocks change has 23 or 25."""
    if not labels:
        return []
    if by == "day":
        first, last = date.fromisoformat(labels[0]), date.fromisoformat(labels[-1])
        days = (last - first).days + 1
        return [str(first + timedelta(days=n)) for n in range(days)] if days <= _MAX_POINTS else labels
    labels = sorted(labels, key=datetime.fromisoformat)
    first, end = (datetime.fromisoformat(label).astimezone(UTC) for label in (labels[0], labels[-1]))
    hours = (end - first) // _HOUR + 1
    if hours > _MAX_POINTS:
        return labels
    clocks = find_zone(zone)
    steps = [_hour((first + n * _HOUR).astimezone(clocks)) for n in range(hours)]
    # Where clocks change by half an hour, those are other hours from then on.
    return steps if set(labels) <= set(steps) else labels


def _hour(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


def _bounds(label: str, by: GroupBy, zone: str) -> dict[str, str]:
    """`from` and `to` of a day or an hour."""
    told = {} if zone == "UTC" else {"zone": zone}
    if by == "day":
        return {"from": label, "to": str(date.fromisoformat(label) + timedelta(days=1)), **told}
    moment = datetime.fromisoformat(label)
    return {"from": _hour(moment), "to": _hour(moment + timedelta(hours=1)), **told}
