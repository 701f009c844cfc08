"""Where to run it, against figures worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import pytest

from millicent.core.clock import NS_PER_HOUR, NS_PER_MS, NS_PER_S, ManualClock
from millicent.core.errors import InvalidRequest
from millicent.core.fits import StepTimeFit
from millicent.core.money import Money
from millicent.core.receipts import RESPONSE_CACHE, Accelerator, Receipt, Status, Timing
from millicent.core.usage import Provenance, Usage
from millicent.economics.capacity import Slots, back_to_back
from millicent.economics.machines import MachineConfig, machine_from
from millicent.economics.places import ApiModel, Asked, Place
from millicent.economics.traffic import Hour, Ran, Spread
from millicent.economics.where import Setup, Where, verdict, where
from millicent.ledger.queries import LedgerQueries, ReceiptFilter
from millicent.meter.placements import PlacementConfig
from millicent.meter.prices import LongContext, PriceBook, PriceConfig
from support.plan_ledgers import BUSY, T0, answer, two_hours, write

EVERYTHING = ReceiptFilter(from_ns=T0)
PRICES = {"big": PriceConfig(input=Decimal(1), input_cached=Decimal("0.1"), output=Decimal(4))}
GPU = MachineConfig(kind="rented", usd_per_hour=Decimal(2), output_tokens_per_s=Decimal(200))
USD = 10**9


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> tuple[LedgerQueries, ManualClock]:
    home = tmp_path_factory.mktemp("home")
    clock = write(home, two_hours())
    return LedgerQueries(home / "ledger.db"), clock


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[LedgerQueries, ManualClock]:
    """An answer takes four minutes: in the first hour 30 of them two at a time, 120 s of device time each, which fills
    it; in the second ten alone, 240 s each. On average 150 s, of which an hour holds 24."""
    home = tmp_path_factory.mktemp("full")
    timing = Timing(queue_ns=0, ttft_ns=1, tpot_ns=1, total_ns=240 * NS_PER_S)
    rows = []
    for each in two_hours(timing=timing):
        serving_ns = (120 if each.created_at_ns < T0 + NS_PER_HOUR else 240) * NS_PER_S
        ran = Accelerator(serving_ns, serving_ns, 0, 100, 100, Provenance.MEASURED)
        rows.append(msgspec.structs.replace(each, accelerator=ran))
    clock = write(home, rows)
    return LedgerQueries(home / "ledger.db"), clock


def setup_of(**changes: Any) -> Setup:
    given: dict[str, Any] = {
        "placements": {"box": PlacementConfig(kind="rented", usd_per_hour=Decimal(1)).placement("box")},
        "apis": (ApiModel("big"),),
        "machines": {"gpu": GPU},
        "prices": PriceBook(PRICES),
        "slots": Slots(8, 512),
    }
    return Setup(**{**given, **changes})


def comparing(ledger: tuple[LedgerQueries, ManualClock]) -> Callable[..., Where]:
    queries, clock = ledger

    def compared(asked: Asked = Asked(), compare_with: Sequence[str] = (), **changes: Any) -> Where:  # noqa: B008 - frozen
        return where(queries, clock, setup_of(**changes), EVERYTHING, asked, compared=compare_with)

    return compared


@pytest.fixture
def compare(ledger: tuple[LedgerQueries, ManualClock]) -> Callable[..., Where]:
    return comparing(ledger)


@pytest.fixture
def compare_full(full: tuple[LedgerQueries, ManualClock]) -> Callable[..., Where]:
    return comparing(full)


def named(found: Where, name: str) -> Place:
    [place] = [each for each in found.places if each.name == name]
    return place


def test_the_traffic_is_what_the_ledger_saw(compare: Callable[..., Where]) -> None:
    traffic = compare().traffic
    assert (traffic.requests, traffic.hours, traffic.busiest, traffic.monthly) == (40, 2, 30, 14_600)
    assert traffic.peak == Fraction(3, 2)
    assert traffic.input_tokens is not None
    assert (int(traffic.input_tokens.mean), traffic.input_tokens.p95) == (1500, 1500)
    assert traffic.provenance is Provenance.MEASURED


def test_an_api_costs_its_price_of_every_token(compare: Callable[..., Where]) -> None:
    """1,000 x $1 + 500 x $0.10 + 100 x $4, per million: $0.00145; 14,600 of them $21.17. Without caches $0.0019."""
    big = named(compare(), "big")
    assert big.per_request == Money.from_usd("0.00145")
    assert big.monthly == Money.from_usd("21.17")
    assert big.uncached == Money.from_usd("27.74")
    assert big.per_million_tokens == Money.from_usd(Decimal("0.00145") / 1600 * 10**6)
    assert big.provenance is Provenance.ESTIMATED


def test_a_machine_that_was_busy_carries_what_its_best_hour_did(compare_full: Callable[..., Where]) -> None:
    """30 an hour, more than the 24 of mean device time, at a peak of 1.5 are 14,600 a month: one machine, $730, two
    thirds used. It served 30 x 120 and 10 x 240 of 7,200 seconds."""
    box = named(compare_full(), "box small")
    assert box.capacity is not None
    assert (box.capacity.requests_per_hour, box.capacity.provenance) == (30, Provenance.MEASURED)
    assert (box.machines, box.monthly) == (1, Money.from_usd(730))
    assert box.utilization == Fraction(2, 3)
    assert box.unused == Money(round(Fraction(730 * USD, 3)))
    assert box.per_request == Money.from_usd("0.05")
    assert box.busy == Fraction(6000, 7200)
    assert (box.p50_ns, box.p95_ns, box.latency_provenance) == (240 * NS_PER_S, 240 * NS_PER_S, Provenance.MEASURED)


def test_a_machine_that_was_idle_carries_what_an_hour_holds_of_its_device_time(compare: Callable[..., Where]) -> None:
    """Each of the 40 took a second of it: 3,600 an hour, and at a peak of 1.5 a month 1,752,000 for $730. 20 an hour on
    average are 1/180 of that. It pays from 730 / 0.00145 = 503,448.3 requests a month."""
    found = compare()
    box = named(found, "box small")
    assert box.capacity is not None
    assert (box.capacity.requests_per_hour, box.capacity.provenance) == (3600, Provenance.ESTIMATED)
    assert box.capacity.how == (
        "an answer takes 1,000 ms of device time here, and an hour holds so many; queues grow before that"
    )
    assert (box.machines, box.monthly, box.provenance) == (1, Money.from_usd(730), Provenance.ESTIMATED)
    assert (box.utilization, box.busy) == (Fraction(1, 180), Fraction(40, 7200))
    assert box.curve is not None
    assert box.curve.capacity == 1_752_000
    [even] = [each for each in found.break_evens if each.machine == "box small"]
    assert even.pays_from == even.pays_always_from == 503_449


def test_a_machine_of_several_accelerators_has_as_many_hours_of_device_time(compare: Callable[..., Where]) -> None:
    """A receipt's device time is that of all of them: two hours of it in one hour of two, for $2."""
    pair = PlacementConfig(kind="rented", usd_per_hour=Decimal(1), accelerators=2).placement("box")
    box = named(compare(placements={"box": pair}), "box small")
    assert box.capacity is not None
    assert (box.capacity.requests_per_hour, box.monthly) == (7200, Money.from_usd(1460))


