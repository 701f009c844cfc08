"""The Plan pages and their JSON, over a ledger whose figures are worked out by hand."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from millicent.core.clock import ManualClock
from millicent.dashboard.plan import Planning
from millicent.dashboard.plans import plan_pages
from millicent.economics.alternatives import Alternative
from millicent.economics.capacity import Slots
from millicent.economics.machines import MachineConfig
from millicent.economics.places import ApiModel
from millicent.economics.standing import Configured
from millicent.economics.where import Setup
from millicent.meter.placements import PlacementConfig
from millicent.meter.prices import PriceBook, PriceConfig
from support.pages import pages_of, planning_of, site_of, words
from support.plan_ledgers import BUSY, two_hours, write


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ManualClock]:
    home = tmp_path_factory.mktemp("home")
    return home, write(home, two_hours(accelerator=BUSY))


def setup_of(**machines: MachineConfig) -> Setup:
    return Setup(
        {"box": PlacementConfig(kind="rented", usd_per_hour=Decimal(1)).placement("box")},
        (ApiModel("big"),),
        machines,
        PriceBook({"big": PriceConfig(input=Decimal(1), input_cached=Decimal("0.1"), output=Decimal(4))}),
        Slots(8, 512),
    )


def client_of(planning: Planning) -> TestClient:
    return pages_of(site_of(planning.queries, planning.clock), *plan_pages(planning))


@pytest.fixture(scope="module")
def pages(ledger: tuple[Path, ManualClock]) -> Iterator[TestClient]:
    gpu = MachineConfig(kind="rented", usd_per_hour=Decimal(2), output_tokens_per_s=Decimal(200))
    with client_of(planning_of(*ledger, lambda: setup_of(gpu=gpu), {"search": 1500})) as client:
        yield client


def rows(pages: TestClient, path: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(pages.get(path).text)))


def test_places_stand_side_by_side_cheapest_first(pages: TestClient) -> None:
    told = words(pages.get("/plan").text)
    assert "14,600 requests a month, place by place" in told
    assert told.index("$21.17") < told.index("$730.00") < told.index("$1,460.00")
    assert "Confirmed on this traffic" in told
    assert "big: tokens as the model here counts them" in told


def test_each_table_and_the_chart_can_be_exported_exactly(pages: TestClient) -> None:
    assert rows(pages, "/plan?csv=places")[1][:4] == ["big", "api", "21.17", "0.00145"]
    evens = {row[0]: row[2:4] for row in rows(pages, "/plan?csv=break-evens")[1:]}
    assert evens == {"gpu": ["1006897", "1006897"], "box small": ["", ""]}
    chart = rows(pages, "/plan?csv=staircases")
    assert chart[0] == ["requests_a_month", "big_usd", "gpu_usd"]
    steps = {int(row[0]): row[2] for row in chart[1:]}
    assert (steps[3_504_000], steps[3_504_001]) == ("1460", "2920")


def test_the_address_says_what_is_compared(pages: TestClient) -> None:
    asked = "compare=big&machine=own,usd_per_hour=1,requests_per_hour=100&spares=1&volume=1000&latency_target_ms=800"
    body = pages.get(f"/v1/plan/where?{asked}").json()
    assert (body["requests_per_month"], body["spares"], body["latency_target_ms"]) == (1000, 1, 800)
    own = next(each for each in body["places"] if each["name"] == "own")
    assert (own["machines"], own["monthly_usd"]) == (2, "1460")


def test_a_features_own_latency_target_holds_unless_another_is_asked_for(pages: TestClient) -> None:
    assert pages.get("/v1/plan/where?feature=search").json()["latency_target_ms"] == 1500
    assert pages.get("/v1/plan/where?feature=search&latency_target_ms=9").json()["latency_target_ms"] == 9
    assert pages.get("/v1/plan/where").json()["latency_target_ms"] is None


@pytest.mark.parametrize(
    "wrong",
    ["spares=-1", "volume=many", "volume=" + "9" * 5000, "machine=gpu,watts=much", "colour=red", "from=soon"],
)
def test_what_an_address_cannot_mean_is_refused_by_name(pages: TestClient, wrong: str) -> None:
    refused = pages.get(f"/plan?{wrong}")
    assert refused.status_code == 400
    assert wrong.partition("=")[0] in words(refused.text).lower()


def test_a_period_without_requests_points_elsewhere(tmp_path: Path) -> None:
    with client_of(planning_of(tmp_path, ManualClock(), setup_of)) as pages:
        told = words(pages.get("/plan").text)
    assert "No requests in this period" in told
    assert "Confirmed" not in told


def test_the_same_question_is_not_computed_twice_within_a_minute(ledger: tuple[Path, ManualClock]) -> None:
    asked: list[Setup] = []

    def setup() -> Setup:
        asked.append(setup_of())
        return asked[-1]

    with client_of(planning_of(*ledger, setup)) as pages:
        for path in ("/plan", "/plan", "/plan?csv=places", "/v1/plan/where", "/plan?spares=1"):
            assert pages.get(path).status_code == 200
    assert len(asked) == 2


def test_the_page_of_standing_shows_bands_the_checklist_and_doing_without(ledger: tuple[Path, ManualClock]) -> None:
    agent = Configured(alternatives={"search": Alternative(usd=Decimal(3), what="an <agent>")})
    with client_of(planning_of(*ledger, setup_of, configured=lambda: agent)) as pages:
        page = pages.get("/plan/standing").text
        body = pages.get("/v1/plan/standing").json()
    assert "an &lt;agent&gt;" in page
    for text in ("AI-first SaaS", "under $0.005", "Next:", "40 of 40 name one"):
        assert text in words(page)
    stands = {each["measure"]: each for each in body["stands"]}
    assert stands["AI cost / revenue"]["value"] is None
    assert stands["cost per request"] == {
        "measure": "cost per request",
        "industry": "enterprise",
        "unit": "usd",
        "value": "0.000277778",
        "stands": "leading",
        "bands": {"behind": "over $0.10", "typical": "$0.01 to $0.05", "leading": "under $0.005"},
        "evidence": "1.11 cents for 40 priced requests",
    }
    assert body["next_step"]["stage"] == "measure"
    assert body["without_model"][0]["saved_usd"] == "2.999722222"
