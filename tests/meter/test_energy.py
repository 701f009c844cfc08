"""Energy is split like time, exactly; counters are read where there are any; unknown is never zero."""

from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.core.clock import NS_PER_MS, NS_PER_S, ManualClock
from millicent.core.identifiers import SequentialIds
from millicent.core.receipts import Energy
from millicent.core.steps import DeviceState, SequenceWork, StepRecord
from millicent.core.usage import Provenance
from millicent.meter.energy import Counter, EnergyAccount, EnergyShare, StatedPower, energy_source
from millicent.meter.meter import Meter
from millicent.meter.placements import assumed_placement


def zone(folder: Path, name: str, uj: int, wraps_at: int = 262_143_328_850) -> Path:
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{wraps_at}\n")
    return folder / "energy_uj"


def test_packages_and_memory_are_counted_once_each(tmp_path: Path) -> None:
    package = zone(tmp_path / "intel-rapl:0", "package-0", 100)
    core = zone(tmp_path / "intel-rapl:0" / "intel-rapl:0:0", "core", 100)
    memory = zone(tmp_path / "intel-rapl:0" / "intel-rapl:0:1", "dram", 100)
    whole_machine = zone(tmp_path / "intel-rapl:1", "psys", 100)
    source = energy_source("cpu", None, tmp_path)
    assert isinstance(source, Counter)
    for file, more in ((package, 1000), (core, 900), (memory, 200), (whole_machine, 5000)):
        file.write_text(str(100 + more))
    assert source.busy_uj(NS_PER_S, NS_PER_S) == 1200
    assert source.busy_uj(NS_PER_S, NS_PER_S) == 0


def test_a_counter_that_starts_again_from_zero_has_not_run_backwards(tmp_path: Path) -> None:
    file = zone(tmp_path / "intel-rapl:0", "package-0", 990, wraps_at=999)
    source = energy_source("cpu", None, tmp_path)
    assert source is not None
    file.write_text("10")
    assert source.busy_uj(1, 1) == 20


def test_what_is_drawn_while_nobody_is_served_is_nobodys(tmp_path: Path) -> None:
    file = zone(tmp_path / "intel-rapl:0", "package-0", 0)
    source = energy_source("cpu", None, tmp_path)
    assert source is not None
    file.write_text("1000")
    assert source.busy_uj(NS_PER_S, 4 * NS_PER_S) == 250


def test_a_counter_that_may_not_be_read_gives_way_to_the_stated_watts(tmp_path: Path) -> None:
    file = zone(tmp_path / "intel-rapl:0", "package-0", 0)
    file.unlink()
    file.mkdir()  # reading it fails, also for root
    assert energy_source("cpu", None, tmp_path) is None
    assert isinstance(energy_source("cpu", Decimal(80), tmp_path), StatedPower)


def test_a_device_without_a_counter_or_watts_is_unknown(tmp_path: Path) -> None:
    assert energy_source("cpu", None, tmp_path) is None
    assert EnergyShare().energy == Energy(None, Provenance.UNKNOWN)


def test_a_counter_that_fails_makes_the_energy_of_that_time_unknown(tmp_path: Path) -> None:
    file = zone(tmp_path / "intel-rapl:0", "package-0", 0)
    source = energy_source("cpu", None, tmp_path)
    assert source is not None
    account, share = EnergyAccount(source, 0), EnergyShare()
    account.used(share, 10)
    file.write_text("nonsense")
    account.settle(10, 1)
    assert share.energy == Energy(None, Provenance.UNKNOWN)


@given(
    st.lists(st.lists(st.integers(0, 10**10), min_size=1, max_size=6), min_size=1, max_size=8),
    st.decimals(0, 2000, places=3),
)
def test_joules_sum_to_watts_times_seconds(windows: list[list[int]], watts: Decimal) -> None:
    account = EnergyAccount(StatedPower(watts), 0)
    shares = [EnergyShare() for _ in range(6)]
    for parts in windows:
        for share, part_ns in zip(shares, parts, strict=False):
            account.used(share, part_ns)
        account.settle(0, 1)
    drawn = sum((share.energy.joules or Decimal(0)) for share in shares)
    exact = watts * sum(map(sum, windows)) / 10**9
    assert 0 <= exact - drawn < Decimal("0.000001")


def test_the_meter_splits_a_measured_window_among_those_who_had_its_time(tmp_path: Path) -> None:
    file = zone(tmp_path / "intel-rapl:0", "package-0", 0)
    clock = ManualClock()
    meter = Meter(clock, "gw", SequentialIds(), lambda record: [3, 1][: len(record.sequences)])
    meter.add_device("cpu", assumed_placement("local", 2), energy=energy_source("cpu", None, tmp_path))
    meter.device_state("cpu", DeviceState.UP, clock.monotonic_ns())
    meter.open("a", 1, [1])
    meter.open("b", 1, [2])
    start_ns = clock.monotonic_ns()
    clock.advance(80 * NS_PER_MS)
    works = (SequenceWork(1, 0, 1, 1, 5), SequenceWork(2, 8, 0, 1, 8, 3))
    meter.step(StepRecord("cpu", "m", 0, start_ns, 80 * NS_PER_MS, works))
    file.write_text("4000001")
    first, second = meter.close("a"), meter.close("b")
    assert first.energy == Energy(Decimal("3.000001"), Provenance.MEASURED)
    assert second.energy.joules == pytest.approx(Decimal(1))
    assert (first.accelerator.recomputed_tokens, second.accelerator.recomputed_tokens) == (0, 3)
