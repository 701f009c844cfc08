"""The estimator's page: its form is an address, scenarios are saved by admins, and the JSON says the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal

import msgspec
import pytest
from starlette.testclient import TestClient
from starlette.types import Scope

from millicent.core.clock import ManualClock
from millicent.dashboard.plan import Planning
from millicent.dashboard.plans import plan_pages
from millicent.dashboard.site import Alone
from millicent.economics.estimate import Scenario
from millicent.meter.prices import PriceBook, PriceConfig
from support.pages import NO_SETUP, pages_of, planning_of, site_of, words
from support.plan_ledgers import T0, two_hours, write

PRICES = {"big": PriceConfig(input=Decimal(2), input_cached=Decimal("0.2"), output=Decimal(8))}
ASKED = "users=1000&sessions=20&calls=2.5&input_tokens=1000&output_tokens=100&models=big&feature=search"


@pytest.fixture(scope="module")
def planning(tmp_path_factory: pytest.TempPathFactory) -> Planning:
    home = tmp_path_factory.mktemp("home")
    clock = write(home, two_hours())
    return planning_of(home, clock, lambda: replace(NO_SETUP, prices=PriceBook(PRICES)))


@pytest.fixture(scope="module")
def pages(planning: Planning) -> Iterator[TestClient]:
    def visitor(scope: Scope) -> Alone:
        headers = dict(scope["headers"])
        return Alone("mk_a", headers.get(b"x-role") != b"viewer", "the-token")

    with pages_of(site_of(planning.queries, planning.clock, visitor=visitor), *plan_pages(planning)) as client:
        yield client


def test_the_form_stands_alone_until_it_is_filled_in(pages: TestClient) -> None:
    told = words(pages.get("/plan/estimate").text)
    assert "Users a month" in told
    assert "Cheapest" not in told


def test_an_estimate_is_an_address(pages: TestClient) -> None:
    """50,000 calls at $0.0028: $140, and 30% either way."""
    page = pages.get(f"/plan/estimate?{ASKED}").text
    told = words(page)
    for amount in ("$140.00", "$98.00", "$182.00"):
        assert amount in told
    assert 'name="users" value="1000"' in page
    body = pages.get(f"/v1/plan/estimate?{ASKED}").json()
    assert body["data"][0]["monthly_usd"] == {"low": "98", "expected": "140", "high": "182"}


def test_lengths_can_be_measured_of_another_feature(pages: TestClient) -> None:
    body = pages.get("/v1/plan/estimate?users=10&like=search&models=big").json()
    assert (body["scenario"]["input_tokens"], body["scenario"]["cache_percent"]) == (1500, 33)


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ("users=many&input_tokens=1&output_tokens=1", "users"),
        ("users=1&input_tokens=1", "output_tokens: missing"),
        ("users=1&input_tokens=1&output_tokens=1&calls=often", "calls"),
        ("users=1&input_tokens=1&output_tokens=1&peak=0", "peak"),
        ("users=1&like=nobody", "state the tokens"),
        ("colour=red", "colour"),
    ],
)
def test_what_is_missing_or_means_nothing_is_told(pages: TestClient, asked: str, problem: str) -> None:
    refused = pages.get(f"/plan/estimate?{asked}")
    assert refused.status_code == 400
    assert problem in words(refused.text).lower()


def test_a_scenario_is_saved_compared_and_deleted_by_admins_only(pages: TestClient, planning: Planning) -> None:
    form = dict(pair.split("=") for pair in ASKED.split("&")) | {"name": "pilot", "form_token": "the-token"}
    assert pages.post("/plan/estimate", data=form, headers={"x-role": "viewer"}).status_code == 403
    assert pages.post("/plan/estimate", data=form | {"form_token": "another"}).status_code == 403
    assert planning.scenarios.names() == []
    saved = pages.post("/plan/estimate", data=form)
    assert (saved.status_code, saved.headers["location"]) == (303, "/plan/estimate?scenario=pilot")
    [kept] = pages.get("/v1/plan/scenarios").json()["data"]
    assert (kept["name"], kept["expected_usd"]) == ("pilot", {"big": "140"})
    told = words(pages.get("/plan/estimate?scenario=pilot").text)
    assert "hasn't been asked for since this was saved" in told
    assert pages.post("/plan/estimate/remove", data={"name": "pilot", "form_token": "the-token"}).status_code == 303
    assert planning.scenarios.names() == []
    assert pages.get("/plan/estimate?scenario=pilot").status_code == 404


def test_what_happened_stands_beside_what_was_expected_on_the_page(pages: TestClient, planning: Planning) -> None:
    """14,600 calls a month instead of 50,000: 70.8% fewer."""
    scenario = Scenario(users=1000, sessions=Decimal(50), input_tokens=1000, output_tokens=100, feature="search")
    saved = planning.scenarios.save("early", scenario, [], ManualClock())
    path = planning.scenarios._path("early")
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(saved, saved_at_ns=T0)))
    told = words(pages.get("/plan/estimate?scenario=early").text)
    assert "40 requests in 2 hours" in told
    assert "calls a month 50,000 14,600 -70.8 %" in told
    beside = {each["what"]: each for each in pages.get("/v1/plan/scenarios/early").json()["beside"]}
    assert (beside["users"]["expected"], beside["users"]["happened"]) == (1000, 1)
    planning.scenarios.remove("early")


def test_names_from_callers_are_only_ever_text(planning: Planning, pages: TestClient) -> None:
    hostile = "<script>alert(1)</script>"
    page = pages.get(
        "/plan/estimate", params={"users": "1", "input_tokens": "1", "output_tokens": "1", "models": hostile}
    )
    assert page.status_code == 200
    assert "<script>alert" not in page.text
