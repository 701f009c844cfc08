"""What was routed and what was wasted, from the ledger's rows."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest

from millicent.cli import run
from millicent.core.clock import NS_PER_S, ManualClock
from millicent.core.money import Money
from millicent.core.receipts import Line, Meter, Receipt, Role, Status
from millicent.core.request import Attribution
from millicent.core.usage import Provenance, Usage
from millicent.ledger.config import LedgerConfig
from millicent.ledger.hits import CacheUse
from millicent.ledger.levers import Coverage, Waste
from millicent.ledger.queries import LedgerQueries, ReceiptFilter
from millicent.ledger.sqlite import SqliteLedger
from support.receipts import START_NS, settled


def receipt(
    number: int, *, read: int = 100, cached: int = 0, written: int = 10, price: int = 100, **given: object
) -> Receipt:
    """Its input costs `price` nano-dollars a token."""
    line = Line(
        attempt=1,
        role=Role.INFERENCE,
        meter=Meter.INPUT,
        quantity=Decimal(read - cached),
        unit="token",
        unit_price_usd=Decimal(price).scaleb(-9),
        amount=Money(price * (read - cached)),
        provenance=Provenance.REPORTED,
        incurred_at_ns=START_NS,
        posted_at_ns=START_NS,
    )
    base = msgspec.structs.replace(
        settled(f"rcpt_{number:026d}"),
        created_at_ns=START_NS + number * NS_PER_S,
        usage=Usage.of(Provenance.REPORTED, input_fresh=read - cached, input_cache_read=cached, output_text=written),
        lines=(line,),
        attribution=Attribution(feature="search"),
    )
    return msgspec.structs.replace(base, **given)


def ledger_of(home: Path, *receipts: Receipt) -> LedgerQueries:
    async def fill() -> None:
        ledger = SqliteLedger(home / "ledger.db", LedgerConfig(), ManualClock(), "gw_1")
        await ledger.start()
        for each in receipts:
            opened = msgspec.structs.replace(each, status=None, settled_at_ns=None, lines=())
            await ledger.open(opened)
            await ledger.close(each, ())
        await ledger.stop()

    asyncio.run(fill())
    return LedgerQueries(home / "ledger.db")


def routed(number: int, answered_by: str, *, saved: int | None = None, **more: str) -> Receipt:
    policy = {"routing": "auto", "chosen": "small", "answered_by": answered_by, "strongest": "large", **more}
    return receipt(number, policy=policy, saved={} if saved is None else {"routing": Money(saved)})


def test_coverage_counts_what_was_routed_what_was_cheaper_and_what_that_saved(tmp_path: Path) -> None:
    queries = ledger_of(
        tmp_path,
        receipt(1),
        routed(2, "small", saved=500),
        routed(3, "small"),
        routed(4, "large", saved=-100, escalated="pattern"),
    )
    assert queries.coverage(ReceiptFilter()) == [Coverage("auto", 3, 2, 1, 2, Money(400), 4)]
    assert queries.coverage(ReceiptFilter(feature="other")) == []
    assert LedgerQueries(tmp_path / "none.db").coverage(ReceiptFilter()) == []


def test_what_the_response_cache_gave_is_counted_by_model_and_is_no_waste(tmp_path: Path) -> None:
    def cached(number: int, outcome: str, written: int = 10, **given: object) -> Receipt:
        made = receipt(number, written=written)
        return msgspec.structs.replace(made, policy={"response_cache": outcome}, **given)

    queries = ledger_of(
        tmp_path,
        receipt(1),
        cached(2, "miss", finish_reason="length", written=50),
        cached(3, "hit", backend="response_cache", finish_reason="length", written=50, lines=(),
               saved={"response_cache": Money(700)}),
        cached(4, "hit", backend="response_cache", lines=()),
        cached(5, "bypass"),
        receipt(6, model="uncached"),
    )  # fmt: skip
    assert queries.cache_use(ReceiptFilter()) == [CacheUse(receipt(1).model, 5, 2, 1, 1, 60, 1, Money(700))]
    assert LedgerQueries(tmp_path / "none.db").cache_use(ReceiptFilter()) == []
    assert queries.waste(ReceiptFilter()) == [Waste("cut", "search", 1, 50, Money(10_000), 0)]


def test_outputs_that_were_cut_or_not_read_are_waste(tmp_path: Path) -> None:
    queries = ledger_of(
        tmp_path,
        receipt(1),
        receipt(2, finish_reason="length", written=50),
        receipt(3, status=Status.CANCELLED, finish_reason="cancelled", written=7),
        receipt(4, status=Status.CANCELLED, finish_reason="cancelled", lines=(unpriced(),)),
    )
    assert queries.waste(ReceiptFilter()) == [
        Waste("cut", "search", 1, 50, Money(10_000), 0),
        Waste("unread", "search", 2, 17, Money(10_000), 1),
    ]


def unpriced() -> Line:
    return msgspec.structs.replace(receipt(0).lines[0], amount=None, unit_price_usd=None, provenance=Provenance.UNKNOWN)


def test_a_conversation_read_again_without_a_cache_is_waste_at_the_price_of_fresh_input(tmp_path: Path) -> None:
    turn = Attribution(feature="search", conversation="c")
    queries = ledger_of(
        tmp_path,
        receipt(1, read=2000, written=100, attribution=turn),
        receipt(2, read=2500, written=100, attribution=turn),  # 2,100 of it were there before
        receipt(3, read=3000, cached=2500, written=100, attribution=turn),  # all but 100 came from a cache
        receipt(4, read=2500, attribution=Attribution(feature="search", conversation="other")),
    )
    assert queries.waste(ReceiptFilter()) == [Waste("repeated", "search", 1, 2100, Money(210_000), 0)]


def test_prompts_that_grow_cost_what_the_later_half_has_more(tmp_path: Path) -> None:
    receipts = [receipt(number, read=100 if number < 20 else 150) for number in range(40)]
    steady = [receipt(100 + number, attribution=Attribution(feature="steady")) for number in range(40)]
    queries = ledger_of(tmp_path, *receipts, *steady)
    assert queries.waste(ReceiptFilter()) == [Waste("growing", "search", 20, 1000, Money(100_000), 0)]


def test_the_reports_show_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MILLICENT_HOME", str(tmp_path))
    ledger_of(tmp_path, receipt(1, finish_reason="length"), routed(2, "small", saved=500))
    assert run(["report", "--routing"]) == 0
    shown = capsys.readouterr().out.splitlines()[1].split()
    assert shown[:5] == ["auto", "1", "50.0%", "100.0%", "0.0%"]
    assert run(["report", "--routing", "--json"]) == 0
    told = msgspec.json.decode(capsys.readouterr().out)["data"]
    assert (told[0]["saved_usd"], told[0]["cheaper"], told[0]["requests"]) == ("0.0000005", 1, 2)
    assert run(["report", "--waste", "--json"]) == 0
    wasted = msgspec.json.decode(capsys.readouterr().out)["data"]
    assert [(each["kind"], each["cost_usd"]) for each in wasted] == [("cut", "0.00001")]
    assert run(["report", "--waste"]) == 0
    assert "the limit ended the output" in capsys.readouterr().out
    assert run(["report", "--waste", "--routing"]) == 2
