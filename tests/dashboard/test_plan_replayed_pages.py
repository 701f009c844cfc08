"""The pages of what is simulated: they run the command in a process of its own, and show what it found."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from decimal import Decimal

import msgspec
import pytest
from starlette.testclient import TestClient

from millicent.core.clock import ManualClock
from millicent.core.errors import InvalidRequest
from millicent.dashboard import plan_replayed
from millicent.dashboard.plans import plan_pages
from support.pages import exported, pages_of, planning_of, site_of, words
from support.replay_ledgers import keep, machine, recorded, traffic

TARGET = "latency_target_ms=3000"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    home = tmp_path_factory.mktemp("home")
    sides = {True: "with", False: "without"}
    keep(
        home,
        [
            msgspec.structs.replace(
                each, policy={"holdout_response_cache": sides[number % 3 > 0], "holdout_share": "0.33"}
            )
            for number, each in enumerate(recorded(traffic(120, every_ms=500), machine()))
        ],
    )
    clock = ManualClock()
    clock.advance(3 * 3600 * 10**9)
    planning = planning_of(home, clock)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_replayed, "_SCALE_REQUESTS", 1000)
        patch.setenv("MILLICENT_HOME", str(tmp_path_factory.mktemp("another")))  # the server's own is what counts
        patch.setenv("MILLICENT_CACHE", str(home))
        with pages_of(site_of(planning.queries, clock), *plan_pages(planning)) as client:
            yield client


def test_what_breaks_is_simulated_beside_the_server_and_then_shown(pages: TestClient) -> None:
    first = pages.get(f"/plan/scale?{TARGET}").text
    assert "Simulating" in first
    assert 'http-equiv="refresh"' in first
    body = pages.get(f"/v1/plan/scale?{TARGET}").json()
    shown = pages.get(f"/plan/scale?{TARGET}").text
    assert "Simulating" not in shown
    assert body["breaks"][0]["name"] in words(shown)
    rows = list(csv.reader(io.StringIO(pages.get(f"/plan/scale?{TARGET}&csv=machines").text)))
    assert [int(row[0]) for row in rows[1:]] == [10, 100]
    assert [int(row[2]) for row in rows[1:]] == [each["machines"] for each in body["scaled"]]
    assert Decimal(rows[1][6]) == 730 * int(rows[1][2])


def test_what_a_lever_saved_against_a_hold_out_is_shown_with_its_interval(pages: TestClient) -> None:
    (found,) = pages.get("/v1/plan/cheaper").json()["measured"]
    assert (found["lever"], found["requests_with"], found["requests_without"]) == ("response_cache", 80, 40)
    saved = {end: Decimal(found["saved_usd"][end]) for end in ("low", "expected", "high")}
    assert saved["low"] < saved["expected"] < saved["high"]
    (row,) = exported(pages, "/plan/cheaper?csv=measured")
    assert Decimal(row["saved_usd"]) == saved["expected"]
    assert (Decimal(row["low_usd"]), Decimal(row["high_usd"])) == (saved["low"], saved["high"])
    assert "What they saved, against a random hold-out" in words(pages.get("/plan/cheaper").text)


def test_levers_are_shown_with_the_lines_that_switch_them_on(pages: TestClient) -> None:
    body = pages.get("/v1/plan/cheaper").json()
    told = words(pages.get("/plan/cheaper").text)
    assert "120 answers, replayed through each lever" in told
    for lever in body["levers"]:
        assert lever["title"] in told
    assert "[cache] enabled = true" in told
    rows = list(csv.reader(io.StringIO(pages.get("/plan/cheaper?csv=levers").text)))
    freed = {each["title"]: each["capacity_freed_usd"] for each in body["levers"] if each["capacity_freed_usd"]}
    assert len(freed) >= 3
    assert (
        freed.items()
        <= {row[0]: {"expected": row[4], "low": row[5], "high": row[6], "a_month": row[7]} for row in rows[1:]}.items()
    )


def test_what_cannot_be_simulated_is_said_where_it_was_asked(pages: TestClient) -> None:
    with pytest.raises(InvalidRequest, match="nothing in this part of the ledger can be grown"):
        pages.get("/v1/plan/scale?feature=nobody")  # the server's own handler tells it
    assert "nothing in this part of the ledger can be grown" in pages.get("/plan/scale?feature=nobody").text


@pytest.mark.parametrize("asked", ["latency_target_ms=soon", "machines=0", "conversation=c1", "ttl_s=5"])
def test_an_address_that_makes_no_sense_is_refused_by_name(pages: TestClient, asked: str) -> None:
    refused = pages.get(f"/plan/scale?{asked}")
    assert refused.status_code == 400
    assert asked.partition("=")[0] in words(refused.text).lower()
