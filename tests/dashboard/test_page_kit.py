"""Charts and tables, and how a page joins the others."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import ChoiceLoader, DictLoader
from starlette.requests import Request
from starlette.responses import Response
from starlette.testclient import TestClient
from starlette.types import Scope

from millicent.core.clock import ManualClock
from millicent.core.money import Money
from millicent.core.usage import Provenance
from millicent.dashboard import site as site_module
from millicent.dashboard import tables
from millicent.dashboard.charts import SIDE, Chart, Kind, Series, draw
from millicent.dashboard.site import NAV, Alone, Page, Queries, Site
from millicent.dashboard.tables import Column, Table, Value, as_csv
from support.pages import pages_of, site_of

DAYS = ("2026-01-30", "2026-01-31", "2026-02-01")


def chart(kind: Kind = "bar", **changes: object) -> Chart:
    fields: dict[str, object] = {
        "name": "cost",
        "title": "Cost",
        "kind": kind,
        "x_title": "Day (UTC)",
        "x": DAYS,
        "series": (Series(name="Cost", values=(Money.from_usd("1.5"), None, Money.from_usd("-0.5"))),),
        "unit": "usd",
    }
    return Chart(**(fields | changes))  # type: ignore[arg-type]


def read_csv(table: Table) -> list[list[str]]:
    return list(csv.reader(io.StringIO("".join(as_csv(table)))))


def test_a_charts_csv_holds_its_exact_values_and_leaves_out_what_is_unknown() -> None:
    assert read_csv(chart().table()) == [
        ["day_utc", "cost_usd"],
        ["2026-01-30", "1.5"],
        ["2026-01-31", ""],
        ["2026-02-01", "-0.5"],
    ]


def test_an_unknown_value_has_no_bar_and_a_loss_hangs_below_zero() -> None:
    drawing = draw(chart())
    assert drawing is not None
    gain, loss = drawing.marks
    assert Decimal(gain.y) + Decimal(gain.height) == Decimal(loss.y) == Decimal(drawing.zero)
    assert gain.tells == "2026-01-30: $1.50"
    assert [tick.label for tick in drawing.x] == ["Jan 30", "Jan 31", "Feb 1"]


def test_a_line_is_interrupted_where_nothing_is_known() -> None:
    values = (1, 2, None, 4, None, 6, 7)
    drawing = draw(chart("line", x=tuple("abcdefg"), series=(Series(name="p50", values=values),), unit="ns"))
    assert drawing is not None
    assert [path.kind for path in drawing.paths] == ["line", "dot", "line"]


def test_a_chart_of_nothing_is_not_drawn() -> None:
    assert draw(chart(series=(Series(name="Cost", values=(None, None, None)),))) is None
    assert draw(chart(x=(), series=(Series(name="Cost", values=()),))) is None


def test_a_step_keeps_its_height_until_the_next_place_and_a_log_axis_has_equal_decades() -> None:
    steps = Series(name="machines", values=(1, 1, 2))
    drawing = draw(chart("step", x=(1, 10, 100), scale="log", series=(steps,), unit="machines"))
    assert drawing is not None
    assert re.findall(r"[MH]([\d.]+)", drawing.paths[0].d) == ["0", "500", "1000"]


def test_one_axis_has_one_unit_and_a_linear_one_round_places() -> None:
    drawing = draw(chart())
    assert drawing is not None
    assert [tick.label for tick in drawing.y] == ["-$0.50", "0", "$0.50", "$1.00", "$1.50"]
    small = draw(chart(series=(Series(name="Cost", values=tuple(map(Money.from_usd, ("0.3", "0.1", "0.4")))),)))
    assert small is not None
    assert {tick.label.split()[-1] for tick in small.y[1:-1]} == {"cents"}
    volumes = Series(name="machines", values=(1, 2, 3, 4))
    line = draw(chart("line", x=(0, 14_503, 14_504, 43_767), scale="linear", series=(volumes,), unit="machines"))
    assert line is not None
    assert [tick.label for tick in line.x] == ["0", "10,000", "20,000", "30,000", "40,000"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((1, 0, 1), ["0", "1"]),
        ((1, 2, 0), ["0", "1", "2"]),
        ((7,) * 3, ["0", "2", "4", "6", "8"]),
        ((0, 0, 0), ["0", ""]),
        ((0, None, 0.5), ["0", "0.100", "0.200", "0.300", "0.400", "0.5"]),
        ((Money(1), Money(0), None), ["0", "0.0001 millicents"]),
        ((Money(0),) * 3, ["0", ""]),
    ],
)
def test_what_is_counted_has_no_half_on_its_axis(values: tuple[Value, ...], expected: list[str]) -> None:
    unit = "usd" if any(isinstance(each, Money) for each in values) else "requests"
    drawing = draw(chart(series=(Series(name="s", values=values),), unit=unit))
    assert drawing is not None
    assert [tick.label for tick in drawing.y] == expected


def test_a_single_bar_is_no_wall() -> None:
    drawing = draw(chart(x=("New",), series=(Series(name="Cost", values=(Money.from_usd("1"),)),)))
    assert drawing is not None
    assert Decimal(drawing.marks[0].width) < SIDE / 10
    assert Decimal(drawing.marks[0].x) + Decimal(drawing.marks[0].width) / 2 == SIDE // 2


@pytest.mark.parametrize(
    ("amounts", "expected"),
    [
        (["12", "3.50"], "num money"),
        (["12", "0.35", None], "num money in-cents"),
        (["12", "0.35", "0.0001"], "num money in-millicents"),
        ([None], "num money"),
    ],
)
def test_amounts_stand_under_each_other_and_their_heading_above_whatever_their_units(
    amounts: list[str | None], expected: str
) -> None:
    """The room for a unit is the widest's that is there: a column of dollars has none."""
    rows = tuple((tables.text("a"), tables.money(None if each is None else Money.from_usd(each))) for each in amounts)
    columns = (Column("What", "what", number=False), Column("Cost", "cost_usd"))
    assert Table(name="t", title="T", columns=columns, rows=rows).classes() == ["text", expected]


