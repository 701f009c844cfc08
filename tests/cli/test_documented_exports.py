"""Exports as their makers document them, to the letter: OpenAI's and Anthropic's Admin APIs, LiteLLM's spend logs,
Langfuse's observations. What they mean is worked out by hand."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from millicent.cli import run

ANTHROPIC_USAGE = {
    "data": [
        {
            "starting_at": "2025-08-01T00:00:00Z",
            "ending_at": "2025-08-02T00:00:00Z",
            "results": [
                {
                    "uncached_input_tokens": 1500,
                    "cache_creation": {"ephemeral_1h_input_tokens": 1000, "ephemeral_5m_input_tokens": 500},
                    "cache_read_input_tokens": 200,
                    "output_tokens": 500,
                    "server_tool_use": {"web_search_requests": 10},
                    "api_key_id": "apikey_01Rj2N8SVvo6BePZj99NhmiT",
                    "workspace_id": "wrkspc_01JwQvzr7rXLA5AGx3HKfFUJ",
                    "model": "claude-sonnet-4-20250514",
                    "service_tier": "standard",
                    "context_window": "0-200k",
                }
            ],
        }
    ],
    "has_more": True,
    "next_page": "page_MjAyNS0wNS0xNFQwMDowMDowMFo=",
}
ANTHROPIC_COSTS = {
    "data": [
        {
            "starting_at": "2025-08-01T00:00:00Z",
            "ending_at": "2025-08-02T00:00:00Z",
            "results": [
                {"currency": "USD", "amount": "123.78912", "workspace_id": None, "cost_type": "tokens",
                 "description": "Claude Sonnet 4 Usage - Input Tokens", "model": "claude-sonnet-4-20250514",
                 "context_window": "0-200k", "service_tier": "standard", "token_type": "uncached_input_tokens"},
                {"currency": "USD", "amount": "76.21088", "workspace_id": None, "cost_type": "tokens",
                 "description": "Claude Sonnet 4 Usage - Output Tokens", "model": "claude-sonnet-4-20250514",
                 "context_window": "0-200k", "service_tier": "standard", "token_type": "output_tokens"},
            ],
        }
    ],
    "has_more": False,
    "next_page": None,
}  # fmt: skip
OPENAI_COSTS = {
    "object": "page",
    "data": [
        {
            "object": "bucket",
            "start_time": 1790812800,
            "end_time": 1790899200,
            "results": [
                {"object": "organization.costs.result", "amount": {"value": 0.0009, "currency": "usd"},
                 "line_item": "gpt-4o-2024-08-06, input", "project_id": "proj_1", "api_key_id": None, "quantity": None},
                {"object": "organization.costs.result", "amount": {"value": 0.00033, "currency": "usd"},
                 "line_item": "gpt-4o-2024-08-06, output", "project_id": "proj_1", "api_key_id": None,
                 "quantity": None},
                {"object": "organization.costs.result", "amount": {"value": 0.06, "currency": "usd"},
                 "line_item": "Image models", "project_id": None, "api_key_id": None, "quantity": None},
            ],
        }
    ],
    "has_more": False,
    "next_page": None,
}  # fmt: skip
# The columns of the table LiteLLM_SpendLogs.
LITELLM = """\
request_id,call_type,api_key,spend,total_tokens,prompt_tokens,completion_tokens,startTime,endTime,completionStartTime,\
model,model_id,model_group,custom_llm_provider,api_base,user,metadata,cache_hit,cache_key,request_tags,team_id,\
end_user,requester_ip_address,messages,response,status
chat-1,acompletion,88dc28,0.00123,120,100,20,2026-10-01 12:00:00.123,2026-10-01 12:00:03.456,\
2026-10-01 12:00:01,gpt-4o-2024-08-06,,gpt-4o,openai,https://api.openai.com,u1,"{""k"": 1}",False,,"[""a""]",t,bob,\
127.0.0.1,{},{},success
chat-2,acompletion,88dc28,0,27,20,7,2026-10-01 12:10:00,2026-10-01 12:10:01,,my-own-llama,,,openai,,u1,{},False,,[],\
t,bob,,{},{},success
chat-3,acompletion,88dc28,0,27,20,7,2026-10-01 12:20:00,2026-10-01 12:20:01,,gpt-4o-2024-08-06,,,openai,,u1,{},True,\
k,[],t,bob,,{},{},success
"""
LANGFUSE = [
    {"id": "obs-1", "traceId": "t-1", "type": "SPAN", "name": "retrieve", "startTime": "2026-10-01T12:00:00.000Z",
     "endTime": "2026-10-01T12:00:00.100Z", "model": None, "usageDetails": {}, "costDetails": {}},
    {"id": "obs-2", "traceId": "t-1", "type": "GENERATION", "startTime": "2026-10-01T12:00:00.100Z",
     "endTime": "2026-10-01T12:00:01.000Z", "model": "gpt-4o", "environment": "default", "level": "DEFAULT",
     "usageDetails": {"input": 100, "input_cached_tokens": 50, "output": 20, "total": 170},
     "costDetails": {"input": 0.00025, "output": 0.0002, "total": 0.0005125}, "metadata": {"a": {"b": 1}}},
    {"id": "obs-3", "traceId": "t-2", "type": "GENERATION", "startTime": "2026-10-01T12:05:00.000Z",
     "endTime": "2026-10-01T12:05:01.000Z", "model": "nobody-knows", "usageDetails": {"input": 3, "output": 1},
     "costDetails": {}},
]  # fmt: skip
LANGFUSE_BLOB = """\
id,trace_id,project_id,environment,type,start_time,end_time,name,provided_model_name,usage_details,cost_details,total_cost,\
user_id
obs-9,t-9,p,default,GENERATION,2026-10-01 12:00:00.100000,2026-10-01 12:00:01.000000,answer,gpt-4o,\
"{""input"": 100, ""output"": 20, ""total"": 120}","{""total"": 0.00045}",0.00045,ada
"""


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MILLICENT_HOME", str(tmp_path / "home"))


def file(tmp_path: Path, content: Any, name: str = "export") -> str:
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    code = run((*arguments, "--json"))
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def tokens(receipt: Any) -> dict[str, int]:
    return {leaf: each["tokens"] for leaf, each in receipt["usage"].items()}


def test_anthropics_usage_report_keeps_its_two_kinds_of_cache_writes_apart(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    told = call(capsys, "import", file(tmp_path, ANTHROPIC_USAGE))
    assert (told["format"], told["rows"], told["unpriced"]) == ("anthropic", 1, 1)
    [receipt] = call(capsys, "receipts")["data"]
    assert tokens(receipt) == {
        "input_fresh": 1500, "input_cache_read": 200, "input_cache_write_5m": 500, "input_cache_write_1h": 1000,
        "output_text": 500,
    }  # fmt: skip
    assert receipt["created_at"].startswith("2025-08-01T00:00:00")
    assert receipt["model"] == "claude-sonnet-4-20250514"
    assert receipt["attribution"]["team"] == "wrkspc_01JwQvzr7rXLA5AGx3HKfFUJ"


def test_anthropics_cost_report_is_in_cents(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    call(capsys, "import", file(tmp_path, ANTHROPIC_USAGE))
    body = call(capsys, "reconcile", file(tmp_path, ANTHROPIC_COSTS, "costs"))
    assert body["total"]["invoice_usd"] == "2"
    [line] = body["data"]
    assert (line["name"], line["invoice_usd"], line["requests"]) == ("claude-sonnet-4-20250514", "2", 1)


def test_openais_cost_items_for_input_and_output_are_one_models(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    call(capsys, "import", file(tmp_path, LITELLM))
    body = call(capsys, "reconcile", file(tmp_path, OPENAI_COSTS, "costs"))
    lines = {each["name"]: each for each in body["data"]}
    model = lines["gpt-4o-2024-08-06"]
    # 0.0009 for what was read and 0.00033 for what was written: the log says 0.00123.
    assert (model["invoice_usd"], model["residual_usd"], model["why"]) == ("0.00123", "0", "explained")
    assert lines["Image models"]["residual_usd"] == "0.06"
    assert body["total"]["invoice_usd"] == "0.06123"


def test_litellms_zero_is_a_price_only_for_a_cached_answer(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    told = call(capsys, "import", file(tmp_path, LITELLM))
    assert (told["format"], told["rows"], told["unpriced"], told["cost_usd"]) == ("litellm", 3, 1, "0.00123")
    receipts = {each["model"]: each for each in call(capsys, "receipts", "--model", "my-own-llama")["data"]}
    assert receipts["my-own-llama"]["total_usd"] is None
    totals = [each["total_usd"] for each in call(capsys, "receipts", "--model", "gpt-4o-2024-08-06")["data"]]
    assert sorted(map(Decimal, totals)) == [Decimal(0), Decimal("0.00123")]


@pytest.mark.parametrize(("lines", "seen"), [(False, 2), (True, 2)])
def test_langfuses_generations_are_requests_and_its_spans_are_not(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, lines: bool, seen: int
) -> None:
    export = "\n".join(map(json.dumps, LANGFUSE)) if lines else json.dumps({"data": LANGFUSE, "meta": {"page": 1}})
    told = call(capsys, "import", file(tmp_path, export))
    assert (told["format"], told["rows"], told["unpriced"], told["cost_usd"]) == ("langfuse", seen, 1, "0.0005125")
    [receipt] = call(capsys, "receipts", "--model", "gpt-4o")["data"]
    assert tokens(receipt) == {"input_fresh": 100, "input_cache_read": 50, "output_text": 20}


def test_langfuses_files_hold_their_usage_in_a_cell(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    told = call(capsys, "import", file(tmp_path, LANGFUSE_BLOB))
    assert (told["format"], told["cost_usd"]) == ("langfuse", "0.00045")
    [receipt] = call(capsys, "receipts", "--user", "ada")["data"]
    assert tokens(receipt) == {"input_fresh": 100, "output_text": 20}


def test_an_invoice_in_another_currency_is_refused_by_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    call(capsys, "import", file(tmp_path, LITELLM))
    euros = "date,model,amount,currency\n2026-10-01,gpt-4o,1.5,EUR\n"
    assert run(("reconcile", file(tmp_path, euros, "invoice.csv"))) != 0
    assert "'EUR' is not USD: convert it first" in capsys.readouterr().err
