"""Compiles every kernel for a Hopper chip in real shapes, without one: `python -m support.compiled_kernels` prints, as
JSON, the bytes of shared memory and the instructions of the matrix units of each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch


def main() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        """Of a GPU that isn't there."""

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: object = None) -> int:
            return 0

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

    driver.set_active(Driver())
    found: list[dict[str, Any]] = []
    compile_and_run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = compile_and_run(self, *args, grid=grid, warmup=True, **options)
        assert kernel.asm["cubin"]
        text = kernel.asm["ptx"]
        found.append(
            {
                "kernel": self.fn.__name__,
                "shared_bytes": kernel.metadata.shared,
                "wgmma": text.count("wgmma.mma_async"),
                "mma": text.count("mma.sync"),
            }
        )
        return kernel

    JITFunction.run = compile_only
    call_each(torch.bfloat16, 32, 4096, 14_336, 128_256)  # Llama-3.1-8B
    call_each(torch.float32, 16, 1024, 3072, 151_936)  # Qwen3-0.6B
    print(json.dumps(found))


def call_each(dtype: torch.dtype, heads: int, hidden: int, inner: int, vocabulary: int) -> None:
    from millicent.engine.cuda.kernels import attention, matmul, rows, sampling

    kv_heads, head_dim, count = 8, 128, 64
    ints = torch.zeros(count, dtype=torch.int32)
    floats = torch.zeros(count)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    qkv, out = empty(count, (heads + 2 * kv_heads) * head_dim), empty(count, heads * head_dim)
    keys, norm, angles = empty(4, kv_heads, 16, head_dim), empty(head_dim), torch.empty(4096, head_dim // 2)
    for splits in (1, 32):
        attention.attend_decode(qkv, keys, keys, attention.DecodeRows(ints, ints, ints, splits), out)
    attention.attend_prefill(qkv, keys, keys, attention.PrefillTiles(ints, ints, ints, ints, ints), out)
    x = rows.embed(ints, ints, empty(vocabulary, hidden))
    for delta, picked in ((None, None), (x, None), (x, ints)):
        rows.add_rms_norm(delta, x, empty(hidden), 1e-5, picked=picked)
    for norms in (None, (norm, norm)):
        rows.rotate_and_cache(qkv, norms, 1e-5, (angles, angles), ints, ints, keys, keys)
    rows.silu_mul(empty(count, 2 * inner))
    sampling.draw(empty(count, vocabulary), sampling.Draws(floats, ints, floats, floats, floats), ints)
    if dtype is torch.bfloat16:
        rows.quantize_rows(empty(count, inner))
        for outputs, inputs in _products(hidden, inner):
            weight = torch.empty(outputs, inputs, dtype=rows.FP8)
            matmul.multiply_small(empty(4, inputs), weight, torch.empty(outputs))


def _products(hidden: int, inner: int) -> Iterator[tuple[int, int]]:
    yield 2 * inner, hidden
    yield hidden, inner


if __name__ == "__main__":
    main()
