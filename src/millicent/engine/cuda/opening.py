"""From a model's files to what runs on the device."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import torch

from millicent.core.errors import ConfigError
from millicent.engine.batch import Encoder
from millicent.engine.config import Dtype, EngineConfig
from millicent.engine.cuda.ahead import AheadRunner
from millicent.engine.cuda.decoder import DeviceDecoder
from millicent.engine.cuda.device import Device, open_device
from millicent.engine.cuda.weights import load_weights
from millicent.engine.models import FAMILIES, is_encoder, load_encoder
from millicent.engine.protocol import Load
from millicent.engine.runner import OpenModel
from millicent.engine.weights import Checkpoint, open_checkpoint
from millicent.text import TextStream, load_tokenizer

_log = logging.getLogger(__name__)
_DTYPES = {"auto": torch.bfloat16, "bf16": torch.bfloat16, "fp32": torch.float32}


class GpuModels:
    """Opens models on the device that the configuration names."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._device = open_device(config.device)
        if config.kv_dtype != "auto":
            raise ConfigError(
                f"[engine] kv_dtype = {config.kv_dtype!r}: on a GPU the cache has the dtype; leave it out"
            )

    @property
    def memory_bytes(self) -> int:
        return self._device.budget_bytes(self._config)

    def __call__(self, frame: Load) -> OpenModel | Encoder:
        """Raises ModelError for files that cannot be used, ConfigError for a precision that cannot be had."""
        path = Path(frame.path)
        quantize = frame.quantize or self._config.quantize
        if quantize in {"int8", "int4"}:
            raise ConfigError(f"{frame.model}: quantize = {quantize!r} is for processors; on a GPU there is 'fp8'")
        if frame.draft is not None:
            raise ConfigError(
                f"{frame.model}: draft models run on processors only; leave draft = {frame.draft.model!r} out"
            )
        if is_encoder(path):
            if quantize == "fp8":
                raise ConfigError(f"{frame.model}: encoders run in bf16 or fp32; leave quantize = 'fp8' out")
            return load_encoder(path, dtype=frame.dtype, name=frame.model, device=self._device.torch_device)
        tokenizer = load_tokenizer(path)
        with torch.inference_mode():
            model = open_decoder(
                open_checkpoint(path, FAMILIES),
                self._device,
                self._config,
                name=frame.model,
                dtype=frame.dtype,
                fp8=quantize == "fp8",
                eos_tokens=tokenizer.eos_tokens,
            )
        return OpenModel(
            model,
            tokenizer.eos_tokens,
            functools.partial(TextStream, tokenizer),
            tokenizer.grammar_vocabulary,
            make_runner=functools.partial(AheadRunner, model),
            working_bytes=model.working_bytes,
        )


def open_decoder(
    checkpoint: Checkpoint,
    device: Device,
    config: EngineConfig,
    *,
    name: str,
    dtype: Dtype,
    fp8: bool,
    eos_tokens: frozenset[int],
) -> DeviceDecoder:
    """`dtype` auto is bfloat16; a file's own quantization is expanded to it."""
    if fp8 and not device.has_fp8:
        raise ConfigError(f"{name}: quantize = 'fp8' needs a GPU of compute capability 8.9 or later; leave it out")
    if fp8 and dtype == "fp32" and device.torch_device.type == "cuda":
        raise ConfigError(f"{name}: quantize = 'fp8' goes with dtype bf16; leave dtype = 'fp32' out")
    weights = load_weights(checkpoint, _DTYPES[dtype], device.torch_device, fp8=fp8)
    _log.info("%s: %s on %s", name, "fp8 weights" if fp8 else f"{weights.dtype} weights", device.torch_device)
    return DeviceDecoder(name, weights, device, config, eos_tokens=eos_tokens)
