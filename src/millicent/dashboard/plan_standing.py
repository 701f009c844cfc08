"""Plan: where you stand. The page, and the same as JSON."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from millicent.dashboard.figures import Figure
from millicent.dashboard.plan import Planning, told_as_json
from millicent.dashboard.plan_json import standing_body
from millicent.dashboard.selection import TIMES, feature_address
from millicent.dashboard.site import Page, Site
from millicent.dashboard.tables import Cell, Column, Table, count, money, table_of, text
from millicent.economics.standing import Stand, Standing, WithoutModel, band_words, standing, told

PATH = "/plan/standing"


def standing_page(planning: Planning, site: Site) -> Page:
    async def found_for(request: Request) -> Standing:
        chosen = site.selection(request, TIMES, default_range="30d").where
        return await site.read(
            lambda: standing(planning.queries, planning.clock, chosen, planning.configured(), planning.books)
        )

    async def show(request: Request) -> Response:
        found = await found_for(request)
        selection = site.selection(request, TIMES, default_range="30d")
        shown = [_bands(found.stands), _without(found.without)]
        return site.answer(request, "plan_standing.html", shown=shown, selection=selection, found=found)

    async def as_json(request: Request) -> Response:
        return told_as_json(standing_body(await found_for(request)))

    routes = [site.get(PATH, show), Route("/v1/plan/standing", as_json, methods=["GET"])]
    return Page("Plan", "Where you stand", PATH, routes)


def _bands(stands: tuple[Stand, ...]) -> Table:
    return Table(
        name="bands",
        title="Beside published bands",
        columns=(
            Column("Measure", "measure", number=False),
            Column("Here", "here"),
            Column("Stands", "stands", number=False),
            Column("Behind", "behind", number=False, wide=True),
            Column("Typical", "typical", number=False, wide=True),
            Column("Leading", "leading", number=False, wide=True),
            Column("Of", "industry", number=False, wide=True),
            Column("Evidence", "evidence", number=False, wide=True),
        ),
        rows=tuple(_stand(each) for each in stands),
        note="Bands as they were published, each for its own industry; what lies between two of them was published for"
        " nobody. Whether you are one of that industry is yours to say.",
    )


def _stand(stand: Stand) -> tuple[Cell, ...]:
    value = None if stand.value is None else round(float(stand.value), 9)
    shown = "unknown" if stand.value is None else told(stand.band, stand.value)
    exact = "nobody knows; it is not zero" if value is None else f"{value}"
    return (
        text(stand.band.measure),
        Cell(Figure(shown, "", exact), value),
        text(stand.where or "unknown"),
        *(text(words) for words in band_words(stand.band)),
        text(stand.band.industry),
        text(stand.evidence),
    )


def _without(found: tuple[WithoutModel, ...]) -> Table:
    return table_of(
        found,
        (
            Column("Feature", "feature", number=False),
            lambda each: text(each.feature, feature_address(each.feature)),
        ),
        (Column("Without", "without_usd"), lambda each: money(each.without)),
        (Column("With", "with_usd"), lambda each: money(each.with_model)),
        (Column("Saved by each", "saved_usd"), lambda each: money(each.saved)),
        (Column("Of", "of", number=False, wide=True), lambda each: text(each.of)),
        (Column("Outcomes", "outcomes", wide=True), lambda each: count(each.outcomes)),
        (Column("How", "what", number=False, wide=True), lambda each: text(each.what)),
        name="without-a-model",
        title="What the same outcome costs without a model",
        empty="No feature says what it would take: state [features.NAME.alternative].",
        note="What it costs without is stated; useful outputs are those that were rated so in this period.",
    )
