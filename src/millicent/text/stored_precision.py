"""In how many bits a model's files keep its weights, told from their heads alone."""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from pathlib import Path

from millicent.core.errors import ModelError
from millicent.text.gguf import find_gguf, read_gguf_head

_GGML_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 30: "BF16",
}  # fmt: skip
_MAX_HEAD_BYTES = 100_000_000  # safetensors' own limit


def stored_precision(path: Path) -> str | None:
    """The kind that most of the weights are of: `Q4_1`, `BF16`. None where the files don't say."""
    elements: Counter[str] = Counter()
    try:
        gguf_path = find_gguf(path)
        if gguf_path is not None:
            for info in read_gguf_head(gguf_path).tensors.values():
                elements[_GGML_NAMES.get(info.quantization, f"GGML {info.quantization}")] += prod(info.shape)
        else:
            for file in path.glob("*.safetensors"):
                elements.update(_safetensors_elements(file))
    except (ModelError, OSError, ValueError, LookupError, TypeError):
        return None  # what is wrong with it is said where it is used
    return elements.most_common(1)[0][0] if elements else None


def _safetensors_elements(file: Path) -> Counter[str]:
    """Layout: 8 bytes of little-endian length, then JSON of that length."""
    found: Counter[str] = Counter()
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > _MAX_HEAD_BYTES:
            raise ValueError(f"a head of {length} bytes")
        head = json.loads(opened.read(length))
    for name, tensor in head.items():
        if name != "__metadata__":
            found[tensor["dtype"]] += prod(tensor["shape"])
    return found
