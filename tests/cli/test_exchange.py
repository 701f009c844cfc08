"""`export`, `import`, `reconcile` and `ledger`, over a ledger of their own."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from millicent.cli import run

LITELLM = """\
request_id,call_type,api_key,spend,prompt_tokens,completion_tokens,startTime,endTime,model,team_id,end_user,status
a1,acompletion,k,0.00123,100,20,2026-10-01 12:00:00.123,2026-10-01 12:00:03,gpt-4o,t,bob,success
a2,acompletion,k,0.5,100,20,2026-10-02T12:00:00Z,2026-10-02T12:00:03Z,gpt-4o-mini,t,,failure
a3,acompletion,k,,7,1,2026-10-02T23:30:00Z,2026-10-02T23:30:03Z,gpt-4o-mini,t,=cmd(),success
"""
OPENAI_PAGE = {
    "object": "page",
    "data": [
        {
            "object": "bucket",
            "start_time": 1790812800,
            "end_time": 1790899200,
            "results": [
                {
                    "object": "organization.usage.completions.result",
                    "input_tokens": 1000,
                    "output_tokens": 50,
                    "input_cached_tokens": 800,
                    "num_model_requests": 5,
                    "project_id": "proj_1",
                    "user_id": None,
                    "model": "gpt-4o-2024-08-06",
                }
            ],
        }
    ],
}
ANTHROPIC = """\
usage_date_utc,model_version,api_key,workspace,usage_type,usage_input_tokens_no_cache,\
usage_input_tokens_cache_write_5m,usage_input_tokens_cache_write_1h,usage_input_tokens_cache_read,usage_output_tokens
2026-10-01,claude-sonnet-4-5,prod,Default,standard,200,30,4,1000,50
2026-10-01,claude-sonnet-4-5,prod,Default,standard,200,30,4,1000,50
"""
TABLE = ("--time", "day", "--model", "model", "--user", "user", "--cost", "cost")
INVOICE = """\
Date,Description,Amount
2026-10-01,"GPT-4o, tokens","$0.00123"
2026-10-02,gpt-4o-mini,0.60
2026-10-03,Support plan,0.10
"""


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MILLICENT_HOME", str(tmp_path / "home"))


def written(tmp_path: Path, text: str, name: str = "file.csv") -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    code = run(arguments)
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out) if "--json" in arguments else out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(arguments) != 0
    return capsys.readouterr().err


def by_group(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str | None, Any]:
    return {each["group"]: each for each in call(capsys, "report", "--json", *arguments)["data"]}


def test_spend_logs_are_reported_before_the_first_request_and_importing_again_adds_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    logs = written(tmp_path, LITELLM)
    assert call(capsys, "import", logs, "--dry-run", "--json")["added"] == 0
    first = call(capsys, "import", logs, "--json")
    assert (first["format"], first["rows"], first["added"], first["unpriced"]) == ("litellm", 3, 3, 1)
    assert first["cost_usd"] == "0.50123"
    assert call(capsys, "import", logs, "--json")["added"] == 0
    models = by_group(capsys, "--by", "model")
    assert (models["gpt-4o"]["cost_usd"], models["gpt-4o-mini"]["cost_usd"]) == ("0.00123", "0.5")
    assert models["gpt-4o-mini"]["unpriced"] == 1
    days = by_group(capsys, "--by", "day", "--timezone", "Europe/Berlin")
    assert {day: each["requests"] for day, each in days.items()} == {"2026-10-01": 1, "2026-10-02": 1, "2026-10-03": 1}
    assert by_group(capsys, "--by", "user", "--user", "")[None]["requests"] == 1
    receipts = call(capsys, "receipts", "--json")["data"]
    assert {each["backend"] for each in receipts} == {"import"}
    assert [each["status"] for each in receipts] == ["succeeded", "failed", "succeeded"]


def test_openais_usage_page_is_read_with_its_buckets_times_and_cached_tokens_apart(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call(capsys, "import", written(tmp_path, json.dumps(OPENAI_PAGE)), "--json")["format"] == "openai"
    (receipt,) = call(capsys, "receipts", "--json")["data"]
    usage = {leaf: each["tokens"] for leaf, each in receipt["usage"].items()}
    assert usage == {"input_fresh": 200, "input_cache_read": 800, "output_text": 50}
    assert {each["provenance"] for each in receipt["usage"].values()} == {"reported"}
    assert receipt["created_at"].startswith("2026-10-01T00:00:00")
    assert receipt["attribution"]["tags"] == {"requests": "5"}
    assert receipt["total_usd"] is None


def test_two_equal_rows_of_an_export_are_two_receipts_and_still_imported_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    export = written(tmp_path, ANTHROPIC)
    assert call(capsys, "import", export, "--json")["added"] == 2
    assert call(capsys, "import", export, "--json")["added"] == 0
    assert by_group(capsys, "--by", "team")["Default"]["input_tokens"] == 2 * 1234


def test_any_table_is_read_when_its_columns_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table = written(tmp_path, "when,what,usd\n2026-01-31,m,1.5\n1767225600,m,2\n")
    assert "name its columns" in refusal(capsys, "import", table)
    assert "no column 'wen'" in refusal(capsys, "import", table, "--time", "wen", "--model", "what")
    named = ("--time", "when", "--model", "what", "--cost", "usd", "--placement", "acme")
    assert call(capsys, "import", table, *named, "--json")["cost_usd"] == "3.5"
    assert by_group(capsys, "--by", "placement")["acme"]["cost_usd"] == "3.5"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no rows"),
        ('{"broken": ', "neither CSV nor JSON"),
        ("[1]", "no list of objects"),
        (LITELLM.replace(",7,", ",seven,"), "row 3, column prompt_tokens: 'seven' is no number"),
        (LITELLM.replace(",7,", ",-7,"), "row 3, column prompt_tokens: '-7' is no count"),
        (LITELLM.replace("2026-10-01 12:00:00.123", "yesterday"), "row 1, column startTime: 'yesterday' is no time"),
        (LITELLM.replace("gpt-4o,", ","), "row 1 has no model"),
        (LITELLM.replace(",7,", ",1e30,"), "row 3, column prompt_tokens: '1e30' is no count"),
        (LITELLM.replace("2026-10-01 12:00:00.123", "\u00b2"), "row 1, column startTime: '\u00b2' is no time"),
        (LITELLM.replace("2026-10-01 12:00:00.123", "9999-12-31"), "row 1, column startTime: '9999-12-31' is no time"),
        (LITELLM.replace("2026-10-01 12:00:00.123", "1969-12-31"), "row 1, column startTime: '1969-12-31' is no time"),
        (LITELLM.replace("0.00123", "1e30"), "row 1, column spend: '1e30' is more than a row can cost"),
        (LITELLM.replace("gpt-4o,", "gpt-4o\x00,"), "row 1, column model: 'gpt-4o\\x00' holds control characters"),
        ("time,model\n2026-10-01,a\n2026-10-01,b,c\n", "row 2 has more cells than the header"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_and_nothing_is_imported(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, told: str
) -> None:
    assert told in refusal(capsys, "import", written(tmp_path, text))
    assert not (tmp_path / "home" / "ledger.db").exists()


def test_a_file_that_is_no_text_is_told_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "export.xlsx").write_bytes(b"PK\x03\x04\xff")
    assert "export.xlsx is no UTF-8 text (byte 4)" in refusal(capsys, "import", str(tmp_path / "export.xlsx"))
    assert "export.xlsx is no UTF-8 text (byte 4)" in refusal(capsys, "reconcile", str(tmp_path / "export.xlsx"))


def test_models_that_are_spelled_alike_are_each_charged_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    named = ("--time", "when", "--model", "what", "--cost", "usd")
    call(capsys, "import", written(tmp_path, "when,what,usd\n2026-10-01,gpt-4o,1.5\n2026-10-01,GPT 4o,2\n"), *named)
    invoice = written(tmp_path, "date,model,amount\n2026-10-01,gpt-4o,1.500000001\n", "invoice.csv")
    body = call(capsys, "reconcile", invoice, "--json")
    assert [(each["name"], each["invoice_usd"], each["residual_usd"]) for each in body["data"]] == [
        ("gpt-4o", "1.500000001", "0.000000001"),
        ("GPT 4o", "0", "-2"),
    ]
    assert body["total"]["invoice_usd"] == "1.500000001"


def test_lines_of_another_time_than_the_one_asked_for_are_left_out(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    call(capsys, "import", written(tmp_path, LITELLM))
    text = "date,model,amount\n2026-10-01,gpt-4o,0.00123\n2026-09-01,gpt-4o,9\n"
    since = ("--since", "2026-10-01", "--until", "2026-10-02")
    body = call(capsys, "reconcile", written(tmp_path, text, "invoice.csv"), *since, "--json")
    assert (body["total"]["invoice_usd"], body["total"]["residual_usd"]) == ("0.00123", "0")


def test_an_invoice_is_explained_line_by_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    call(capsys, "import", written(tmp_path, LITELLM))
    body = call(capsys, "reconcile", written(tmp_path, INVOICE, "invoice.csv"), "--json")
    lines = {each["name"]: each for each in body["data"]}
    for line in lines.values():
        parts = (line[f"{part}_usd"] for part in ("attributed", "unattributed", "residual"))
        assert Decimal(line["invoice_usd"]) == sum(map(Decimal, parts))
    assert lines["GPT-4o, tokens"]["why"] == "explained"
    assert (lines["gpt-4o-mini"]["unattributed_usd"], lines["gpt-4o-mini"]["residual_usd"]) == ("0.5", "0.1")
    assert "unpriced" in lines["gpt-4o-mini"]["why"]
    assert lines["Support plan"]["residual_usd"] == "0.1"
    assert body["total"]["invoice_usd"] == "0.70123"
    assert "Support plan" in call(capsys, "reconcile", str(tmp_path / "invoice.csv"))
    assert "no column 'x'" in refusal(capsys, "reconcile", str(tmp_path / "invoice.csv"), "--amount", "x")


def test_exports_hold_every_receipt_in_every_format(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    call(capsys, "import", written(tmp_path, LITELLM))
    rows = list(csv.DictReader(io.StringIO(call(capsys, "export"))))
    assert [row["total_usd"] for row in rows] == ["", "0.5", "0.00123"]
    assert rows[0]["user"] == "'=cmd()"
    assert len(json.loads(call(capsys, "export", "--format", "json", "--model", "gpt-4o"))["data"]) == 1
    out = tmp_path / "focus.csv"
    assert run(("export", "--format", "focus", "--out", str(out))) == 0
    assert "2 unpriced" in capsys.readouterr().err
    charges = list(csv.DictReader(out.read_text().splitlines()))
    assert sum(Decimal(row["BilledCost"]) for row in charges) == Decimal("0.50123")
    aside = list(csv.DictReader((tmp_path / "focus.csv.unpriced.csv").read_text().splitlines()))
    assert [(row["meter"], row["quantity"]) for row in aside] == [("input", "7"), ("output", "1")]


def test_an_export_that_fails_leaves_what_was_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It left the half that was written."""
    call(capsys, "import", written(tmp_path, LITELLM))
    out = tmp_path / "out.csv"
    out.write_text("as it was")
    out.chmod(0o600)

    def broken(_: object) -> Iterator[str]:
        yield "half"
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("millicent.dashboard.exports.as_csv", broken)
        assert refusal(capsys, "export", "--out", str(out)) == "error: No space left on device\n"
    assert out.read_text() == "as it was"
    call(capsys, "export", "--out", str(out))
    assert out.read_text().startswith("id,")
    assert out.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.csv", "home", "out.csv"]