def test_a_line_can_have_a_range_around_it_which_its_table_shows() -> None:
    series = Series(name="cost", values=(1, 2, 3), low=(None, 1, 2), high=(None, 4, 9))
    ranged = chart("line", series=(series,), unit="requests")
    drawing = draw(ranged)
    assert drawing is not None
    assert [path.kind for path in drawing.paths] == ["band", "line"]
    assert read_csv(ranged.table())[0] == ["day_utc", "cost_requests", "cost_low_requests", "cost_high_requests"]


sizes = st.one_of(st.none(), st.integers(-(10**15), 10**15), st.floats(-1e9, 1e9, allow_subnormal=False))


@given(
    st.sampled_from(("line", "step", "bar", "stacked", "histogram")),
    st.integers(1, 12).flatmap(
        lambda width: st.lists(st.lists(sizes, min_size=width, max_size=width), min_size=1, max_size=4)
    ),
)
def test_whatever_the_values_everything_drawn_lies_inside_the_picture(
    kind: Kind, values: list[list[int | float | None]]
) -> None:
    series = tuple(Series(name=f"s{n}", values=tuple(each)) for n, each in enumerate(values))
    drawing = draw(chart(kind, x=tuple(str(n) for n in range(len(values[0]))), series=series, unit="things"))
    if drawing is None:
        assert all(value is None for each in values for value in each)
        return
    for mark in drawing.marks:
        assert float(mark.x) >= -1
        assert float(mark.x) + float(mark.width) <= SIDE + 1
        assert float(mark.y) >= -1
        assert float(mark.y) + float(mark.height) <= SIDE + 1
    for path in drawing.paths:
        assert all(-1 <= float(number) <= SIDE + 1 for number in re.findall(r"-?[\d.]+", path.d))
    assert drawing.y[0].at == "100%"
    assert drawing.y[-1].at == "0%"


def a_page(site: Site) -> Page:
    table = Table(
        name="features",
        title="Features",
        columns=(Column("Feature", "feature", number=False), Column("Cost", "cost_usd")),
        rows=(
            (tables.text("=1+1", "/receipts?feature=%3D1%2B1"), tables.money(Money(12), Provenance.ESTIMATED)),
            (tables.text("search"), tables.money(None)),
        ),
    )

    async def show(request: Request) -> Response:
        return site.answer(request, "test_page.html", shown=[table, chart()], selection=site.selection(request))

    async def change(request: Request, form: Mapping[str, str]) -> Response:
        return site.redirect(f"/plan?{form['to']}")

    routes = [site.get("/plan", show), site.post("/plan", change)]
    return Page("Plan", "Break-even", "/plan", routes)


