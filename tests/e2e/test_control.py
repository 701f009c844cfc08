"""Keys, budgets, limits and idempotency against a live server with a tiny model, crashes included."""

import json
import re
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.live import LiveServer, live_server
from support.tiny_models import TinyLlama, write_tiny_model
from support.waiting import until

RATE = '[placements.here]\nkind = "rented"\nusd_per_hour = "3600"\n'  # a dollar a second: a millicent is 10 us
SHORT = {"model": "tiny", "prompt": "once upon", "max_tokens": 4, "ignore_eos": True}
LONG = SHORT | {"max_tokens": 100_000, "stream": True}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LiveServer]:
    tiny = write_tiny_model(tmp_path / "tiny", TinyLlama(context_tokens=8192))
    with live_server(tmp_path / "home", [str(tiny)], RATE) as live:
        yield live


def post(server: LiveServer, body: dict[str, Any], **headers: str) -> tuple[int, Any, dict[str, str]]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    status, answer, returned = server.request("POST", "/v1/completions", json.dumps(body).encode(), named)
    return status, answer, {name.lower(): value for name, value in returned.items()}


def admin(server: LiveServer, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    status, answer, _ = server.request(method, f"/admin{path}", None if body is None else json.dumps(body).encode())
    assert status in {200, 201}, answer
    return answer


def balance(server: LiveServer, name: str = "small") -> dict[str, Decimal]:
    [budget] = [one for one in admin(server, "GET", "/budgets")["data"] if one["name"] == name]
    [found] = budget["balances"] or [{"spent_usd": "0", "held_usd": "0", "left_usd": budget["limit_usd"]}]
    return {part: Decimal(found[f"{part}_usd"]) for part in ("spent", "held", "left")}


def spent(server: LiveServer, query: str = "") -> Decimal:
    return sum((Decimal(one["total_usd"]) for one in server.receipts(query)), Decimal(0))


def usual_hold(server: LiveServer) -> Decimal:
    """What a short request holds, once a few have been seen."""
    for _ in range(3):
        _, _, headers = post(server, SHORT)
    return Decimal(server.get(f"/v1/receipts/{headers['x-millicent-receipt']}")[1]["hold_usd"])


def check_ledger(server: LiveServer) -> None:
    connection = sqlite3.connect(server.home / "ledger.db")
    assert connection.execute("SELECT count(*) FROM holds WHERE held_nanousd != 0 OR NOT settled").fetchone() == (0,)
    assert connection.execute("SELECT count(*) FROM budget_periods WHERE held_nanousd != 0").fetchone() == (0,)
    connection.close()


def test_64_calls_at_once_on_a_nearly_empty_hard_budget_never_overspend(server: LiveServer) -> None:
    hold = usual_hold(server)
    before = {one["id"] for one in server.receipts()}
    admin(server, "POST", "/budgets", {"name": "small", "limit_usd": str(hold * Decimal("2.5"))})
    results: list[Any] = []
    with ThreadPoolExecutor(64) as pool:
        # Where the machine is so busy that calls come one by one, it takes more of them to use the budget up.
        while all(status == 200 for status, _, _ in results):
            results += pool.map(lambda _: post(server, SHORT), range(64))
    refused = [answer for status, answer, _ in results if status == 402]
    assert len(refused) < len(results)
    assert {status for status, _, _ in results} == {200, 402}
    error = refused[0]["error"]
    assert error["code"] == "budget_exceeded"
    for word in ("`small`", "left", "renews at", "may cost up to $"):
        assert word in error["message"]
    now = balance(server)
    assert now["held"] == 0
    paid = [one for one in server.receipts() if one["id"] not in before]
    assert len(paid) == len(results) - len(refused)
    assert now["spent"] == sum(Decimal(one["total_usd"]) for one in paid)
    assert now["left"] >= 0
    assert all(Decimal(one["total_usd"]) <= Decimal(one["hold_usd"]) for one in paid)
    server.check_accounts()


def test_a_soft_budget_counts_and_refuses_nothing(server: LiveServer) -> None:
    admin(server, "POST", "/budgets", {"name": "small", "limit_usd": "0", "hard": False, "every": "once"})
    assert post(server, SHORT)[0] == 200
    assert balance(server)["spent"] == spent(server) > 0


def test_a_budget_per_team_is_each_teams_own(server: LiveServer) -> None:
    limit = str(usual_hold(server) * 8)
    admin(server, "POST", "/budgets", {"name": "small", "limit_usd": limit, "per": "team", "only": "red"})
    assert post(server, SHORT | {"max_tokens": 400}, X_Millicent_Team="red")[0] == 402
    assert post(server, SHORT | {"max_tokens": 400}, X_Millicent_Team="blue")[0] == 200
    assert post(server, SHORT, X_Millicent_Team="red")[0] == 200


def test_a_kill_frees_nothing_that_was_spent_and_keeps_nothing_that_was_not(server: LiveServer) -> None:
    admin(server, "POST", "/budgets", {"name": "small", "limit_usd": "1000000"})
    assert post(server, SHORT)[0] == 200
    threads = [threading.Thread(target=_drain, args=(server,), daemon=True) for _ in range(6)]
    for thread in threads:
        thread.start()
    until(lambda: len(server.receipts()) == 7)
    until(lambda: checkpointed(server) == 6)
    assert balance(server)["held"] > 0
    server.kill()
    for thread in threads:
        thread.join(60)
    server.start()
    once = balance(server)
    assert once["held"] == 0
    assert once["spent"] == spent(server) > 0
    assert {one["status"] for one in server.receipts()} == {"succeeded", "interrupted"}
    check_ledger(server)
    server.stop()
    server.start()
    assert balance(server) == once
    server.check_accounts()


def checkpointed(server: LiveServer) -> int:
    """How many receipts are open with some of their device time already in the ledger."""
    connection = sqlite3.connect(server.home / "ledger.db")
    [(count,)] = connection.execute("SELECT count(*) FROM receipts WHERE status IS NULL AND serving_ns > 0")
    connection.close()
    return int(count)


def _drain(server: LiveServer) -> None:
    try:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as response:
            for _ in response.iter_lines():
                pass
    except httpx.HTTPError:
        pass


def lets_in(server: LiveServer, token: str) -> bool:
    return server.request("GET", "/v1/models", headers={"Authorization": f"Bearer {token}"})[0] == 200


def knows_keys(server: LiveServer) -> bool:
    """Until it has heard of one that was made beside it, it lets everybody in."""
    return not lets_in(server, "whatever")


def test_keys_open_and_close_the_doors(server: LiveServer) -> None:
    assert post(server, SHORT, Authorization="Bearer whatever")[0] == 200  # no keys yet: anonymous
    anonymous_receipt = server.receipts()[0]["id"]
    boss = server.command("keys", "create", "boss", "--scope", "admin")
    until(lambda: knows_keys(server))
    assert post(server, SHORT)[0] == 401
    assert post(server, SHORT, Authorization="Bearer mk_x_y")[0] == 401
    assert server.get("/ready")[0] == server.get("/health")[0] == 200
    server.token = boss
    client = admin(server, "POST", "/keys", {"name": "app", "team": "search", "models": ["tiny"]})
    viewer = admin(server, "POST", "/keys", {"scope": "viewer"})
    as_client, as_viewer = ({"Authorization": f"Bearer {made['token']}"} for made in (client, viewer))
    status, _, headers = post(server, SHORT, **as_client, X_Millicent_User="ada")
    assert status == 200
    receipt_id = headers["x-millicent-receipt"]
    _, own, _ = server.request("GET", "/v1/receipts", headers=as_client)
    assert [one["id"] for one in own["data"]] == [receipt_id]
    assert own["data"][0]["attribution"] | {"tags": {}} == {
        "key": client["id"], "team": "search", "user": "ada", "feature": None, "tier": None, "conversation": None,
        "run": None, "tags": {},
    }  # fmt: skip
    assert post(server, SHORT, **as_client, X_Millicent_Team="other")[0] == 403
    assert post(server, SHORT | {"model": "dear"}, **as_client)[0] == 403
    assert post(server, SHORT, **as_viewer)[0] == 403
    cases: list[tuple[str, dict[str, str], int]] = [
        (f"/v1/receipts/{receipt_id}", as_client, 200), (f"/v1/receipts/{receipt_id}", as_viewer, 200),
        (f"/v1/receipts/{anonymous_receipt}", as_client, 404), (f"/v1/receipts/{anonymous_receipt}", as_viewer, 200),
        (f"/v1/receipts?key={viewer['id']}", as_client, 403), ("/v1/accounts", as_client, 403),
        ("/v1/accounts", as_viewer, 200), ("/admin/keys", as_viewer, 403), ("/admin/keys", as_client, 403),
        ("/v1/models", as_client, 200), ("/v1/models", {"x-api-key": client["token"], "Authorization": ""}, 200),
    ]  # fmt: skip
    for path, headers, expected in cases:
        assert server.request("GET", path, headers=headers)[0] == expected, path
    assert server.request("GET", "/v1/receipts", headers={"Authorization": ""})[0] == 401
    admin(server, "DELETE", f"/keys/{client['id']}")
    assert post(server, SHORT, **as_client)[0] == 401
    listed = admin(server, "GET", "/keys")
    secret = client["token"].split("_", 2)[2]
    assert secret not in json.dumps(listed)
    for file in (server.home / "logs").iterdir():
        assert secret not in file.read_text()
    assert secret.encode() not in (server.home / "ledger.db").read_bytes()


def test_a_rotated_key_overlaps_and_then_ends(server: LiveServer) -> None:
    server.token = old = server.command("keys", "create", "--scope", "admin")
    key_id = "_".join(old.split("_")[:2])
    until(lambda: knows_keys(server))
    new = server.command("keys", "rotate", key_id, "--overlap", "1h")
    until(lambda: lets_in(server, new))
    for token in (old, new):
        assert post(server, SHORT, Authorization=f"Bearer {token}")[0] == 200
    server.token = new
    rotated = admin(server, "POST", f"/keys/{key_id}/rotate", {"overlap_s": 0})["token"]
    assert post(server, SHORT, Authorization=f"Bearer {new}")[0] == 401
    assert post(server, SHORT, Authorization=f"Bearer {old}")[0] == 401
    assert post(server, SHORT, Authorization=f"Bearer {rotated}")[0] == 200


def form_token(browser: httpx.Client) -> str:
    """What the page's forms send back."""
    found = re.search(r'name="form_token" value="([0-9a-f]+)"', browser.get("/sign-in").text)
    assert found
    return found[1]


def test_the_pages_want_a_signed_in_viewer(server: LiveServer) -> None:
    server.token = server.command("keys", "create", "--scope", "admin")
    until(lambda: knows_keys(server))
    viewer = admin(server, "POST", "/keys", {"scope": "viewer"})
    client = admin(server, "POST", "/keys", {})
    html = {"Accept": "text/html"}
    with httpx.Client(base_url=server.url, headers=html, timeout=60) as browser:
        asked = browser.get("/receipts")
        assert asked.status_code == 303
        assert asked.headers["location"] == "/sign-in?next=/receipts"
        assert "/receipts" in browser.get(asked.headers["location"]).text
        ours = {"form_token": form_token(browser)}
        assert browser.post("/sign-in", data={"key": "mk_a_b", "next": "/receipts", **ours}).status_code == 401
        assert browser.post("/sign-in", data={"key": client["token"], **ours}).status_code == 403
        foreign = {"Origin": "http://evil.example"}
        assert browser.post("/sign-in", data={"key": viewer["token"], **ours}, headers=foreign).status_code == 403
        assert browser.post("/sign-in", data={"key": viewer["token"]}).status_code == 403
        signed = browser.post("/sign-in", data={"key": viewer["token"], "next": "//evil.example", **ours})
        assert signed.status_code == 303
        assert signed.headers["location"] == "/"
        cookie = signed.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert viewer["token"] not in cookie
        assert browser.get("/receipts").status_code == 200
        assert browser.get("/accounts").status_code == 200
        assert browser.post("/sign-out", data=ours).status_code == 403
        assert browser.get("/receipts").status_code == 200
        copied = {"Cookie": f"millicent_session={browser.cookies['millicent_session']}", **html}
        browser.post("/sign-out", data={"form_token": form_token(browser)})
        assert browser.get("/receipts").status_code == 303
        assert httpx.get(f"{server.url}/receipts", headers=copied, timeout=60).status_code == 303
    forged = {"Cookie": f"millicent_session={viewer['id']}.99999999999.{'0' * 64}", **html}
    assert httpx.get(f"{server.url}/receipts", headers=forged, timeout=60).status_code == 303


def test_limits_answer_429_with_the_seconds_to_wait_and_the_rate_headers(server: LiveServer) -> None:
    server.token = server.command("keys", "create", "--scope", "admin")
    until(lambda: knows_keys(server))
    limited = admin(server, "POST", "/keys", {"requests_per_minute": 2, "tokens_per_minute": 100_000})
    as_limited = {"Authorization": f"Bearer {limited['token']}"}
    first = post(server, SHORT, **as_limited)
    assert first[0] == 200
    assert first[2]["x-ratelimit-limit-requests"] == "2"
    assert first[2]["x-ratelimit-remaining-requests"] == "1"
    assert first[2]["x-ratelimit-limit-tokens"] == "100000"
    assert post(server, SHORT, **as_limited)[0] == 200
    status, answer, headers = post(server, SHORT, **as_limited)
    assert status == 429
    assert answer["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(headers["retry-after"]) <= 30
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert "x-ratelimit-limit-requests" not in post(server, SHORT)[2]


@pytest.mark.parametrize("stream", [False, True])
def test_an_idempotency_key_gets_one_bill_and_the_same_answer(server: LiveServer, stream: bool) -> None:
    body = SHORT | {"stream": stream, "max_tokens": 12}

    def ask(key: str = "once", **changes: Any) -> httpx.Response:
        headers = {"Idempotency-Key": key}
        return httpx.post(f"{server.url}/v1/completions", json=body | changes, headers=headers, timeout=60)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(), range(8)))
    assert {one.status_code for one in answers} == {200}
    assert len({one.headers["x-millicent-receipt"] for one in answers}) == 1
    assert len({_text(one, stream) for one in answers}) == 1
    assert len(server.receipts()) == 1
    conflict = ask(max_tokens=13)
    assert conflict.status_code == 409
    assert conflict.json()["error"]["code"] == "idempotency_conflict"
    server.kill()
    server.start()
    again = ask()
    assert again.headers["x-millicent-receipt"] == answers[0].headers["x-millicent-receipt"]
    assert _text(again, stream) == _text(answers[0], stream)
    if not stream:
        assert {one.content for one in answers} == {again.content}
    assert len(server.receipts()) == 1
    assert ask(key="two").headers["x-millicent-receipt"] != again.headers["x-millicent-receipt"]
    assert admin(server, "DELETE", "/answers?user=nobody")["purged"] == 0
    assert admin(server, "DELETE", "/answers")["purged"] == 2
    assert ask().headers["x-millicent-receipt"] != again.headers["x-millicent-receipt"]


