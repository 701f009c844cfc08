from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.core.accounts import Reading
from millicent.core.errors import ConfigError
from millicent.core.money import Money
from millicent.core.receipts import RATE_KEY, Accelerator, Attempt, HourShare, Role
from millicent.core.usage import Provenance, Usage
from millicent.meter.placements import Placement, PlacementConfig, assumed_placement
from millicent.meter.pricing import price

ATTEMPTS = (
    Attempt(1, "local", "gpu", "m", Role.INFERENCE, 10, 20),
    Attempt(2, "local", "gpu", "m", Role.RETRY, 20, 30),
)
RENTED = Placement("gpu", 1, Decimal("2.49"), Provenance.MEASURED)


def reading(*serving_ns: int, provenance: Provenance = Provenance.MEASURED) -> Reading:
    shares = tuple(HourShare(attempt, "s", 0, ns) for attempt, ns in enumerate(serving_ns, start=1))
    return Reading("r", Usage(), Accelerator(sum(serving_ns), sum(serving_ns), 0, 1, 1, provenance), shares)


def test_a_line_is_seconds_at_the_hourly_rate_rounded_once() -> None:
    (line,) = price(reading(412_345_678), ATTEMPTS[:1], RENTED, 99).lines
    # 0.412345678 s x 2.49 / 3600 = 0.000285205760616... dollars
    assert line.amount == Money(285_206)
    assert (line.quantity, line.unit) == (Decimal("0.412345678"), "second")
    assert line.unit_price_usd == Decimal("0.000691666666666667")
    assert (line.provenance, line.incurred_at_ns, line.posted_at_ns) == (Provenance.MEASURED, 10, 99)


@given(st.integers(0, 10**16), st.decimals(0, 10_000, places=6))
def test_time_is_priced_exactly_and_half_even(serving_ns: int, rate: Decimal) -> None:
    exact = Fraction(serving_ns) * Fraction(rate) / 3600
    # Python rounds fractions half-even.
    assert Money.of_time(serving_ns, rate) == Money(round(exact))


@given(st.integers(0, 10**14), st.decimals(0, 1_000, places=6))
def test_the_line_shown_multiplies_out_to_its_amount(serving_ns: int, rate: Decimal) -> None:
    placement = Placement("gpu", 1, rate, Provenance.MEASURED)
    (line,) = price(reading(serving_ns), ATTEMPTS[:1], placement, 0).lines
    assert line.unit_price_usd is not None
    assert line.amount is not None
    assert abs(Fraction(line.quantity) * Fraction(line.unit_price_usd) * 10**9 - line.amount.nanousd) <= Fraction(
        51, 100
    )


@pytest.mark.parametrize(("serving_ns", "nanousd"), [(1800, 0), (5400, 2), (9000, 2), (9001, 3)])
def test_a_tie_goes_to_the_even_nano_dollar(serving_ns: int, nanousd: int) -> None:
    assert Money.of_time(serving_ns, Decimal(1)) == Money(nanousd)


def test_each_attempt_has_its_line_and_role() -> None:
    priced = price(reading(3_600, 7_200), ATTEMPTS, Placement("gpu", 1, Decimal(1), Provenance.MEASURED), 0)
    assert [(line.attempt, line.role, line.amount) for line in priced.lines] == [
        (1, Role.INFERENCE, Money(1)),
        (2, Role.RETRY, Money(2)),
    ]
    assert priced.list_price == Money(3)


def test_no_device_time_costs_a_measured_nothing_even_without_a_rate() -> None:
    unpriced = Placement("gpu", 1, None, Provenance.UNKNOWN)
    for placement in (RENTED, unpriced, assumed_placement("cpu", 2)):
        (line,) = price(reading(0), ATTEMPTS[:1], placement, 0).lines
        assert (line.amount, line.provenance) == (Money(0), Provenance.MEASURED)


