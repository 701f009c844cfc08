"""Hugging Face directories: config.json with one safetensors file, or several and their index."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millicent.core.errors import ModelError
from millicent.engine.weights import Checkpoint, ModelSpec, RopeScaling, check_family

if TYPE_CHECKING:
    import torch

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class SafetensorsCheckpoint(Checkpoint):
    def __init__(self, path: Path, families: Collection[str]) -> None:
        from safetensors import SafetensorError, safe_open

        self.label = path.name
        config = _read_object(path / "config.json")
        check_family(self.label, str(config.get("model_type")), families)
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
        try:
            self.spec = _read_spec(config, self.label, self.shapes)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ModelError(f"{path / 'config.json'}: makes no sense ({reason}); fetch the model again") from None

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


def _read_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{file}: missing; fetch the model again") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: not readable as JSON ({error}); fetch the model again") from None
    if not isinstance(found, dict):
        raise ModelError(f"{file}: not a JSON object; fetch the model again")
    return found


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
