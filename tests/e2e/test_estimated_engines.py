"""An engine that runs elsewhere and is paid for by the hour: receipts have a time and a price, as estimates."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import openai
import pytest

from millicent.core.clock import SystemClock
from millicent.core.identifiers import SystemIds
from millicent.ledger.config import LedgerConfig
from millicent.ledger.sqlite import SqliteLedger
from millicent.meter.attribution import StepTimeShares
from millicent.step_time import Coefficients, Fitter
from support.fake_upstream import Call, chunk, events, fake_upstream_in_a_thread
from support.live import LiveServer, live_server

CONFIG = """
[placements.box]
kind = "rented"
usd_per_hour = 3.6
accelerators = 2
server = "vllm"
base_url = "{url}"

[models.mine]
placement = "box"
model = "qwen3"
"""
OTHERS = """# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name="qwen3"} 1.0
vllm:num_requests_waiting{model_name="qwen3"} 0.0
"""
USAGE = {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14}


ASKED = threading.Event()


async def answer(call: Call) -> None:
    if call.path == "/metrics":
        ASKED.set()
        await call.whole(OTHERS.encode(), kind="text/plain")
        return
    if call.json["messages"][0]["content"] == "fail":
        await call.whole(b'{"error": {"message": "no"}}', status="400 Bad Request")
        return
    words = [events(chunk({"content": "so "}), done=False) for _ in range(5)]
    await call.stream(words[:1], end=False)
    if call.json["messages"][0]["content"] == "until the load is looked at":
        await asyncio.to_thread(ASKED.wait, 60)
    for word in words[1:]:
        await asyncio.sleep(0.05)
        await call.send(b"%x\r\n%s\r\n" % (len(word), word))
    last = events(chunk({}, finish_reason="stop"), {"choices": [], "usage": USAGE})
    await call.send(b"%x\r\n%s\r\n0\r\n\r\n" % (len(last), last))


def ask(server: LiveServer, text: str) -> dict[str, Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        asked: Any = {"model": "mine", "messages": [{"role": "user", "content": text}]}
        raw = client.chat.completions.with_raw_response.create(**asked)
        receipt = server.get(f"/v1/receipts/{raw.headers['x-millicent-receipt']}")[1]
        assert isinstance(receipt, dict)
        return receipt


def test_its_receipts_have_estimated_time_that_the_hours_account_for(tmp_path: Path) -> None:
    with (
        fake_upstream_in_a_thread(answer) as upstream,
        live_server(tmp_path, [], CONFIG.format(url=upstream.url)) as server,
    ):
        began = time.monotonic()
        with ThreadPoolExecutor(4) as threads:
            receipts = list(threads.map(lambda _: ask(server, "hello"), range(8)))
        most_s = 2 * (time.monotonic() - began)
        for receipt in receipts:
            assert receipt["accelerator"]["provenance"] == "estimated"
            [line] = receipt["lines"]
            assert (line["meter"], line["provenance"]) == ("accelerator", "estimated")
            # $3.6 an hour is a thousandth of a dollar a second.
            assert Decimal(receipt["total_usd"]) == pytest.approx(Decimal(line["quantity"]) / 1000, abs=Decimal("1e-9"))
            assert Decimal(line["quantity"]) > 0
        total_s = sum(Decimal(receipt["lines"][0]["quantity"]) for receipt in receipts)
        assert 0.2 * 2 <= total_s <= most_s
        with pytest.raises(openai.BadRequestError) as caught:
            ask(server, "fail")
        _, failed = server.get(f"/v1/receipts/{caught.value.response.headers['x-millicent-receipt']}")
        assert (failed["total_usd"], failed["accelerator"]["provenance"]) == ("0", "estimated")
        watched = ask(server, "until the load is looked at")
        assert ASKED.is_set()
        total_s += Decimal(watched["lines"][0]["quantity"])
        accounts = server.get("/v1/accounts")[1]["data"]
        assert {account["device"] for account in accounts} == {"estimated:box"}
        assert sum(account["serving_ns"] for account in accounts) == pytest.approx(float(total_s) * 1e9, abs=10)


def test_quotes_and_holds_begin_with_what_was_learned_of_it_before_the_restart(tmp_path: Path) -> None:
    learned = Coefficients(0.0, 40e6, 1e6, 0.0, 0.0, 0.0)
    config = CONFIG.replace("accelerators = 2", "accelerators = 1")
    with fake_upstream_in_a_thread(answer) as upstream:
        runs = f"{upstream.url} qwen3 accelerators=1"
        asyncio.run(_kept(tmp_path / "home" / "ledger.db", learned, runs))
        with live_server(tmp_path / "home", [], config.format(url=upstream.url)) as server:
            messages = [{"role": "user", "content": "x" * 1184}]
            asked = json.dumps({"model": "mine", "messages": messages, "max_tokens": 100}).encode()
            quote = server.request("POST", "/v1/quote", asked)[1]["data"][0]
            # Each token read takes a millisecond, then each one written but the first a step of 40 ms.
            read = quote["input_tokens"]
            assert 200 <= read < 400
            assert quote["ttft_ms"]["expected"] == read
            longest_ms = 10 * (read + 99 * 40)
            assert quote["total_ms"]["high"] == longest_ms
            # A thousandth of a dollar a second.
            assert Decimal(quote["cost_usd"]["high"]) == Decimal(longest_ms) / 10**6
            for maximum, status in (("0.00001", 402), ("0.02", 200)):
                most = {"X-Millicent-Max-Cost-USD": maximum}
                told = server.request("POST", "/v1/chat/completions", asked, most)
                assert told[0] == status, told


async def _kept(database: Path, learned: Coefficients, runs: str) -> None:
    """A ledger with this fit of the engine."""
    database.parent.mkdir(mode=0o700, parents=True)
    clock = SystemClock()
    ledger = SqliteLedger(database, LedgerConfig(), clock, "gw_before")
    await ledger.start()
    try:
        shares = StepTimeShares(clock, SystemIds(clock))
        shares.version_of(("estimated:box", "*", runs), learned, Fitter(), 500)
        await ledger.save_fits(shares.unsaved())
    finally:
        await ledger.stop()
