"""The shared library: finding or building it, its structs and signatures (`native/millicent_kernels.h`)."""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

from millicent.core.errors import ConfigError
from millicent.engine.kernels.build import BuildError, build

_INTERFACE_VERSION = 4
_ENVIRONMENT = "MILLICENT_KERNELS"


class WeightStruct(Structure):
    _fields_ = (
        ("format", c_int32),
        ("reserved", c_int32),
        ("outputs", c_int64),
        ("inputs", c_int64),
        ("values", c_void_p),
        ("scales", c_void_p),
        ("mins", c_void_p),
        ("bias", c_void_p),
    )


class BatchStruct(Structure):
    _fields_ = (
        ("rows", c_int64),
        ("pieces", c_int64),
        ("row_offsets", c_void_p),
        ("starts", c_void_p),
        ("table_offsets", c_void_p),
        ("tables", c_void_p),
    )


class ShapeStruct(Structure):
    _fields_ = (
        ("hidden", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("rotary_dims", c_int32),
        ("rotary_interleaved", c_int32),
        ("intermediate", c_int32),
        ("block_tokens", c_int32),
        ("cache_format", c_int32),
        ("norm_epsilon", c_float),
        ("attention_scale", c_float),
        ("reserved", c_int32),
        ("cosines", c_void_p),
        ("sines", c_void_p),
    )


class LayerStruct(Structure):
    _fields_ = (
        ("attention_norm", c_void_p),
        ("feed_forward_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("qkv", WeightStruct),
        ("output", WeightStruct),
        ("gate_up", WeightStruct),
        ("down", WeightStruct),
        ("keys", c_void_p),
        ("values", c_void_p),
    )


def _raise_out_of_memory(status: int) -> None:
    """Result type of functions that answer a status: ctypes calls it with the status."""
    if status:
        raise MemoryError("the system has no memory left for what the kernels compute in; lower [engine] step_tokens")


_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "mk_interface_version": (c_int32, ()),
    "mk_instruction_sets": (c_char_p, ()),
    "mk_instruction_set": (c_char_p, ()),
    "mk_use_instruction_set": (c_int32, (c_char_p,)),
    "mk_use_threads": (c_int32, (c_int32,)),
    "mk_packed_value_bytes": (c_int64, (c_int32, c_int64, c_int64)),
    "mk_packed_scales": (c_int64, (c_int64, c_int64)),
    "mk_use_large_pages": (None, (c_void_p, c_int64)),
    "mk_pack": (
        None,
        (c_int32, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    ),
    "mk_unpack_rows": (None, (POINTER(WeightStruct), c_void_p, c_int64, c_void_p)),
    "mk_linear": (
        _raise_out_of_memory,
        (POINTER(WeightStruct), c_void_p, c_int64, c_void_p, c_float, c_int32, c_void_p),
    ),
    "mk_cache_block_bytes": (c_int64, (POINTER(ShapeStruct),)),
    "mk_rotate_and_write": (
        _raise_out_of_memory,
        (POINTER(ShapeStruct), POINTER(LayerStruct), POINTER(BatchStruct), c_void_p),
    ),
    "mk_attend": (
        _raise_out_of_memory,
        (POINTER(ShapeStruct), POINTER(LayerStruct), POINTER(BatchStruct), c_void_p, c_void_p),
    ),
    "mk_decode_layers": (
        _raise_out_of_memory,
        (POINTER(ShapeStruct), POINTER(LayerStruct), c_int64, POINTER(BatchStruct), c_void_p),
    ),
    "mk_sample": (_raise_out_of_memory, (c_void_p, c_int64, c_int64, c_void_p)),
    "mk_score": (_raise_out_of_memory, (c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p)),
}


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether the kernels can run here. `instruction_set` is None when they can't, and `reason` says what to do."""

    instruction_set: str | None
    reason: str


def available() -> Availability:
    """In a checkout the first call compiles the sources, some ten seconds; an installed package has its library."""
    if os.environ.get(_ENVIRONMENT) == "off":
        return Availability(None, f"{_ENVIRONMENT}=off; unset it to use the compiled kernels")
    found = _open()
    if isinstance(found, str):
        return Availability(None, f"{found}; models run on torch alone, several times slower at small batches")
    return Availability(found.mk_instruction_set().decode(), "")


def library() -> ctypes.CDLL:
    """The library itself. Ask `available` first: raises ConfigError where it can't be loaded."""
    found = _open()
    if isinstance(found, str):
        raise ConfigError(found)
    return found


def instruction_sets() -> tuple[str, ...]:
    """What this processor has of what the library was built with, best first."""
    return tuple(library().mk_instruction_sets().decode().split(","))


def use_instruction_set(name: str) -> None:
    """For tests and measurements; packed weights and caches fit every instruction set alike."""
    if library().mk_use_instruction_set(name.encode()):
        raise ConfigError(f"instruction set {name!r} is not there; use one of {', '.join(instruction_sets())}")


def use_threads(threads: int) -> int:
    """Threads of every later call, the caller's included. Answers how many there are."""
    found: int = library().mk_use_threads(threads)
    return found


@functools.cache
def _open() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    here = Path(__file__).parent
    native = here.parents[3] / "native"
    try:
        path = build(native, here) if native.is_dir() else next(here.glob("millicent_kernels.*.so"), None)
        if path is None:
            return "Millicent was installed without its compiled kernels; install g++ and then Millicent again"
        loaded = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    except (BuildError, OSError, AttributeError) as error:
        return f"the compiled kernels cannot be used: {error}"
    if loaded.mk_interface_version() != _INTERFACE_VERSION:
        return f"{path.name} is of another version; install Millicent again"
    wanted = os.environ.get(_ENVIRONMENT)
    if wanted and wanted != "off" and loaded.mk_use_instruction_set(wanted.encode()):
        there = loaded.mk_instruction_sets().decode()
        return f"{_ENVIRONMENT}={wanted} is not an instruction set of this machine; use off or one of {there}"
    return loaded
