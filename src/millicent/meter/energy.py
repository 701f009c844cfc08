"""What a device drew, and whose it was: energy is split like the time it was drawn in.

Processors count their energy in Linux's powercap (RAPL), NVIDIA's accelerators in NVML. Where there is no counter, or
it may not be read, a placement's stated watts give an estimate; without those, energy is unknown.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple, Protocol

from millicent.core.clock import NS_PER_MS
from millicent.core.money import apportion
from millicent.core.receipts import Energy
from millicent.core.usage import Provenance, weakest

POWERCAP = Path("/sys/class/powercap")
NVML = "libnvidia-ml.so.1"
# The answers of nvmlReturn_t that one meets.
_NVML_ANSWERS = {1: "uninitialized", 2: "invalid argument", 3: "not supported", 4: "no permission", 6: "not found",
                 9: "driver not loaded", 15: "GPU is lost", 999: "unknown error"}  # fmt: skip
# Reading a counter costs some 20 microseconds; between readings, energy is spread evenly over time.
SETTLE_EVERY_NS = 100 * NS_PER_MS
_MICROJOULES = 10**6


class EnergySource(Protocol):
    provenance: Provenance

    def busy_uj(self, busy_ns: int, wall_ns: int) -> int | None:
        """Microjoules since it was last asked that belong to `busy_ns` of `wall_ns`; None when it cannot tell."""
        ...


class StatedPower:
    """So many watts while it works, as the operator says."""

    provenance = Provenance.ESTIMATED

    def __init__(self, watts: Decimal) -> None:
        self._watts, self._per = watts.as_integer_ratio()
        self._rest = 0

    def busy_uj(self, busy_ns: int, wall_ns: int) -> int | None:
        """Watts x nanoseconds / 1000; what is less than a microjoule is carried on."""
        del wall_ns
        whole, self._rest = divmod(busy_ns * self._watts + self._rest, 1000 * self._per)
        return whole


class Counter:
    """A cumulative counter. Of what it counted, the busy part of the time has that part."""

    provenance = Provenance.MEASURED

    def __init__(self, zones: Sequence[Zone]) -> None:
        self._zones = zones
        self._last_uj = self._read()

    def busy_uj(self, busy_ns: int, wall_ns: int) -> int | None:
        last_uj, self._last_uj = self._last_uj, self._read()
        if last_uj is None or self._last_uj is None:
            return None
        spent_uj = sum(
            (now - before) % zone.wraps_at_uj if zone.wraps_at_uj else max(0, now - before)
            for zone, before, now in zip(self._zones, last_uj, self._last_uj, strict=True)
        )
        return spent_uj * busy_ns // max(busy_ns, wall_ns, 1)

    def _read(self) -> list[int] | None:
        try:
            return [zone.read_uj() for zone in self._zones]
        except (OSError, ValueError):
            return None


class Zone(Protocol):
    """`wraps_at_uj` is where it starts again from 0; 0 for never."""

    wraps_at_uj: int

    def read_uj(self) -> int:
        """Raises OSError or ValueError."""
        ...


class RaplZone:
    """One domain of powercap: a processor package, or its memory."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self.wraps_at_uj = int((folder / "max_energy_range_uj").read_text()) + 1

    def read_uj(self) -> int:
        return int(self._file.read_text())


class NvmlZone:
    """One NVIDIA accelerator. Counts millijoules since its driver was loaded (Volta and later).

    `index` is CUDA's. NVML counts all accelerators in the order of the bus, whatever `visible`
    (`CUDA_VISIBLE_DEVICES`) leaves of them; like CUDA does under `CUDA_DEVICE_ORDER=PCI_BUS_ID`.
    """

    wraps_at_uj = 0

    def __init__(self, index: int, visible: str | None, library: str = NVML) -> None:
        self._library = ctypes.CDLL(library)
        self._device = ctypes.c_void_p()
        self._check(self._library.nvmlInit_v2())
        names = [name.strip() for name in visible.split(",")] if visible else []
        name = names[index] if index < len(names) else str(index)
        if name.isdigit():
            found = self._library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(name)), ctypes.byref(self._device))
        else:
            found = self._library.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(self._device))
        self._check(found)

    def read_uj(self) -> int:
        millijoules = ctypes.c_ulonglong()
        self._check(self._library.nvmlDeviceGetTotalEnergyConsumption(self._device, ctypes.byref(millijoules)))
        return millijoules.value * 1000

    @staticmethod
    def _check(code: int) -> None:
        if code:
            raise OSError(f"NVML answered {_NVML_ANSWERS.get(code, code)}")