def test_a_latency_target_leaves_a_machine_as_much_idle_time_as_it_takes(compare: Callable[..., Where]) -> None:
    """900 ms alone are 900 / (1 - busy) on a machine that is shared: 1,800 when half busy, and 1,800 answers an hour
    then; 900 of 1,000 leave a tenth, 360. At 900 there is no room: only the hour that met it is known."""
    held = {
        target_ms: named(compare(Asked(latency_target_ms=target_ms)), "box small").capacity
        for target_ms in (1800, 1000, 900)
    }
    assert [each and (each.requests_per_hour, each.provenance) for each in held.values()] == [
        (1800, Provenance.ESTIMATED),
        (360, Provenance.ESTIMATED),
        (30, Provenance.MEASURED),
    ]
    assert held[1800] is not None
    assert held[1800].how == (
        "an answer takes 1,000 ms of device time here; at most 50.0% busy, 95 in 100 within 1800 ms"
    )


def test_what_is_slow_when_it_is_busiest_is_not_said_to_carry_more() -> None:
    """In time on the whole, but not in its busiest hour: 1 - 500/1,000 of the 7,200 until that is known."""
    quiet, busy = Hour(T0, 50, 500 * NS_PER_MS), Hour(T0 + NS_PER_HOUR, 200, 2000 * NS_PER_MS)
    took = Spread(Fraction(400 * NS_PER_MS), 300 * NS_PER_MS, 500 * NS_PER_MS)
    ran = Ran("box", "small", 4000, took, Fraction(NS_PER_S, 2), None, (quiet,), None)
    calm = back_to_back(ran, 1, 1000 * NS_PER_MS)
    assert calm is not None
    assert calm.requests_per_hour == 3600
    assert back_to_back(msgspec.structs.replace(ran, hours=(quiet, busy)), 1, 1000 * NS_PER_MS) is None


