"""A model's file with its matrices in 8 or 4 bits: a GGUF that this engine and others load as it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from millicent.core.errors import ConfigError, ModelError
from millicent.text.gguf import find_gguf, read_gguf_head

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader, GGUFWriter

Width = Literal["int8", "int4"]


def copy_metadata(source: GGUFReader, writer: GGUFWriter, changed: Mapping[str, int]) -> None:
    """Everything a file says of its model: shape, tokenizer, chat template. `changed` are uint32."""
    from gguf import GGUFValueType

    for field in source.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture" or field.name in changed:
            continue
        inner = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for name, value in changed.items():
        writer.add_uint32(name, value)
