"""What the simulator has to know of the engine: its settings, the model's context, and how many KV blocks there is room
for. A model whose file isn't here is taken to have room for every context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from millicent.config import Config
    from millicent.economics.basis import EngineShape
    from millicent.engine.config import EngineConfig

# Of a model of which nothing is known.
_CONTEXT_TOKENS = 8192
_KV_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}


def engine_shape(settings: Config, model: str, *, kv_tokens: int | None = None) -> EngineShape:
    """`kv_tokens` is the room there is, where it is stated."""
    from millicent.economics.basis import EngineShape
    from millicent.engine.machine import kv_blocks, memory_budget_bytes

    engine = settings.engine
    about = _about(settings, model)
    context_tokens = about[0] if about else _CONTEXT_TOKENS
    if kv_tokens is not None:
        blocks = max(1, kv_tokens // engine.block_tokens)
    elif about is not None and engine.device == "cpu":
        left = memory_budget_bytes(engine) - about[2]
        blocks, _ = kv_blocks(engine, context_tokens, about[1], left)
    else:
        blocks = engine.max_sequences * -(-context_tokens // engine.block_tokens)
    return EngineShape(
        kv_blocks=blocks,
        context_tokens=context_tokens,
        block_tokens=engine.block_tokens,
        max_sequences=engine.max_sequences,
        step_tokens=engine.step_tokens,
        prefix_cache=engine.prefix_cache,
        memory_known=kv_tokens is not None or (about is not None and engine.device == "cpu"),
    )


def _about(settings: Config, model: str) -> tuple[int, int, int] | None:
    """Its context in tokens, the bytes that a token takes in the KV cache, and those of its weights. None where its
    file isn't here, or doesn't say."""
    from millicent.cli.models import path_of
    from millicent.config import cache, home
    from millicent.core.errors import ModelError, ModelNotFound
    from millicent.hub import resolve

    how = settings.models.get(model)
    try:
        installed = resolve(path_of(how.path, home()) if how is not None and how.path else model, cache())
        context, layers, kv_heads, head = _numbers(installed.path)
    except (ModelNotFound, ModelError, KeyError, OSError, ValueError):
        return None
    return context, 2 * layers * kv_heads * head * _kv_bytes(settings.engine), installed.bytes


def _kv_bytes(engine: EngineConfig) -> int:
    """Of one number."""
    kept = engine.kv_dtype if engine.kv_dtype != "auto" else engine.dtype
    return _KV_BYTES.get(kept, 2)


def _numbers(path: Path) -> tuple[int, int, int, int]:
    """Context, layers, heads of keys and values, and a head's width."""
    from millicent.text.gguf import read_gguf_head

    if path.is_dir():
        config: dict[str, Any] = json.loads((path / "config.json").read_text())
        heads = int(config["num_attention_heads"])
        head = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
        kv_heads = int(config.get("num_key_value_heads") or heads)
        return int(config["max_position_embeddings"]), int(config["num_hidden_layers"]), kv_heads, head
    found = read_gguf_head(path).metadata
    family = found["general.architecture"]
    heads = int(found[f"{family}.attention.head_count"])
    head = int(found.get(f"{family}.attention.key_length") or int(found[f"{family}.embedding_length"]) // heads)
    kv_heads = int(found.get(f"{family}.attention.head_count_kv") or heads)
    return int(found[f"{family}.context_length"]), int(found[f"{family}.block_count"]), kv_heads, head