def test_device_time_that_nobody_knows_or_too_few_answers_for_a_target_carry_nothing_back_to_back() -> None:
    unknown = Ran("box", "small", 3, None, None, None, (Hour(T0, 3, None),), None)
    assert back_to_back(unknown, 1, None) is None
    few = msgspec.structs.replace(unknown, serving_ns=Fraction(NS_PER_MS, 2))
    assert back_to_back(few, 1, 1000 * NS_PER_MS) is None
    told = back_to_back(few, 1, None)
    assert told is not None
    assert (told.requests_per_hour, told.how.partition(";")[0]) == (
        7_200_000,
        "an answer takes 0.5 ms of device time here, and an hour holds so many",
    )


def test_what_ran_there_and_was_of_another_length_is_told(tmp_path: Path) -> None:
    """20 tokens a request ran on the box, 1,600 in the cloud: 1,284 on average."""
    short = Usage.of(Provenance.MEASURED, input_fresh=10, output_text=10)
    rows = [answer(i, T0 + i, usage=short, accelerator=BUSY) for i in range(10)]
    rows += [answer(10 + i, T0 + i, placement="cloud") for i in range(40)]
    found = where(LedgerQueries(tmp_path / "ledger.db"), write(tmp_path, rows), setup_of(), EVERYTHING, Asked())
    assert "20 tokens a request ran there, and 1,284 are asked about" in named(found, "box small").notes[0]


def test_a_rented_machine_can_be_given_back_between_hours(compare_full: Callable[..., Where]) -> None:
    """Of 30 an hour both hours need one machine: 730 machine-hours a month, with a spare twice that. Ten times the
    volume needs ten in one hour and four in the other: seven on average."""
    assert named(compare_full(), "box small").when_needed == Money.from_usd(730)
    assert named(compare_full(Asked(spares=1)), "box small").when_needed == Money.from_usd(1460)
    tenfold = named(compare_full(Asked(volume=146_000)), "box small")
    assert (tenfold.machines, tenfold.when_needed) == (10, Money.from_usd(7 * 730))


def test_an_api_that_is_known_to_be_late_is_not_the_cheapest(tmp_path: Path) -> None:
    """Its answers took 900 ms here; the dearer one was never seen, and may be in time."""
    rows = two_hours(placement="cloud", model="quick")
    clock = write(tmp_path, rows)
    prices = PRICES | {"dear": PriceConfig(input=Decimal(9), output=Decimal(9))}
    setup = setup_of(
        apis=(ApiModel("big", placement="cloud", asked="quick"), ApiModel("dear")), prices=PriceBook(prices)
    )
    queries = LedgerQueries(tmp_path / "ledger.db")
    found = where(queries, clock, setup, EVERYTHING, Asked(latency_target_ms=800))
    assert (named(found, "cloud big").in_time, found.cheapest[0].name) == (False, "dear")
    assert {each.api for each in found.break_evens} == {"dear"}
    in_time = where(queries, clock, setup, EVERYTHING, Asked(latency_target_ms=900))
    assert (named(in_time, "cloud big").in_time, in_time.cheapest[0].name) == (True, "cloud big")
    assert named(in_time, "cloud big").provenance is Provenance.MEASURED


def test_a_stated_machine_is_assumed_and_breaks_even_where_the_arithmetic_says(compare: Callable[..., Where]) -> None:
    """200 tokens/s are 7,200 requests an hour and 3,504,000 a month at this peak, for $1,460. At $0.00145 that is
    1,006,896.6 requests; a full machine's would cost $5,080.80, so that 28.7% of it suffices."""
    found = compare()
    gpu = named(found, "gpu")
    assert gpu.provenance is Provenance.ASSUMED
    assert gpu.p95_ns is None
    assert gpu.latency_provenance is Provenance.UNKNOWN
    [even] = [each for each in found.break_evens if each.machine == "gpu"]
    assert even.pays_from == even.pays_always_from == 1_006_897
    assert even.utilization == Fraction(146_000, 508_080)
    assert found.break_evens[-1].machine == "gpu" or found.break_evens[0].machine == "box small"


