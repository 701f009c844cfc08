"""The economics' reports through the front door: JSON, the command line, and who may ask."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.testclient import TestClient

from millicent.cli import run
from millicent.control.access import KeyRing
from millicent.control.keys import Scope, insert_key, new_key
from millicent.core.clock import SystemClock
from millicent.core.errors import MillicentError
from millicent.core.identifiers import SystemIds
from millicent.core.periods import parse_period
from millicent.economics.reports import ANSWERS, Reports, Setting
from millicent.ledger.entries import add_entries
from millicent.ledger.memory import MemoryLedger
from millicent.server.application import _on_error
from millicent.server.authentication import Authentication
from millicent.server.economics import economics_routes
from millicent.server.sessions import Sessions
from support.economy import DAY_NS, answered, write_ledger
from support.live import LiveServer, live_server

MONDAY = parse_period("2025-11-03").from_ns
CONFIG = """
[placements.elsewhere]
kind = "api"
provider = "openai"
base_url = "http://127.0.0.1:9"
[models.small]
placement = "elsewhere"
model = "gpt-4o-mini"
[features.chat]
owner = "ada"
cost_target_usd = 0.005
latency_target_ms = 2000
revenue_usd_per_request = 0.01
baseline = 2025-11-03
[plans.pro]
price_usd_per_month = 20
margin_target = 0.75
[costs.hosting]
usd_per_month = 300
feature = "chat"
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    home = tmp_path_factory.mktemp("economics") / "home"
    home.mkdir()
    receipts = [
        answered(
            number,
            MONDAY + number % 2 * DAY_NS + number,
            tier="pro",
            user="ada" if number % 3 else "bob\x1b[2J",
            fresh=1000 + 500 * (number % 2),
            useful=bool(number % 2),
        )
        for number in range(12)
    ]
    write_ledger(home / "ledger.db", receipts)
    with live_server(home, [], CONFIG) as live:
        yield live


def post(server: LiveServer, path: str, body: Any) -> tuple[int, Any]:
    status, answer, _ = server.request("POST", path, json.dumps(body).encode())
    return status, answer


Command = Callable[..., str]


