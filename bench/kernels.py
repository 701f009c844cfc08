"""Speed of the compiled kernels: linears beside torch, whole models beside llama.cpp on the same GGUF file.

Everything is interleaved round by round, because a shared machine's speed drifts; ratios are medians of the rounds'
ratios. Appends one JSON line per run to bench/results/kernels.jsonl.

    python bench/kernels.py linears
    python bench/kernels.py model FILE.gguf --llama-cpp BUILD/bin
    python bench/kernels.py contexts FILE.gguf --llama-cpp BUILD/bin
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from millicent.engine import kernels
from millicent.engine.batch import Piece
from millicent.engine.kernels.weights import Format, PackedWeight, quantize
from millicent.engine.models.kernel_decoder import KernelDecoder
from millicent.engine.sampler import Draw, sample
from millicent.engine.weights import open_checkpoint

CONTEXT = 256
PROMPT = 512
BLOCK = 16
SHAPES = ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072))  # outputs, inputs of a 0.6B model's layer
ROWS = (1, 4, 8, 16, 32, 128, 512)
Samples = dict[str, list[float]]


def bandwidth_gb_s(data: torch.Tensor) -> float:
    """What reading memory through gives right now."""
    start = time.perf_counter()
    data.sum()
    return data.nbytes / (time.perf_counter() - start) / 1e9


def seconds(body: Callable[[], Any], least: float = 0.15) -> float:
    """Per call, after one call to warm up."""
    body()
    calls, start = 0, time.perf_counter()
    while calls < 2 or time.perf_counter() - start < least:
        body()
        calls += 1
    return (time.perf_counter() - start) / calls


def linears(rounds: int) -> tuple[Samples, dict[str, float]]:
    """Billions of multiply-adds per second in a layer's linears; 12 layers of weights, more than the caches hold."""
    torch.manual_seed(0)
    plain = [torch.randn(shape) * 0.02 for shape in SHAPES]
    contenders: dict[str, list[list[Callable[[torch.Tensor], torch.Tensor]]]] = {}
    for name, matrices in (
        ("bf16", [weight.bfloat16() for weight in plain]),
        ("int8", [quantize(weight, Format.Q8) for weight in plain]),
        ("int4", [quantize(weight, Format.Q4) for weight in plain]),
    ):
        contenders[name] = [[PackedWeight(matrix) for matrix in matrices] for _ in range(12)]
    contenders["torch bf16"] = [[_torch_linear(weight.bfloat16()) for weight in plain] for _ in range(12)]
    work = 12 * sum(outputs * inputs for outputs, inputs in SHAPES)
    samples: Samples = defaultdict(list)
    for _ in range(rounds):
        for rows in ROWS:
            inputs = {width: torch.randn(rows, width) for _, width in SHAPES}
            rounded = {width: x.bfloat16() for width, x in inputs.items()}
            for name, layers in contenders.items():
                given = rounded if name.startswith("torch") else inputs

                def run(layers: Any = layers, given: Any = given) -> None:
                    for layer in layers:
                        for linear, (_, width) in zip(layer, SHAPES, strict=True):
                            linear(given[width])

                samples[f"{name} rows={rows}"].append(work * rows / seconds(run) / 1e9)
    ratios = {
        f"{name} rows={rows} / torch bf16": _ratio(samples, f"{name} rows={rows}", f"torch bf16 rows={rows}")
        for name in ("bf16", "int8", "int4")
        for rows in ROWS
    }
    return samples, ratios


