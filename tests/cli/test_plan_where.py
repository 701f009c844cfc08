"""`plan where` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from millicent.cli import run
from support.plan_ledgers import BUSY, two_hours, write

SINCE = ("--since", "2026-01-01")
CONFIG = """
[placements.box]
kind = "rented"
usd_per_hour = 1

[placements.cloud]
kind = "api"
models = ["big"]

[prices.big]
input = 1
input_cached = 0.1
output = 4

[machines.gpu]
kind = "rented"
usd_per_hour = 2
output_tokens_per_s = 200
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    write(home, two_hours(accelerator=BUSY))
    (home / "millicent.toml").write_text(CONFIG)
    return home


@pytest.fixture(autouse=True)
def _home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLICENT_HOME", str(home))


def first_cells(out: str) -> dict[str, str]:
    """The first line that begins with each cell."""
    return {line.split("  ")[0]: line for line in reversed(out.splitlines())}


def test_places_stand_side_by_side_with_what_makes_them_pay(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "where", *SINCE]) == 0
    out = capsys.readouterr().out
    assert "40 requests in 2 hours" in out
    assert "Compared at 14,600 requests a month" in out
    rows = first_cells(out)
    assert "$21.17" in rows["cloud big"]
    assert "66.7%" in rows["box small"]
    assert "1,006,897" in out
    assert "At 1M: API $1,450.00, machines $1,460.00; at 100M: API $145,000.00, machines $42,340.00." in out


def test_the_same_as_json_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "where", *SINCE, "--json", "--spares", "1"]) == 0
    body = json.loads(capsys.readouterr().out)
    places = {each["name"]: each for each in body["places"]}
    assert places["cloud big"]["monthly_usd"] == "21.17"
    assert places["cloud big"]["monthly_without_caches_usd"] == "27.74"
    assert places["gpu"]["machines"] == 2
    assert places["gpu"]["capacity"] == {
        "requests_per_hour": 7200,
        "provenance": "assumed",
        "how": "stated: 200 output tokens/s, 100 a request",
    }
    assert places["gpu"]["latency_ms"] == {"p50": None, "p95": None, "provenance": "unknown"}
    assert body["rule_of_thumb"]["verdict"] == "confirmed"


def test_a_machine_and_an_api_can_be_named_on_the_spot(capsys: pytest.CaptureFixture[str]) -> None:
    machine = "own,kind=owned,capital_usd=8760,life_years=1,requests_per_hour=100"
    assert run(["plan", "where", *SINCE, "--machine", machine, "--compare", "gpt-5-mini", "--volume", "1000"]) == 0
    out = capsys.readouterr().out
    rows = first_cells(out)
    assert "$730.00" in rows["own"]
    assert "estimated" in rows["gpt-5-mini"]
    assert rows["gpt-5-mini"].endswith("openai/gpt-5-mini")


def test_a_machine_that_is_no_machine_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "where", *SINCE, "--machine", "gpu,watts=much"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "write NAME,usd_per_hour=2.5,output_tokens_per_s=2500" in error


def test_an_empty_period_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "where", "--since", "2030-01-01"]) == 0
    told = capsys.readouterr()
    assert told.out == "No requests in this period.\n"
    assert "widen --since" in told.err
