"""Hugging Face directories: config.json with one safetensors file, or several and their index."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from millicent.core.errors import ModelError
from millicent.engine.weights import Checkpoint, EncoderSpec, ModelSpec, RopeScaling, check_family

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class SafetensorsCheckpoint(Checkpoint):
    def __init__(self, path: Path, families: Collection[str]) -> None:
        from safetensors import SafetensorError, safe_open

        self.label = path.name
        config = _read_object(path / "config.json")
        self.family = str(config.get("model_type"))
        check_family(self.label, self.family, families)
        self._files: dict[str, Any] = {}
        self.shapes = {}
        for file in _weight_files(path):
            try:
                opened: Any = safe_open(str(file), framework="pt")
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    self._files[name] = opened
                    self.shapes[name] = tuple(opened.get_slice(name).get_shape())
            except FileNotFoundError:
                raise ModelError(f"{file}: missing; fetch the model again") from None
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file}: damaged or cut off ({error}); fetch the model again") from None
        self._config = config
        self._path = path

    @cached_property
    def spec(self) -> ModelSpec:
        return self._sensible(lambda: _read_spec(self._config, self.label, self.shapes))

    @cached_property
    def encoder_spec(self) -> EncoderSpec:
        return self._sensible(lambda: _read_encoder_spec(self._config, self.label, self._path))

    def _sensible(self, read: Callable[[], T]) -> T:
        try:
            return read()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            file = self._path / "config.json"
            raise ModelError(f"{file}: makes no sense ({reason}); fetch the model again") from None

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor.to(dtype)


def _weight_files(path: Path) -> list[Path]:
    index = path / _INDEX
    if not index.exists():
        if not (path / _SINGLE).exists():
            raise ModelError(f"{path}: holds no weights ({_SINGLE} or {_INDEX}); fetch the model again")
        return [path / _SINGLE]
    names = _read_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{index}: has no weight_map; fetch the model again")
    files = sorted(set(names.values()))
    outside = [name for name in files if Path(name).name != name]
    if outside:
        raise ModelError(f"{index}: names {outside[0]!r}, which is outside its directory; fetch the model again")
    return [path / name for name in files]


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{file}: missing; fetch the model again") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: not readable as JSON ({error}); fetch the model again") from None


def _read_object(file: Path) -> dict[str, Any]:
    found = _read_json(file)
    if not isinstance(found, dict):
        raise ModelError(f"{file}: not a JSON object; fetch the model again")
    return found


def _read_optional(file: Path) -> dict[str, Any]:
    return _read_object(file) if file.exists() else {}


def _read_spec(config: dict[str, Any], label: str, shapes: dict[str, tuple[int, ...]]) -> ModelSpec:
    family, hidden, heads = str(config["model_type"]), int(config["hidden_size"]), int(config["num_attention_heads"])
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelError(f"{label}: activation {activation!r} is not supported (supported: silu); use another model")
    if "quantization_config" in config:
        raise ModelError(f"{label}: quantized safetensors are not supported; use its GGUF or unquantized build")
    layers, window = int(config["num_hidden_layers"]), config.get("sliding_window")
    if window is not None and config.get("use_sliding_window", True):
        raise ModelError(f"{label}: sliding-window attention ({window} tokens) is not supported; use another model")
    return ModelSpec(
        family=family,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        intermediate=int(config["intermediate_size"]),
        vocabulary=int(config["vocab_size"]),
        context_tokens=int(config["max_position_embeddings"]),
        norm_eps=float(config["rms_norm_eps"]),
        rope_theta=_rope_theta(config),
        rope_scaling=_rope_scaling(config, label),
        # A checkpoint without an output layer of its own is tied, whatever its config forgot to say.
        tied_embeddings=bool(config.get("tie_word_embeddings", "lm_head.weight" not in shapes)),
        qkv_bias=bool(config.get("attention_bias", "model.layers.0.self_attn.q_proj.bias" in shapes)),
        attention_output_bias=bool(config.get("attention_bias", "model.layers.0.self_attn.o_proj.bias" in shapes)),
        mlp_bias=bool(config.get("mlp_bias", False)),
    )


def _read_encoder_spec(config: dict[str, Any], label: str, path: Path) -> EncoderSpec:
    activation, positions = config.get("hidden_act", "gelu"), int(config["max_position_embeddings"])
    if activation != "gelu":
        raise ModelError(f"{label}: activation {activation!r} is not supported (supported: gelu); use another model")
    if (kind := config.get("position_embedding_type", "absolute")) != "absolute":
        raise ModelError(f"{label}: positions {kind!r} are not supported (supported: absolute); use another model")
    pooling, normalize = _read_modules(path, label)
    context_tokens = _read_optional(path / "sentence_bert_config.json").get("max_seq_length") or positions
    return EncoderSpec(
        family=str(config["model_type"]),
        layers=int(config["num_hidden_layers"]),
        hidden=int(config["hidden_size"]),
        heads=int(config["num_attention_heads"]),
        intermediate=int(config["intermediate_size"]),
        vocabulary=int(config["vocab_size"]),
        positions=positions,
        context_tokens=min(int(context_tokens), positions),
        norm_eps=float(config["layer_norm_eps"]),
        pooling=pooling,
        normalize=normalize,
    )


def _read_modules(path: Path, label: str) -> tuple[str, bool]:
    """How vectors are made of rows, and whether they become unit vectors: sentence-transformers' modules.json.

    Without one it is the mean, as it is, which is what sentence-transformers does with a bare encoder.
    """
    file = path / "modules.json"
    if not file.exists():
        return "mean", False
    pooling, normalize = "mean", False
    for module in _read_json(file):
        kind = str(module["type"]).rpartition(".")[2]
        if kind == "Pooling":
            pooling = _read_pooling(_read_object(path / str(module["path"]) / "config.json"), label)
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise ModelError(
                f"{label}: module {kind!r} is not supported (supported: Transformer, Pooling, Normalize);"
                " use another model"
            )
    return pooling, normalize


def _read_pooling(config: dict[str, Any], label: str) -> str:
    modes = [name.removeprefix("pooling_mode_") for name, chosen in config.items() if chosen is True]
    found = config.get("pooling_mode") or "+".join(mode for mode in modes if mode != "include_prompt")
    pooling = {"mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls"}.get(found)
    if pooling is None:
        raise ModelError(f"{label}: pooling {found!r} is not supported (supported: mean, cls); use another model")
    return pooling


def _rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Newer configurations keep all of rotation in `rope_parameters`, older ones its scaling in `rope_scaling`."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _rope_theta(config: dict[str, Any]) -> float:
    return float(_rope_parameters(config).get("rope_theta") or config.get("rope_theta", 10_000.0))


def _rope_scaling(config: dict[str, Any], label: str) -> RopeScaling | None:
    found = _rope_parameters(config)
    kind = found.get("rope_type") or found.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", factor=float(found["factor"]))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            factor=float(found["factor"]),
            low_frequency_factor=float(found["low_freq_factor"]),
            high_frequency_factor=float(found["high_freq_factor"]),
            original_context_tokens=int(found["original_max_position_embeddings"]),
        )
    raise ModelError(
        f"{label}: rotary scaling {kind!r} is not supported (supported: linear, llama3); use another model"
    )