def _torch_linear(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    onednn: Any = torch.ops.mkldnn
    packed = onednn._reorder_linear_weight(weight, None)  # noqa: SLF001 - torch has no public name for it
    return lambda x: onednn._linear_pointwise(  # noqa: SLF001
        x, packed, None, "none", [], ""
    )


def model(
    path: Path, llama_cpp: Path | None, threads: int, rounds: int, batches: list[int]
) -> tuple[Samples, dict[str, float]]:
    """Tokens per second: prefill of 512, and decoding 16 tokens in a batch after 240 cached ones each."""
    ours = _open(path, max(*batches, 2) * CONTEXT)
    probe = torch.ones(64 << 20)
    samples: Samples = defaultdict(list)
    for _ in range(rounds):
        samples["bandwidth GB/s"].append(bandwidth_gb_s(probe))
        for key, value in _measure_ours(ours, batches).items():
            samples[f"ours {key}"].append(value)
        for key, value in _measure_llama_cpp(llama_cpp, path, threads, batches).items() if llama_cpp else ():
            samples[f"llama.cpp {key}"].append(value)
    keys = [f"decode batch={batch}" for batch in batches] + [f"prefill {PROMPT}"]
    return samples, {key: _ratio(samples, f"ours {key}", f"llama.cpp {key}") for key in keys if llama_cpp}


def contexts(
    path: Path, llama_cpp: Path | None, threads: int, rounds: int, depths: list[int]
) -> tuple[Samples, dict[str, float]]:
    """Tokens per second of one sequence after so many cached tokens: prefill of 512, and decoding 16."""
    ours = _open(path, max(depths) + PROMPT)
    samples: Samples = defaultdict(list)
    for start in range(0, max(depths), PROMPT):
        ours.forward([_piece(ours, start, PROMPT)])
    for _ in range(rounds):
        for depth in depths:
            for key, value in _measure_ours_after(ours, depth).items():
                samples[f"ours {key}"].append(value)
            for key, value in _measure_llama_cpp_after(llama_cpp, path, threads, depth).items() if llama_cpp else ():
                samples[f"llama.cpp {key}"].append(value)
    keys = [f"{what} after {depth}" for what in (f"prefill {PROMPT}", "decode") for depth in depths]
    return samples, {key: _ratio(samples, f"ours {key}", f"llama.cpp {key}") for key in keys if llama_cpp}


def _open(path: Path, cached_tokens: int) -> KernelDecoder:
    with torch.inference_mode():
        ours = KernelDecoder(
            path.stem,
            open_checkpoint(path, ("llama", "qwen3")),
            torch.bfloat16,
            "native",
            cache_dtype=torch.bfloat16,
            eos_tokens=frozenset(),
        )
        ours.allocate(-(-cached_tokens // BLOCK), BLOCK)
    return ours


def _piece(ours: KernelDecoder, start: int, tokens: int) -> Piece:
    stop = start + tokens
    return Piece(
        0, [(7 + 31 * at) % ours.vocabulary_size for at in range(start, stop)], start, range(-(-stop // BLOCK)), True
    )


def _measure_ours_after(ours: KernelDecoder, depth: int) -> dict[str, float]:
    def decode() -> None:
        for position in range(depth, depth + 16):
            sample(ours.forward([_piece(ours, position, 1)]), [Draw(0.0, 1.0, 0, 0, 0)])

    return {
        f"prefill {PROMPT} after {depth}": PROMPT / seconds(lambda: ours.forward([_piece(ours, depth, PROMPT)]), 0.0),
        f"decode after {depth}": 16 / seconds(decode, 0.0),
    }


def _measure_llama_cpp_after(binaries: Path, path: Path, threads: int, depth: int) -> dict[str, float]:
    command = [binaries / "llama-bench", "-m", str(path), "-t", str(threads), "-r", "2", "-o", "jsonl"]
    lines = _json_lines([*command, "-p", str(PROMPT), "-n", "16", "-d", str(depth)])
    names = {True: f"prefill {PROMPT} after {depth}", False: f"decode after {depth}"}
    return {names[line["n_prompt"] > 0]: float(line["avg_ts"]) for line in lines}


def _measure_ours(ours: KernelDecoder, batches: list[int]) -> dict[str, float]:
    tokens = torch.randint(0, ours.vocabulary_size, (PROMPT,)).tolist()
    greedy = [Draw(0.0, 1.0, 0, 0, 0)] * max(batches)
    prompt = [Piece(0, tokens, 0, range(PROMPT // BLOCK), True)]
    found = {f"prefill {PROMPT}": PROMPT / seconds(lambda: ours.forward(prompt), 0.0)}
    for batch in batches:
        tables = [range(i * CONTEXT // BLOCK, (i + 1) * CONTEXT // BLOCK) for i in range(batch)]

        def decode(tables: list[range] = tables) -> None:
            token = [0] * len(tables)
            for position in range(CONTEXT - 16, CONTEXT):
                pieces = [Piece(i, [token[i]], position, table, True) for i, table in enumerate(tables)]
                token = [drawn or 0 for drawn in sample(ours.forward(pieces), greedy[: len(pieces)])]

        found[f"decode batch={batch}"] = 16 * batch / seconds(decode)
    return found


def _measure_llama_cpp(binaries: Path, path: Path, threads: int, batches: list[int]) -> dict[str, float]:
    """Its own benchmarks. The prompt's cache is shared there (-pps), which spares it memory reads that ours makes."""
    common = ["-m", str(path), "-t", str(threads)]
    prefill = _json_lines([binaries / "llama-bench", *common, "-p", str(PROMPT), "-n", "0", "-r", "2", "-o", "jsonl"])
    found = {f"prefill {PROMPT}": float(prefill[-1]["avg_ts"])}
    decode = [binaries / "llama-batched-bench", *common, "-tb", str(threads), "-c", "8704", "-b", "2048", "-ub", "512"]
    decode += [
        "-npp",
        str(CONTEXT - 16),
        "-ntg",
        "16",
        "-pps",
        "-npl",
        ",".join(map(str, batches)),
        "--output-format",
        "jsonl",
    ]
    for line in _json_lines(decode):
        found[f"decode batch={line['pl']}"] = float(line["speed_tg"])
    return found


def _json_lines(command: list[Any]) -> list[dict[str, Any]]:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in (done.stdout + done.stderr).splitlines() if line.startswith("{")]


def _ratio(samples: Samples, ours: str, theirs: str) -> float:
    return round(statistics.median(a / b for a, b in zip(samples[ours], samples[theirs], strict=True)), 3)


def _commit() -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()


def _processor() -> str:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return next((line.split(":")[1].strip() for line in text.splitlines() if "model name" in line), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["linears", "model", "contexts"])
    parser.add_argument("gguf", type=Path, nargs="?")
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--depths", type=int, nargs="+", default=[0, 1024, 4096, 7680])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    kernels.use_threads(arguments.threads)
    if arguments.what == "linears":
        samples, ratios = linears(arguments.rounds)
    else:
        common = (arguments.gguf, arguments.llama_cpp, arguments.threads, arguments.rounds)
        samples, ratios = (
            model(*common, arguments.batches) if arguments.what == "model" else contexts(*common, arguments.depths)
        )
    record = {
        "bench": f"kernels {arguments.what}",
        "commit": _commit(),
        "machine": f"{_processor()}, {arguments.threads} threads",
        "load_average": os.getloadavg(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "configuration": {
            "instruction_set": kernels.available().instruction_set,
            "model": f"{arguments.gguf.parent.name}/{arguments.gguf.name}" if arguments.gguf else None,
        },
        "samples": {key: [round(value, 2) for value in values] for key, values in samples.items()},
        "median_ratios": ratios,
    }
    with (Path(__file__).parent / "results" / "kernels.jsonl").open("a") as results:
        results.write(json.dumps(record) + "\n")
    for key, values in samples.items():
        print(f"{key:28s} {statistics.median(values):9.1f}   ({min(values):.1f} to {max(values):.1f})")
    for key, value in ratios.items():
        print(f"{key:40s} {value:.2f}x")


if __name__ == "__main__":
    main()
