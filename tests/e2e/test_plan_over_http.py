"""The plans of a live server over a ledger that was there before: who may ask, and that nothing fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fake_upstream import Call, fake_upstream_in_a_thread
from support.live import LiveServer, live_server
from support.plan_ledgers import BUSY, two_hours, write

CONFIG = """
[placements.cloud]
kind = "api"
base_url = "{url}"

[models.big]
placement = "cloud"

[prices.big]
input = 1
input_cached = 0.1
output = 4

[machines.gpu]
kind = "rented"
usd_per_hour = 2
output_tokens_per_s = 200
"""
ESTIMATE = "users=1000&input_tokens=1000&output_tokens=100&models=big"


async def answer(call: Call) -> None:
    await call.whole(b"{}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    home: Path = tmp_path_factory.mktemp("plans")
    write(home, two_hours(accelerator=BUSY))
    with fake_upstream_in_a_thread(answer) as upstream, live_server(home, [], CONFIG.format(url=upstream.url)) as live:
        yield live


def test_plans_are_for_those_who_may_read_all_and_wrong_questions_are_told_as_errors(server: LiveServer) -> None:
    status, found = server.get("/v1/plan/where?range=all")
    assert status == 200
    places = {each["name"]: each for each in found["places"]}
    assert places["cloud big"]["monthly_usd"] == "21.17"
    assert places["box small"]["machines"] == 1
    assert found["rule_of_thumb"]["verdict"] == "confirmed"
    assert server.get("/v1/plan/standing?range=all")[1]["object"] == "plan.standing"
    assert server.get("/v1/plan/scenarios")[1] == {"object": "list", "data": []}
    assert server.get(f"/v1/plan/estimate?{ESTIMATE}")[1]["data"][0]["name"] == "cloud big"
    status, refused = server.get("/v1/plan/where?spares=many")
    assert (status, refused["error"]["param"]) == (400, "spares")
    made = {scope: _key(server, scope) for scope in ("admin", "viewer", "client")}
    for scope, allowed in (("admin", 200), ("viewer", 200), ("client", 403)):
        as_them = {"Authorization": f"Bearer {made[scope]}"}
        for path in ("/v1/plan/where?range=all", "/v1/plan/standing?range=all", f"/v1/plan/estimate?{ESTIMATE}"):
            assert server.request("GET", path, None, as_them)[0] == allowed, (scope, path)


def _key(server: LiveServer, scope: str) -> str:
    _, key, _ = server.request("POST", "/admin/keys", json.dumps({"name": scope, "scope": scope}).encode())
    token: str = key["token"]
    if scope == "admin":
        server.token = token
    return token
