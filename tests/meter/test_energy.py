"""Energy is split like time, exactly; counters are read where there are any; unknown is never zero."""

import os
import shutil
import subprocess
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
from millicent.meter.energy import Counter, EnergyAccount, EnergyShare, StatedPower, find_energy
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
    source = find_energy("cpu", None, powercap=tmp_path).source
    assert isinstance(source, Counter)
    for file, more in ((package, 1000), (core, 900), (memory, 200), (whole_machine, 5000)):
        file.write_text(str(100 + more))
    assert source.busy_uj(NS_PER_S, NS_PER_S) == 1200
    assert source.busy_uj(NS_PER_S, NS_PER_S) == 0


def test_a_counter_that_starts_again_from_zero_has_not_run_backwards(tmp_path: Path) -> None:
    file = zone(tmp_path / "intel-rapl:0", "package-0", 990, wraps_at=999)
    source = find_energy("cpu", None, powercap=tmp_path).source
    assert source is not None
    file.write_text("10")
    assert source.busy_uj(1, 1) == 20


def test_what_is_drawn_while_nobody_is_served_is_nobodys(tmp_path: Path) -> None:
    file = zone(tmp_path / "intel-rapl:0", "package-0", 0)
    source = find_energy("cpu", None, powercap=tmp_path).source
    assert source is not None
    file.write_text("1000")
    assert source.busy_uj(NS_PER_S, 4 * NS_PER_S) == 250


def test_a_counter_that_may_not_be_read_gives_way_to_the_stated_watts(tmp_path: Path) -> None:
    file = zone(tmp_path / "intel-rapl:0", "package-0", 0)
    file.unlink()
    file.mkdir()  # reading it fails, also for root
    assert find_energy("cpu", None, powercap=tmp_path).source is None
    assert isinstance(find_energy("cpu", Decimal(80), powercap=tmp_path).source, StatedPower)


def test_a_device_without_a_counter_or_watts_is_unknown(tmp_path: Path) -> None:
    assert find_energy("cpu", None, powercap=tmp_path).source is None
    assert EnergyShare().energy == Energy(None, Provenance.UNKNOWN)


def test_a_counter_that_fails_makes_the_energy_of_that_time_unknown(tmp_path: Path) -> None:
    file = zone(tmp_path / "intel-rapl:0", "package-0", 0)
    source = find_energy("cpu", None, powercap=tmp_path).source
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
    meter.add_device("cpu", assumed_placement("local", 2), energy=find_energy("cpu", None, powercap=tmp_path).source)
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


FAKE_NVML = r"""
// What <nvml.h> documents of these four, with two accelerators; FAKE_NVML says how the second answers.
#include <cstdlib>
#include <cstring>
typedef struct nvmlDevice_st { int index; unsigned long long millijoules; } *nvmlDevice_t;
static nvmlDevice_st devices[2] = {{0, 1000}, {1, 18446744073709ull}};
static int begun = 0;
extern "C" {
int nvmlInit_v2(void) { begun = 1; return getenv("FAKE_NVML_NO_DRIVER") ? 9 : 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, nvmlDevice_t *device) {
    if (!begun) return 1;
    if (index > 1) return 2;
    *device = &devices[index];
    return 0;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device) {
    if (strcmp(uuid, "GPU-8f2c")) return 6;
    *device = &devices[1];
    return 0;
}
int nvmlDeviceGetTotalEnergyConsumption(nvmlDevice_t device, unsigned long long *energy) {
    if (getenv("FAKE_NVML_OLD")) return 3;
    device->millijoules += 250;
    *energy = device->millijoules;
    return 0;
}
}
"""


@pytest.fixture(scope="module")
def nvml(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("nvml")
    source, library = folder / "nvml.cpp", folder / "libnvidia-ml.so.1"
    source.write_text(FAKE_NVML)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return str(library)


@pytest.mark.parametrize(
    ("device", "visible"),
    [("cuda:0", None), ("cuda:1", None), ("cuda:0", "1"), ("cuda:1", "0, GPU-8f2c"), ("cuda", "")],
)
def test_an_accelerators_counter_is_read_in_millijoules(nvml: str, device: str, visible: str | None) -> None:
    """Also where it counts beyond 32 bits, and where CUDA numbers what it may see from 0."""
    found = find_energy(device, Decimal(300), nvml=nvml, visible=visible)
    assert found.what == "measured by NVML"
    assert isinstance(found.source, Counter)
    assert found.source.busy_uj(NS_PER_S, NS_PER_S) == 250_000


@pytest.mark.parametrize(
    ("device", "variable", "said"),
    [
        ("cuda:0", "FAKE_NVML_OLD", "NVML answered not supported"),
        ("cuda:0", "FAKE_NVML_NO_DRIVER", "NVML answered driver not loaded"),
        ("cuda:7", "NOTHING", "NVML answered invalid argument"),
    ],
)
def test_an_accelerator_without_a_counter_says_why(
    nvml: str, device: str, variable: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "1")
    unknown = find_energy(device, None, nvml=nvml)
    assert unknown.source is None
    assert unknown.what == f"unknown: its counter cannot be read ({said}), and no watts are stated"
    assert isinstance(find_energy(device, Decimal(300), nvml=nvml).source, StatedPower)
    assert find_energy(device, None, nvml="libnvidia-ml-that-is-not-there.so.1").source is None


def test_several_packages_wrap_each_at_its_own_end(tmp_path: Path) -> None:
    """Two sockets, each with dies and memory; one counter runs over between two readings, the others don't."""
    files = [
        zone(tmp_path / "intel-rapl:0", "package-0-die-0", 262_143_328_000),
        zone(tmp_path / "intel-rapl:0" / "intel-rapl:0:0", "dram", 65_712_999_000, wraps_at=65_712_999_613),
        zone(tmp_path / "intel-rapl:1", "package-1-die-0", 5),
        zone(tmp_path / "intel-rapl:2", "package-1-die-1", 7),
    ]
    zone(tmp_path / "intel-rapl-mmio:0", "package-0", 0)  # the same package again, through another door
    found = find_energy("cpu", None, powercap=tmp_path)
    assert found.what == "measured by RAPL, 4 zones"
    for file, now in zip(files, (149, 386, 1_000_005, 7), strict=True):
        file.write_text(f"{now}\n")
    assert found.source is not None
    assert found.source.busy_uj(NS_PER_S, NS_PER_S) == 1000 + 1000 + 1_000_000


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_counters_that_are_roots_alone_say_so(tmp_path: Path) -> None:
    zone(tmp_path / "intel-rapl:0", "package-0", 0).chmod(0)
    assert "Permission denied" in find_energy("cpu", None, powercap=tmp_path).what
