"""The device as the decoder uses it: one stream of work, marks in it, passes recorded once and played again.

`open_device` gives the GPU, or, with TRITON_INTERPRET=1, the processor in its place: everything then happens at once.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from millicent.core.clock import Clock, SystemClock
from millicent.core.errors import ConfigError
from millicent.engine.config import EngineConfig

_OLDEST = (8, 0)  # bfloat16 in the matrix units
_FP8_FROM = (8, 9)


class Mark(Protocol):
    """A place in the stream of work."""

    def reached(self) -> bool: ...

    def wait(self) -> None:
        """Until it is reached."""
        ...

    def since(self, earlier: Any) -> int:
        """Nanoseconds on the device's own clock; both are reached."""
        ...


class Device(Protocol):
    torch_device: torch.device
    processors: int
    has_fp8: bool

    def mark(self) -> Mark: ...

    def on_host(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory of the host that copies to and from the device needn't wait for."""
        ...

    def send(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        """A copy on the device, which the host doesn't wait for."""
        ...

    def record(self, runs: Sequence[Callable[[], None]]) -> list[Callable[[], None]]:
        """Each run happens now, and again with each call of what is given back for it. They share memory: never two at
        the same time."""
        ...

    def budget_bytes(self, config: EngineConfig) -> int:
        """For all models together."""
        ...

    def peak_bytes(self, run: Callable[[], None]) -> int:
        """How much more memory than before `run` held at most."""
        ...

    def is_lost(self, error: Exception) -> bool:
        """After which nothing works any more until the process is started anew."""
        ...


class _CudaMark:
    def __init__(self) -> None:
        # Of a library whose functions aren't all typed.
        self._event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._event.record()

    def reached(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        self._event.synchronize()

    def since(self, earlier: _CudaMark) -> int:
        milliseconds: float = earlier._event.elapsed_time(self._event)
        return round(milliseconds * 1e6)


class CudaDevice:
    def __init__(self, name: str) -> None:
        self.torch_device = torch.device(name)
        torch.cuda.set_device(self.torch_device)
        properties = torch.cuda.get_device_properties(self.torch_device)
        capability = (properties.major, properties.minor)
        if capability < _OLDEST:
            raise ConfigError(
                f"[engine] device: {properties.name} is of compute capability {capability[0]}.{capability[1]}, and at"
                f" least {_OLDEST[0]}.{_OLDEST[1]} is needed; set device = 'cpu'."
            )
        self.processors = properties.multi_processor_count
        self.has_fp8 = capability >= _FP8_FROM
        # Not the default stream, which other libraries' work would wait for; and the one that this thread uses.
        torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]

    def mark(self) -> _CudaMark:
        return _CudaMark()

    def on_host(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, pin_memory=True)

    def send(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(array).pin_memory().to(self.torch_device, non_blocking=True)

    def record(self, runs: Sequence[Callable[[], None]]) -> list[Callable[[], None]]:
        # A pool for each model: once all its graphs are gone, PyTorch lets nothing be recorded into a pool again.
        pool = torch.cuda.graph_pool_handle()
        recorded: list[Callable[[], None]] = []
        for run in runs:
            run()  # compiles what isn't yet, and libraries take their memory
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                run()
            recorded.append(graph.replay)
        return recorded

    def budget_bytes(self, config: EngineConfig) -> int:
        """Configured, or what is free less a twelfth: graphs, libraries' workspaces, fragments."""
        if config.memory_gb is not None:
            return int(config.memory_gb * 1e9)
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        return free - free // 12

    def peak_bytes(self, run: Callable[[], None]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def is_lost(self, error: Exception) -> bool:
        if isinstance(error, torch.OutOfMemoryError):
            return False
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False


class _HostMark:
    def __init__(self, clock: Clock) -> None:
        self._ns = clock.monotonic_ns()

    def reached(self) -> bool:
        return True

    def wait(self) -> None:
        """It is reached."""

    def since(self, earlier: _HostMark) -> int:
        return self._ns - earlier._ns


class HostDevice:
    """The processor, with kernels in Triton's interpreter: to test without a GPU all that isn't one."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.torch_device = torch.device("cpu")
        self.processors = 4
        self.has_fp8 = True
        self._clock = clock or SystemClock()

    def mark(self) -> _HostMark:
        return _HostMark(self._clock)

    def on_host(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype)

    def send(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(array).clone()

    def record(self, runs: Sequence[Callable[[], None]]) -> list[Callable[[], None]]:
        return list(runs)

    def budget_bytes(self, config: EngineConfig) -> int:
        return int((config.memory_gb or 1.0) * 1e9)

    def peak_bytes(self, run: Callable[[], None]) -> int:
        run()
        return 0

    def is_lost(self, error: Exception) -> bool:
        del error
        return False


@functools.cache
def _cuda_device(name: str) -> CudaDevice:
    """One for all models on it: they share its stream."""
    return CudaDevice(name)


def open_device(name: str) -> Device:
    """`name` is as in [engine] device. Raises ConfigError, saying what is missing."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return HostDevice()
    if not torch.cuda.is_available():
        raise ConfigError(
            f"[engine] device = {name!r}: PyTorch {torch.__version__} finds no CUDA device; install a CUDA build of"
            " PyTorch and its driver, or set device = 'cpu'."
        )
    index = int(name.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise ConfigError(f"[engine] device = {name!r}: there are {torch.cuda.device_count()} CUDA devices, from 0.")
    return _cuda_device(f"cuda:{index}")
