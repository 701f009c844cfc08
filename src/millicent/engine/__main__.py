"""`python -m millicent.engine --socket PATH --config JSON`: the engine process. The gateway starts it."""

from __future__ import annotations

import argparse
import ctypes
import functools
import logging
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from millicent.core.clock import SystemClock
from millicent.core.errors import ConfigError
from millicent.engine.batch import Encoder, Model
from millicent.engine.config import EngineConfig
from millicent.engine.connection import Connection, Disconnected
from millicent.engine.loop import Engine
from millicent.engine.machine import memory_budget_bytes, usable_cores
from millicent.engine.protocol import Draft, Load
from millicent.engine.runner import OpenModel

if TYPE_CHECKING:
    from millicent.text import Tokenizer

_PR_SET_PDEATHSIG = 1


def _models(config: EngineConfig) -> tuple[Callable[[Load], OpenModel | Encoder], int]:
    """What opens models on the configured device, and the memory there is for all of them."""
    if config.device == "cpu":
        return _model_opener(config), memory_budget_bytes(config)
    from millicent.engine.cuda.opening import GpuModels

    models = GpuModels(config)
    return models, models.memory_bytes


def _model_opener(config: EngineConfig) -> Callable[[Load], OpenModel | Encoder]:
    """Imports torch now, so that its seconds are the engine's start and not the first model's loading time."""
    from millicent.engine.models import is_encoder, load_encoder, load_model
    from millicent.text import TextStream, load_tokenizer

    threads = usable_cores(config)

    def open_draft(draft: Draft, beside: str, tokenizer: Tokenizer) -> Model:
        path = Path(draft.path)
        if is_encoder(path):
            raise ConfigError(f"{beside}: draft = {draft.model!r} makes vectors, not text; name a smaller text model")
        own = load_tokenizer(path)
        if difference := own.difference(tokenizer):
            raise ConfigError(
                f"{beside}: draft = {draft.model!r} has another tokenizer ({difference}); name a smaller model of the"
                " same family"
            )
        return load_model(
            path,
            dtype=draft.dtype,
            name=draft.model,
            deterministic=config.deterministic,
            threads=threads,
            quantize=draft.quantize or config.quantize,
            kv_dtype=config.kv_dtype,
            tokenizer=own,
        )

    def open_model(frame: Load) -> OpenModel | Encoder:
        path = Path(frame.path)
        if is_encoder(path):
            if frame.draft is not None:
                raise ConfigError(f"{frame.model}: encoders guess nothing; leave draft = {frame.draft.model!r} out")
            if frame.quantize in {"int8", "int4"}:
                raise ConfigError(
                    f"{frame.model}: encoders run in bf16 or fp32; leave quantize = {frame.quantize!r} out"
                )
            return load_encoder(path, dtype=frame.dtype, name=frame.model, threads=threads)
        tokenizer = load_tokenizer(path)
        model = load_model(
            path,
            dtype=frame.dtype,
            name=frame.model,
            deterministic=config.deterministic,
            threads=threads,
            quantize=frame.quantize or config.quantize,
            kv_dtype=config.kv_dtype,
            tokenizer=tokenizer,
        )
        return OpenModel(
            model,
            tokenizer.eos_tokens,
            functools.partial(TextStream, tokenizer),
            tokenizer.grammar_vocabulary,
            None if frame.draft is None else open_draft(frame.draft, frame.model, tokenizer),
        )

    return open_model


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m millicent.engine", description=__doc__)
    parser.add_argument("--socket", required=True, help="the gateway's Unix socket")
    parser.add_argument("--config", default="{}", help="[engine] settings, as JSON")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    config = msgspec.json.decode(arguments.config, type=EngineConfig)

    # Ctrl-C in a terminal reaches us too, and a supervisor's SIGTERM to a whole group; the gateway decides when we end,
    # once its answers are settled. If it dies, so do we, in any step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    open_model, memory_bytes = _models(config)
    gateway = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    gateway.connect(arguments.socket)
    engine = Engine(
        Connection(gateway),
        config,
        SystemClock(),
        memory_bytes=memory_bytes,
        open_model=open_model,
    )
    try:
        engine.run()
    except Disconnected as error:
        logging.getLogger(__name__).warning("leaving: %s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
