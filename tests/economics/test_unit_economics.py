"""Unit economics and targets: the figures are those that a person gets from the exported receipts."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction

import msgspec
import pytest

from millicent.core.accounts import Checkpoint, DeviceSession, HourTime
from millicent.core.clock import NS_PER_HOUR, NS_PER_S, ManualClock
from millicent.core.fits import StepTimeFit
from millicent.core.money import Money
from millicent.core.receipts import Accelerator, HourShare, device_line
from millicent.core.receipts import Role as LineRole
from millicent.core.usage import Provenance
from millicent.dashboard.exports import as_csv
from millicent.economics.bodies import body_of
from millicent.economics.devices import full_batch
from millicent.economics.reports import Reports, Setting
from millicent.economics.targets import Aim, targets
from millicent.economics.unit import units
from millicent.ledger.memory import MemoryLedger
from millicent.ledger.queries import ReceiptFilter
from support.economy import DAY_NS, answered, ledger_of

NOW = ManualClock().now_ns() + 20 * DAY_NS


@pytest.fixture(scope="module")
def ledger() -> Iterator[MemoryLedger]:
    chance = random.Random(3)
    made = ledger_of(
        [
            answered(
                number,
                NOW - 9 * DAY_NS + number * 7919 * NS_PER_S,
                feature=chance.choice(["chat", "search", None]),
                user=chance.choice(["ada", "bob", None]),
                model=chance.choice(["large", "small"]),
                fresh=chance.randrange(1, 3000),
                cached=chance.choice([0, 500]),
                output=chance.randrange(1, 400),
                retries_usd=chance.choice([None, None, "0.0007"]),
                priced=chance.random() > 0.1,
                total_ms=chance.randrange(100, 5000),
                conversation=f"c{number % 7}",
                useful=chance.choice([True, False, None]),
            )
            for number in range(80)
        ]
    )
    yield made
    asyncio.run(made.stop())


def exported(ledger: MemoryLedger) -> list[dict[str, str]]:
    text = "".join(as_csv(iter([ledger.queries.receipts(ReceiptFilter(), limit=500)])))
    return list(csv.DictReader(io.StringIO(text)))


def test_figures_are_those_of_the_exported_receipts_added_up_by_hand(ledger: MemoryLedger) -> None:
    rows: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in exported(ledger):
        rows[row["feature"]].append(row)
    verdicts = {each.id: each.useful for each in ledger.queries.receipts(ReceiptFilter(), limit=500).receipts}
    report = units(ledger.queries, "feature", ReceiptFilter(), NOW)
    assert {each.group or "" for each in report.units} == set(rows)
    for unit in report.units:
        own = rows[unit.group or ""]
        costs = [Decimal(row["total_usd"]) for row in own if row["total_usd"]]
        assert unit.requests == len(own)
        assert unit.unpriced == len(own) - len(costs)
        assert unit.cost == Money.from_usd(sum(costs, Decimal(0)))
        assert unit.cost_per_request is not None
        assert abs(unit.cost_per_request.usd - sum(costs, Decimal(0)) / len(costs)) <= Decimal("5e-10")
        rated = [verdicts[row["id"]] for row in own if verdicts[row["id"]] is not None]
        assert unit.rated == len(rated)
        assert unit.tokens_per_useful is not None
        tokens = sum(int(row["input_tokens"]) + int(row["output_tokens"]) for row in own)
        useful = Fraction(sum(value is True for value in rated), len(rated))
        assert round(unit.tokens_per_useful, 3) == round(
            Decimal(tokens) / len(own) * useful.denominator / useful.numerator, 3
        )
        took = sorted(Decimal(row["total_ms"]) for row in own)
        assert unit.took is not None
        exact_ms = took[-(-95 * len(took) // 100) - 1]
        assert unit.took.total.p95_ns is not None
        assert abs(Decimal(unit.took.total.p95_ns) / 10**6 - exact_ms) <= exact_ms / 32
    total = report.total
    assert total.cost == Money.total(each.cost or Money(0) for each in report.units)
    assert total.fully_loaded == total.cost  # nothing runs on a machine of ours
    assert sum(total.roles.values(), Money(0)) >= total.cost


def test_what_a_conversation_costs_is_the_mean_over_conversations(ledger: MemoryLedger) -> None:
    report = units(ledger.queries, "conversation", ReceiptFilter(), NOW)
    assert len(report.units) == 7
    assert report.cost_per_group is not None
    assert report.total.cost is not None
    assert abs(report.cost_per_group.nanousd * 7 - report.total.cost.nanousd) <= 7
    assert report.units[0].took is not None


def test_the_tallies_that_reports_rest_on_cost_what_the_totals_say(ledger: MemoryLedger) -> None:
    found = ledger.queries.tallies(("feature", "model"), ReceiptFilter()) or {}
    by_model = {each.group: each.cost.nanousd for each in ledger.queries.totals("model", ReceiptFilter())}
    for model, nanousd in by_model.items():
        assert sum(tally.cost_nanousd for (_, of), tally in found.items() if of == model) == nanousd


def test_what_is_unattributed_or_unpriced_is_told_with_what_to_do(ledger: MemoryLedger) -> None:
    report = units(ledger.queries, "feature", ReceiptFilter(), NOW)
    nobody = sum(row["user"] == "" for row in exported(ledger))
    told = {gap.what: gap for gap in report.gaps}
    assert told["no user"].requests == nobody
    assert told["no user"].share == Decimal(nobody) / 80
    assert "X-Millicent-User" in told["no user"].advice
    assert told["no price for large"].cost is None
    assert "[prices.NAME]" in told["no price for large"].advice


def test_targets_are_met_or_missed_by_what_was_measured(ledger: MemoryLedger) -> None:
    own = [row for row in exported(ledger) if row["feature"] == "chat"]
    costs = [Decimal(row["total_usd"]) for row in own if row["total_usd"]]
    mean = sum(costs, Decimal(0)) / len(costs)
    aims = {
        "chat": Aim("ada", Money.from_usd(mean + 1), 100_000),
        "search": Aim(None, Money.from_usd("0.0000001"), 1),
        "idle": Aim(None, Money.from_usd("0.01"), 500),
        "aimless": Aim("bob"),
    }
    chat, idle, search = targets(ledger.queries, aims, ReceiptFilter())
    assert (chat.feature, chat.owner, chat.cost_verdict, chat.latency_verdict) == ("chat", "ada", "met", "met")
    assert (chat.cost_share, chat.latency_share) == (Decimal(1), Decimal(1))
    assert (search.cost_verdict, search.latency_verdict) == ("missed", "missed")
    assert search.latency_share == 0
    assert (idle.cost_verdict, idle.latency_verdict, idle.requests) == ("unknown", "unknown", 0)


def test_the_share_within_a_latency_target_is_right_to_a_bucket(ledger: MemoryLedger) -> None:
    own = [int(Decimal(row["total_ms"])) for row in exported(ledger) if row["feature"] == "chat"]
    (found,) = targets(ledger.queries, {"chat": Aim(None, None, 2000)}, ReceiptFilter())
    assert found.latency_share is not None
    near = [sum(took <= bound for took in own) for bound in (1870, 2130)]
    assert near[0] <= found.latency_share * len(own) <= near[1]
    assert found.cost_verdict is None


def served(seconds: int, *, user: str, number: int) -> tuple[object, HourShare]:
    start_ns = NOW - DAY_NS + number * NS_PER_HOUR
    serving_ns = seconds * NS_PER_S
    line = device_line(
        1,
        LineRole.INFERENCE,
        serving_ns,
        Decimal(1),
        Provenance.MEASURED,
        incurred_at_ns=start_ns,
        posted_at_ns=start_ns,
    )
    receipt = msgspec.structs.replace(
        answered(900 + number, start_ns, user=user, output=3600),
        placement="box",
        lines=(line,),
        accelerator=Accelerator(serving_ns, serving_ns // 4, serving_ns - serving_ns // 4, 1, 1, Provenance.MEASURED),
    )
    return receipt, HourShare(1, "sess", start_ns, serving_ns)


def test_a_machines_idle_time_is_borne_by_use_and_busy_is_told_from_fast() -> None:
    """Four hours at $1: ada used 900 s and bob 300 s. The other 13,200 s cost $3.666..., three quarters of it ada's."""
    made = MemoryLedger()
    start_ns = NOW - DAY_NS

    async def fill() -> None:
        hours = tuple(HourTime(start_ns + hour * NS_PER_HOUR, NS_PER_HOUR) for hour in range(4))
        session = DeviceSession(
            "sess", "gw", "cpu:0", "box", 1, Decimal(1), Provenance.MEASURED, start_ns, start_ns + 4 * NS_PER_HOUR,
            False, False, hours,
        )  # fmt: skip
        await made.checkpoint(Checkpoint(start_ns, (session,), ()))
        for number, (user, seconds) in enumerate([("ada", 900), ("bob", 300)]):
            receipt, share = served(seconds, user=user, number=number)
            await made.close(receipt, (share,))  # type: ignore[arg-type]
        fit = StepTimeFit("fit_1", "cpu:0", "large", "bf16", 1e6, 9e6, 0.0, 0.0, 0.0, 0.0, 10, None, 1)
        await made.save_fits((fit,))

    asyncio.run(fill())
    report = units(made.queries, "user", ReceiptFilter(), NOW, max_sequences=8)
    loaded = {each.group: each.fully_loaded for each in report.units}
    # Busy: 25 and 8.333 cents; idle: 2.75 and 0.91666... dollars.
    assert loaded == {"ada": Money(250_000_000 + 2_750_000_000), "bob": Money(83_333_333 + 916_666_667)}
    assert report.total.fully_loaded == Money.from_usd(4)
    (device,) = report.devices
    assert device.busy == Decimal(1200) / 14_400
    # 7,200 output tokens in four hours; a step of 8 sequences takes 10 ms: 800 tokens a second.
    assert device.output_tokens_per_s == Decimal("0.5")
    assert (device.maximum_tokens_per_s, device.maximum_from) == (Decimal(800), "step-time model")
    assert device.throughput == Decimal("0.000625")
    seen = units(made.queries, "user", ReceiptFilter(), NOW).devices[0]
    assert (seen.maximum_tokens_per_s, seen.maximum_from) == (Decimal(1), "fastest hour")
    # Half the period's use bears half of what the month left over, whenever it is asked.
    later = units(made.queries, "user", ReceiptFilter(from_ns=start_ns + NS_PER_HOUR), NOW)
    assert later.total.fully_loaded == Money(83_333_333 + 916_666_667)
    standard = units(made.queries, "user", ReceiptFilter(), NOW, standard={"box": Decimal("0.5")})
    assert standard.total.fully_loaded == Money(333_333_333 + 4_000_000_000 - 666_666_667)
    asyncio.run(made.stop())


def test_a_machine_at_full_batch_does_what_its_step_takes() -> None:
    fit = StepTimeFit("v", "cpu:0", "m", "bf16", 1e6, 2e6, 1e5, 5e4, 10.0, 0.0, 9, None, 1)
    # 1 ms + max(2 ms, 32 x 0.1 ms) + 32 x 0.05 ms + 32 x 100 x 10 ns = 5.832 ms for 32 tokens.
    assert full_batch(fit, 32, 100) == Decimal(32) * 10**9 / 5_832_000


def test_the_json_of_a_report_has_money_as_strings_and_names_that_say_so(ledger: MemoryLedger) -> None:
    reports = Reports(ledger.queries, ManualClock(NOW), Setting())
    body = reports.answer("usage", {"by": "feature"})
    told = json.loads(msgspec.json.Encoder(decimal_format="number").encode(body))
    assert told["object"] == "usage"
    assert told["to"] == "2026-01-21T00:00:00.000000Z"
    assert isinstance(told["total"]["cost_usd"], str)
    assert set(told["total"]["roles_usd"]) == {"inference", "retry"}
    assert body_of(None) is None
