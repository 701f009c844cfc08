"""What the driver's library says becomes a device, or a line that says what is missing."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from millicent.core.errors import ConfigError
from millicent.engine.gpus import Gpu, chosen_device, gpus

HOPPER = Gpu("NVIDIA H100", 80 << 30, (9, 0), "580.1")
TURING = Gpu("NVIDIA T4", 16 << 30, (7, 5), "580.1")


class Driver:
    """NVML with two GPUs; `code` is what the first call answers."""

    def __init__(self, code: int = 0) -> None:
        self.code = code

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return self.code

    def nvmlSystemGetDriverVersion(self, text: Any, size: Any) -> int:  # noqa: N802
        text.value = b"580.1"
        return 0 if size.value > 5 else 7

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: ctypes.c_uint, device: Any) -> int:  # noqa: N802
        device._obj.value = index.value + 1
        return 0

    def nvmlDeviceGetMemoryInfo(self, device: Any, memory: Any) -> int:  # noqa: N802
        memory._obj.total = [80 << 30, 16 << 30][device.value - 1]
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, device: Any, major: Any, minor: Any) -> int:  # noqa: N802
        major._obj.value, minor._obj.value = [(9, 0), (7, 5)][device.value - 1]
        return 0

    def nvmlDeviceGetName(self, device: Any, text: Any, size: Any) -> int:  # noqa: N802
        text.value = [b"NVIDIA H100", b"NVIDIA T4"][device.value - 1]
        return 0


def test_the_drivers_gpus_are_told() -> None:
    assert gpus(Driver()) == [HOPPER, TURING]
    assert gpus(Driver(code=9)) == []


@pytest.mark.parametrize(
    ("wanted", "found", "missing", "chosen"),
    [
        ("cpu", [HOPPER], None, "cpu"),
        ("auto", [HOPPER], None, "cuda:0"),
        ("auto", [], None, "cpu"),
        ("auto", [TURING], None, "cpu"),
        ("auto", [HOPPER], "install something", "cpu"),
        ("cuda:1", [TURING, HOPPER], None, "cuda:1"),
    ],
)
def test_a_device_is_chosen(
    wanted: str, found: list[Gpu], missing: str | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert chosen_device(wanted, found, missing) == chosen


@pytest.mark.parametrize(
    ("found", "missing", "reason"),
    [
        ([], None, "no NVIDIA driver answers"),
        ([TURING], None, "compute capability 7.5"),
        ([HOPPER], "install something", "install something"),
    ],
)
def test_a_gpu_asked_for_by_name_that_cannot_be_used_is_refused(
    found: list[Gpu], missing: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=rf"'cuda:0': .*{reason}.*set device = 'cpu'"):
        chosen_device("cuda:0", found, missing)
    with pytest.raises(ConfigError, match="there are 1 NVIDIA GPUs"):
        chosen_device("cuda:1", [HOPPER])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert chosen_device("cuda:0", found, missing) == "cuda:0"
