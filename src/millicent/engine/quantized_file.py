"""A model's file with its matrices in 8 or 4 bits: a GGUF that this engine and others load as it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from millicent.core.errors import ConfigError, ModelError
from millicent.core.files import flush
from millicent.engine.kernels.weights import Format, Quantized, format_of, quantize
from millicent.engine.models import FAMILIES, load_model
from millicent.engine.quantization import dequantize, stored_bytes, to_blocks
from millicent.engine.weights_gguf import GgufCheckpoint, hugging_face_name
from millicent.text.gguf import TensorInfo, find_gguf, read_gguf_head

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader, GGUFWriter

Width = Literal["int8", "int4"]
_FILE_TYPES = {Format.Q8: 7, Format.Q4: 2, Format.Q4_MIN: 3}  # llama.cpp's numbers for "mostly this"
_GGML_TYPES = {Format.Q8: 8, Format.Q4: 2, Format.Q4_MIN: 3}
_TEXTS, _TEXT_TOKENS = 48, 512  # for calibration
_LEAST_LAYERS = 8  # of which two can be spared more bits
_NAMES = {Format.Q8: "Q8_0", Format.Q4: "Q4_0", Format.Q4_MIN: "Q4_1"}


def write_quantized(source: Path, folder: Path, to: Width, progress: Callable[[int, int], None] | None = None) -> Path:
    """The file made of the GGUF at `source`, in `folder`, which appears by one rename once everything is on disk.

    `int8` rounds to the nearest, `int4` to the model's own texts (`calibrated_rounding`). What is stored in as few bits
    or fewer, and everything but matrices, is copied. `progress` gets the bytes of the source done, and their sum.
    """
    file = find_gguf(source)
    if file is None:
        raise ModelError(
            f"{source}: only GGUF files can be quantized into files; serve it with --quantize {to} instead"
        )
    if folder.exists():
        raise ConfigError(f"{folder}: exists already; name another folder with --out")
    checkpoint = GgufCheckpoint(file, FAMILIES)  # refuses what the engine couldn't run
    plan = _Plan(checkpoint, read_gguf_head(file).tensors, to, progress)
    if not plan.wanted:
        raise ConfigError(f"{file.name}: has nothing of more bits than {to}; use it as it is")
    main = format_of("", to)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if to == "int4":
            plan.calibrate(file)
        target = partial / f"{file.stem}-{_NAMES[main]}.gguf"
        _write(file, target, plan, _FILE_TYPES[main])
        flush(target)
        flush(partial)
        partial.rename(folder)
        flush(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder / target.name


class _Plan:
    """What becomes of each tensor, by its name in the file."""

    def __init__(
        self,
        checkpoint: GgufCheckpoint,
        tensors: Mapping[str, TensorInfo],
        to: Width,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.tensors = tensors
        self.names = {name: hugging_face_name(checkpoint.family, name) for name in tensors}
        self._edges = _edges(checkpoint.spec.layers)
        targets = {name: _target(self.names[name], info, to, self._edges) for name, info in tensors.items()}
        self.wanted = {name: target for name, target in targets.items() if target is not None}
        self._checkpoint = checkpoint
        self._progress = progress
        self._blocks: dict[str, np.ndarray[Any, Any]] = {}
        self._left = {name: stored_bytes(info.quantization, info.shape) for name, info in tensors.items()}
        self._total_bytes = sum(self._left.values())

    def calibrate(self, file: Path) -> None:
        """Rounds the layers' matrices to what they are multiplied with in texts of the model's own."""
        from millicent.engine.calibrated_rounding import own_texts, round_layers

        stored = {self.names[name]: name for name, target in self.wanted.items() if target is Format.Q4_MIN}
        if not stored:
            return

        def rounded(name: str, matrix: Quantized) -> None:
            if name in stored:
                self._blocks[stored[name]] = to_blocks(self._checkpoint.as_stored(name, matrix))
                self._done(stored[name])

        self._report()
        model = load_model(file, dtype="auto", name=file.stem)
        texts = own_texts(model, _TEXTS, _TEXT_TOKENS)
        del model
        round_layers(self._checkpoint, FAMILIES[self._checkpoint.family], texts, Format.Q4_MIN, rounded, self._edges)

    def data(self, name: str, raw: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """What the new file holds for a tensor that the source has as `raw`. Ask once."""
        info = self.tensors[name]
        if name not in self.wanted:
            found = raw
        elif name in self._blocks:
            found = self._blocks.pop(name)
        else:
            values = dequantize(raw.reshape(-1).view("uint8"), info.quantization, info.shape, torch.float32)
            found = to_blocks(quantize(values, self.wanted[name]))
        self._done(name)
        return found

    def _done(self, name: str) -> None:
        self._left.pop(name, None)
        self._report()

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(self._total_bytes - sum(self._left.values()), self._total_bytes)


def _edges(layers: int) -> frozenset[int]:
    """The first layer, whose errors all others work on, and the last, whose errors nothing mends: they keep 8 bits."""
    return frozenset({0, layers - 1} if layers >= _LEAST_LAYERS else ())


def _target(name: str, info: TensorInfo, to: Width, edges: frozenset[int]) -> Format | None:
    """What a tensor of Hugging Face's name is rounded to; None copies it."""
    is_matrix = name.endswith("_proj.weight") or name in {"lm_head.weight", "model.embed_tokens.weight"}
    if not is_matrix or len(info.shape) != 2 or info.shape[1] % 32:
        return None
    at_edge = any(name.startswith(f"model.layers.{edge}.") for edge in edges)
    wanted = Format.Q8 if at_edge else format_of(name, to)
    stored_bits = stored_bytes(info.quantization, info.shape) * 8 / prod(info.shape)
    return wanted if stored_bits > wanted.bits + 1 else None  # scales and minima take up to one more


def _write(source: Path, target: Path, plan: _Plan, file_type: int) -> None:
    from gguf import GGUFReader, GGUFWriter

    reader = GGUFReader(source, "c")  # torch takes only writable memory
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    copy_metadata(reader, writer, {"general.file_type": file_type, "general.quantization_version": 2})
    try:
        for tensor in reader.tensors:
            _announce(writer, plan.tensors[tensor.name], plan.wanted.get(tensor.name))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in reader.tensors:
            writer.write_tensor_data(plan.data(tensor.name, tensor.data))
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