def test_whether_a_machine_pays_is_said_in_a_sentence(
    compare: Callable[..., Where], compare_full: Callable[..., Where]
) -> None:
    few, many = verdict(compare(Asked(volume=1000))), verdict(compare_full(Asked(volume=10_000_000)))
    assert few.startswith("At 1,000 requests a month a machine does not pay: ")
    assert "$730.00" in few
    assert "$1.45." in few
    first = min(each.pays_from for each in compare(Asked(volume=1000)).break_evens if each.pays_from)
    assert few.endswith(f"from {first:,} requests a month, {first / 1000:,.1f} times as many.")
    assert many.startswith("At 10,000,000 requests a month a machine pays: ")


def test_the_rule_of_thumb_is_tested_on_this_traffic(compare_full: Callable[..., Where]) -> None:
    """Confirmed where the machine pays from 1,006,897; refuted where one at half the price pays from 503,449. The box,
    of 14,600 a month, never does."""
    assert compare_full().rule.verdict == "confirmed"
    cheap = MachineConfig(kind="rented", usd_per_hour=Decimal(1), output_tokens_per_s=Decimal(200))
    rule = compare_full(machines={"gpu": cheap}).rule
    assert (rule.verdict, rule.below, rule.above) == ("refuted", "refuted", "confirmed")
    assert rule.api_at[0] == Money.from_usd(1450)
    assert rule.machine_at[0] == Money.from_usd(730)
    assert compare_full(apis=(ApiModel("nobody's"),), machines={}).rule.verdict == "untested"


def test_a_machine_that_never_pays_says_so_and_refutes_the_rule(compare_full: Callable[..., Where]) -> None:
    """The 14,600 requests that the box carries in a month cost $730, an API's $21.17."""
    found = compare_full(machines={})
    assert [(each.pays_from, each.pays_always_from) for each in found.break_evens] == [(None, None)]
    assert found.rule.above == "refuted"


def test_sensitivities_move_the_break_even_as_the_arithmetic_says(compare: Callable[..., Where]) -> None:
    """Half as long: $0.000725 a request, and twice as many to a machine. 20% less a year, over three: 0.8133 of it."""
    without_box = {"box": PlacementConfig(kind="rented", usd_per_hour=Decimal(9)).placement("box")}
    found = compare(Asked(volume=1_000_000), placements=without_box)
    moved = {each.what: each.pays_from for each in found.sensitivities}
    assert moved["as it is"] == 1_006_897
    assert moved["API prices 50% lower"] == moved["requests half as long"] == 2_013_794
    assert moved["API prices fall 20% a year, over 3 years"] == int(1460 / (Decimal("0.00145") * 61 / 75)) + 1
    assert moved["the machine 30% cheaper"] == int(Decimal(1022) / Decimal("0.00145")) + 1


def test_sensitivities_are_of_the_machine_that_is_the_first_to_pay(compare_full: Callable[..., Where]) -> None:
    """The box is cheaper at this volume and never pays; where it is alone, it is the one in question."""
    found = compare_full()
    pays = {each.machine: each.pays_from for each in found.break_evens}
    assert pays[found.break_evens[0].machine] is None
    assert found.sensitive is not None
    assert (pays[found.sensitive], found.sensitivities[0].pays_from) == (1_006_897, 1_006_897)
    assert compare_full(machines={}).sensitive == found.break_evens[0].machine


def test_spares_are_paid_for(compare: Callable[..., Where]) -> None:
    box = named(compare(Asked(spares=2)), "box small")
    assert (box.machines, box.monthly) == (3, Money.from_usd(2190))


def test_a_latency_target_leaves_only_hours_that_met_it(compare: Callable[..., Where]) -> None:
    """All answers took 900 ms. The second hour's ten are too few to say anything of."""
    assert named(compare(Asked(latency_target_ms=900)), "box small").in_time is True
    late = named(compare(Asked(latency_target_ms=899)), "box small")
    assert late.in_time is False
    assert late.monthly is None
    assert "runs nothing in time" in late.notes[0]


