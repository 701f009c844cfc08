"""Margin: what is earned beside what is spent, who costs more than they pay, and what would mend it."""

from __future__ import annotations

from typing import cast, get_args
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response

from millicent.core.errors import InvalidRequest
from millicent.core.money import ZERO
from millicent.core.periods import Period, month_of
from millicent.dashboard.charts import Chart, Series
from millicent.dashboard.selection import TIMES, Selection, feature_address
from millicent.dashboard.site import Page, Site
from millicent.dashboard.tables import Cell, Column, Table, count, if_any, known, money, part, table_of, text
from millicent.economics.margin import By, MarginReport, MarginRow
from millicent.economics.reports import Reports

_DRAWN = 12


def margin_page(site: Site, reports: Reports) -> Page:
    async def show(request: Request) -> Response:
        selection = site.selection(request, TIMES | {"by"}, default_range="30d")
        by = request.query_params.get("by") or "feature"
        if by not in get_args(By):
            raise InvalidRequest(f"by={by!r}: only {', '.join(get_args(By))} earn something", param="by")
        period = period_of(site, reports, selection)
        report = await site.read(lambda: reports.margins(cast("By", by), period))
        earns = report.total.revenue is not None
        shown = (_chart(report), _rows_table(report), plans_table(report), over_table(report))
        return site.answer(
            request, "margin.html", shown=shown, selection=selection, report=report, known=earns, choices=get_args(By)
        )

    return Page("Features", "Margin", "/margin", [site.get("/margin", show)])


def period_of(site: Site, reports: Reports, selection: Selection) -> Period:
    """The times selected, up to now."""
    now_ns = site.clock.now_ns()
    to_ns = min(now_ns, selection.where.to_ns or now_ns)
    from_ns = selection.where.from_ns
    if from_ns is None:
        from_ns = min(reports.ledger.first_days_ns().values(), default=month_of(to_ns).from_ns)
    return Period(min(from_ns, to_ns), to_ns)


def _chart(report: MarginReport) -> Chart:
    """The groups with the most money in or out."""
    moving = sorted(
        report.rows, key=lambda row: -max(abs((each or ZERO).nanousd) for each in (row.revenue, row.ai_cost))
    )[:_DRAWN]
    return Chart(
        name="earned-and-spent",
        title="Earned and spent",
        kind="bar",
        x_title=report.by.capitalize(),
        x=tuple(row.group or f"no {report.by}" for row in moving),
        series=(
            Series(name="Revenue", values=tuple(row.revenue for row in moving)),
            Series(name="Models", values=tuple(row.ai_cost for row in moving)),
            Series(name="Other costs", values=tuple(row.other_cost for row in moving)),
        ),
        unit="usd",
    )


def _rows_table(report: MarginReport) -> Table:
    columns = (
        Column(report.by.capitalize(), report.by, number=False),
        Column("Requests", "requests", wide=True),
        Column("Revenue", "revenue_usd"),
        Column("Models", "ai_cost_usd"),
        Column("Other costs", "other_cost_usd", wide=True),
        Column("Margin", "margin_usd"),
        Column("Of revenue", "margin_share"),
        Column("Models/revenue", "ai_share", wide=True),
        Column("Target", "target_share", wide=True),
        Column("Needs", "needed_usd", wide=True),
    )

    def cells(row: MarginRow, name: str, href: str | None = None) -> tuple[Cell, ...]:
        return (
            text(name, href),
            count(row.requests),
            known(row.revenue),
            money(row.ai_cost),
            money(row.other_cost),
            known(row.margin),
            part(row.margin_share),
            part(row.ai_share),
            part(row.target or None),
            if_any(row.needed),
        )

    return Table(
        name="margin",
        title=f"By {report.by}",
        columns=columns,
        rows=tuple(cells(row, row.group or f"no {report.by}", _link(report.by, row.group)) for row in report.rows),
        total=cells(report.total, "total"),
        note="Needs: the least revenue that would leave the target's part."
        + (f" {report.total.unpriced:,} unpriced requests are in no cost." if report.total.unpriced else ""),
    )


def _link(by: str, group: str | None) -> str | None:
    if group is None:
        return None
    return feature_address(group) if by == "feature" else f"/receipts?{urlencode({by: group})}"


def plans_table(report: MarginReport) -> Table:
    return table_of(
        report.plans,
        (Column("Plan", "plan", number=False), lambda each: text(each.plan)),
        (Column("Users", "users"), lambda each: count(each.users)),
        (Column("Revenue", "revenue_usd"), lambda each: money(each.revenue)),
        (Column("Models", "ai_cost_usd", wide=True), lambda each: money(each.ai_cost)),
        (Column("Over their part", "over_users"), lambda each: count(each.over)),
        (Column("Pay less than they cost", "losing_users"), lambda each: count(each.losing)),
        name="plans",
        title="Plans",
        empty="No [plans.NAME] is configured.",
    )


def over_table(report: MarginReport) -> Table:
    """The users whose models cost more than their plan leaves for them."""
    return table_of(
        report.over,
        (Column("User", "user", number=False), lambda each: text(each.user, _link("user", each.user))),
        (Column("Tier", "tier", number=False, wide=True), lambda each: text(each.tier)),
        (Column("Pays", "paid_usd"), lambda each: money(each.paid)),
        (Column("Costs", "cost_usd"), lambda each: money(each.cost)),
        (Column("May cost", "allowed_usd"), lambda each: money(each.allowed)),
        (
            Column("", "verdict", number=False),
            lambda each: text("costs more than they pay" if each.losing else "over its part"),
        ),
        name="over",
        title="Users who cost more than their plan leaves",
        empty="Nobody costs more than their plan leaves.",
        most=20,
    )
