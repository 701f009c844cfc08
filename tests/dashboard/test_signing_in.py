"""Who may see and change what, once there are keys; and what pages from elsewhere may try."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import httpx

from millicent.app import open_app
from millicent.cli.demo_replay import prepare, served
from millicent.control.keys import Scope, insert_key, new_key
from millicent.core.clock import SystemClock
from millicent.core.identifiers import SystemIds
from millicent.server.sessions import COOKIE

BASE = "http://127.0.0.1:8090"
HTML = {"Accept": "text/html"}
FOREIGN = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
PAGES = ["/", "/users", "/models", "/models/rate", "/accounts", "/receipts", "/settings", "/chat"]


@dataclass
class Server:
    """Its application, and a token for each scope."""

    app: httpx.ASGITransport
    tokens: dict[str, str]

    def browser(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=self.app, base_url=BASE, headers=HTML)

    @asynccontextmanager
    async def signed_in(self, scope: str) -> AsyncIterator[httpx.AsyncClient]:
        async with self.browser() as browser:
            form = {"key": self.tokens[scope], "next": "/users", "form_token": await token(browser)}
            signed = await browser.post("/sign-in", data=form)
            assert signed.status_code == 303
            yield browser


async def token(browser: httpx.AsyncClient, path: str = "/sign-in") -> str:
    """What that page's forms send back."""
    page = await browser.get(path)
    found = re.search(r'name="form_token" value="([0-9a-f]+)"', page.text)
    assert found, page.text
    return found[1]


Story = Callable[[Server], Awaitable[None]]


def with_keys(story: Story, home: Path) -> None:
    """Play the story against a server with an admin's, a viewer's and a client's key."""

    async def play() -> None:
        clock = SystemClock()
        async with open_app(served(home, prepare(home), Random(1))) as app:
            await app.start()
            tokens = {}
            for scope in Scope:
                key, made = new_key(SystemIds(clock), clock, name=scope.value, scope=scope)
                await app.ledger.write(partial(insert_key, key=key))
                tokens[scope.value] = made
            await story(Server(httpx.ASGITransport(app.server.asgi), tokens))

    asyncio.run(play())


def test_without_a_session_every_page_leads_to_signing_in_and_no_form_works(tmp_path: Path) -> None:
    async def story(server: Server) -> None:
        async with server.browser() as browser:
            for path in PAGES:
                asked = await browser.get(path)
                assert asked.status_code == 303, path
                assert asked.headers["location"].startswith("/sign-in?next=")
            for path in ("/users/keys", "/users/keys/revoke", "/models/rate"):
                assert (await browser.post(path, data={"scope": "admin"})).status_code == 401

    with_keys(story, tmp_path / "home")


def test_a_viewer_sees_every_page_and_cannot_administer_or_run_anything(tmp_path: Path) -> None:
    async def story(server: Server) -> None:
        async with server.signed_in("viewer") as browser:
            for path in PAGES:
                page = await browser.get(path)
                assert page.status_code == 200, path
                assert 'method="post"' not in page.text, path
                assert ">viewer</a>" in page.text
            good = {"form_token": await token(browser), "scope": "admin", "id": "x", "kind": "rented"}
            for path in ("/users/keys", "/users/keys/rotate", "/users/keys/revoke", "/models/rate"):
                assert (await browser.post(path, data=good)).status_code == 403, path
            assert (await browser.post("/admin/keys", json={"scope": "admin"})).status_code == 403
            assert (await browser.get("/admin/keys")).status_code == 403
            assert (await browser.request("DELETE", "/admin/answers")).status_code == 403
            asked = {"model": "owl-8b", "messages": [{"role": "user", "content": "Hello?"}]}
            assert (await browser.post("/v1/chat/completions", json=asked)).status_code == 403

    with_keys(story, tmp_path / "home")


def test_a_client_key_opens_no_page(tmp_path: Path) -> None:
    async def story(server: Server) -> None:
        async with server.browser() as browser:
            form = {"key": server.tokens["client"], "form_token": await token(browser)}
            refused = await browser.post("/sign-in", data=form)
            assert refused.status_code == 403
            assert COOKIE not in browser.cookies
            bearer = {"Authorization": f"Bearer {server.tokens['client']}"}
            assert (await browser.get("/users", headers=bearer)).status_code == 403

    with_keys(story, tmp_path / "home")


