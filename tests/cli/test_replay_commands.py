"""`millicent replay` and `millicent plan scale`, on a ledger of known traffic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from millicent.cli import run
from support.replay_ledgers import keep, machine, recorded, traffic

SINCE = ["--since", "2025-12-31"]
TOML = """
[placements.box]
kind = "rented"
usd_per_hour = 1

[limits]
requests_per_minute = 100
max_concurrent = 30

[budgets.everything]
limit_usd = 0.005
every = "hour"
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    keep(home, recorded(traffic(150, every_ms=500), machine()))
    (home / "millicent.toml").write_text(TOML)
    return home


@pytest.fixture(autouse=True)
def at_home(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLICENT_HOME", str(home))
    monkeypatch.setenv("MILLICENT_CACHE", str(tmp_path))


def test_replay_shows_before_and_after(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["replay", *SINCE, "--machines", "2", "--times", "3", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["before"]["requests"] == 150
    assert (body["after"]["requests"], body["after"]["machines"]) == (450, 2)
    assert body["measured_latency_ms"]["total"]["mean"] == pytest.approx(
        body["before"]["latency_ms"]["total"]["mean"], rel=0.02
    )
    assert body["engine"]["model"] == "small"
    assert abs(body["engine"]["errors"]["cost"]) < 0.02
    assert isinstance(body["after"]["busy_cost_usd"], str)
    assert run(["replay", *SINCE, "--steps-take", "0.5"]) == 0
    shown = capsys.readouterr().out
    assert "150 answers of small on box." in shown
    assert "MEASURED" in shown


def test_replay_takes_a_trace_instead(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("timestamp,input_tokens,output_tokens\n" + "".join(f"{at},100,10\n" for at in range(30)))
    assert run(["replay", *SINCE, "--trace", str(trace), "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert (body["before"]["requests"], body["measured_latency_ms"]) == (30, None)


def test_plan_scale_names_what_breaks(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "scale", *SINCE, "--times", "5", "--latency-target-ms", "3000", "--requests", "1000"]
    assert run([*command, "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    breaks = {each["what"]: each["multiple"] for each in body["breaks"]}
    assert breaks["rate"] <= 5
    assert breaks["budget"] < 1
    assert body["scaled"][0]["machines"] >= 1
    assert body["latency_target_provenance"] == "measured"
    assert run(command) == 0
    shown = capsys.readouterr().out
    assert "[budgets.everything]" in shown
    assert "rate limits of keys" in shown
    assert "MACHINES/MONTH" in shown


def test_plan_cheaper_ranks_levers_with_the_lines_that_switch_them_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "cheaper", *SINCE, "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    levers = {each["name"]: each for each in body["levers"]}
    shorter = levers["shorter_output"]
    assert 0 < float(shorter["capacity_freed_usd"]["low"]) <= float(shorter["capacity_freed_usd"]["expected"])
    assert shorter["saved_usd"] is None
    assert levers["response_cache"]["needs"].startswith("hashes of what was asked")
    assert levers["response_cache"]["configuration"].startswith("[cache]")
    assert run(["plan", "cheaper", *SINCE]) == 0
    shown = capsys.readouterr().out
    assert "Outputs a tenth shorter" in shown
    assert "freed" in shown
    assert "    [cache]" in shown


def test_without_answers_it_is_said_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["replay", "--since", "2030-01-01"]) == 1
    assert "choose another model or time, or give a trace" in capsys.readouterr().err
