"""What an hour costs by kind of placement, under a contract, and from a day on."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import msgspec
import pytest

from millicent.core.accounts import Account, DeviceSession, Reading
from millicent.core.clock import NS_PER_HOUR, NS_PER_S, ManualClock, parse_time_ns
from millicent.core.errors import ConfigError
from millicent.core.identifiers import SequentialIds
from millicent.core.money import Money
from millicent.core.receipts import Accelerator, Attempt, HourShare, Role
from millicent.core.steps import DeviceState, SequenceWork, StepRecord
from millicent.core.usage import Provenance, Usage
from millicent.meter.meter import Meter
from millicent.meter.placements import Placement, PlacementConfig
from millicent.meter.pricing import price, total

ATTEMPTS = (Attempt(1, "local", "gpu", "m", Role.INFERENCE, 10, 20),)


def config(**fields: Any) -> Placement:
    return msgspec.convert(fields, PlacementConfig).placement("box")


def reading(serving_ns: int) -> Reading:
    shares = (HourShare(1, "s", 0, serving_ns),)
    return Reading("r", Usage(), Accelerator(serving_ns, serving_ns, 0, 1, 1, Provenance.MEASURED), shares)


def test_three_dollars_an_hour_at_two_thousand_tokens_a_second_is_42_cents_a_million() -> None:
    rented = config(kind="rented", usd_per_hour=3)
    million = price(reading(10**6 * NS_PER_S // 2_000), ATTEMPTS, rented, 0).lines
    assert str(total(million)) == "0.416666667"
    assert f"{Decimal('0.416666667'):.2f}" == "0.42"
    five_hundred = price(reading(500 * NS_PER_S // 2_000), ATTEMPTS, rented, 0).lines
    assert str(total(five_hundred)) == "0.000208333"


def test_a_discount_lowers_the_price_and_the_list_price_stays() -> None:
    contracted = config(kind="rented", usd_per_hour=4, discount=Decimal("0.25"))
    assert contracted.usd_per_hour == Decimal(3)
    priced = price(reading(NS_PER_HOUR), ATTEMPTS, contracted, 0)
    assert (str(total(priced.lines)), str(priced.list_price)) == ("3", "4")
    assert priced.saved == {"contract": Money.from_usd(1)}
    snapshot = priced.prices.snapshot
    assert (snapshot["list_usd_per_hour"], snapshot["discount"], snapshot["usd_per_hour"]) == ("4", "0.25", "3")


def test_a_rate_holds_until_the_day_of_the_next() -> None:
    dated = [
        {"effective_from": "2026-03-01", "usd_per_hour": 2},
        {"effective_from": "2026-05-01", "discount": Decimal("0.5")},
    ]
    placement = msgspec.convert(
        {"kind": "rented", "usd_per_hour": 3, "dated": dated}, PlacementConfig, strict=False
    ).placement("box")
    rates = [
        placement.at(parse_time_ns(day)).usd_per_hour
        for day in ("2026-01-01", "2026-02-28T23:59:59", "2026-03-01", "2026-04-30", "2026-05-01", "2030-01-01")
    ]
    assert rates == [3, 3, 2, 2, 1, 1]


def test_the_clients_own_device_costs_nothing_unless_a_rate_says_so() -> None:
    free = config(kind="edge")
    line = price(reading(5), ATTEMPTS, free, 0).lines[0]
    assert (line.amount, line.provenance) == (Money(0), Provenance.ASSUMED)
    assert config(kind="edge", usd_per_hour=Decimal("0.02")).rate_provenance is Provenance.MEASURED


def test_of_committed_capacity_what_is_unused_is_its_own_figure() -> None:
    account = Account(
        device="gpu", placement="committed", hour_ns=0, accelerators=1, wall_ns=1_000, serving_ns=200, overhead_ns=50,
        lost_ns=0, idle_ns=650, down_ns=100, usd_per_hour=Decimal(2), rate_provenance=Provenance.MEASURED,
        cost=Money(1_000),
    )  # fmt: skip
    assert account.unused_cost == Money(750)
    assert msgspec.structs.replace(account, cost=None).unused_cost is None


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"kind": "provisioned"}, "usd_per_hour"),
        ({"kind": "api", "usd_per_hour": 1}, "usd_per_hour"),
        ({"kind": "rented", "usd_per_hour": 1, "models": ["m"]}, "models"),
        ({"kind": "rented", "usd_per_hour": 1, "discount": Decimal("1.5")}, "discount"),
        ({"kind": "edge", "capital_usd": 5}, "capital_usd"),
    ],
)
def test_a_field_that_does_not_go_with_the_kind_is_refused_by_name(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        config(**fields)


def test_a_new_rate_begins_a_new_session_and_loses_no_time() -> None:
    clock = ManualClock()
    midnight_ns = clock.now_ns()
    later = (midnight_ns + 5 * NS_PER_S, Placement("box", 1, Decimal(2), Provenance.MEASURED))
    placement = Placement("box", 1, Decimal(3), Provenance.MEASURED, later=(later,))
    meter = Meter(clock, "gw", SequentialIds())
    meter.add_device("cpu", placement)
    meter.device_state("cpu", DeviceState.UP, 0)
    meter.open("r", 1, (1,))

    def step(start_ns: int) -> None:
        meter.step(StepRecord("cpu", "m", 0, start_ns, NS_PER_S, (SequenceWork(1, 0, 1, 1, 9),)))

    clock.advance(3 * NS_PER_S)
    step(2 * NS_PER_S)
    (first,) = meter.checkpoint().sessions
    assert first.usd_per_hour == 3
    clock.advance(3 * NS_PER_S)
    checkpoint = meter.checkpoint()
    old, new = checkpoint.sessions
    assert (old.id, old.closed, old.usd_per_hour, new.usd_per_hour) == (first.id, True, Decimal(3), Decimal(2))
    assert meter.checkpoint().sessions[0] == old  # until the ledger has it
    meter.written(checkpoint)
    clock.advance(4 * NS_PER_S)
    step(8 * NS_PER_S)
    (running,) = meter.checkpoint().sessions
    stopped = meter.stop().sessions[0]

    def wall(session: DeviceSession) -> int:
        return sum(hour.wall_ns for hour in session.hours)

    assert running.id == new.id
    assert wall(old) + wall(stopped) == 10 * NS_PER_S
    assert sum(hour.down_ns for hour in stopped.hours) == 0
    assert {share.session: share.serving_ns for share in meter.close("r").shares} == {
        old.id: NS_PER_S,
        new.id: NS_PER_S,
    }