def test_an_admin_makes_and_ends_keys_and_a_form_from_elsewhere_does_not(tmp_path: Path) -> None:
    async def story(server: Server) -> None:
        async with server.signed_in("admin") as browser, server.signed_in("admin") as other:
            ours = await token(browser, "/users")
            made = await browser.post("/users/keys", data={"form_token": ours, "name": "ci", "scope": "client"})
            assert made.status_code == 200
            found = re.search(r"mk_[0-9a-z]+_[\w-]+", made.text)
            assert found
            asked = {"model": "owl-8b", "messages": [{"role": "user", "content": "Hello?"}]}
            bearer = {"Authorization": f"Bearer {found[0]}"}
            assert (await other.post("/v1/chat/completions", json=asked, headers=bearer)).status_code == 200
            wanted = {"name": "mine", "scope": "admin"}
            anothers = await token(other, "/users")
            for data, headers in (
                (wanted, {}),
                (wanted | {"form_token": ours}, FOREIGN),
                (wanted | {"form_token": ours}, {"Origin": "null"}),
                (wanted | {"form_token": anothers}, {}),
                (wanted | {"form_token": "0" * 64}, {}),
            ):
                assert (await browser.post("/users/keys", data=data, headers=headers)).status_code == 403
            as_text = {"Content-Type": "text/plain"}
            smuggled = await browser.post("/users/keys", content=f"form_token={ours}&scope=admin", headers=as_text)
            assert smuggled.status_code == 400
            assert (await browser.get("/users?csv=keys")).text.count("\n") == 5  # a heading, three keys, and ours

    with_keys(story, tmp_path / "home")


def test_signing_in_makes_a_session_that_nobody_could_have_fixed_before(tmp_path: Path) -> None:
    async def story(server: Server) -> None:
        async with server.browser() as browser:
            planted = "mk_planted.abc.99999999999." + "0" * 64
            browser.cookies.set(COOKIE, planted)
            form = {"key": server.tokens["admin"], "form_token": await token(browser)}
            signed = await browser.post("/sign-in", data=form)
            cookie = signed.headers["set-cookie"]
            assert planted not in cookie
            for promise in ("httponly", "samesite=strict", "max-age=43200"):
                assert promise in cookie.lower()
        async with server.signed_in("admin") as one, server.signed_in("admin") as another:
            values = {browser.cookies[COOKIE] for browser in (one, another)}
            assert len(values) == 2
            left = await one.post("/sign-out", data={"form_token": await token(one)})
            assert left.status_code == 303
            assert (await another.get("/users")).status_code == 200
            kept = {"Cookie": f"{COOKIE}={max(values - {another.cookies[COOKIE]})}"}
            async with server.browser() as thief:
                assert (await thief.get("/users", headers=kept)).status_code == 303

    with_keys(story, tmp_path / "home")


def test_no_page_can_be_framed_or_made_to_run_what_is_not_ours(tmp_path: Path) -> None:
    async def story(server: Server) -> None:
        async with server.signed_in("viewer") as browser:
            for path in (*PAGES, "/sign-in", "/static/pages.css", "/receipts/none", "/receipts.csv"):
                headers = (await browser.get(path)).headers
                policy = headers["content-security-policy"]
                assert "frame-ancestors 'none'" in policy, path
                assert "default-src 'self'" in policy, path
                assert "unsafe" not in policy, path
                assert headers["x-frame-options"] == "DENY", path
                assert headers["x-content-type-options"] == "nosniff", path

    with_keys(story, tmp_path / "home")


def test_after_signing_in_nobody_is_sent_to_another_server(tmp_path: Path) -> None:
    async def story(server: Server) -> None:
        for wanted in ("//evil.example", "https://evil.example", "/\\evil.example", "javascript:alert(1)"):
            async with server.browser() as browser:
                form = {"key": server.tokens["viewer"], "next": wanted, "form_token": await token(browser)}
                assert (await browser.post("/sign-in", data=form)).headers["location"] == "/"

    with_keys(story, tmp_path / "home")


def test_an_address_where_nothing_is_tells_a_browser_in_words_and_a_program_in_json(tmp_path: Path) -> None:
    async def story(server: Server) -> None:
        async with server.signed_in("viewer") as browser:
            page = await browser.get("/nothing<here>")
            assert page.status_code == 404
            assert "There is nothing at" in page.text
            assert "<here>" not in page.text
            assert "Demo." in page.text
            assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
            program = await browser.get("/nothing", headers={"Accept": "application/json"})
            assert program.json()["error"]["code"] == "not_found"
            assert (await browser.get("/v1/nothing")).json()["error"]["code"] == "not_found"

    with_keys(story, tmp_path / "home")


def test_a_form_that_was_refused_leads_back_to_its_page(tmp_path: Path) -> None:
    async def story(server: Server) -> None:
        async with server.signed_in("admin") as browser:
            refused = await browser.post("/users/keys", data={"scope": "admin", "form_token": "old"})
            assert refused.status_code == 403
            assert '<a href="/users">Back</a>' in refused.text

    with_keys(story, tmp_path / "home")
