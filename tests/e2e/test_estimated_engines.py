"""An engine that runs elsewhere and is paid for by the hour: receipts have a time and a price, as estimates."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import openai
import pytest

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
