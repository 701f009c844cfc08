"""GGUF checkpoints: llama.cpp's names and layouts turned into Hugging Face's."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, TypeVar

from millicent.core.errors import ModelError
from millicent.engine.weights import Checkpoint, EncoderSpec, ModelSpec, RopeScaling, check_family
from millicent.text.gguf import TensorInfo, read_gguf_head

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch

    from millicent.engine.kernels.weights import Quantized

T = TypeVar("T")
_OUTSIDE_LAYERS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BERT_EMBEDDINGS = "embeddings"
_BERT_OUTSIDE_LAYERS = {
    "token_embd": f"{_BERT_EMBEDDINGS}.word_embeddings",
    "token_types": f"{_BERT_EMBEDDINGS}.token_type_embeddings",
    "position_embd": f"{_BERT_EMBEDDINGS}.position_embeddings",
    "token_embd_norm": f"{_BERT_EMBEDDINGS}.LayerNorm",
}
_BERT_IN_LAYER = {
    "attn_q": "attention.self.query",
    "attn_k": "attention.self.key",
    "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense",
    "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
    "layer_output_norm": "output.LayerNorm",
}
_NAMES = {"bert": ("encoder.layer", _BERT_OUTSIDE_LAYERS, _BERT_IN_LAYER)}
_POOLINGS = {1: "mean", 2: "cls"}  # llama.cpp's numbers
# Converters reorder the rows of query and key projections of these architectures for interleaved rotation.
_INTERLEAVED = frozenset({"llama"})
_ROPE_DIVISORS = "rope_freqs.weight"


class GgufCheckpoint(Checkpoint):
    def __init__(self, path: Path, families: Collection[str]) -> None:
        head = read_gguf_head(path)
        self.label = path.name
        self._path = path
        self.family = str(head.metadata.get("general.architecture"))
        check_family(self.label, self.family, families)
        self._metadata = head.metadata
        self._tensors = {hugging_face_name(self.family, name): info for name, info in head.tensors.items()}
        self.shapes = {name: info.shape for name, info in self._tensors.items()}
        self._byte_counts = {name: _stored_bytes(self.label, info) for name, info in self._tensors.items()}
        for name, info in self._tensors.items():
            if info.offset + self._byte_counts[name] > head.file_bytes:
                raise ModelError(f"{self.label}: cut off in tensor {info.name}; fetch the model again")
        self._data = _map_file(path)

    @cached_property
    def spec(self) -> ModelSpec:
        return self._sensible(self._read_spec)

    @cached_property
    def encoder_spec(self) -> EncoderSpec:
        return self._sensible(self._read_encoder_spec)

    def _sensible(self, read: Callable[[], T]) -> T:
        try:
            return read()
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise ModelError(f"{self.label}: its metadata makes no sense ({error}); fetch the model again") from None

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        from millicent.engine.quantization import dequantize

        info = self._tensors[name]
        tensor = dequantize(self._raw(name), info.quantization, info.shape, dtype)
        order = self._row_order(name)
        return tensor if order is None else tensor[order]

    def is_quantized(self, name: str) -> bool:
        from millicent.engine.quantization import is_plain

        return not is_plain(self._tensors[name].quantization)

    def read_quantized(self, name: str) -> Quantized | None:
        from millicent.engine.quantization import quantized

        info = self._tensors[name]
        found = quantized(self._raw(name), info.quantization, info.shape)
        order = self._row_order(name)
        return found if found is None or order is None else found.rows(order)

    def as_stored(self, name: str, matrix: Quantized) -> Quantized:
        """Rows in Hugging Face's order put into this file's."""
        order = self._row_order(name)
        return matrix if order is None else matrix.rows(order.argsort())

    def _raw(self, name: str) -> np.ndarray[Any, Any]:
        offset = self._tensors[name].offset
        return self._data[offset : offset + self._byte_counts[name]]

    def _row_order(self, name: str) -> torch.Tensor | None:
        """Which stored row is which of Hugging Face's: in GGUF, rows (0, 1), (2, 3), ... of a head rotate together; in
        Hugging Face's layout, rows i and i + half do. None where both are the same."""
        import torch

        if self.family not in _INTERLEAVED:
            return None
        if name.endswith(("q_proj.weight", "q_proj.bias")):
            heads = self.spec.heads
        elif name.endswith(("k_proj.weight", "k_proj.bias")):
            heads = self.spec.kv_heads
        else:
            return None
        rows = torch.arange(self.shapes[name][0]).view(heads, -1, 2)
        return rows.transpose(1, 2).reshape(-1)

    def _number(self, key: str, default: Any = None) -> Any:
        found = self._metadata.get(f"{self.family}.{key}", default)
        if not isinstance(found, int | float):
            raise ModelError(f"{self.label}: {self.family}.{key} is {found!r}, not a number; use another build")
        return found

    def _read_spec(self) -> ModelSpec:
        number = self._number
        heads, hidden = int(number("attention.head_count")), int(number("embedding_length"))
        head_dim = int(number("attention.key_length", hidden // max(heads, 1)))
        if int(number("attention.value_length", head_dim)) != head_dim:
            raise ModelError(f"{self.label}: keys and values of different widths are not supported; use another model")
        if int(number("rope.dimension_count", head_dim)) != head_dim:
            raise ModelError(f"{self.label}: rotating part of a head is not supported; use another model")
        if window := int(number("attention.sliding_window", 0)):
            raise ModelError(
                f"{self.label}: sliding-window attention ({window} tokens) is not supported; use another model"
            )
        if int(number("expert_count", 0)):
            raise ModelError(f"{self.label}: mixtures of experts are not supported; use another model")
        return ModelSpec(
            family=self.family,
            layers=int(number("block_count")),
            hidden=hidden,
            heads=heads,
            kv_heads=int(number("attention.head_count_kv", heads)),
            head_dim=head_dim,
            intermediate=int(number("feed_forward_length")),
            vocabulary=self.shapes.get("model.embed_tokens.weight", (0,))[0],
            context_tokens=int(number("context_length")),
            norm_eps=float(number("attention.layer_norm_rms_epsilon")),
            rope_theta=float(number("rope.freq_base", 10_000.0)),
            rope_scaling=self._rope_scaling(),
            tied_embeddings="lm_head.weight" not in self.shapes,
            qkv_bias="model.layers.0.self_attn.q_proj.bias" in self.shapes,
            attention_output_bias="model.layers.0.self_attn.o_proj.bias" in self.shapes,
            mlp_bias="model.layers.0.mlp.down_proj.bias" in self.shapes,
        )

    def _read_encoder_spec(self) -> EncoderSpec:
        number = self._number
        if self._metadata.get(f"{self.family}.attention.causal"):
            raise ModelError(f"{self.label}: causal attention is not supported in an encoder; use another model")
        kind = int(number("pooling_type", 1))
        if kind not in _POOLINGS:
            raise ModelError(f"{self.label}: pooling {kind} is not supported (supported: mean, cls); use another model")
        positions = self.shapes.get(f"{_BERT_EMBEDDINGS}.position_embeddings.weight", (0,))[0]
        return EncoderSpec(
            family=self.family,
            layers=int(number("block_count")),
            hidden=int(number("embedding_length")),
            heads=int(number("attention.head_count")),
            intermediate=int(number("feed_forward_length")),
            vocabulary=self.shapes.get(f"{_BERT_EMBEDDINGS}.word_embeddings.weight", (0,))[0],
            positions=positions,
            context_tokens=min(int(number("context_length")), positions),
            norm_eps=float(number("attention.layer_norm_epsilon")),
            pooling=_POOLINGS[kind],
            normalize=True,  # the format doesn't say; llama.cpp's server does
        )

    def _rope_scaling(self) -> RopeScaling | None:
        import torch

        if _ROPE_DIVISORS in self._tensors:
            divisors = self.read(_ROPE_DIVISORS, torch.float32)
            return RopeScaling("llama3", divisors=tuple(divisors.tolist()))
        kind = self._metadata.get(f"{self.family}.rope.scaling.type", "none")
        if kind == "none":
            return None
        if kind != "linear":
            raise ModelError(
                f"{self.label}: rotary scaling {kind!r} is not supported (supported: linear, llama3); use another model"
            )
        return RopeScaling("linear", factor=float(self._metadata[f"{self.family}.rope.scaling.factor"]))


def hugging_face_name(architecture: str, name: str) -> str:
    """`blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`. Unknown names stay as they are."""
    layers, outside, inside = _NAMES.get(architecture, ("model.layers", _OUTSIDE_LAYERS, _IN_LAYER))
    stem, _, suffix = name.rpartition(".")
    if stem in outside:
        return f"{outside[stem]}.{suffix}"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in inside:
        return f"{layers}.{parts[1]}.{inside[parts[2]]}.{suffix}"
    return name


def _stored_bytes(label: str, info: TensorInfo) -> int:
    from millicent.engine.quantization import block_layout

    layout = block_layout(info.quantization)
    if layout is None:
        raise ModelError(
            f"{label}: tensor {info.name} has an unknown quantization {info.quantization}; update Millicent"
        )
    elements, size_bytes = layout
    if info.shape and info.shape[-1] % elements:
        raise ModelError(f"{label}: tensor {info.name} has rows of {info.shape[-1]}; fetch the model again")
    return prod(info.shape) // elements * size_bytes


def _map_file(path: Path) -> np.ndarray[Any, Any]:
    """The file's bytes, read as they are touched. Copy on write, because torch takes only writable memory."""
    import numpy as np

    return np.memmap(path, dtype=np.uint8, mode="c")