def _text(answer: httpx.Response, stream: bool) -> str:
    if not stream:
        return str(answer.json()["choices"][0]["text"])
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return "".join(choice["text"] for event in events[:-1] for choice in json.loads(event)["choices"])


def test_a_request_with_an_idempotency_key_is_finished_although_its_client_left(server: LiveServer) -> None:
    body = SHORT | {"max_tokens": 400}
    headers = {"Idempotency-Key": "gone"}
    impatient = httpx.Timeout(60, read=0.5)
    with server.engine_paused(), pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=impatient)
    answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] == 400
    [receipt] = server.receipts()
    assert receipt["id"] == answer.headers["x-millicent-receipt"]
    assert receipt["status"] == "succeeded"


def test_a_first_try_that_a_crash_cut_off_does_not_block_the_second(server: LiveServer) -> None:
    headers = {"Idempotency-Key": "crashed"}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, headers=headers, timeout=60) as response:
        next(response.iter_lines())
        first = response.headers["x-millicent-receipt"]
        server.kill()
    server.start()
    assert server.get(f"/v1/receipts/{first}")[1]["status"] == "interrupted"
    second = httpx.post(f"{server.url}/v1/completions", json=SHORT, headers=headers, timeout=60)
    assert second.status_code == 200
    assert second.headers["x-millicent-receipt"] != first


def test_other_machines_are_served_once_there_is_a_key(tmp_path: Path) -> None:
    tiny = write_tiny_model(tmp_path / "tiny")
    server = LiveServer(tmp_path / "home", [str(tiny)], '[server]\nhost = "0.0.0.0"\n')
    with pytest.raises(AssertionError, match="make one with `millicent keys create`"):
        server.start()
    token = server.command("keys", "create")
    try:
        server.start()
        assert post(server, SHORT)[0] == 401
        assert post(server, SHORT, Authorization=f"Bearer {token}")[0] == 200
    finally:
        if server.process is not None:
            server.kill()
