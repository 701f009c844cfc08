"""The pages of features, margin and changes: the reports' figures, safe to show, each with its CSV."""

from __future__ import annotations

import asyncio
import html
import re
from collections.abc import Iterator
from decimal import Decimal
from functools import partial
from typing import Any
from urllib.parse import urljoin

import pytest
from starlette.testclient import TestClient

from millicent.core.clock import ManualClock
from millicent.core.money import Money
from millicent.core.periods import parse_period
from millicent.dashboard.changed import changes_page
from millicent.dashboard.earnings import margin_page
from millicent.dashboard.features import features_page
from millicent.dashboard.users import users_page
from millicent.economics.config import CostConfig, EarningsConfig, PlanConfig
from millicent.economics.margin import Books
from millicent.economics.reports import Reports, Setting
from millicent.economics.targets import Aim
from millicent.ledger.memory import MemoryLedger
from support.economy import DAY_NS, answered, ledger_of
from support.pages import exported, pages_of, site_of

HOSTILE = "<img src=x onerror=alert(1)>/a b"
NOW = parse_period("2026-11-20").from_ns
SETTING = Setting(
    books=Books(
        plans={"pro": PlanConfig(price_usd_per_month=Decimal("0.03"), margin_target=Decimal("0.5"))},
        features={"chat": EarningsConfig(revenue_usd_per_request=Decimal("0.01"))},
        costs={"database": CostConfig(usd_per_month=Decimal(3), feature="chat")},
    ),
    aims={"chat": Aim("ada", Money.from_usd("0.001"), 2000), "idle": Aim(None, None, 100)},
)


class NoKeys:
    def keys(self) -> list[Any]:
        return []

    budgets = keys

    async def create(self, fields: object) -> str:
        raise AssertionError(fields)

    rotate = create

    async def revoke(self, key_id: str) -> None:
        raise AssertionError(key_id)


def pages(ledger: MemoryLedger, setting: Setting = SETTING) -> TestClient:
    clock = ManualClock(NOW)
    reports = Reports(ledger.queries, clock, setting)
    makers = [partial(page, reports=reports) for page in (features_page, margin_page, changes_page)]
    makers.append(partial(users_page, control=NoKeys(), reports=reports))
    return pages_of(site_of(ledger.queries, clock, models=lambda: ["small"]), *makers)


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    ledger = ledger_of(
        [
            answered(
                number,
                NOW - (number + 1) * DAY_NS // 2,
                feature=(HOSTILE, "chat", None)[number % 3],
                user=f"u{number % 2}",
                tier="pro",
                fresh=1000 + 100 * number,
                priced=number != 5,
            )
            for number in range(30)
        ]
    )
    with pages(ledger) as made:
        yield made
    asyncio.run(ledger.stop())


@pytest.mark.parametrize(
    "path",
    [
        "/features",
        "/features?range=30d&zone=Europe/Berlin",
        "/features/chat",
        "/features/idle",
        "/features/%3Cimg%20src=x%20onerror=alert(1)%3E%2Fa%20b?range=24h",
        "/margin",
        "/margin?by=user&range=all",
        "/margin?by=tier&from=2026-11-01",
        "/changes",
        "/changes?before=2026-11-10&after=2026-11-11",
    ],
)
def test_the_economics_pages_answer_and_names_stay_text(client: TestClient, path: str) -> None:
    found = client.get(path)
    assert found.status_code == 200, found.text
    assert "<img src=x" not in found.text
    assert "default-src 'self'" in found.headers["content-security-policy"]


def test_every_feature_has_a_line_with_its_targets_and_leads_to_its_page(client: TestClient) -> None:
    text = client.get("/features?range=30d").text
    assert "missed: 100 millicents" in text
    assert "met: 2,000 ms, 100.0% within" in text
    assert "/features/%3Cimg%20src%3Dx%20onerror%3Dalert%281%29%3E%2Fa%20b?range=30d" in text
    assert "no price for large" in text
    assert "ada answers for it" in client.get("/features/chat").text


NAMES = ("..", ".", "../../etc/passwd", "5%b", "a/b?c=d&e#f", "a//b", "/a", "a;b", "+1", "it's", '"><b>', "漢字 😀")
LISTS = ("/features?range=30d", "/margin?by=feature", "/margin?by=user&range=all", "/?range=30d", "/users?range=30d")


