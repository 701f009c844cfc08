"""Which NVIDIA GPUs there are, asked of the driver's library: no torch, so the gateway can ask too."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millicent.core.errors import ConfigError

_NVML = "libnvidia-ml.so.1"
_NAME_BYTES = 96
_OLDEST = (8, 0)  # the first whose matrix units take bfloat16


@dataclass(frozen=True, slots=True)
class Gpu:
    """`capability` is CUDA's compute capability; `driver` the driver's version."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    driver: str


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def gpus(library: Any = None) -> list[Gpu]:
    """In the driver's order; none where there is no driver."""
    try:
        nvml = library or ctypes.CDLL(_NVML)
        _check(nvml.nvmlInit_v2())
        driver = _text(nvml.nvmlSystemGetDriverVersion)
        count = ctypes.c_uint()
        _check(nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)))
        return [_gpu(nvml, index, driver) for index in range(count.value)]
    except OSError:
        return []


def _gpu(nvml: Any, index: int, driver: str) -> Gpu:
    device, memory, major, minor = ctypes.c_void_p(), _Memory(), ctypes.c_int(), ctypes.c_int()
    _check(nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device)))
    _check(nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)))
    _check(nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)))
    name = _text(lambda text, size: nvml.nvmlDeviceGetName(device, text, size))
    return Gpu(name, memory.total, (major.value, minor.value), driver)


def _text(ask: Any) -> str:
    text = ctypes.create_string_buffer(_NAME_BYTES)
    _check(ask(text, ctypes.c_uint(_NAME_BYTES)))
    return text.value.decode()


def _check(code: int) -> None:
    if code:
        raise OSError(f"NVML answered {code}")


def missing_for_gpu() -> str | None:
    """What isn't installed that a GPU needs, as an instruction; None if everything is."""
    torch = importlib.util.find_spec("torch")
    folders = torch.submodule_search_locations if torch is not None else None
    if not any((Path(folder) / "lib" / "libtorch_cuda.so").exists() for folder in folders or ()):
        return "install a CUDA build of PyTorch"
    if importlib.util.find_spec("triton") is None:
        return "pip install 'millicent[gpu]'"
    return None


def chosen_device(wanted: str, found: list[Gpu] | None = None, missing: str | None = None) -> str:
    """What `[engine] device` comes to on this machine: `auto` is the first GPU that can be used, else the CPU.

    Raises ConfigError for a GPU that is asked for by name and cannot be. With TRITON_INTERPRET=1 none is needed: the
    processor takes its place.
    """
    if wanted == "cpu" or (wanted != "auto" and os.environ.get("TRITON_INTERPRET") == "1"):
        return wanted
    found, missing = (gpus(), missing_for_gpu()) if found is None else (found, missing)
    index = int(wanted.partition(":")[2] or 0)
    if index >= len(found):
        problem = f"there are {len(found)} NVIDIA GPUs, counted from 0" if found else "no NVIDIA driver answers"
    elif found[index].capability < _OLDEST:
        major, minor = found[index].capability
        problem = f"{found[index].name} is of compute capability {major}.{minor}, and 8.0 is needed"
    elif missing:
        problem = missing
    else:
        return f"cuda:{index}"
    if wanted == "auto":
        return "cpu"
    raise ConfigError(f"[engine] device = {wanted!r}: {problem}; or set device = 'cpu'.")
