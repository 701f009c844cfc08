"""`plan standing` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from millicent.cli import run
from millicent.config import load
from support.plan_ledgers import two_hours, write

CONFIG = """
[features.search]
owner = "ada"
cost_target_usd = 0.01
revenue_usd_per_request = 0.001

[features.search.alternative]
what = "an agent answers"
minutes = 6
usd_per_hour = 30
"""


def test_standing_is_told_with_its_evidence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """$0.000278 of each $0.001 are 27.8%: between the bands."""
    write(tmp_path, two_hours())
    (tmp_path / "millicent.toml").write_text(CONFIG)
    monkeypatch.setenv("MILLICENT_HOME", str(tmp_path))
    assert run(["plan", "standing", "--since", "2026-01-01"]) == 0
    told = capsys.readouterr()
    assert "between behind and typical" in told.out
    assert "27.8%" in told.out
    assert "[x]  measure     features have a cost target" in told.out
    assert "[ ]  measure     features have a latency target" in told.out
    assert "an agent answers" in told.out
    assert told.err.startswith("Next: ")
    assert run(["plan", "standing", "--since", "2026-01-01", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert [each["stands"] for each in body["stands"]] == ["between behind and typical", "leading", "behind", "leading"]
    assert body["without_model"][0]["without_usd"] == "3"


def test_a_features_three_halves_share_its_section(tmp_path: Path) -> None:
    path = tmp_path / "millicent.toml"
    path.write_text(CONFIG)
    config = load(path)
    assert config.features["search"].owner == "ada"
    assert config.earnings["search"].revenue_usd_per_request > 0
    assert config.alternatives["search"].alternative is not None