def test_unknown_device_time_is_unpriced() -> None:
    priced = price(reading(0, provenance=Provenance.UNKNOWN), ATTEMPTS[:1], RENTED, 0)
    assert (priced.lines[0].amount, priced.lines[0].provenance) == (None, Provenance.UNKNOWN)
    assert priced.list_price is None


def test_time_without_a_rate_is_unpriced() -> None:
    priced = price(reading(5), ATTEMPTS[:1], Placement("gpu", 1, None, Provenance.UNKNOWN), 0)
    assert priced.lines[0].amount is None
    assert priced.prices.source == "none"


def test_a_price_on_an_assumed_rate_is_assumed() -> None:
    placement = assumed_placement("cpu", 4)
    priced = price(reading(5), ATTEMPTS[:1], placement, 0)
    assert placement.usd_per_hour == Decimal("0.20")
    assert priced.lines[0].provenance is Provenance.ASSUMED
    assert priced.prices.source == "assumption"
    assert priced.prices.snapshot["usd_per_core_hour"] == "0.05"


def config(**fields: Any) -> Placement:
    return msgspec.convert(fields, PlacementConfig).placement("box")


def test_the_standard_basis_divides_the_rate_by_the_utilization() -> None:
    placement = config(kind="rented", usd_per_hour=2.4, standard_utilization=0.6)
    priced = price(reading(3_600), ATTEMPTS[:1], placement, 0)
    assert (priced.basis, priced.lines[0].amount) == ("standard", Money(4))
    assert priced.prices.source == "placements.box"
    assert (priced.prices.snapshot[RATE_KEY], priced.prices.snapshot["usd_per_hour"]) == ("4", "2.4")
    assert config(kind="rented", usd_per_hour=2, standard_utilization=0.3).receipt_usd_per_hour == Decimal(
        "6.666666666667"
    )


def test_an_owned_machine_costs_its_life_its_power_and_its_year() -> None:
    placement = config(
        kind="owned",
        capital_usd=39_420,
        life_years=4,
        residual_usd=4_380,
        watts=700,
        pue=1.5,
        usd_per_kwh=0.2,
        annual_usd=876,
    )
    # 35,040 / (4 x 8,760 h) = 1; 0.7 kW x 1.5 x 0.2 = 0.21; 876 / 8,760 = 0.1
    assert placement.usd_per_hour == Decimal("1.31")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"kind": "rented"}, "usd_per_hour"),
        ({"kind": "rented", "usd_per_hour": -1}, "usd_per_hour"),
        ({"kind": "rented", "usd_per_hour": "NaN"}, "usd_per_hour"),
        ({"kind": "rented", "usd_per_hour": 1, "watts": 5}, "watts"),
        ({"kind": "rented", "usd_per_hour": 1, "accelerators": 0}, "accelerators"),
        ({"kind": "rented", "usd_per_hour": 1, "standard_utilization": 0}, "standard_utilization"),
        ({"kind": "rented", "usd_per_hour": 1, "standard_utilization": "1.01"}, "standard_utilization"),
        ({"kind": "owned", "life_years": 4}, "capital_usd"),
        ({"kind": "owned", "capital_usd": 4}, "life_years"),
        ({"kind": "owned", "capital_usd": 4, "life_years": 0}, "life_years"),
        ({"kind": "owned", "capital_usd": 4, "life_years": 1, "residual_usd": 5}, "residual_usd"),
        ({"kind": "owned", "capital_usd": 4, "life_years": 1, "watts": 5}, "usd_per_kwh"),
        ({"kind": "owned", "capital_usd": 4, "life_years": 1, "usd_per_kwh": 5}, "watts"),
        ({"kind": "owned", "capital_usd": 4, "life_years": 1, "pue": "0.9"}, "pue"),
        ({"kind": "owned", "capital_usd": 4, "life_years": 1, "usd_per_hour": 1}, "usd_per_hour"),
    ],
)
def test_a_wrong_placement_is_refused_by_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^\[placements\.box\] {field}\b"):
        config(**fields)


def test_an_unknown_field_of_a_placement_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="usd_hour"):
        config(kind="rented", usd_hour=1)
