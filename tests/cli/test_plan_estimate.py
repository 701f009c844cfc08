"""`plan estimate` and `plan scenarios` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from millicent.cli import run

CONFIG = "[prices.big]\ninput = 2\ninput_cached = 0.2\noutput = 8\n"
ASKED = ("--users", "1000", "--sessions", "20", "--calls", "2.5", "--in", "1000", "--out", "100", "--model", "big")


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLICENT_HOME", str(tmp_path))
    (tmp_path / "millicent.toml").write_text(CONFIG)


def test_an_estimate_needs_no_ledger(capsys: pytest.CaptureFixture[str]) -> None:
    """50,000 calls of 1,000 x $2 + 100 x $8 per million: $0.0028, $140; 30% either way."""
    assert run(["plan", "estimate", *ASKED]) == 0
    out = capsys.readouterr().out
    assert "50,000 calls a month" in out
    [row] = [line for line in out.splitlines() if line.startswith("big")]
    assert row.split()[1:4] == ["$140.00", "$98.00", "$182.00"]


def test_an_estimate_is_saved_listed_shown_and_removed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "estimate", *ASKED, "--feature", "search", "--save", "pilot", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["data"][0]["monthly_usd"] == {"low": "98", "expected": "140", "high": "182"}
    assert body["scenario"]["calls_per_month"] == 50_000
    assert run(["plan", "scenarios", "--json"]) == 0
    [saved] = json.loads(capsys.readouterr().out)["data"]
    assert (saved["name"], saved["expected_usd"]) == ("pilot", {"big": "140"})
    assert run(["plan", "scenarios"]) == 0
    assert "50,000" in capsys.readouterr().out
    assert run(["plan", "scenarios", "pilot"]) == 1  # there is no ledger yet
    assert "no ledger" in capsys.readouterr().err
    assert run(["plan", "scenarios", "pilot", "--remove"]) == 0
    capsys.readouterr()
    assert run(["plan", "scenarios", "pilot", "--remove"]) == 1
    assert "no scenario 'pilot' is saved" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--users", "1"), "--in and --out"),
        (("--users", "1", "--in", "1", "--out", "1", "--like", "search"), "--like measures the tokens"),
        (("--users", "1", "--in", "1", "--out", "1", "--calls", "many"), "must be a number from 0"),
    ],
)
def test_what_is_missing_or_said_twice_is_told(
    arguments: tuple[str, ...], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", "estimate", *arguments]) == 2
    assert problem in capsys.readouterr().err
