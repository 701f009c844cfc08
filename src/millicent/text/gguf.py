"""The head of a GGUF file: its metadata and where its tensors lie. Reads no tensor data and needs no library.

Layout (little-endian), from the GGUF specification: magic, version, tensor count, key count; then each key with a
typed value; then for each tensor its name, its dimensions (innermost first), its quantization and its offset from the
start of the data, which begins at the next multiple of `general.alignment`.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millicent.core.errors import ModelError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_ELEMENTS = 1 << 26  # more keys, tokens or tensors than any model has: the file is damaged
_MAX_DIMENSIONS = 4
_MAX_DEPTH = 4

_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_STRING, _ARRAY = 8, 9
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """`shape` is outermost first, as NumPy and PyTorch have it. `offset` is from the start of the file.

    `quantization` is GGML's number for how the elements are stored.
    """

    name: str
    shape: tuple[int, ...]
    quantization: int
    offset: int


@dataclass(frozen=True, slots=True)
class GgufHead:
    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    file_bytes: int


class _Cursor:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.position = 0

    def scalar(self, packed: struct.Struct) -> Any:
        (value,) = packed.unpack_from(self._data, self.position)
        self.position += packed.size
        return value

    def count(self) -> int:
        count: int = self.scalar(_U64)
        if count > _MAX_ELEMENTS:
            raise ValueError(f"a count of {count} at byte {self.position - 8}")
        return count

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """`count` length-prefixed strings. Bytes that aren't UTF-8 become U+FFFD, as in llama.cpp's listings."""
        data, position, end = self._data, self.position, len(self._data)
        unpack = _U64.unpack_from
        found = []
        for _ in range(count):
            start = position + 8
            position = start + unpack(data, position)[0]
            if position > end:
                raise ValueError("a string that reaches past the end of the file")
            found.append(data[start:position].decode("utf-8", "replace"))
        self.position = position
        return found

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            if kind not in _SCALARS:
                raise ValueError(f"an unknown value type {kind} at byte {self.position}")
            return self.scalar(_SCALARS[kind])
        if depth >= _MAX_DEPTH:
            raise ValueError("arrays nested too deeply")
        inner, count = self.scalar(_SCALARS[4]), self.count()
        if inner == _STRING:
            return self.strings(count)
        if inner == _ARRAY:
            return [self.value(_ARRAY, depth + 1) for _ in range(count)]
        if inner not in _SCALARS:
            raise ValueError(f"an unknown element type {inner} at byte {self.position}")
        packed = struct.Struct(f"<{count}{_SCALARS[inner].format[1:]}")
        values = packed.unpack_from(self._data, self.position)
        self.position += packed.size
        return list(values)


def read_gguf_head(path: Path) -> GgufHead:
    """Metadata and tensor table of the file at `path`. Raises ModelError if it is missing, cut off or damaged."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, data)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such model file; fetch it with `millicent pull`") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from None
    except (struct.error, ValueError, OverflowError, MemoryError) as error:
        raise ModelError(f"{path}: not a whole GGUF file ({error}); fetch the model again") from None


def _parse(path: Path, data: mmap.mmap) -> GgufHead:
    if data[:4] != MAGIC:
        raise ValueError("it doesn't start with GGUF")
    cursor = _Cursor(data)
    cursor.position = 4
    version = cursor.scalar(_SCALARS[4])
    if version not in _VERSIONS:
        raise ValueError(f"version {version} is not one of {', '.join(map(str, _VERSIONS))}")
    tensor_count, key_count = cursor.count(), cursor.count()
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar(_SCALARS[4]))
    listed = [_tensor_info(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    data_start = -(-cursor.position // alignment) * alignment
    tensors = {
        info.name: TensorInfo(info.name, info.shape, info.quantization, data_start + info.offset) for info in listed
    }
    return GgufHead(path, metadata, tensors, len(data))


def _tensor_info(cursor: _Cursor) -> TensorInfo:
    """`offset` is still from the start of the data."""
    name = cursor.string()
    dimensions = cursor.scalar(_SCALARS[4])
    if dimensions > _MAX_DIMENSIONS:
        raise ValueError(f"tensor {name} has {dimensions} dimensions")
    shape = tuple(cursor.scalar(_U64) for _ in range(dimensions))[::-1]
    return TensorInfo(name, shape, cursor.scalar(_SCALARS[4]), cursor.scalar(_U64))


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that `path` is or, for a directory without Hugging Face's files, the one it holds; else None."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ModelError(f"{path}: no such model; fetch it with `millicent pull`")
    if (path / "config.json").exists():
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ModelError(f"{path}: holds several GGUF files ({names}); name the one to use")
    return found[0] if found else None
