"""A server elsewhere that fails, behind every dialect: the client is told in its own shape, whole and streamed, and the
receipt says what was spent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import httpx
import pytest

from support.fake_upstream import Call, chunk, events, fake_upstream_in_a_thread
from support.live import LiveServer, live_server

# What the model's name there makes the server do; whether something was worked on, and the client's status.
FAILURES = {
    "drops": (True, 502), "drops-at-once": (True, 502), "errs": (True, 502), "stops-short": (True, 502),
    "garbles": (True, 502), "is-html": (True, 502), "takes-no-more": (False, 429), "breaks": (False, 502),
    "refuses": (False, 400), "knows-no-key": (False, 502),
}  # fmt: skip
STATUSES = {"takes-no-more": "429 x", "breaks": "500 x", "refuses": "400 x", "knows-no-key": "401 x"}
SAID = events(chunk({"content": "Well"}), done=False)

MESSAGES = [{"role": "user", "content": "Rome?"}]
ASKED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "Rome?"},
    "/v1/responses": {"input": "Rome?"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 9},
    "/api/chat": {"messages": MESSAGES},
    "/api/generate": {"prompt": "Rome?"},
}


async def fail(call: Call) -> None:
    how = call.json["model"]
    if how in STATUSES:
        await call.whole(b'{"error": {"message": "because"}}', status=STATUSES[how], more="Retry-After: 7\r\n")
    elif how == "is-html":
        await call.whole(b"<html>because</html>", kind="text/html")
    elif how == "drops-at-once":
        call.writer.close()
    else:
        more = {"errs": events({"error": {"message": "because"}}), "garbles": b"data: {\n\n"}
        await call.stream([SAID, more.get(how, b"")], end=how != "drops")
        call.writer.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with fake_upstream_in_a_thread(fail) as upstream:
        config = f'[placements.there]\nkind = "api"\nserver = "compatible"\nbase_url = "{upstream.url}"\n'
        for name in FAILURES:
            config += f'[models.{name}]\nplacement = "there"\nretries = 0\nbreaker = {{ failures = 1000 }}\n'
            config += f"[prices.{name}]\ninput = 1\noutput = 2\n"
        with live_server(tmp_path_factory.mktemp("failures") / "home", [], config) as live:
            yield live


def shape_of(address: str, body: Any) -> tuple[str, Any]:
    """The message and code, of an error in this dialect's shape and no other's."""
    if address.startswith("/api/"):
        assert set(body) == {"error", "code", "param"}
        return body["error"], body["code"]
    if address == "/v1/messages":
        assert (body["type"], set(body["error"])) == ("error", {"type", "message", "param", "details"})
        return body["error"]["message"], None
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]["message"], body["error"]["code"]


@pytest.mark.parametrize("address", ASKED)
@pytest.mark.parametrize("how", FAILURES)
def test_a_failure_there_is_an_error_here_with_what_it_took(server: LiveServer, address: str, how: str) -> None:
    worked, status = FAILURES[how]
    body = {"model": how, "stream": False} | ASKED[address]
    answer = httpx.post(server.url + address, json=body, timeout=60)
    assert answer.status_code == status
    message, _ = shape_of(address, answer.json())
    assert "(placement `there`)" in message
    assert answer.headers.get("retry-after") == ("7" if how in {"takes-no-more", "breaks"} else None)
    check_receipt(server, answer.headers["x-millicent-receipt"], message, worked=worked)


@pytest.mark.parametrize("address", ASKED)
@pytest.mark.parametrize("how", FAILURES)
def test_a_failure_there_ends_a_stream_with_an_error(server: LiveServer, address: str, how: str) -> None:
    worked, _ = FAILURES[how]
    answer = httpx.post(server.url + address, json={"model": how, "stream": True} | ASKED[address], timeout=60)
    assert answer.status_code == 200
    lines = [line for line in answer.text.split("\n") if line.strip() not in {"", "data: [DONE]"}]
    last = json.loads(lines[-1].removeprefix("data: "))
    if address == "/v1/responses":
        assert last["type"] == "response.failed"
        message = last["response"]["error"]["message"]
    else:
        message, _ = shape_of(address, last)
    assert "(placement `there`)" in message
    assert ("Well" in answer.text) is (how in {"drops", "errs", "stops-short", "garbles"})
    check_receipt(server, answer.headers["x-millicent-receipt"], message, worked=worked)


def check_receipt(server: LiveServer, receipt_id: str, message: str, *, worked: bool) -> None:
    receipt = server.settled(receipt_id)
    assert (receipt["status"], receipt["error"]) == ("failed", message)
    assert (Decimal(receipt["total_usd"]) > 0) is worked
    assert {count["provenance"] for count in receipt["usage"].values()} == ({"estimated"} if worked else set())
