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

_SHARED_BYTES = 227 << 10  # what a program can have on a Hopper chip


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="Triton's compiler for CUDA is a Linux program"
)
def test_every_kernel_compiles_for_a_hopper_chip(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "support.compiled_kernels"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = json.loads(done.stdout.splitlines()[-1])
    assert {kernel["kernel"] for kernel in kernels} == {
        "_add_rms_norm",
        "_combine",
        "_decode",
        "_draw",
        "_embed",
        "_multiply_small",
        "_prefill",
        "_quantize_rows",
        "_rotate_and_cache",
        "_silu_mul",
    }
    assert max(kernel["shared_bytes"] for kernel in kernels) <= _SHARED_BYTES
    # In bfloat16 the matrix units do the work: the chip's own instructions for tiles, the older ones for a few rows.
    assert any(kernel["wgmma"] for kernel in kernels if kernel["kernel"] == "_prefill")
    assert all(kernel["mma"] for kernel in kernels if kernel["kernel"] == "_multiply_small")
