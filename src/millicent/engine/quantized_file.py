"""A model's file with its matrices in 8 or 4 bits: a GGUF that this engine and others load as it is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from millicent.core.errors import ConfigError, ModelError
from millicent.engine.kernels.weights import Format, format_of, quantize
from millicent.engine.models import FAMILIES
from millicent.engine.quantization import dequantize, stored_bytes, to_blocks
from millicent.engine.weights import open_checkpoint
from millicent.engine.weights_gguf import hugging_face_name
from millicent.text.gguf import TensorInfo, find_gguf, read_gguf_head

if TYPE_CHECKING:
    from gguf import GGUFReader, GGUFWriter

Width = Literal["int8", "int4"]
_FILE_TYPES = {Format.Q8: 7, Format.Q4: 2, Format.Q4_MIN: 3}  # llama.cpp's numbers for "mostly this"
_GGML_TYPES = {Format.Q8: 8, Format.Q4: 2, Format.Q4_MIN: 3}
_NAMES = {Format.Q8: "Q8_0", Format.Q4: "Q4_0", Format.Q4_MIN: "Q4_1"}


def write_quantized(source: Path, folder: Path, to: Width, progress: Callable[[int, int], None] | None = None) -> Path:
    """The file made of the GGUF at `source`, in `folder`, which appears by one rename once everything is on disk.

    Matrices are rounded as by `--quantize`; what is stored in as few bits or fewer, and everything else, is copied.
    `progress` gets the bytes of the source done, and their sum.
    """
    file = find_gguf(source)
    if file is None:
        raise ModelError(
            f"{source}: only GGUF files can be quantized into files; serve it with --quantize {to} instead"
        )
    if folder.exists():
        raise ConfigError(f"{folder}: exists already; name another folder with --out")
    checkpoint = open_checkpoint(file, FAMILIES)  # refuses what the engine couldn't run
    head = read_gguf_head(file)
    names = {name: hugging_face_name(checkpoint.family, name) for name in head.tensors}
    targets = {name: _target(names[name], info, to) for name, info in head.tensors.items()}
    wanted = {name: target for name, target in targets.items() if target is not None}
    if not wanted:
        raise ConfigError(f"{file.name}: has nothing of more bits than {to}; use it as it is")
    main = format_of("", to)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        target = partial / f"{file.stem}-{_NAMES[main]}.gguf"
        _write(file, target, head.tensors, wanted, _FILE_TYPES[main], progress)
        _flush(target)
        _flush(partial)
        partial.rename(folder)
        _flush(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder / target.name


def _target(name: str, info: TensorInfo, to: Width) -> Format | None:
    """What a tensor of Hugging Face's name is rounded to; None copies it."""
    is_matrix = name.endswith("_proj.weight") or name in {"lm_head.weight", "model.embed_tokens.weight"}
    if not is_matrix or len(info.shape) != 2 or info.shape[1] % 32:
        return None
    wanted = format_of(name, to)
    stored_bits = stored_bytes(info.quantization, info.shape) * 8 / prod(info.shape)
    return wanted if stored_bits > wanted.bits + 1 else None  # scales and minima take up to one more


def _write(
    source: Path,
    target: Path,
    tensors: Mapping[str, TensorInfo],
    wanted: Mapping[str, Format],
    file_type: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    from gguf import GGUFReader, GGUFWriter

    reader = GGUFReader(source, "c")  # torch takes only writable memory
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    copy_metadata(reader, writer, {"general.file_type": file_type, "general.quantization_version": 2})
    try:
        for tensor in reader.tensors:
            _announce(writer, tensors[tensor.name], wanted.get(tensor.name))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done, total = 0, sum(int(tensor.n_bytes) for tensor in reader.tensors)
        for tensor in reader.tensors:
            data = tensor.data
            if tensor.name in wanted:
                info = tensors[tensor.name]
                values = dequantize(data.reshape(-1).view("uint8"), info.quantization, info.shape, torch.float32)
                data = to_blocks(quantize(values, wanted[tensor.name]))
            writer.write_tensor_data(data)
            done += int(tensor.n_bytes)
            if progress is not None:
                progress(done, total)
    finally:
        writer.close()


def _announce(writer: GGUFWriter, info: TensorInfo, target: Format | None) -> None:
    """An entry of the file's table of tensors; `target` None keeps what there was."""
    import numpy as np
    from gguf import GGMLQuantizationType

    kind = info.quantization if target is None else _GGML_TYPES[target]
    size_bytes = stored_bytes(kind, info.shape)
    byte_shape = (*info.shape[:-1], size_bytes // prod(info.shape[:-1]))
    writer.add_tensor_info(info.name, byte_shape, np.dtype(np.uint8), size_bytes, GGMLQuantizationType(kind))


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


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
