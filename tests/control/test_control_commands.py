"""`millicent keys` and `millicent budgets`, and what of them stands in millicent.toml."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from millicent import config
from millicent.cli import run
from millicent.core.errors import ConfigError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MILLICENT_HOME", str(tmp_path))
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    status = run(arguments)
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out.strip()


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(arguments) != 0
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


def test_a_key_is_shown_once_and_then_listed_without_its_secret(capsys: pytest.CaptureFixture[str]) -> None:
    token = said(capsys, "keys", "create", "app", "--team", "search", "--model", "tiny", "--expires", "90d",
                 "--usd-per-minute", "1.50")  # fmt: skip
    key_id = "_".join(token.split("_")[:2])
    [key] = json.loads(said(capsys, "keys", "list", "--json"))["data"]
    assert key["id"] == key_id
    assert key["scope"] == "client"
    assert key["pinned"]["team"] == "search"
    assert key["models"] == ["tiny"]
    assert key["usd_per_minute"] == "1.50"
    assert key["expires_at"] > key["created_at"]
    for shown in (said(capsys, "keys", "list"), json.dumps(key)):
        assert key_id in shown
        assert token not in shown
    rotated = said(capsys, "keys", "rotate", key_id)
    assert rotated.startswith(f"{key_id}_")
    assert rotated != token
    said(capsys, "keys", "revoke", key_id)
    assert json.loads(said(capsys, "keys", "list", "--json"))["data"][0]["state"] == "revoked"


def test_budgets_are_made_changed_listed_and_removed(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "budgets", "create", "daily", "--limit", "$5", "--every", "day", "--per", "team") == (
        "daily: $5, hard, every day, for each team."
    )
    said(capsys, "budgets", "create", "daily", "--limit", "7.25", "--every", "day", "--per", "team", "--soft")
    [budget] = json.loads(said(capsys, "budgets", "list", "--json"))["data"]
    assert (budget["limit_usd"], budget["hard"], budget["per"]) == ("7.25", False, "team")
    assert "daily" in said(capsys, "budgets", "list")
    pro = ("budgets", "create", "pro", "--limit", "5", "--per", "user", "--tier", "pro")
    assert said(capsys, *pro) == "pro: $5, hard, every month, for each user of tier pro."
    assert "of tier pro" in said(capsys, "budgets", "list")
    said(capsys, "budgets", "remove", "pro")
    said(capsys, "budgets", "remove", "daily")
    assert json.loads(said(capsys, "budgets", "list", "--json"))["data"] == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("budgets", "create", "x", "--limit", "much"), "no amount"),
        (("budgets", "create", "x", "--limit", "-1"), "limit_usd"),
        (("budgets", "create", "x", "--limit", "1", "--only", "y"), "per"),
        (("budgets", "remove", "x"), "no budget `x`"),
        (("keys", "create", "--expires", "soon"), "no duration"),
        (("keys", "create", "--usd-per-minute", "0"), "above 0"),
        (("keys", "rotate", "mk_none"), "no key `mk_none`"),
        (("keys", "revoke", "mk_none"), "no key `mk_none`"),
    ],
)
def test_a_slip_is_told_in_one_line(arguments: Any, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert told in refused(capsys, *arguments)


def test_the_configuration_has_budgets_and_rates(home: Path) -> None:
    path = home / "millicent.toml"
    path.write_text(
        '[budgets.users]\nlimit_usd = 2.5\nevery = "day"\nper = "user"\n[limits]\nrequests_per_minute = 9\n'
    )
    found = config.load(path)
    assert found.budgets["users"].limit_usd == Decimal("2.5")
    assert found.limits.requests_per_minute == 9


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("[budgets.x]\nlimit_usd = -1\n", 1, "limit_usd"),
        ('[budgets.x]\nlimit_usd = 1\nevery = "decade"\n', 3, "every"),
        ("[budgets.x]\nlimit = 1\n", 2, "limit_usd"),
        ("[server]\nport = 1\n[limits]\nusd_per_minute = 0\n", 4, "above 0"),
    ],
)
def test_a_mistake_in_them_is_told_with_its_line(home: Path, text: str, line: int, told: str) -> None:
    path = home / "millicent.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told) as caught:
        config.load(path)
    assert caught.value.message.startswith(f"{path}:{line}:")


def test_another_machine_is_served_only_once_there_is_a_key(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said(capsys, "keys", "create")
    key_id = json.loads(said(capsys, "keys", "list", "--json"))["data"][0]["id"]
    said(capsys, "keys", "revoke", key_id)

    from millicent.app import ServeOptions, serve
    from millicent.meter.placements import assumed_placement
    from millicent.server.config import ServerConfig

    settings = config.Config(server=ServerConfig(host="0.0.0.0", port=0))
    with pytest.raises(ConfigError, match="there is no key"):
        serve(ServeOptions(tmp_path, settings, {}, assumed_placement("here", 1)))
