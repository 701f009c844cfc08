"""Every kernel test runs on every instruction set that this processor has."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest

from millicent.engine import kernels

_X86 = ["avx512-bf16", "avx512-vnni", "avx2", "portable"]
_ARM = ["neon-dotprod", "portable"]


@pytest.fixture(params=_ARM if platform.machine().lower() in {"arm64", "aarch64"} else _X86)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    if kernels.available().instruction_set is None:
        pytest.skip(kernels.available().reason)
    if request.param not in kernels.instruction_sets():
        pytest.skip(f"this processor has no {request.param}")
    best = kernels.instruction_sets()[0]
    kernels.use_instruction_set(request.param)
    kernels.use_threads(2)
    yield request.param
    kernels.use_instruction_set(best)
