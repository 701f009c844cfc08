"""What was routed, from the ledger's rows; and how both reports look."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest

from millicent.cli import run
from millicent.core.clock import NS_PER_S, ManualClock
from millicent.core.money import Money
from millicent.core.receipts import Line, Meter, Receipt, Role
from millicent.core.request import Attribution
from millicent.core.usage import Provenance, Usage
from millicent.ledger.config import LedgerConfig
from millicent.ledger.hits import CacheUse
from millicent.ledger.levers import Coverage
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
    (cut,) = queries.waste(ReceiptFilter()).found
    assert (cut.kind, cut.requests, cut.tokens, cut.cost) == ("cut", 1, 50, Money(10_000))


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
