"""A model's files, opened: what it is (`ModelSpec`) and its tensors, by Hugging Face's names in every format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from millicent.core.errors import ModelError
from millicent.text.gguf import find_gguf

if TYPE_CHECKING:
    import torch

    from millicent.engine.kernels.weights import Quantized


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context a model was first trained for.

    `linear` divides all by `factor`; `llama3` divides those whose wavelength is longer than
    `original_context / low_frequency_factor`, keeps those shorter than `original_context / high_frequency_factor`
    and blends between. `divisors` (half the head's width) is what a GGUF stores in place of these numbers.
    """

    kind: str
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context_tokens: int = 8192
    divisors: tuple[float, ...] = ()


_HEAD_NORMS = frozenset({"qwen3"})


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder's shape. `family` is the name under which `engine.models` knows how to build it."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    context_tokens: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied_embeddings: bool
    qkv_bias: bool
    attention_output_bias: bool
    mlp_bias: bool

    @property
    def head_norms(self) -> bool:
        """Whether each head of queries and keys has a norm."""
        return self.family in _HEAD_NORMS

    def __post_init__(self) -> None:
        for field in ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocabulary"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} key-value heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"a head of {self.head_dim} cannot be rotated: its width is odd")


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """An encoder's shape. `pooling` is mean (over a text's rows) or cls (its first); `normalize` makes vectors unit."""

    family: str
    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocabulary: int
    positions: int
    context_tokens: int
    norm_eps: float
    pooling: str
    normalize: bool

    def __post_init__(self) -> None:
        for field in ("layers", "hidden", "heads", "intermediate", "vocabulary", "context_tokens"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}")
        if self.hidden % self.heads:
            raise ValueError(f"{self.hidden} dimensions cannot be split among {self.heads} heads evenly")
        if self.context_tokens > self.positions:
            raise ValueError(f"{self.context_tokens} tokens are more than its {self.positions} positions")


class Checkpoint(ABC):
    """An open model. `family` is its architecture's name; `shapes` what is there, by Hugging Face's names."""

    label: str
    family: str
    shapes: dict[str, tuple[int, ...]]

    @cached_property
    @abstractmethod
    def spec(self) -> ModelSpec:
        """What the metadata says of a decoder. Raises ModelError."""

    @cached_property
    @abstractmethod
    def encoder_spec(self) -> EncoderSpec:
        """What the metadata says of an encoder. Raises ModelError."""

    @abstractmethod
    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The tensor, dequantized, in `dtype`. It is there: `shapes` has it."""

    def is_quantized(self, name: str) -> bool:
        """Whether the tensor is stored in fewer bits than its values have."""
        del name
        return False

    def read_quantized(self, name: str) -> Quantized | None:
        """The matrix as stored, nothing rounded again; None unless it is in a format that the kernels compute in."""
        del name
        return None

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        self.require(name, shape)
        return self.read(name, dtype)

    def require(self, name: str, shape: Sequence[int]) -> None:
        """Raise ModelError unless the tensor is there with that shape."""
        found = self.shapes.get(name)
        if found is None:
            raise ModelError(f"{self.label}: tensor {name} is missing; fetch the model again")
        if found != tuple(shape):
            raise ModelError(
                f"{self.label}: tensor {name} is {list(found)} where the model's metadata makes it {list(shape)}; "
                "fetch the model again"
            )


def check_family(label: str, family: str, families: Collection[str]) -> None:
    """Before anything else is read: another architecture's metadata means other things."""
    if family not in families:
        raise ModelError(
            f"{label}: architecture {family!r} is not supported (supported: {', '.join(families)}); use another model"
        )


def open_checkpoint(path: Path, families: Collection[str]) -> Checkpoint:
    """The model at `path`: a GGUF file, or a directory with one or with config.json and safetensors.

    Raises ModelError, in one line, for what is missing, cut off, damaged or not of one of these families.
    """
    gguf_path = find_gguf(path)
    if gguf_path is not None:
        from millicent.engine.weights_gguf import GgufCheckpoint

        return GgufCheckpoint(gguf_path, families)
    from millicent.engine.weights_safetensors import SafetensorsCheckpoint

    return SafetensorsCheckpoint(path, families)
