"""`[models.NAME]`: how a model is run, and where one of your own lies."""

from __future__ import annotations

from typing import Annotated

import msgspec

from millicent.engine.protocol import Dtype, Quantization


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`path` is a GGUF file or a folder of safetensors; without it, NAME is a catalogue name or `org/name`.

    A model that nobody asks for is given back after `keep_alive_s`; None keeps it. `preload` loads it at the start
    instead of at its first use. `dtype` and `quantize` are this model's own, instead of those of [engine].
    `draft` is a smaller model with the same tokenizer, named like any other: it guesses what this one will say.
    """

    path: str | None = None
    keep_alive_s: Annotated[int, msgspec.Meta(ge=0)] | None = None
    preload: bool = False
    dtype: Dtype | None = None
    quantize: Quantization | None = None
    draft: str | None = None
