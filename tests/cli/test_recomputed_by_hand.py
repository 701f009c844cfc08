"""Every figure of the overview, the features, users, margin and changes, from the exported receipts of a demo with
nothing but decimals: pages, their CSV and JSON must say the same to the nano-dollar."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterable
from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

from millicent.app import open_app
from millicent.cli.demo_replay import prepare, replay, served
from millicent.core.clock import parse_time_ns

Row = dict[str, str]

# A Thursday, long ago: no clock decides what is counted.
END = "2025-11-20T12:00:00Z"
FROM = "2025-11-16T12:00:00Z"
TIMES = f"from={FROM}&to={END}"
PER_REQUEST = {
    "support-chat": "0.02",
    "search-answers": "0.005",
    "code-review": "0.03",
    "meeting-notes": "0.025",
    "doc-extraction": "0.004",
    "autocomplete": "0.0006",
}
PLANS = {"free": 0, "pro": 2, "business": 6}
NANO = Decimal("1e-9")
PATHS = (
    f"/?{TIMES}",
    f"/?{TIMES}&csv=cost-over-time",
    f"/?{TIMES}&csv=requests-over-time",
    f"/features?{TIMES}&csv=features",
    f"/features?{TIMES}&csv=gaps",
    f"/users?{TIMES}&csv=users",
    f"/margin?{TIMES}&by=feature&csv=margin",
    f"/margin?{TIMES}&by=tier&csv=margin",
    f"/margin?{TIMES}&by=user&csv=margin",
    "/changes?before=2025-11-18&after=2025-11-19&csv=changes",
    f"/v1/usage?{TIMES}&by=feature",
    f"/v1/usage?{TIMES}&by=user",
    f"/v1/margin?{TIMES}&by=feature",
    f"/v1/margin?{TIMES}&by=user",
    "/v1/changes?before=2025-11-18&after=2025-11-19",
    f"/receipts.csv?{TIMES}",
)


async def fetched(home: Path) -> dict[str, str]:
    found = {}
    async with open_app(served(home, prepare(home), Random(1))) as app:
        await app.start()
        transport = httpx.ASGITransport(app.server.asgi)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8090", timeout=120) as client:
            for path in PATHS:
                answer = await client.get(path)
                assert answer.status_code == 200, (path, answer.text)
                found[path] = answer.text
    return found


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("recomputed") / "home"
    config = prepare(home)
    replay(home, config, days=4, per_day=90, end_ns=parse_time_ns(END), seed=4, tell=lambda _: None)
    return asyncio.run(fetched(home))


def rows(text: str) -> list[Row]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.fixture(scope="module")
def receipts(told: dict[str, str]) -> list[Row]:
    found = rows(told[f"/receipts.csv?{TIMES}"])
    assert len(found) > 200
    assert len({row["id"] for row in found}) == len(found)
    assert any(not row["total_usd"] for row in found)
    return found


def by(receipts: Iterable[Row], name: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in receipts:
        groups[row[name]].append(row)
    return groups


def cost(group: Iterable[Row]) -> Decimal:
    return sum((Decimal(row["total_usd"]) for row in group if row["total_usd"]), Decimal(0))


def priced(group: Iterable[Row]) -> int:
    return sum(bool(row["total_usd"]) for row in group)


def known(group: list[Row]) -> str:
    """As CSV has it: empty where nothing has a price."""
    return f"{cost(group).normalize():f}" if priced(group) else ""


def tokens(group: Iterable[Row], which: str) -> int:
    return sum(int(row[which] or 0) for row in group)


def same(left: str, right: str) -> bool:
    return left == right == "" or (left != "" and right != "" and Decimal(left) == Decimal(right))


def to_nano(value: Fraction) -> Decimal:
    return (Decimal(value.numerator) / Decimal(value.denominator)).quantize(NANO, ROUND_HALF_EVEN)


def test_the_overviews_totals_and_hours_are_those_of_the_receipts(told: dict[str, str], receipts: list[Row]) -> None:
    page = told[f"/?{TIMES}"]
    assert f'title="{cost(receipts).normalize():f} USD"' in page
    for name in ("input_tokens", "output_tokens"):
        assert f"{tokens(receipts, name):,}" in page
    days = by(({**row, "day": row["created_at"][:10]} for row in receipts), "day")
    spent = {next(iter(row.values())): row for row in rows(told[f"/?{TIMES}&csv=cost-over-time"])}
    counted = {next(iter(row.values())): row for row in rows(told[f"/?{TIMES}&csv=requests-over-time"])}
    assert set(days) <= set(spent)
    for day, group in days.items():
        assert Decimal(list(spent[day].values())[1]) == cost(group)
        assert int(list(counted[day].values())[1]) == len(group)


def test_each_features_figures_are_those_of_its_receipts(told: dict[str, str], receipts: list[Row]) -> None:
    table = {row["feature"]: row for row in rows(told[f"/features?{TIMES}&csv=features"])}
    units = {unit["group"] or "": unit for unit in json.loads(told[f"/v1/usage?{TIMES}&by=feature"])["units"]}
    margins = {row["feature"]: row for row in rows(told[f"/margin?{TIMES}&by=feature&csv=margin"])}
    groups = by(receipts, "feature")
    assert set(units) == set(groups)
    for feature, group in groups.items():
        shown, unit = table[feature or "no feature"], units[feature]
        assert int(shown["requests"]) == unit["requests"] == len(group)
        assert same(shown["cost_usd"], known(group))
        assert same(unit["cost_usd"] or "", known(group))
        assert unit["unpriced"] == len(group) - priced(group)
        assert (unit["input_tokens"], unit["output_tokens"]) == (
            tokens(group, "input_tokens"),
            tokens(group, "output_tokens"),
        )
        mean = "" if not priced(group) else str(to_nano(Fraction(cost(group)) / priced(group)))
        assert same(shown["cost_per_request_usd"], mean)
        assert same(unit["cost_per_request_usd"] or "", mean)
        assert same(shown["margin_usd"], margins[feature or "no feature"]["margin_usd"])
    total = json.loads(told[f"/v1/usage?{TIMES}&by=feature"])["total"]
    assert Decimal(total["cost_usd"]) == cost(receipts)


def test_each_users_figures_are_those_of_their_receipts(told: dict[str, str], receipts: list[Row]) -> None:
    table = {row["user"]: row for row in rows(told[f"/users?{TIMES}&csv=users"])}
    units = {unit["group"] or "": unit for unit in json.loads(told[f"/v1/usage?{TIMES}&by=user"])["units"]}
    margins = {row["group"] or "": row for row in json.loads(told[f"/v1/margin?{TIMES}&by=user"])["rows"]}
    groups = by(receipts, "user")
    assert len(table) == len(units) == len(groups)
    for user, group in groups.items():
        shown = table[user or "unattributed"]
        assert int(shown["requests"]) == units[user]["requests"] == len(group)
        assert int(shown["input_tokens"]) == tokens(group, "input_tokens")
        assert same(shown["cost_usd"], known(group))
        assert same(units[user]["cost_usd"] or "", known(group))
        assert Decimal(shown["share"]) == round(Decimal(float(cost(group)) / float(cost(receipts))), 6)
        if user in margins:  # of the users, those with the least margin
            assert same(shown["margin_usd"], margins[user]["margin_usd"] or "")


def accrued(usd: Decimal) -> Decimal:
    """What of a month's amount falls between the times: whole nano-dollars up to the one, less those to the other."""
    start = parse_time_ns("2025-11-01T00:00:00Z")
    month = parse_time_ns("2025-12-01T00:00:00Z") - start
    whole = int(usd / NANO)
    return (whole * (parse_time_ns(END) - start) // month - whole * (parse_time_ns(FROM) - start) // month) * NANO


def earned_by_users(receipts: list[Row]) -> dict[str, tuple[str, Decimal]]:
    """Each user's tier, of the latest request, and what its plan bills."""
    found = {}
    for user, group in by(receipts, "user").items():
        tier = max(group, key=lambda row: (row["created_at"], row["id"]))["tier"]
        if user and tier in PLANS:
            found[user] = (tier, accrued(Decimal(PLANS[tier])))
    return found


def margin_rows(told: dict[str, str], name: str) -> dict[str, Row]:
    return {row[name]: row for row in rows(told[f"/margin?{TIMES}&by={name}&csv=margin"])}


def test_margins_are_what_is_earned_less_what_is_spent(told: dict[str, str], receipts: list[Row]) -> None:
    users = earned_by_users(receipts)
    subscriptions = sum((paid for _, paid in users.values()), Decimal(0))
    hosting = accrued(Decimal(8))
    features = margin_rows(told, "feature")
    for feature, group in by(receipts, "feature").items():
        shown = features[feature or "no feature"]
        answered = sum(row["status"] == "succeeded" for row in group)
        revenue: Decimal | None = None
        if feature in PER_REQUEST:
            revenue = answered * Decimal(PER_REQUEST[feature])
        elif not feature:
            revenue = subscriptions
        other = hosting if feature == "search-answers" else Decimal(0)
        assert same(shown["revenue_usd"], "" if revenue is None else f"{revenue:f}")
        assert same(shown["ai_cost_usd"], known(group))
        assert Decimal(shown["other_cost_usd"]) == other
        left = None if revenue is None or not priced(group) else revenue - cost(group) - other
        assert same(shown["margin_usd"], "" if left is None else f"{left:f}")
    tiers = margin_rows(told, "tier")
    for tier, group in by(receipts, "tier").items():
        paid = sum((each for theirs, each in users.values() if theirs == tier), Decimal(0))
        assert Decimal(tiers[tier]["margin_usd"]) == paid - cost(group)
    shown_users = margin_rows(told, "user")
    for user, (_, paid) in users.items():
        if user in shown_users:
            assert Decimal(shown_users[user]["revenue_usd"]) == paid
            assert Decimal(shown_users[user]["margin_usd"]) == paid - cost(by(receipts, "user")[user])
    total = json.loads(told[f"/v1/margin?{TIMES}&by=feature"])["total"]
    revenue = subscriptions + sum(
        Decimal(price) * sum(row["status"] == "succeeded" and row["feature"] == name for row in receipts)
        for name, price in PER_REQUEST.items()
    )
    assert Decimal(total["revenue_usd"]) == revenue
    assert Decimal(total["margin_usd"]) == revenue - cost(receipts) - hosting


def test_changes_compare_two_days_of_receipts_and_their_parts_sum_up(told: dict[str, str], receipts: list[Row]) -> None:
    days = [[row for row in receipts if row["created_at"].startswith(day)] for day in ("2025-11-18", "2025-11-19")]
    shown = {row["feature"]: row for row in rows(told["/changes?before=2025-11-18&after=2025-11-19&csv=changes"])}
    body: dict[str, Any] = json.loads(told["/v1/changes?before=2025-11-18&after=2025-11-19"])
    groups = [by(day, "feature") for day in days]
    compared = {feature for group in groups for feature in group if priced(group[feature])}
    assert {each["group"] or "" for each in body["features"]} == compared
    assert set(shown) == {feature or "no feature" for feature in compared}
    for each in body["features"]:
        was, became = (group.get(each["group"] or "", []) for group in groups)
        assert (Decimal(each["before_usd"]), Decimal(each["after_usd"])) == (cost(was), cost(became))
        assert sum(map(Decimal, each["effects_usd"].values())) == cost(became) - cost(was)
        assert (each["was"]["requests"], each["became"]["requests"]) == (priced(was), priced(became))
        table = shown[each["group"] or "no feature"]
        assert Decimal(table["difference_usd"]) == cost(became) - cost(was)
        for rates, group in ((each["was"], was), (each["became"], became)):
            paid = [row for row in group if row["total_usd"]]
            if paid:
                wanted = Decimal(tokens(paid, "input_tokens")) / len(paid)
                assert abs(Decimal(str(rates["input_tokens"])) - wanted) <= Decimal("1e-6")
    total = body["total"]
    assert Decimal(total["difference_usd"]) == cost(days[1]) - cost(days[0])
    assert sum(map(Decimal, total["effects_usd"].values())) == cost(days[1]) - cost(days[0])
