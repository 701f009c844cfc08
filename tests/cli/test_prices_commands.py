"""`quote` and `reprice`, as they are typed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from millicent.cli import run
from millicent.core.clock import ManualClock
from millicent.ledger.config import LedgerConfig
from millicent.ledger.sqlite import SqliteLedger
from support import receipts
from support.http_server import Handler, http_server

QUOTE = {
    "object": "quote",
    "model": "tiny",
    "placement": "here",
    "input_tokens": 12,
    "output_tokens": {"low": 3, "expected": 40, "high": 128},
    "ttft_ms": {"low": 1, "expected": 2.5, "high": 9},
    "total_ms": None,
    "cost_usd": {"low": "0.00001", "expected": "0.0012", "high": "0.02"},
    "provenance": "estimated",
}
UNPRICED = QUOTE | {"model": "far", "ttft_ms": None, "cost_usd": None, "provenance": "unknown"}


class Told(Handler):
    asked: list[dict[str, Any]]

    def do_GET(self) -> None:
        self.send_json({"object": "list", "data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.read_body()) | {"path": self.path})
        self.send_json({"object": "list", "data": [QUOTE, UNPRICED]})


@pytest.fixture
def url() -> Iterator[str]:
    Told.asked = []
    with http_server(Told) as url:
        yield url


def test_a_quote_is_asked_for_and_shown_side_by_side(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["quote", "hello", "--model", "tiny", "--model", "far", "--max-tokens", "9", "--feature", "f"]
    assert run([*arguments, "--url", url]) == 0
    assert Told.asked == [
        {
            "path": "/v1/quote",
            "models": ["tiny", "far"],
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": 9,
            "metadata": {"feature": "f"},
        }
    ]
    header, tiny, far = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["MODEL", "PLACEMENT", "IN"]
    assert "3-128" in tiny
    assert "2.5 ms" in tiny
    assert "120 millicents" in tiny
    assert "2 cents" in tiny
    assert far.count("unpriced") == 3


def test_without_a_model_the_servers_first_is_quoted(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quote", "hello", "--url", url, "--json"]) == 0
    assert Told.asked[0]["models"] == ["tiny"]
    assert json.loads(capsys.readouterr().out)["data"][0]["cost_usd"]["high"] == "0.02"


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A ledger with two closed receipts of a quarter of a second each, and one that runs."""
    monkeypatch.setenv("MILLICENT_HOME", str(tmp_path))

    async def fill() -> None:
        ledger = SqliteLedger(tmp_path / "ledger.db", LedgerConfig(), ManualClock(receipts.END_NS), "gw_1")
        await ledger.start()
        for number in range(2):
            await ledger.close(receipts.settled(f"rcpt_{number}"), ())
        running = msgspec.structs.replace(receipts.running("rcpt_9"), created_at_ns=receipts.START_NS + 9)
        await ledger.open(running)
        await ledger.stop()

    asyncio.run(fill())
    (tmp_path / "millicent.toml").write_text(
        '[placements.this-machine]\nkind = "rented"\nusd_per_hour = 3.6\n'
        "[[placements.this-machine.dated]]\neffective_from = 2026-02-01\nusd_per_hour = 7.2\n"
    )
    return tmp_path


def costs(capsys: pytest.CaptureFixture[str], book: str) -> str:
    assert run(["report", "--by", "model", "--book", book, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["data"]
    return str(row["cost_usd"])


@pytest.mark.usefixtures("home")
def test_reprice_makes_a_new_book_beside_the_old(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["reprice", "january", "--at", "2026-01-15", "--until", "2026-02-01", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unpriced"] == 0
    assert run(["reprice", "today", "--until", "2026-02-01"]) == 0
    capsys.readouterr()
    # Half a second in all, at $3.60 and at $7.20 an hour.
    assert (costs(capsys, "january"), costs(capsys, "today")) == ("0.0005", "0.001")
    assert costs(capsys, "actual") == "0.00005"


@pytest.mark.usefixtures("home")
def test_repeating_a_reprice_adds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert run(["reprice", "again", "--until", "2026-02-01"]) == 0
    assert "0 receipts in book again" in capsys.readouterr().out.splitlines()[-1]
    assert costs(capsys, "again") == "0.001"


def test_prices_can_come_from_another_file(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = home / "other.toml"
    other.write_text('[placements.this-machine]\nkind = "owned"\ncapital_usd = 87600\nlife_years = 1\n')
    assert run(["reprice", "bought", "--prices", str(other), "--until", "2026-02-01"]) == 0
    capsys.readouterr()
    assert costs(capsys, "bought") == "0.001388888"


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("book", ["actual", "reported"])
def test_a_book_that_stands_cannot_be_made_again(capsys: pytest.CaptureFixture[str], book: str) -> None:
    assert run(["reprice", book]) == 1
    assert "can't be a new book" in capsys.readouterr().err