class Found(NamedTuple):
    """`source` None: the energy of the device is unknown. `what` says which source there is, or why there is none."""

    source: EnergySource | None
    what: str


def find_energy(
    device: str, watts: Decimal | None, *, powercap: Path = POWERCAP, nvml: str = NVML, visible: str | None = None
) -> Found:
    """The best there is for a device: its counter, else the stated watts. `visible` is `CUDA_VISIBLE_DEVICES`."""
    zones: Sequence[Zone] = []
    try:
        zones = _zones(device, powercap, nvml, visible)
        for zone in zones:
            zone.read_uj()
        missing = f"no counter under {powercap}"
    except (OSError, ValueError) as error:
        zones, missing = [], f"its counter cannot be read ({error})"
    if zones:
        return Found(
            Counter(zones), f"measured by {'NVML' if device.startswith('cuda') else f'RAPL, {len(zones)} zones'}"
        )
    if watts is not None:
        return Found(StatedPower(watts), f"estimated from {watts} stated watts: {missing}")
    return Found(None, f"unknown: {missing}, and no watts are stated")


def _zones(device: str, powercap: Path, nvml: str, visible: str | None) -> Sequence[Zone]:
    kind, _, index = device.partition(":")
    if kind == "cuda":
        return [NvmlZone(int(index or 0), visible, nvml)]
    # Packages, and the memory beside them; core and uncore are parts of a package, psys is the whole machine.
    found = sorted({*powercap.glob("intel-rapl:*"), *powercap.glob("intel-rapl:*/intel-rapl:*")})
    named = {folder.resolve(): (folder / "name").read_text().strip() for folder in found}
    return [RaplZone(folder) for folder, name in named.items() if name.startswith("package") or name == "dram"]


class EnergyShare:
    """A receipt's part, in microjoules. Unknown from the first time that nobody could tell."""

    __slots__ = ("_provenance", "_uj")

    def __init__(self) -> None:
        self._uj = 0
        self._provenance: Provenance | None = None

    def add(self, uj: int | None, provenance: Provenance) -> None:
        known = Provenance.UNKNOWN if uj is None else provenance
        self._uj += uj or 0
        self._provenance = weakest((self._provenance or known, known))

    @property
    def energy(self) -> Energy:
        if self._provenance in {None, Provenance.UNKNOWN}:
            return Energy()
        assert self._provenance is not None
        return Energy(Decimal(self._uj) / _MICROJOULES, self._provenance)


class EnergyAccount:
    """One device's energy between two settlements, and who had its time."""

    def __init__(self, source: EnergySource, now_ns: int) -> None:
        self._source = source
        self._settled_ns = now_ns
        self._pending: dict[EnergyShare, int] = {}
        self._unclaimed_ns = 0

    def used(self, share: EnergyShare | None, accelerator_ns: int) -> None:
        """None: it was nobody's."""
        if share is None:
            self._unclaimed_ns += accelerator_ns
        else:
            self._pending[share] = self._pending.get(share, 0) + accelerator_ns

    def settle(self, now_ns: int, accelerators: int) -> None:
        """Give everyone what they drew so far: microjoules, exactly as many as belong to the busy time."""
        busy_ns = sum(self._pending.values()) + self._unclaimed_ns
        spent_uj = self._source.busy_uj(busy_ns, (now_ns - self._settled_ns) * accelerators)
        self._settled_ns = now_ns
        if busy_ns == 0:
            return
        parts: Sequence[int | None] = [None] * len(self._pending)
        if spent_uj is not None:
            parts = apportion(spent_uj, [*self._pending.values(), self._unclaimed_ns])[:-1]
        for share, part_uj in zip(self._pending, parts, strict=True):
            share.add(part_uj, self._source.provenance)
        self._pending.clear()
        self._unclaimed_ns = 0

    def is_due(self, now_ns: int) -> bool:
        return now_ns - self._settled_ns >= SETTLE_EVERY_NS