def test_what_nobody_measured_or_stated_is_refused_not_invented(compare: Callable[..., Where]) -> None:
    silent = MachineConfig(kind="rented", usd_per_hour=Decimal(2))
    found = compare(machines={"gpu": silent}, apis=(ApiModel("unheard-of"),))
    gpu, api = named(found, "gpu"), named(found, "unheard-of")
    assert gpu.monthly is None
    assert len(gpu.notes) == 1
    assert "was never measured: run traffic there, or state [machines.gpu] output_tokens_per_s" in gpu.notes[0]
    assert api.monthly is None
    assert "nobody publishes prices" in api.notes[0]


def test_a_machine_like_a_placement_carries_what_that_does(compare_full: Callable[..., Where]) -> None:
    """Owned: $8,760 over a year are $1 an hour, as the rented one costs. It carries the same 30 an hour."""
    owned = MachineConfig(kind="owned", capital_usd=Decimal(8760), life_years=Decimal(1), like="box")
    same = named(compare_full(machines={"ours": owned}), "ours")
    assert (same.kind, same.monthly, same.machines) == ("owned", Money.from_usd(730), 1)
    assert same.provenance is Provenance.MEASURED
    assert same.p50_ns == 240 * NS_PER_S


def test_clients_own_devices_cost_what_they_are_said_to(compare: Callable[..., Where]) -> None:
    """A second's device time at $1 an hour is $1/3600; without a rate, nothing, and that is assumed."""
    edge = PlacementConfig(kind="edge", usd_per_hour=Decimal(1)).placement("box")
    assert named(compare(placements={"box": edge}), "box small").per_request == Money(round(Fraction(USD, 3600)))
    free = named(compare(placements={"box": PlacementConfig(kind="edge").placement("box")}), "box small")
    assert (free.monthly, free.provenance) == (Money(0), Provenance.ASSUMED)


def test_long_requests_are_priced_in_their_own_tier(tmp_path: Path) -> None:
    """One of 1,000 tokens at $1 and one of 3,000 at $2 per million: $0.0035 a request on average."""
    usages = [Usage.of(Provenance.MEASURED, input_fresh=tokens, output_text=0) for tokens in (1000, 3000)]
    clock = write(tmp_path, [answer(i, T0 + i, usage=usage) for i, usage in enumerate(usages)])
    tiers = (LongContext(above_input_tokens=2000, input=Decimal(2), output=Decimal(0)),)
    prices = PriceBook({"big": PriceConfig(input=Decimal(1), output=Decimal(0), long_context=tiers)})
    found = where(LedgerQueries(tmp_path / "ledger.db"), clock, setup_of(prices=prices), EVERYTHING, Asked())
    assert named(found, "big").per_request == Money.from_usd("0.0035")


def test_unknown_usage_and_refused_requests_are_not_counted_as_traffic(tmp_path: Path) -> None:
    unknown = Usage.of(Provenance.MEASURED, input_fresh=7).leaves | dict.fromkeys(
        Usage.of(Provenance.MEASURED, output_text=1).leaves, _unknown()
    )
    rows = [
        answer(0, T0),
        answer(1, T0 + 1, usage=Usage(unknown)),
        answer(2, T0 + 2, status=Status.REFUSED, lines=(), accelerator=Accelerator()),
    ]
    clock = write(tmp_path, rows)
    traffic = where(LedgerQueries(tmp_path / "ledger.db"), clock, setup_of(), EVERYTHING, Asked()).traffic
    assert (traffic.requests, len(traffic.usages), traffic.unknown) == (2, 1, 1)
    assert traffic.provenance is Provenance.ESTIMATED


def _unknown() -> Any:
    from millicent.core.usage import Count

    return Count(None, Provenance.UNKNOWN)


def test_what_the_response_cache_answers_has_to_run_nowhere(tmp_path: Path) -> None:
    """Ten of 40 were hits: 30 requests in the first hour, none in the second."""
    hit = {
        "placement": None,
        "backend": "response_cache",
        "policy": {RESPONSE_CACHE: "hit"},
        "attempts": (),
        "lines": (),
    }
    rows = [each if number < 30 else msgspec.structs.replace(each, **hit) for number, each in enumerate(two_hours())]
    clock = write(tmp_path, rows)
    traffic = where(LedgerQueries(tmp_path / "ledger.db"), clock, setup_of(), EVERYTHING, Asked()).traffic
    assert (traffic.requests, traffic.hours, len(traffic.usages)) == (30, 1, 30)


