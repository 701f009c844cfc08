"""Models that the engine runs. A family is a file that builds its layer from shared parts, and a line below."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch

from millicent.core.errors import ConfigError
from millicent.engine import kernels
from millicent.engine.batch import Encoder, Model
from millicent.engine.config import Dtype, KvDtype, Quantization
from millicent.engine.layers import has_fast_bf16
from millicent.engine.models import llama, qwen3
from millicent.engine.models.bert import Bert
from millicent.engine.models.decoder import BuildLayer, Decoder, Loader
from millicent.engine.models.kernel_decoder import KernelDecoder, unsupported
from millicent.engine.weights import Checkpoint, open_checkpoint
from millicent.text import Tokenizer, load_tokenizer

_log = logging.getLogger(__name__)

FAMILIES: dict[str, BuildLayer] = {
    "llama": llama.build_layer,
    "mistral": llama.build_layer,
    "qwen2": llama.build_layer,  # its biases are told by the tensors that are there
    "qwen3": qwen3.build_layer,
}
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_CACHE_DTYPES = {**_DTYPES, "int8": torch.int8}
ENCODERS: dict[str, Callable[[str, Checkpoint, torch.dtype, torch.device], Encoder]] = {
    "bert": Bert,
}


def is_encoder(path: Path) -> bool:
    """Whether the model at `path` makes vectors rather than text. Raises ModelError unless it is one of the above."""
    return open_checkpoint(path, (*FAMILIES, *ENCODERS)).family in ENCODERS


def load_encoder(
    path: Path, *, dtype: Dtype, name: str, threads: int = 0, device: torch.device | None = None
) -> Encoder:
    """As `load_model`. `auto` is float32: vectors are kept and compared with later ones. `device` None is the CPU."""
    torch.set_num_threads(threads or min(torch.get_num_threads(), _usable_processors()))
    checkpoint = open_checkpoint(path, ENCODERS)
    with torch.inference_mode():
        return ENCODERS[checkpoint.family](
            name, checkpoint, _torch_dtype("fp32" if dtype == "auto" else dtype), device or torch.device("cpu")
        )


def load_model(
    path: Path,
    *,
    dtype: Dtype,
    name: str,
    deterministic: bool = False,
    threads: int = 0,
    quantize: Quantization = "auto",
    kv_dtype: KvDtype = "auto",
    tokenizer: Tokenizer | None = None,
) -> Model:
    """The model at `path`, ready for `allocate`. `threads` 0 leaves torch's choice, at most the processors we may use.

    The compiled kernels run the model where they can, torch otherwise. `quantize` and `kv_dtype` are as in
    EngineConfig; int8, int4 and a cache of another type than the model's exist in the kernels alone.

    `tokenizer` is the model's, where the caller has it already: reading it takes half a second.

    Raises ModelError for files that are missing, damaged or not of a family in `FAMILIES`, and ConfigError for a
    precision that cannot be had here.
    """
    threads = threads or min(torch.get_num_threads(), _usable_processors())
    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(path, FAMILIES)
    tokenizer = tokenizer or load_tokenizer(path)
    if quantize == "fp8":
        raise ConfigError(f"{checkpoint.label}: quantize = 'fp8' needs a GPU: [engine] device; here there is 'int8'")
    computed = _torch_dtype(dtype)
    cached = computed if kv_dtype == "auto" else _CACHE_DTYPES[kv_dtype]
    quantization = quantize if quantize != "auto" else "native" if dtype == "auto" else "none"
    obstacle = kernels.available().reason or unsupported(checkpoint.spec)
    if obstacle and quantization in {"int8", "int4"}:
        raise ConfigError(f"{checkpoint.label}: quantize = {quantization!r} needs the compiled kernels: {obstacle}")
    if obstacle and cached is not computed:
        raise ConfigError(f"{checkpoint.label}: kv_dtype = {kv_dtype!r} needs the compiled kernels: {obstacle}")
    with torch.inference_mode():
        if not obstacle:
            kernels.use_threads(threads)
            model = KernelDecoder(
                name, checkpoint, computed, quantization, cache_dtype=cached, eos_tokens=tokenizer.eos_tokens
            )
            _log.info("%s: %s", name, model.precision)
            return model
        return Decoder(
            name,
            Loader(checkpoint, computed),
            FAMILIES[checkpoint.family],
            eos_tokens=tokenizer.eos_tokens,
            deterministic=deterministic,
        )


def _torch_dtype(dtype: Dtype) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if has_fast_bf16() else torch.float32
    return _DTYPES[dtype]


def _usable_processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
