"""`[engine]`: how the embedded engine runs."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

PrefixCache = Literal["off", "tenant", "shared"]
Speculation = Literal["off", "ngram"]

Dtype = Literal["auto", "bf16", "fp32"]
Quantization = Literal["auto", "none", "native", "int8", "int4", "fp8"]
Device = Annotated[str, msgspec.Meta(pattern=r"^(auto|cpu|cuda:[0-9]+)$")]
KvDtype = Literal["auto", "bf16", "fp32", "int8"]


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`device` is `cpu`, `cuda:0` (or another number) for an NVIDIA GPU, or `auto` for the first GPU if there is one.

    `threads` 0 and `memory_gb` None mean as much as this machine has to give.

    `dtype` is what weights that aren't quantized are computed in; `auto` is bf16 where the processor has it. `quantize`
    `native` runs a file's own quantization, `none` expands it, `int8` and `int4` round what has more bits, `fp8` does
    on a GPU, which expands all else; `auto` is `native`, or `none` where a dtype is asked for. `kv_dtype` `auto` is the
    dtype; `int8` halves bf16's memory.

    `deterministic` makes results independent of what else is in the batch, at the price of batching's speed.
    `calibrate` spends up to a second after a model's first loading to learn what its steps cost, so that the first
    requests that share one are charged fairly. `prefix_cache`: prompts that begin alike are computed once, for each
    tenant on its own or, `shared`, for all; how fast an answer comes then tells one tenant what others have sent.
    `speculation`: tokens that the text itself suggests are checked several at a time, where that is faster; answers
    stay the same.
    """

    device: Device = "cpu"
    dtype: Dtype = "auto"
    quantize: Quantization = "auto"
    kv_dtype: KvDtype = "auto"
    deterministic: bool = False
    calibrate: bool = True
    threads: Annotated[int, msgspec.Meta(ge=0)] = 0
    memory_gb: Annotated[float, msgspec.Meta(gt=0)] | None = None
    max_sequences: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 32
    step_tokens: Annotated[int, msgspec.Meta(ge=16)] = 512
    block_tokens: Annotated[int, msgspec.Meta(ge=1, le=256)] = 16
    prefix_cache: PrefixCache = "tenant"
    speculation: Speculation = "ngram"