@pytest.fixture
def command(server: LiveServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line, on the server's home."""
    monkeypatch.setenv("MILLICENT_HOME", str(server.home))

    def printed(*arguments: str) -> str:
        capsys.readouterr()
        assert run(arguments) == 0
        return capsys.readouterr().out

    return printed


def report(command: Command, *arguments: str) -> Any:
    return json.loads(command("report", *arguments, "--json"))


def test_unit_economics_are_the_same_over_http_and_on_the_command_line(server: LiveServer, command: Command) -> None:
    window = ("from=2025-11-03&to=2025-11-05", ("--since", "2025-11-03", "--until", "2025-11-05"))
    status, over_http = server.get(f"/v1/usage?by=feature&{window[0]}")
    assert status == 200, over_http
    printed = report(command, "--units", *window[1])
    assert printed["units"] == over_http["units"]
    (chat,) = over_http["units"]
    assert (chat["group"], chat["requests"], chat["cost_usd"]) == ("chat", 12, "0.093")
    assert chat["cost_per_request_usd"] == "0.00775"
    assert chat["useful"] == 6
    text = command("report", "--units", "--by", "user", *window[1])
    assert "A user costs 4.65 cents on average." in text
    assert "\x1b" not in text


def test_targets_are_told_with_a_verdict(server: LiveServer, command: Command) -> None:
    _, body = server.get("/v1/targets")
    (chat,) = body["data"]
    assert (chat["feature"], chat["owner"], chat["cost_target_usd"]) == ("chat", "ada", "0.005")
    assert (chat["cost_verdict"], chat["latency_verdict"]) == ("missed", "met")
    assert report(command, "--targets")["data"] == body["data"]
    assert "missed" in command("report", "--targets")


def test_a_change_is_laid_to_longer_prompts(server: LiveServer, command: Command) -> None:
    _, body = server.get("/v1/changes?before=2025-11-03&after=2025-11-04")
    assert body["total"]["effects_usd"] == {"input_tokens": "0.015"}
    assert body["total"]["difference_usd"] == "0.015"
    assert report(command, "--change", "2025-11-03..2025-11-04") == {
        name: value for name, value in body.items() if name != "object"
    }
    assert "PROMPTS" in command("report", "--change", "2025-11-03..2025-11-04")
    assert server.get("/v1/drift") == (200, {"object": "list", "data": [], "has_more": False, "next": None})
    assert command("report", "--drift").startswith("FEATURE")


def test_revenue_and_costs_are_posted_imported_and_in_the_margin(
    server: LiveServer, command: Command, tmp_path: Path
) -> None:
    one = {"id": "inv-1", "amount_usd": "35.00", "period": "2025-11", "user": "ada"}
    status, kept = post(server, "/v1/revenue", one)
    assert status == 201, kept
    assert (kept["amount_usd"], kept["to"]) == ("35", "2025-12-01T00:00:00.000000Z")
    assert post(server, "/v1/revenue", [one])[0] == 201
    assert post(server, "/v1/revenue", {**one, "amount_usd": "36"})[0] == 409
    assert post(server, "/v1/costs", {"id": "db", "amount_usd": 12.5, "period": "2025-11", "feature": "chat"})[0] == 201
    _, listed = server.get("/v1/revenue?period=2025-11")
    assert [each["id"] for each in listed["data"]] == ["inv-1"]
    assert (listed["has_more"], listed["next"]) == (False, None)
    assert server.get("/v1/costs?period=2025-12")[1]["data"] == []
    file = tmp_path / "payments.csv"
    file.write_text("month,customer,amount\n2025-11,ada,5\n")
    for new in (1, 0):
        told = json.loads(command("import", str(file), "--format", "revenue", "--json"))
        assert (told["rows"], told["added"], told["amount_usd"]) == (1, new, "5")
    _, body = server.get("/v1/margin?by=user&period=2025-11")
    users = {row["group"]: row for row in body["rows"]}
    assert users["ada"]["revenue_usd"] == "40"
    assert body["total"]["revenue_usd"] == "60.12"  # bob's plan, and a cent for each of twelve answers
    assert body["total"]["other_cost_usd"] == "312.5"
    text = command("report", "--margin", "--by", "tier", "--since", "2025-11-01", "--until", "2025-12-01")
    assert "pro: 2 users" in text


def test_entries_are_listed_page_by_page(server: LiveServer) -> None:
    given = [{"id": f"p{number}", "amount_usd": "1", "period": "2024-02"} for number in range(5)]
    assert post(server, "/v1/costs", given)[0] == 201
    seen, after = [], ""
    while True:
        _, page = server.get(f"/v1/costs?period=2024-02&limit=2{after}")
        seen += [each["id"] for each in page["data"]]
        if not page["has_more"]:
            break
        after = f"&after={page['next']}"
    assert seen == [each["id"] for each in given]
    assert server.get("/v1/costs?after=nobody")[0] == 400


@pytest.mark.parametrize(
    "options",
    [
        ["--change", "2025-10..2025-11", "--since", "2025-10-01"],
        ["--margin", "--timezone", "Europe/Berlin"],
        ["--units", "--book", "x"],
        ["--units", "--margin"],
        ["--margin", "--by", "model"],
        ["--change", "2025-11"],
    ],
)
def test_options_that_say_nothing_of_a_report_are_refused(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.setenv("MILLICENT_HOME", str(server.home))
    assert run(["report", *options]) in {1, 2}


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("/v1/usage?by=colour", "Invalid `by`"),
        ("/v1/usage?colour=red", "Unknown parameter `colour`"),
        ("/v1/usage?from=yesterday", "Invalid `from`"),
        ("/v1/changes?before=2025-11", "`after` is missing"),
        ("/v1/margin?period=soon", "is no period"),
        ("/v1/margin?from=2025-11-01", "Send `from` and a later `to`"),
        ("/v1/revenue?by=user", "Unknown parameter `by`"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(server: LiveServer, path: str, problem: str) -> None:
    status, body = server.get(path)
    assert status == 400
    assert problem in body["error"]["message"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"period": "soon"}, "Invalid `period`"),
        ({"amount_usd": "1e12"}, "Invalid `amount_usd`"),
        ({"colour": "red"}, "colour"),
        ({"user": "a\u0007"}, "control characters"),
    ],
)
def test_entries_that_make_no_sense_are_refused(server: LiveServer, change: dict[str, Any], problem: str) -> None:
    status, body = post(server, "/v1/revenue", {"id": "x", "amount_usd": "1", "period": "2025-11"} | change)
    assert status == 400
    assert problem in body["error"]["message"]


def test_a_client_key_may_neither_read_nor_post_and_a_viewer_may_only_read() -> None:
    ledger, clock = MemoryLedger(), SystemClock()
    tokens = {}
    for scope in Scope:
        key, tokens[scope.value] = new_key(SystemIds(clock), clock, scope=scope)
        asyncio.run(ledger.write(lambda connection, key=key: insert_key(connection, key)))  # type: ignore[misc]
    ring = KeyRing(ledger.queries, clock, open_without_keys=True)
    reports = Reports(ledger.queries, clock, Setting())
    routes = economics_routes(reports, ANSWERS, add=add_entries, ledger=ledger, queries=ledger.queries, clock=clock)
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Authentication, keys=ring, sessions=Sessions(clock))],
        exception_handlers={MillicentError: _on_error},
    )
    body = {"id": "x", "amount_usd": "1", "period": "2025-11"}
    found = {}
    with TestClient(app) as client:
        for name, token in tokens.items():
            headers = {"Authorization": f"Bearer {token}"}
            asked = [client.get(path, headers=headers).status_code for path in ("/v1/margin", "/v1/costs")]
            found[name] = [*asked, client.post("/v1/revenue", json=body, headers=headers).status_code]
        assert client.get("/v1/margin").status_code == 401
    assert found == {"client": [403, 403, 403], "viewer": [200, 200, 403], "admin": [200, 200, 201]}
    asyncio.run(ledger.stop())
