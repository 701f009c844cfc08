"""`millicent demo`: days of made-up traffic through the real pipeline in seconds, the same every time."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from random import Random
from typing import ClassVar

import httpx
import msgspec
import pytest
from click.testing import CliRunner

from millicent.app import open_app
from millicent.app_pages import marked_as_demo
from millicent.cli import demo_visitors
from millicent.cli.commands import millicent
from millicent.cli.demo_replay import Planned, placements, prepare, replay, served, stand_ins
from millicent.cli.demo_story import FEATURES, STEPS, Story
from millicent.cli.engine_shape import engine_shape
from millicent.config import Config
from millicent.core.clock import NS_PER_S, SystemClock, parse_time_ns
from millicent.core.errors import ConfigError
from millicent.core.identifiers import SystemIds
from millicent.core.request import Request
from millicent.economics.basis import basis_of
from millicent.economics.recorded import read_recorded
from millicent.ledger.queries import LedgerQueries, ReceiptFilter
from millicent.meter.meter import Meter
from support.http_server import Handler, http_server

END_NS = parse_time_ns("2026-11-19T12:00")  # a Thursday: the week's Tuesday, on which the cost jumps, is behind it
EVERYTHING = ReceiptFilter()


def made(home: Path, *, days: int = 3, seed: int = 1) -> LedgerQueries:
    config = prepare(home)
    replay(home, config, days=days, per_day=60, end_ns=END_NS, seed=seed, tell=lambda _: None)
    return LedgerQueries(home / "ledger.db")


@pytest.fixture(scope="module")
def demo_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("demo") / "home"
    made(home)
    return home


@pytest.fixture
def ledger(demo_home: Path) -> LedgerQueries:
    return LedgerQueries(demo_home / "ledger.db")


def test_the_demo_fills_a_ledger_that_adds_up(ledger: LedgerQueries) -> None:
    assert ledger.verify() == []
    assert ledger.count_open() == 0
    features = {each.group for each in ledger.totals("feature", EVERYTHING)}
    assert {"support-chat", "search-answers", "meeting-notes", "doc-extraction", None} <= features
    assert {"aster", "gpu-rented", "gpu-owned"} <= {each.group for each in ledger.totals("placement", EVERYTHING)}
    assert {each.group for each in ledger.totals("tier", EVERYTHING)} == {"free", "pro", "business"}


def test_every_receipt_of_the_demo_is_tagged_as_such(ledger: LedgerQueries) -> None:
    receipts = ledger.receipts(EVERYTHING, limit=1000).receipts
    assert len(receipts) > 100
    assert {receipt.attribution.tags.get("demo") for receipt in receipts} == {"true"}


def test_machines_are_charged_by_their_share_and_their_hours_balance(ledger: LedgerQueries) -> None:
    accounts = ledger.accounts(0, END_NS + 1)
    assert {account.device for account in accounts} == {"gpu-rented", "gpu-owned"}
    for account in accounts:
        parts = account.serving_ns + account.overhead_ns + account.lost_ns + account.idle_ns + account.down_ns
        assert parts == account.wall_ns
    served = sum(account.serving_ns for account in accounts)
    assert served == sum(each.serving_ns for each in ledger.totals("placement", EVERYTHING))
    assert served > 0


def test_machines_run_several_at_once_and_the_simulator_learns_what_their_steps_take(ledger: LedgerQueries) -> None:
    recorded = read_recorded(ledger, EVERYTHING)
    ran = [each.receipt.accelerator for each in recorded if each.receipt.placement in STEPS]
    assert max(each.batch_sum / each.steps for each in ran) > 2
    assert sum(each.accepted_tokens for each in ran) > sum(each.drafted_tokens for each in ran) / 2
    basis = basis_of(ledger, recorded, engine_shape(Config(), "owl-8b"))
    assert (basis.placement, basis.model) == ("gpu-rented", "owl-8b")
    assert basis.fit.error is not None
    assert basis.fit.error < 0.1
    wanted = STEPS["gpu-rented"].weights_ns + STEPS["gpu-rented"].fixed_ns
    assert basis.fit.weights_ns + basis.fit.fixed_ns == pytest.approx(wanted, rel=0.1)


def test_the_same_seed_makes_the_same_demo(ledger: LedgerQueries, tmp_path: Path) -> None:
    def shape(queries: LedgerQueries) -> list[tuple[object, ...]]:
        receipts = queries.receipts(EVERYTHING, limit=1000).receipts
        return [(each.id, each.created_at_ns, each.model, each.attribution, each.total) for each in receipts]

    again = made(tmp_path / "again")
    assert shape(again) == shape(ledger)
    other = Story(Random(2), days=3, end_ns=END_NS, per_day=60)
    first = Story(Random(1), days=3, end_ns=END_NS, per_day=60)
    assert [event.at_ns for event in other.events()] != [event.at_ns for event in first.events()]


def test_prompts_of_one_feature_grow_on_a_tuesday_and_a_machine_goes_away_for_an_hour() -> None:
    story = Story(Random(1), days=21, end_ns=END_NS, per_day=300)
    tuesday_ns = parse_time_ns("2026-11-17T09:00")
    events = list(story.events())
    assert [event.at_ns for event in events] == sorted(event.at_ns for event in events)
    assert END_NS - 21 * 86_400 * NS_PER_S <= events[0].at_ns < events[-1].at_ns < END_NS
    sizes: dict[bool, list[int]] = {False: [], True: []}
    for event in events:
        if event.request.attribution.feature == "support-chat":
            sizes[event.at_ns >= tuesday_ns].append(event.answers[-1].input_tokens)
    before, after = (sum(found) / len(found) for found in (sizes[False], sizes[True]))
    assert 2.2 < after / before < 3.0
    gone = [event for event in events if "unreachable" in str(event.answers[0].error)]
    assert {event.request.model for event in gone} == {"owl-8b"}
    assert max(event.at_ns for event in gone) - min(event.at_ns for event in gone) < 3600 * NS_PER_S


def test_a_home_that_is_somebodys_own_is_never_made_a_demo(tmp_path: Path) -> None:
    (tmp_path / "millicent.toml").write_text("# mine")
    with pytest.raises(ConfigError, match="holds something that is no demo"):
        prepare(tmp_path)
    assert (tmp_path / "millicent.toml").read_text() == "# mine"


def test_the_command_makes_a_demo_once_and_wants_somewhere_to_keep_it(tmp_path: Path) -> None:
    run = CliRunner().invoke
    home = tmp_path / "kept"
    line = ["demo", "--home", str(home), "--days", "1", "--per-day", "20", "--until", "2026-11-19T12:00", "--no-serve"]
    first = run(millicent, line)
    assert first.exit_code == 0, first.output
    assert f"requests are in the ledger of {home}." in first.output
    assert f"Showing the demo that is in {home}." in run(millicent, line).output
    assert "--no-serve needs --home" in str(run(millicent, ["demo", "--no-serve"]).exception)
    assert "is no time" in str(run(millicent, ["demo", "--until", "soon"]).exception)


async def serve_and_look(home: Path) -> str:
    """Every page, and one answer, whose receipt is returned."""
    async with open_app(served(home, prepare(home), Random(1))) as app:
        await app.start()
        transport = httpx.ASGITransport(marked_as_demo(app.server.asgi))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8090") as client:
            for path in ("/", "/users", "/models", "/settings", "/receipts", "/accounts", "/chat"):
                page = await client.get(path)
                assert page.status_code == 200
                assert "Demo." in page.text
                assert page.headers["x-millicent-demo"] == "true"
            asked = {"model": "owl-8b", "messages": [{"role": "user", "content": "Hello?"}]}
            answer = await client.post("/v1/chat/completions", json=asked, headers={"X-Millicent-Tags": "mine=1"})
            assert answer.status_code == 200, answer.text
            assert "no model runs here" in answer.json()["choices"][0]["message"]["content"]
            assert answer.json()["usage"]["cost"] > 0
            return answer.headers["x-millicent-receipt"]


def test_the_demo_is_served_with_its_banner_and_answers_without_a_model(tmp_path: Path) -> None:
    ledger = made(tmp_path / "served", days=1)
    receipt = ledger.receipt(asyncio.run(serve_and_look(tmp_path / "served")))
    assert receipt is not None
    assert receipt.attribution.tags == {"demo": "true", "mine": "1"}


class Refusing(Handler):
    """Answers three requests, then lets nobody in."""

    asked: ClassVar[list[tuple[dict[str, str], dict[str, object]]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.read_body())
        self.asked.append((dict(self.headers), body))
        status = 200 if len(self.asked) <= 3 else 401
        choices = [{"index": 0, "message": {"role": "assistant", "content": "Hm."}, "finish_reason": "stop"}]
        self.send_json({"choices": choices, "usage": {}} if status == 200 else {"error": {"message": "No."}}, status)


def test_visitors_ask_as_anybody_does_until_they_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_visitors, "_PAUSE_S", 0.001)
    monkeypatch.setattr(demo_visitors, "_AT_ONCE", 1)
    with http_server(Refusing) as url:
        visitors = demo_visitors.Visitors(Random(1))
        visitors.hear(f"Millicent ready on {url}")
        for thread in threading.enumerate():
            if thread.name == "demo visitor":
                thread.join(60)
        visitors.leave()
    assert len(Refusing.asked) == 4
    for headers, body in Refusing.asked:
        feature = next(each for each in FEATURES if each.name == headers.get("X-Millicent-Feature"))
        assert body["model"] == feature.model
    assert "Millicent ready" in capsys.readouterr().out


def test_machines_of_the_demo_never_mix_up_their_sequences(tmp_path: Path) -> None:
    places, clock = placements(prepare(tmp_path / "home")), SystemClock()
    meter = Meter(clock, "gw", SystemIds(clock))
    backends, _ = stand_ins(Planned(Random(1)), meter, places, clock)

    async def numbers() -> list[int]:
        request = Request(id="rcpt_1", dialect="test", model="owl-8b", prompt="x")
        both = [each for each in backends if {"owl-8b", "owl-32b"} & set(each.models())]
        calls = [
            await each.prepare(msgspec.structs.replace(request, model=model))
            for each in both
            for model in each.models()
        ]
        return [number for call in calls for number in call.sequences]

    found = asyncio.run(numbers())
    assert len(found) >= 2
    assert len(set(found)) == len(found)