TEMPLATE = """{% extends "base.html" %}{% from "kit.html" import table, chart, period, tiles, tile, form_token %}
{% block title %}Plan{% endblock %}{% block main %}{{ period(selection, "/plan") }}
{% call tiles() %}{{ tile("Cost", zero | amount, href="/receipts") }}{% endcall %}
{{ table(shown["features"]) }}{{ chart(shown["cost"]) }}<form method="post">{{ form_token(visitor) }}</form>
{% endblock %}
"""


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, queries: Queries, clock: ManualClock) -> Site:
    made = site_module.environment()
    assert made.loader is not None
    made.loader = ChoiceLoader([made.loader, DictLoader({"test_page.html": TEMPLATE})])
    monkeypatch.setattr(site_module, "environment", lambda: made)

    def visitor(scope: Scope) -> Alone:
        headers = dict(scope["headers"])
        return Alone("mk_a", headers.get(b"x-role") != b"viewer", "the-token")

    return site_of(queries, clock, visitor=visitor, demo=True)


@pytest.fixture
def kit(site: Site) -> Iterator[TestClient]:
    with pages_of(site, a_page) as client:
        yield client


def entries(page: str) -> list[str]:
    return re.findall(r"<a href=\"[^\"]*\"[^>]*>([^<]*)</a>", page[page.index("<nav") : page.index("</nav>")])


def test_the_navigation_has_an_entry_for_each_page_that_is_there_in_order(kit: TestClient) -> None:
    shown = [name.replace("&amp;", "&") for name in entries(kit.get("/plan").text)]
    assert shown == [name for name in NAV if name in shown]
    assert {"Overview", "Requests", "Plan", "Chat"} <= set(shown)
    assert "Alerts" not in shown
    assert 'aria-current="page">Plan' in kit.get("/plan").text


def test_the_period_and_zone_are_kept_on_the_way_to_another_page(kit: TestClient) -> None:
    page = kit.get("/plan?range=7d&zone=Asia/Kolkata").text
    assert 'href="/receipts?range=7d&amp;zone=Asia%2FKolkata"' in page
    assert 'href="/chat"' in page
    assert "by the clocks of Asia/Kolkata" in page


def test_a_page_exports_each_of_its_tables_and_charts_by_name(kit: TestClient) -> None:
    assert 'href="/plan?range=7d&amp;csv=features"' in kit.get("/plan?range=7d").text
    exported = kit.get("/plan?csv=features")
    assert exported.headers["content-type"].startswith("text/csv")
    assert list(csv.reader(io.StringIO(exported.text))) == [
        ["feature", "cost_usd"],
        ["'=1+1", "0.000000012"],
        ["search", ""],
    ]
    assert kit.get("/plan?csv=cost").text == "".join(as_csv(chart().table()))
    missing = kit.get("/plan?csv=nothing")
    assert missing.status_code == 404
    assert "it has features, cost" in missing.text


def test_unknown_and_unpriced_are_words_in_a_table_and_sort_last(kit: TestClient) -> None:
    page = kit.get("/plan").text
    assert re.search(r'data-sort=""><span class="figure absent bare"[^>]*><span class="number">unpriced', page)
    assert '<abbr class="mark" title="estimated: computed from a model">e</abbr>' in page


def test_a_zone_that_nobody_knows_is_refused_by_name(kit: TestClient) -> None:
    refused = kit.get("/plan?zone=Mars/Olympus")
    assert refused.status_code == 400
    assert re.search("[Nn]o time zone .{1,8}Mars/Olympus.{1,8} is known here", refused.text)


def test_a_form_needs_an_admin_and_the_token_of_their_session(kit: TestClient) -> None:
    good = {"form_token": "the-token", "to": "saved"}
    assert 'name="form_token" value="the-token"' in kit.get("/plan").text
    assert kit.post("/plan", data=good).headers["location"] == "/plan?saved"
    for sent, headers in (
        ({"to": "saved"}, {}),
        ({"to": "saved", "form_token": "another"}, {}),
        (good, {"X-Role": "viewer"}),
    ):
        refused = kit.post("/plan", data=sent, headers=headers)
        assert refused.status_code == 403
        assert "default-src 'self'" in refused.headers["content-security-policy"]
    assert kit.post("/plan", json=good).status_code == 400


def test_a_demo_says_so_on_every_page(kit: TestClient) -> None:
    for path in ("/", "/plan", "/receipts", "/accounts", "/chat", "/receipts/rcpt_none"):
        page = kit.get(path).text
        assert "Demo." in page
        assert "· demo ·" in page


def test_times_are_shown_by_the_clocks_of_the_zone_that_was_asked_for(client: TestClient) -> None:
    page = client.get("/receipts?zone=Asia/Kolkata&limit=1").text
    assert "Time (Asia/Kolkata)" in page
    assert "2026-01-01 05:50:57 IST" in page
    at = client.get("/receipts?zone=Asia/Kolkata&from=2026-01-01T05:50:57&to=2026-01-01T05:50:58").text
    assert len(re.findall("data-receipt=", at)) == 1