NAMES = (
    "=1+1",
    "'=1+1",
    "''=1+1",
    "'quoted'",
    "\uff1d1+1",
    "-1",
    "+1",
    "@x",
    "plain",
    "it's",
    "a;b",
    '"x", y',
    "<b>",
    "漢字",
)


def test_names_come_back_from_a_csv_as_they_were(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = [{"day": "2026-10-01", "model": "m", "user": name, "cost": "1.5"} for name in NAMES]
    call(capsys, "import", written(tmp_path, json.dumps(rows), "a.json"), *TABLE)
    exported = call(capsys, "export")
    cells = [row["user"] for row in csv.DictReader(io.StringIO(exported))]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\uff1d"))]
    assert {row["total_usd"] for row in csv.DictReader(io.StringIO(exported))} == {"1.5"}
    again = ("--time", "created_at", "--id", "id", "--model", "model", "--user", "user", "--cost", "total_usd")
    call(capsys, "import", written(tmp_path, exported, "again.csv"), *again, "--placement", "again")
    for placement in ("table", "again"):
        users = by_group(capsys, "--by", "user", "--placement", placement)
        assert users.keys() == set(NAMES), placement


def test_parquet_has_types_and_needs_its_extra(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet as pq

    call(capsys, "import", written(tmp_path, LITELLM))
    out = str(tmp_path / "receipts.parquet")
    assert "--out" in refusal(capsys, "export", "--format", "parquet")
    call(capsys, "export", "--format", "parquet", "--out", out)
    table = pq.read_table(out)
    assert table.column("input_tokens").to_pylist() == [7, 100, 100]
    assert str(table.schema.field("stream").type) == "bool"
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "millicent[parquet]" in refusal(capsys, "export", "--format", "parquet", "--out", out)


def test_the_ledger_is_backed_up_restored_upgraded_and_forgets(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    copy = str(tmp_path / "copy.db")
    assert "no ledger" in refusal(capsys, "ledger", "purge", "--user", "bob")
    call(capsys, "import", written(tmp_path, LITELLM))
    assert "checked" in call(capsys, "ledger", "backup", copy)
    assert "1 receipts no longer name bob" in call(capsys, "ledger", "purge", "--user", "bob")
    assert "bob" not in by_group(capsys, "--by", "user")
    assert "is as it was" in call(capsys, "ledger", "restore", copy, "--yes")
    assert "bob" in by_group(capsys, "--by", "user")
    assert len(list((tmp_path / "home").glob("ledger-before-*.db"))) == 1
    assert "up to date" in call(capsys, "ledger", "upgrade")
    assert [each["state"] for each in call(capsys, "doctor", "--ledger", "--json")["data"]] == ["good"]