def test_an_empty_ledger_compares_nothing_and_says_why(tmp_path: Path) -> None:
    found = where(LedgerQueries(tmp_path / "ledger.db"), ManualClock(), setup_of(), ReceiptFilter(), Asked())
    assert found.volume == 0
    assert {each.monthly for each in found.places} == {None}
    assert all(each.notes for each in found.places)


def model_fit(**changes: float) -> StepTimeFit:
    """10 ms to read the weights, and nothing else, unless said."""
    given = dict.fromkeys(("fixed_ns", "row_ns", "sampled_row_ns", "kv_token_ns", "pair_ns"), 0.0)
    values = given | {"weights_ns": 10.0 * NS_PER_MS} | changes
    return StepTimeFit("fit_1", "cpu", "small", "", **values, steps=100, error=0.1, fitted_at_ns=T0)


def fitted(receipt: Receipt) -> Receipt:
    ran = Accelerator(10**9, 10**9, 0, 100, 400, Provenance.MEASURED, step_time_version="fit_1")
    return answer(int(receipt.id[5:]), receipt.created_at_ns, accelerator=ran)


def test_the_step_time_model_says_what_more_a_machine_could_carry(tmp_path: Path) -> None:
    """A request is 99 steps of decoding and 2 of prefill (1,000 rows, 512 to a step): 101 steps of 10 ms, 1.01 s. Eight
    side by side are 8 / 1.01 s: 28,514 an hour, and more than 3,600 one after another. In 1,100 ms they are in time; in
    1,000 ms none is by the model, and what the 900 ms that were seen leave room for stands: a tenth of 3,600."""
    clock = write(tmp_path, [fitted(each) for each in two_hours()], [model_fit()])
    queries = LedgerQueries(tmp_path / "ledger.db")

    def capacity(**asked: Any) -> Any:
        return named(where(queries, clock, setup_of(), EVERYTHING, Asked(**asked)), "box small").capacity

    most = capacity()
    assert (most.requests_per_hour, most.provenance) == (28_514, Provenance.ESTIMATED)
    assert capacity(latency_target_ms=1100).requests_per_hour == 28_514
    assert capacity(latency_target_ms=1000).requests_per_hour == 360


def test_sequences_side_by_side_are_as_many_as_meet_the_target(tmp_path: Path) -> None:
    """Sampling a row costs 1 ms: a step of n takes 10 + n x 100/101 ms. 1,500 ms for 101 steps leave 14.85: n = 4."""
    clock = write(tmp_path, [fitted(each) for each in two_hours()], [model_fit(sampled_row_ns=float(NS_PER_MS))])
    queries = LedgerQueries(tmp_path / "ledger.db")
    place = named(where(queries, clock, setup_of(), EVERYTHING, Asked(latency_target_ms=1500)), "box small")
    assert place.capacity is not None
    step_ms = 10 + 4 * 100 / 101
    assert place.capacity.requests_per_hour == int(4 / 101 / step_ms * 1000 * 3600)
    assert "4 side by side" in place.capacity.how


def test_slow_hours_say_nothing_of_capacity(tmp_path: Path) -> None:
    """The busier hour's answers took two seconds: the quieter one, of 25 in 900 ms, is what was in time."""
    slow = Timing(queue_ns=0, ttft_ns=1, tpot_ns=1, total_ns=2000 * NS_PER_MS)
    rows = [answer(i, T0 + i, timing=slow) for i in range(40)]
    rows += [answer(40 + i, T0 + NS_PER_HOUR + i) for i in range(25)]
    clock = write(tmp_path, rows)
    queries = LedgerQueries(tmp_path / "ledger.db")
    place = named(where(queries, clock, setup_of(), EVERYTHING, Asked(latency_target_ms=1000)), "box small")
    assert place.capacity is not None
    assert place.capacity.requests_per_hour == 25


def test_a_machine_can_be_told_in_one_line() -> None:
    name, machine = machine_from("gpu, usd_per_hour=2.5, output_tokens_per_s=2500, accelerators=8")
    assert (name, machine.usd_per_hour, machine.accelerators) == ("gpu", Decimal("2.5"), 8)
    for wrong in ("gpu,usd_per_hour=much", "gpu,tokens=3", "gpu", "gpu,kind=api,provider=openai"):
        with pytest.raises(InvalidRequest, match="machine"):
            machine_from(wrong)
