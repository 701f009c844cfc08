"""`receipts` and `report`, over a ledger that is told what to hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from millicent.cli import run
from millicent.core.clock import NS_PER_S
from millicent.core.money import Money
from millicent.core.receipts import Receipt, Role
from millicent.core.request import Attribution
from millicent.core.usage import Provenance, Usage
from millicent.ledger.queries import ReceiptFilter, ReceiptPage, Totals
from millicent.ledger.worth import RoleCosts, Usefulness
from support.receipts import settled

CREATED_NS = 1_767_225_600 * NS_PER_S

RECEIPT = msgspec.structs.replace(
    settled("rcpt_00000000000000000000000001"),
    attribution=Attribution(feature="search", user="ada\x1b[2J"),
    usage=Usage.of(Provenance.MEASURED, input_fresh=31, output_text=1200),
)
UNPRICED = Receipt(
    id="rcpt_00000000000000000000000002", created_at_ns=CREATED_NS, model="other", dialect="openai.chat", stream=False
)
TOTALS = [
    Totals("search", 3, 100, 2000, 4 * NS_PER_S, Money(1_200_000_000), 1, 2, 0),
    Totals(None, 1, 5, 6, 0, Money(34_000), 0, 0, 1),
]


class ToldQueries:
    """Answers what it was told, and remembers how it was asked."""

    asked: list[Any]

    def __init__(self, path: Path) -> None:
        type(self).asked = []

    def receipt(self, receipt_id: str) -> Receipt | None:
        return next((each for each in (RECEIPT, UNPRICED) if each.id == receipt_id), None)

    def receipts(self, where: ReceiptFilter, *, limit: int = 50, after: str | None = None) -> ReceiptPage:
        self.asked.append((where, limit, after))
        return ReceiptPage((UNPRICED, RECEIPT), "rcpt_next")

    def totals(self, by: str, where: ReceiptFilter, book: str = "actual", *, zone: str = "UTC") -> Sequence[Totals]:
        assert zone in {"UTC", "Europe/Berlin"}
        self.asked.append((by, where) if book == "actual" else (by, where, book))
        return TOTALS

    def usefulness(self, by: str, where: ReceiptFilter, *, zone: str = "UTC") -> list[Usefulness]:
        assert zone in {"UTC", "Europe/Berlin"}
        return [Usefulness("search", requests=10, priced=10, cost=Money(1_200_000_000), rated=4, useful=3)]

    def role_costs(self, by: str, where: ReceiptFilter, *, zone: str = "UTC") -> list[RoleCosts]:
        assert zone in {"UTC", "Europe/Berlin"}
        costs = {Role.INFERENCE: Money(1_000_000_000), Role.RETRIEVAL: Money(200_000_000)}
        return [RoleCosts("search", costs, unpriced=0)]

    def books(self) -> list[str]:
        return ["actual", "next-year"]


@pytest.fixture(autouse=True)
def _ledger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MILLICENT_HOME", str(tmp_path))
    monkeypatch.setattr("millicent.ledger.queries.LedgerQueries", ToldQueries)
    (tmp_path / "ledger.db").touch()


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(arguments) == 0
    return capsys.readouterr().out


def test_a_receipt_shows_its_amount_first_and_lines_that_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    lines = call(capsys, "receipts", RECEIPT.id).splitlines()
    assert lines[0] == f"2.5 millicents   {RECEIPT.id}"
    assert any(line.startswith("accelerator") and "$0.000025" in line and line.endswith("assumed") for line in lines)
    assert lines[-1].split() == ["total", "$0.000025"]


def test_a_receipt_as_json_is_the_one_the_server_gives(capsys: pytest.CaptureFixture[str]) -> None:
    body = json.loads(call(capsys, "receipts", RECEIPT.id, "--json"))
    assert body["object"] == "receipt"
    assert body["total_usd"] == "0.000025"
    assert body["usage"]["output_text"] == {"tokens": 1200, "provenance": "measured"}


def test_the_list_shows_what_is_unpriced_as_unpriced(capsys: pytest.CaptureFixture[str]) -> None:
    header, running, settled = call(capsys, "receipts").splitlines()
    assert header.split()[-2:] == ["COST", "RECEIPT"]
    assert "running" in running
    assert "2.5 millicents" in settled


def test_names_in_a_list_cannot_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    assert "\x1b" not in call(capsys, "receipts") + call(capsys, "receipts", RECEIPT.id)


def test_filters_reach_the_ledger(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--feature", "f", "--user", "u", "--team", "t", "--model", "m", "--key", "k", "--tier", "gold"]
    given += ["--status", "failed", "--since", "2026-01-01", "--until", "2026-01-02", "--limit", "7", "--after", "x"]
    call(capsys, "receipts", *given)
    where = ReceiptFilter(
        feature="f",
        user="u",
        team="t",
        model="m",
        key="k",
        tier="gold",
        status="failed",
        from_ns=CREATED_NS,
        to_ns=CREATED_NS + 86400 * NS_PER_S,
    )
    assert ToldQueries.asked == [(where, 7, "x")]


def test_the_list_as_json_has_the_next_page(capsys: pytest.CaptureFixture[str]) -> None:
    body = json.loads(call(capsys, "receipts", "--json"))
    assert (body["object"], body["has_more"], body["next"]) == ("list", True, "rcpt_next")
    assert [each["total_usd"] for each in body["data"]] == [None, "0.000025"]


def test_a_report_adds_up_and_says_what_it_leaves_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", "--by", "feature"]) == 0
    out, err = capsys.readouterr()
    header, search, nobody, total = out.splitlines()[:4]
    assert header.startswith("FEATURE")
    assert search.split()[:2] == ["search", "3"]
    assert nobody.startswith("unattributed")
    assert total.split() == ["total", "4", "105", "2,006", "4.00", "s", "$1.20", "1", "2", "1"]
    assert "Unpriced" in err
    assert "Assumed" in err


def test_a_report_as_json_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    body = json.loads(call(capsys, "report", "--by", "user", "--json"))
    assert body["by"] == "user"
    assert [each["cost_usd"] for each in body["data"]] == ["1.2", "0.000034"]
    assert [each["group"] for each in body["data"]] == ["search", None]


def test_a_report_says_what_a_useful_output_costs_and_null_where_nothing_was_rated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    search, unattributed = json.loads(call(capsys, "report", "--json"))["data"]
    assert search["useful"]["cost_per_useful_usd"] == "0.16"
    assert search["useful"]["coverage"] == 0.4
    assert search["roles_usd"] == {"inference": "1", "retrieval": "0.2"}
    assert (unattributed["rated"], unattributed["useful"], unattributed["roles_usd"]) == (0, None, {})
    assert "75.0%" in call(capsys, "report")


def test_the_cost_of_predictivity_is_shown_by_role(capsys: pytest.CaptureFixture[str]) -> None:
    header, row = call(capsys, "report", "--predictivity").splitlines()
    assert header.split() == ["FEATURE", "INFERENCE", "RETRIEVAL", "PREDICTIVITY", "UNPRICED", "LINES"]
    assert row.split() == ["search", "$1.00", "20", "cents", "$1.20", "0"]


def test_a_receipt_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["receipts", "rcpt_none"]) == 1
    assert capsys.readouterr().err.startswith("error: no receipt rcpt_none")


def test_without_a_ledger_the_error_says_where_it_was_looked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "ledger.db").unlink()
    assert run(["report"]) == 1
    assert f"no ledger at {tmp_path}/ledger.db" in capsys.readouterr().err


def test_a_report_can_be_of_another_book(capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(call(capsys, "report", "--book", "next-year", "--json"))["book"] == "next-year"
    assert ToldQueries.asked[-1][2] == "next-year"
    assert run(("report", "--book", "nowhere")) == 1
    assert "there is actual, next-year" in capsys.readouterr().err
