"""Every kernel compiles for the chip, in real shapes, where there is no chip: what an interpreter lets pass doesn't."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton isn't installed", allow_module_level=True)

# What a program can have on a Hopper chip.
_SHARED_BYTES = 227 << 10
_REGISTERS = 65_536


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="Triton's compiler for CUDA is a Linux program"
)
def test_every_kernel_of_every_prepared_pass_compiles_for_a_hopper_chip(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "support.compiled_kernels"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = json.loads(done.stdout.splitlines()[-1])
    assert {kernel["kernel"] for kernel in kernels} == {
        "_add_rms_norm",
        "_best",
        "_decode",
        "_draw",
        "_embed",
        "_multiply_few",
        "_prefill",
        "_quantize_rows",
        "_rotate_and_cache",
        "_silu_mul",
    }
    assert max(kernel["shared_bytes"] for kernel in kernels) <= _SHARED_BYTES
    assert max(kernel["registers"] * kernel["threads"] for kernel in kernels) <= _REGISTERS
    assert max(kernel["spilled_bytes"] for kernel in kernels) <= 16  # Triton 3.6 leaves two registers of a draw's out
    bf16 = [kernel for kernel in kernels if not kernel["model"].endswith("fp32")]
    # In bfloat16 the matrix units do the work: the chip's own instructions for tiles, the older ones for a few rows;
    # and what they multiply next is on its way while they do. One row needs none of them: its weights are on their way,
    # as wide as loads get, before the kernel waits for the one before.
    assert all(kernel["wgmma"] and kernel["loads_ahead"] for kernel in bf16 if kernel["kernel"] == "_prefill")
    few = [kernel for kernel in bf16 if kernel["kernel"] == "_multiply_few"]
    one, several = [k for k in few if not k["mma"]], [k for k in few if k["mma"]]
    assert one
    assert all(kernel["wide_loads_before_waiting"] >= 4 for kernel in one)
    assert all(kernel["loads_ahead"] for kernel in several)
    assert all(kernel["mma"] and kernel["loads_ahead"] for kernel in bf16 if kernel["kernel"] == "_decode")