def test_every_link_of_a_name_leads_to_what_has_it() -> None:
    """A browser makes the folder above of `..`, and what follows a `#` never reaches a server."""
    ledger = ledger_of([answered(number, NOW - DAY_NS, feature=name, user=name) for number, name in enumerate(NAMES)])
    with pages(ledger) as made:
        for path in LISTS:
            shown = made.get(path).text
            for name in NAMES:
                told = html.escape(name).replace("&#x27;", "&#39;").replace("&quot;", "&#34;")
                links = re.findall(rf'href="([^"]*)"[^>]*>{re.escape(told)}</a>', shown)
                assert links or path == "/?range=30d", (path, name)  # the overview has the first eight
                for link in links:
                    address = urljoin(f"http://testserver{path}", html.unescape(link)).partition("#")[0]
                    found = made.get(address.removeprefix("http://testserver"))
                    assert found.status_code == 200, (path, name, link)
                    assert told in found.text.partition("<main")[2], (path, name, link)
    asyncio.run(ledger.stop())


def test_the_tables_are_exported_as_they_are_computed(client: TestClient) -> None:
    rows = {row["feature"]: row for row in exported(client, "/features?range=30d&csv=features")}
    assert int(rows["chat"]["requests"]) == 10
    for row in exported(client, "/changes?csv=changes"):
        parts = [
            Decimal(row[name]) for name in row if name not in {"feature", "before_usd", "after_usd", "difference_usd"}
        ]
        assert sum(parts) == Decimal(row["difference_usd"])
    margin = exported(client, "/margin?by=tier&range=30d&csv=margin")
    assert {row["tier"] for row in margin} == {"pro", "no tier"}


def by_name(client: TestClient, path: str, name: str) -> dict[str, dict[str, str]]:
    return {row[name]: row for row in exported(client, path)}


def test_where_nobody_said_what_is_earned_the_margin_is_unknown_and_never_nothing(client: TestClient) -> None:
    rows = by_name(client, "/margin?range=30d&csv=margin", "feature")
    assert (rows[HOSTILE]["revenue_usd"], rows[HOSTILE]["margin_usd"]) == ("", "")
    assert Decimal(rows["chat"]["margin_usd"]) == Decimal(rows["chat"]["revenue_usd"]) - Decimal(
        rows["chat"]["ai_cost_usd"]
    ) - Decimal(rows["chat"]["other_cost_usd"])
    page = client.get("/margin?range=30d").text
    assert page.count("nobody said what is earned here; it is not zero") == 2
    listed = client.get("/features?range=30d").text
    assert "nobody said what is earned here" in listed
    assert by_name(client, "/features?range=30d&csv=features", "feature")[HOSTILE]["margin_usd"] == ""


def test_users_stand_with_what_is_left_of_what_they_pay(client: TestClient) -> None:
    users = by_name(client, "/users?range=30d&csv=users", "user")
    margins = by_name(client, "/margin?by=user&range=30d&csv=margin", "user")
    assert {name: row["margin_usd"] for name, row in users.items()} == {
        name: margins[name]["margin_usd"] for name in users
    }
    assert Decimal(users["u0"]["margin_usd"]) < 0
    assert 'href="/margin?range=30d&amp;by=user"' in client.get("/users?range=30d").text


def test_a_plan_that_loses_money_is_shown_with_what_would_mend_it(client: TestClient) -> None:
    text = client.get("/margin?by=tier&from=2026-11-01").text
    assert "What would mend pro" in text
    assert "[plans.pro]" in text
    assert "costs more than they pay" in text


def test_what_was_never_asked_for_or_makes_no_sense_is_told_so(client: TestClient) -> None:
    missing = client.get("/features/nobody")
    assert missing.status_code == 404
    assert "No request has named the feature" in missing.text
    assert client.get("/margin?by=model").status_code == 400
    assert "names one" not in client.get("/changes?before=soon").text
    assert client.get("/changes?before=soon").status_code == 400


def test_an_empty_ledger_says_what_to_do() -> None:
    ledger = MemoryLedger()
    with pages(ledger) as client:
        assert "X-Millicent-Feature" in client.get("/features").text
        # What is sold is known, and that nothing was.
        assert "No revenue is known" not in client.get("/margin?by=tier").text
    with pages(ledger, Setting()) as client:
        assert "No revenue is known" in client.get("/margin?by=tier").text
        assert "margin_usd" not in client.get("/users?csv=users").text
        assert client.get("/changes").status_code == 200
    asyncio.run(ledger.stop())
