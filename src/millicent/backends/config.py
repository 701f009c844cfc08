"""`[models.NAME]`: models beside the catalogue, and how each is run."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`path` is a GGUF file, or a folder with safetensors; without it, NAME is looked up in the catalogue.

    A model that nobody asks for is given back after `keep_alive_s`; None keeps it. `preload` loads it at the start.
    """

    path: str | None = None
    dtype: Literal["auto", "bf16", "fp32"] | None = None
    keep_alive_s: Annotated[int, msgspec.Meta(ge=0)] | None = None
    preload: bool = False
    placement: str | None = None
