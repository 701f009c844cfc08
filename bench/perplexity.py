"""Perplexity of a model in each precision, and of llama.cpp on its own files of the same weights.

Windows of 1,024 tokens from the start of a text, each for itself; every token but a window's first is predicted.
Appends one JSON line per run to bench/results/perplexity.jsonl.

    python bench/perplexity.py TEXT MODEL.gguf [--ours NAME=FILE[,dtype[,quantize[,kv_dtype]]]]... [--peer NAME=FILE]...
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from millicent.engine.batch import Piece
from millicent.engine.models import load_model
from millicent.engine.models.kernel_decoder import KernelDecoder
from millicent.text import load_tokenizer

WINDOW = 1024
BLOCK = 16
SCORED_AT_ONCE = 256  # rows of logits


def windows(text: Path, model: Path, tokens: int) -> list[list[int]]:
    """Whole windows only."""
    tokenizer = load_tokenizer(model)
    found = tokenizer.encode(text.read_text("utf-8")[: tokens * 8])[:tokens]
    return [found[at : at + WINDOW] for at in range(0, len(found) - WINDOW + 1, WINDOW)]


def ours(spec: str, given: list[list[int]], threads: int) -> float:
    """`spec` is FILE[,dtype[,quantize[,kv_dtype]]]."""
    path, *rest = spec.split(",")
    settings: dict[str, Any] = dict(zip(("dtype", "quantize", "kv_dtype"), rest, strict=False))
    model = load_model(Path(path), name="measured", threads=threads, **{"dtype": "auto", **settings})
    assert isinstance(model, KernelDecoder)
    blocks = WINDOW // BLOCK
    model.allocate(blocks, BLOCK)
    total = 0.0
    with torch.inference_mode():
        for window in given:
            states = model.states([Piece(0, window, 0, list(range(blocks)), True)])
            for at in range(0, WINDOW - 1, SCORED_AT_ONCE):
                rows = states[at : min(at + SCORED_AT_ONCE, WINDOW - 1)].contiguous()
                wanted = torch.tensor(window[at + 1 : at + 1 + len(rows)])
                total += torch.nn.functional.cross_entropy(model.logits(rows), wanted, reduction="sum").item()
    return math.exp(total / (len(given) * (WINDOW - 1)))


def theirs(path: str, given: list[list[int]], threads: int) -> float:
    """llama.cpp, by its Python package."""
    from llama_cpp import Llama  # type: ignore[import-not-found,unused-ignore]

    model = Llama(
        path, n_ctx=WINDOW, n_batch=512, n_threads=threads, n_threads_batch=threads, logits_all=True, verbose=False
    )
    total = 0.0
    for window in given:
        model.reset()
        model.eval(window)
        rows = torch.from_numpy(model.scores[: WINDOW - 1])
        total += torch.nn.functional.cross_entropy(rows, torch.tensor(window[1:]), reduction="sum").item()
    return math.exp(total / (len(given) * (WINDOW - 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("model", type=Path, help="the model whose tokenizer is used")
    parser.add_argument("--ours", action="append", default=[], help="NAME=FILE[,dtype[,quantize[,kv_dtype]]]")
    parser.add_argument("--peer", action="append", default=[], help="NAME=FILE for llama.cpp")
    parser.add_argument("--tokens", type=int, default=20_480)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "perplexity.jsonl")
    arguments = parser.parse_args()
    given = windows(arguments.text, arguments.model, arguments.tokens)
    found: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for measure, wanted in ((ours, arguments.ours), (theirs, arguments.peer)):
        for entry in wanted:
            name, _, spec = entry.partition("=")
            start = time.perf_counter()
            found[name] = round(measure(spec, given, arguments.threads), 4)
            seconds[name] = round(time.perf_counter() - start, 1)
            print(name, found[name], seconds[name], flush=True)
    line = {
        "text": arguments.text.name,
        "model": arguments.model.name,
        "tokens": len(given) * (WINDOW - 1),
        "window": WINDOW,
        "perplexity": found,
        "seconds": seconds,
    }
    with arguments.results.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
