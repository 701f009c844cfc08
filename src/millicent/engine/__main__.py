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

import msgspec

from millicent.core.clock import SystemClock
from millicent.core.errors import ConfigError
from millicent.engine.batch import Encoder
from millicent.engine.config import EngineConfig
from millicent.engine.connection import Connection, Disconnected
from millicent.engine.loop import Engine
from millicent.engine.machine import memory_budget_bytes, usable_cores
from millicent.engine.protocol import Load
from millicent.engine.runner import OpenModel

_PR_SET_PDEATHSIG = 1


def _model_opener(config: EngineConfig) -> Callable[[Load], OpenModel | Encoder]:
    """Imports torch now, so that its seconds are the engine's start and not the first model's loading time."""
    from millicent.engine.models import is_encoder, load_encoder, load_model
    from millicent.text import TextStream, load_tokenizer

    threads = usable_cores(config)

    def open_model(frame: Load) -> OpenModel | Encoder:
        path = Path(frame.path)
        if is_encoder(path):
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
            model, tokenizer.eos_tokens, functools.partial(TextStream, tokenizer), tokenizer.grammar_vocabulary
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
    open_model = _model_opener(config)
    gateway = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    gateway.connect(arguments.socket)
    engine = Engine(
        Connection(gateway),
        config,
        SystemClock(),
        memory_bytes=memory_budget_bytes(config),
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
