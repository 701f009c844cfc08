"""The estimator, scenarios, and what happened beside them, against figures worked out by hand."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.core.clock import ManualClock
from millicent.core.errors import ConfigError, InvalidRequest, NotFound
from millicent.core.money import Money
from millicent.economics.capacity import Slots
from millicent.economics.estimate import Estimated, Scenario, estimate, like
from millicent.economics.machines import MachineConfig
from millicent.economics.places import ApiModel
from millicent.economics.scenarios import Saved, Scenarios, outcome
from millicent.economics.traffic import read_traffic
from millicent.economics.where import Setup
from millicent.ledger.queries import LedgerQueries, ReceiptFilter
from millicent.meter.prices import PriceBook, PriceConfig, PriceList
from support.plan_ledgers import T0, two_hours, write

SCENARIO = Scenario(
    users=1000,
    sessions=Decimal(20),
    calls=Decimal("2.5"),
    input_tokens=1000,
    output_tokens=100,
    spread_percent=20,
    cache_percent=50,
    models=("big",),
)
BIG = PriceConfig(
    input=Decimal(2),
    input_cached=Decimal("0.2"),
    output=Decimal(8),
    batch=PriceList(input=Decimal(1), input_cached=Decimal("0.1"), output=Decimal(4)),
)


def setup_of(**prices: PriceConfig) -> Setup:
    gpu = MachineConfig(kind="rented", usd_per_hour=Decimal(2), output_tokens_per_s=Decimal(5))
    return Setup({}, (), {"gpu": gpu}, PriceBook(prices), Slots(8, 512))


def of(found: list[Estimated], name: str) -> Estimated:
    [one] = [each for each in found if each.name == name]
    return one


def test_a_months_cost_has_a_range_that_the_spread_and_the_cache_make() -> None:
    """50,000 calls. As stated, 500 x $2 + 500 x $0.20 + 100 x $8 per million: $0.0019, $95. With 20% fewer tokens $76.
    With 20% more and no cache 1,200 x $2 + 120 x $8: $0.00336, $168."""
    big = of(estimate(SCENARIO, setup_of(big=BIG), T0), "big")
    assert SCENARIO.calls_per_month == 50_000
    assert (big.low, big.expected, big.high) == (Money.from_usd(76), Money.from_usd(95), Money.from_usd(168))
    assert (big.per_call, big.per_user) == (Money.from_usd("0.0019"), Money.from_usd("0.095"))


def test_the_share_that_waits_for_a_batch_costs_batch_prices() -> None:
    """40% at half the price: $95 x 0.8."""
    found = estimate(msgspec.structs.replace(SCENARIO, batch_percent=40), setup_of(big=BIG), T0)
    assert of(found, "big").expected == Money.from_usd(76)


def test_without_batch_prices_the_standard_ones_stand_and_are_named() -> None:
    prices = PriceConfig(input=Decimal(2), output=Decimal(8))
    waiting = msgspec.structs.replace(SCENARIO, batch_percent=40, cache_percent=0)
    big = of(estimate(waiting, setup_of(big=prices), T0), "big")
    assert big.expected == Money.from_usd(140)
    assert "no batch prices" in big.notes[0]


def test_machines_are_whole_and_counted_for_the_busiest_hour() -> None:
    """50,000 calls a month are 68.5 an hour, 205.5 in the busiest; 5 tokens/s make 180 answers of 100: two machines,
    $2,920. With 80 tokens 225 an hour and one machine suffices."""
    gpu = of(estimate(SCENARIO, setup_of(big=BIG), T0), "gpu")
    assert (gpu.machines, gpu.expected, gpu.low) == (2, Money.from_usd(2920), Money.from_usd(1460))


def test_a_model_without_prices_is_unknown_and_last() -> None:
    found = estimate(SCENARIO, setup_of(), T0)
    assert [(each.name, each.expected) for each in found][-1] == ("big", None)
    assert "state them in [prices.'big']" in found[-1].notes[0]


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 100), st.integers(0, 5000), st.integers(0, 5000))
def test_the_range_holds_what_is_expected(spread: int, cached: int, batch: int, tokens: int, output: int) -> None:
    scenario = Scenario(
        users=7,
        input_tokens=tokens,
        output_tokens=output,
        spread_percent=spread,
        cache_percent=cached,
        batch_percent=batch,
        models=("big",),
    )
    big = of(estimate(scenario, setup_of(big=BIG), T0), "big")
    assert big.low is not None
    assert big.expected is not None
    assert big.high is not None
    assert big.low <= big.expected <= big.high


@pytest.mark.parametrize("wrong", [{"calls": Decimal("NaN")}, {"sessions": Decimal(-1)}, {"peak": Decimal(0)}])
def test_a_scenario_that_cannot_be_is_refused(wrong: dict[str, Decimal]) -> None:
    with pytest.raises(ValueError, match="must be a number"):
        msgspec.convert({"users": 1, "input_tokens": 1, "output_tokens": 1} | wrong, Scenario)


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> tuple[LedgerQueries, ManualClock]:
    home = tmp_path_factory.mktemp("home")
    clock = write(home, two_hours())
    return LedgerQueries(home / "ledger.db"), clock


def test_what_can_be_measured_need_not_be_stated(ledger: tuple[LedgerQueries, ManualClock]) -> None:
    """1,500 tokens in, a third of them cached, 100 out, a peak of 1.5."""
    queries, _ = ledger
    measured = like(SCENARIO, read_traffic(queries, ReceiptFilter(feature="search")))
    assert (measured.input_tokens, measured.output_tokens) == (1500, 100)
    assert (measured.cache_percent, measured.peak) == (33, Decimal("1.5"))
    with pytest.raises(InvalidRequest, match="state the tokens"):
        like(SCENARIO, read_traffic(queries, ReceiptFilter(feature="nobody's")))


def test_a_scenario_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    kept = Scenarios(tmp_path)
    saved = kept.save("pilot", SCENARIO, estimate(SCENARIO, setup_of(big=BIG), T0), ManualClock())
    assert kept.load("pilot") == saved
    assert saved.expected_usd == {"big": Decimal(95), "gpu": Decimal(2920)}
    assert kept.names() == ["pilot"]
    kept.remove("pilot")
    assert kept.names() == []
    with pytest.raises(NotFound, match="there is none yet"):
        kept.load("pilot")


@pytest.mark.parametrize("name", ["", "../ledger", "a/b", ".hidden", "x" * 65])
def test_a_scenarios_name_is_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match="can't name a scenario"):
        Scenarios(tmp_path).save(name, SCENARIO, [], ManualClock())


def test_a_damaged_scenario_is_named_with_its_file(tmp_path: Path) -> None:
    kept = Scenarios(tmp_path)
    kept.save("pilot", SCENARIO, [], ManualClock())
    (tmp_path / "scenarios" / "pilot.json").write_text("{")
    with pytest.raises(ConfigError, match=r"pilot\.json: is no saved scenario"):
        kept.load("pilot")


def test_what_happened_stands_beside_what_was_expected(ledger: tuple[LedgerQueries, ManualClock]) -> None:
    """40 requests of one user in two hours are 14,600 a month; each cost $1/3600, so that a month comes to $4.06."""
    queries, clock = ledger
    expected = {"big": Decimal(95)}
    saved = Saved("pilot", T0, msgspec.structs.replace(SCENARIO, feature="search"), expected)
    beside = {each.what: each for each in outcome(queries, clock, saved).beside}
    assert beside["calls a month"].expected == 50_000
    assert beside["calls a month"].happened == 14_600
    assert beside["calls a month"].change == Fraction(-708, 1000)
    assert beside["users"].expected == 1000
    assert beside["users"].happened == 1
    assert beside["tokens in a call"].happened == 1500
    assert beside["input from a cache"].happened == Fraction(100, 3)
    month = beside["a month, as at big"]
    assert month.expected == 95
    assert month.happened == Fraction(277_778 * 14_600, 10**9)


def test_before_anything_happened_nothing_is_told_of_it(tmp_path: Path) -> None:
    saved = Saved("pilot", T0, msgspec.structs.replace(SCENARIO, feature="search"), {"big": Decimal(95)})
    found = outcome(LedgerQueries(tmp_path / "ledger.db"), ManualClock(), saved)
    assert {each.happened for each in found.beside} == {None}
    with pytest.raises(InvalidRequest, match="names no feature"):
        outcome(LedgerQueries(tmp_path / "ledger.db"), ManualClock(), Saved("pilot", T0, SCENARIO))


def test_an_api_that_is_deployed_is_named_with_its_place() -> None:
    setup = Setup({}, (ApiModel("big", placement="cloud", asked="large"),), {}, PriceBook({"big": BIG}), Slots(8, 512))
    [found] = estimate(msgspec.structs.replace(SCENARIO, models=()), setup, T0)
    assert (found.name, found.expected) == ("cloud big", Money.from_usd(95))
