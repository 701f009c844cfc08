"""Compiles for a Hopper chip, without one, every kernel that serving a real shape comes to: a whole decoder runs all
its prepared passes on tensors that have sizes and no memory. `python -m support.compiled_kernels` prints, as JSON, what
each compiled kernel takes of the chip."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from millicent.engine.config import Dtype, EngineConfig
from millicent.engine.cuda.device import HostDevice
from millicent.engine.weights import ModelSpec
from support.random_weights import LLAMA_3_1_8B, QWEN3_0_6B, RandomCheckpoint

# What bench/gpu.py serves, and float32 as the tests have it: name, shape, dtype, FP8, sequences.
MODELS: tuple[tuple[str, ModelSpec, Dtype, bool, int], ...] = (
    ("Qwen3-0.6B", QWEN3_0_6B, "bf16", False, 256),
    ("Llama-3.1-8B", LLAMA_3_1_8B, "bf16", False, 1),
    ("Llama-3.1-8B FP8", LLAMA_3_1_8B, "bf16", True, 512),
    ("Qwen3-0.6B fp32", QWEN3_0_6B, "fp32", False, 8),
)


class _NoWeights(RandomCheckpoint):
    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(self.shapes[name], dtype=dtype, device="meta")


class NoMemory(HostDevice):
    """An H200 on which nothing is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.torch_device = torch.device("meta")
        self.processors = 132

    def send(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(array).to("meta")

    def record(self, runs: Sequence[Callable[[], None]]) -> list[Callable[[], None]]:
        for run in runs:
            run()
        return list(runs)

    def budget_bytes(self, config: EngineConfig) -> int:
        del config
        return 120 * 10**9


class _Driver:
    """Of a GPU that isn't there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: object = None) -> int:
        del device
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def main() -> None:
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(_Driver())
    found: dict[int, dict[str, Any]] = {}
    compiled: list[Any] = []
    serving = [""]
    compile_and_run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        del warmup
        assert max(grid[1:], default=1) < 1 << 16, f"{self.fn.__name__}: {grid} is no grid"
        kernel = compile_and_run(self, *args, grid=grid, warmup=True, **options)
        if id(kernel) not in found:
            compiled.append(kernel)  # so that its number stays its own
            found[id(kernel)] = {"model": serving[0], "kernel": self.fn.__name__, **_takes(kernel)}
        return kernel

    JITFunction.run = compile_only
    for name, shape, dtype, fp8, sequences in MODELS:
        serving[0] = name
        _serve(shape, dtype, fp8=fp8, sequences=sequences)
    print(json.dumps(list(found.values())))


def _serve(shape: ModelSpec, dtype: Dtype, *, fp8: bool, sequences: int) -> None:
    from millicent.engine.cuda.ahead import Changes
    from millicent.engine.cuda.opening import open_decoder
    from millicent.engine.sampler import Draw

    config = EngineConfig(device="cuda:0", max_sequences=sequences, step_tokens=2048)
    with torch.inference_mode():
        checkpoint = _NoWeights(replace(shape, layers=1))
        decoder = open_decoder(
            checkpoint, NoMemory(), config, name="compiled", dtype=dtype, fp8=fp8, eos_tokens=frozenset()
        )
        decoder.allocate(60_000, config.block_tokens)
    nothing = np.empty(0, dtype=np.float32)
    allowed = {0: bytes(shape.vocabulary // 8)}
    changes = Changes(nothing, nothing, nothing, nothing, nothing, allowed)
    decoder.redraw([0], [Draw(0.8, 0.9, 40, 1, 1)], changes)


def _takes(kernel: Any) -> dict[str, Any]:
    text = kernel.asm["ptx"]
    return {
        "shared_bytes": kernel.metadata.shared,
        "threads": 32 * kernel.metadata.num_warps,
        **_resources(kernel.asm["cubin"]),
        "wgmma": text.count("wgmma.mma_async"),
        "mma": text.count("mma.sync"),
        "loads_ahead": text.count("cp.async.cg"),
        "wide_loads_before_waiting": len(
            re.findall(r"ld\.global[\w.:]*\.v4\.b32", text.partition("griddepcontrol.wait")[0])
        ),
    }


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and the bytes of it that found no register, by the disassembler that Triton brings."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    numbers = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout))
    return {"registers": int(numbers["REG"]), "spilled_bytes": int(numbers["STACK"]) + int(numbers["LOCAL"])}


if __name__ == "__main__":
    main()
