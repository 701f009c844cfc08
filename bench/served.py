"""Served end to end: output tokens/s, time to first token and between tokens, beside llama.cpp's server.

    python bench/served.py --model smollm2:135m --clients 1,16 --rounds 3 \
        [--trace AzureLLMInferenceTrace_conv.csv] [--peer-python /path/to/venv/bin/python --peer-model FILE.gguf]

Clients are closed loops: each sends its next request when the last is answered. Prompts are random token ids, so no
prefix is shared; outputs are forced to their length. With a trace, lengths are its own, scaled to at most --most-tokens
in all; without, 128 in and 64 out. The peer (package xllamacpp in an environment of its own) gets as many slots
as there are clients. Rounds are interleaved; medians and ratios go to bench/results/served.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from results import environment, write

Lengths = list[tuple[int, int]]
_PEER = """
import sys, time, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.port, slots = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
parameters.hostnames, parameters.n_parallel, parameters.n_ctx = ["127.0.0.1"], slots, 1280 * slots
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = int(sys.argv[4])
server = xllamacpp.Server(parameters)
time.sleep(10**9)
"""


@dataclass
class Measured:
    """One round: per request the time to its first token, and all gaps between tokens, in seconds."""

    first_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    output_tokens: int = 0
    wall_s: float = 0.0

    def figures(self) -> dict[str, float]:
        return {
            "output_tokens_per_s": self.output_tokens / self.wall_s,
            "first_token_ms_p50": 1000 * quantile(self.first_s, 0.5),
            "first_token_ms_p95": 1000 * quantile(self.first_s, 0.95),
            "between_tokens_ms_p50": 1000 * quantile(self.gaps_s, 0.5),
            "between_tokens_ms_p95": 1000 * quantile(self.gaps_s, 0.95),
        }


@dataclass(frozen=True)
class Target:
    """A server under load: `body` makes a request of token ids and an output length; `tokens` counts an event's."""

    name: str
    url: str
    body: Callable[[list[int], int], dict[str, Any]]
    tokens: Callable[[dict[str, Any]], int]


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def lengths_of(trace: Path | None, count: int, seed: int, most: int) -> Lengths:
    if trace is None:
        return [(128, 64)] * count
    with trace.open() as lines:
        rows = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(lines)]
    draw = random.Random(seed)
    scaled = []
    for given, made in draw.sample(rows, count):
        shrink = min(1.0, most / (given + made))
        scaled.append((max(1, int(given * shrink)), max(1, int(made * shrink))))
    return scaled


async def load(target: Target, lengths: Lengths, clients: int, vocabulary: int, seed: int) -> Measured:
    """Each seed has prompts of its own: what an earlier round left in a prefix cache is of no use."""
    measured = Measured()
    waiting = iter(lengths)
    draw = random.Random(seed)
    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=600), connector=aiohttp.TCPConnector(limit=0, force_close=True)
    ) as session:

        async def client() -> None:
            for given, made in waiting:
                prompt = [draw.randrange(100, vocabulary) for _ in range(given)]
                await one(session, target, target.body(prompt, made), measured)

        start = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        measured.wall_s = time.perf_counter() - start
    return measured


async def one(session: aiohttp.ClientSession, target: Target, body: dict[str, Any], measured: Measured) -> None:
    start = last = time.perf_counter()
    async for event in events(session, target.url, body):
        tokens = target.tokens(event)
        if tokens == 0:
            continue
        now = time.perf_counter()
        if last == start:
            measured.first_s.append(now - start)
        else:
            measured.gaps_s += [(now - last) / tokens] * tokens
        last = now
        measured.output_tokens += tokens


async def events(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    async with session.post(url, json=body) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                yield event


def ours(port: int, model: str) -> Target:
    def body(prompt: list[int], tokens: int) -> dict[str, Any]:
        return {
            "model": model,
            "prompt": prompt,
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"continuous_usage_stats": True},
        }

    seen: dict[str, int] = {}

    def tokens(event: dict[str, Any]) -> int:
        now = event["usage"]["completion_tokens"]
        new = now - seen.get(event["id"], 0)
        seen[event["id"]] = now
        return int(new)

    return Target("millicent", f"http://127.0.0.1:{port}/v1/completions", body, tokens)


def peer(port: int) -> Target:
    def body(prompt: list[int], tokens: int) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "n_predict": tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "cache_prompt": False,
            "return_tokens": True,
        }

    return Target("llama.cpp", f"http://127.0.0.1:{port}/completion", body, lambda event: len(event["tokens"]))


@contextlib.contextmanager
def running(command: list[str], port: int, path: str, env: dict[str, str] | None = None) -> Iterator[tuple[int, float]]:
    """A server process; yields its pid and the seconds until it answered."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env=os.environ | (env or {}), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not answers(port, path):
            assert process.poll() is None, f"{command[:3]} ended"
            time.sleep(0.05)
        yield process.pid, time.perf_counter() - start
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(port: int, path: str) -> bool:
    import urllib.request

    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def memory_mb(pid: int) -> int:
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    total: int = sum(process.memory_info().rss for process in family)
    return round(total / 1e6)


def measure(options: argparse.Namespace, clients: int, rounds: int) -> dict[str, Any]:
    """Both servers up at once, loaded in turn: idle ones cost nothing, and the machine's mood is shared."""
    lengths = lengths_of(options.trace, options.requests_per_client * clients, clients, options.most_tokens)
    found: dict[str, list[dict[str, float]]] = {}
    about: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory())
        port = free_port()
        command = [sys.executable, "-m", "millicent", "serve", options.model, "--port", str(port)]
        pid, start_s = stack.enter_context(running(command, port, "/ready", {"MILLICENT_HOME": home}))
        about["millicent_start_s"] = round(start_s, 2)
        targets = [ours(port, options.name or options.model)]
        if options.peer_python:
            peer_port = free_port()
            arguments = [options.peer_model, str(peer_port), str(clients), str(os.cpu_count())]
            command = [options.peer_python, "-c", _PEER, *arguments]
            _, about["llama.cpp_start_s"] = stack.enter_context(running(command, peer_port, "/health"))
            targets.append(peer(peer_port))
        for target in targets:
            asyncio.run(load(target, lengths[:clients], clients, options.vocabulary, seed=0))
        for number in range(1, rounds + 1):
            for target in targets:
                round_ = asyncio.run(load(target, lengths, clients, options.vocabulary, seed=number))
                found.setdefault(target.name, []).append(round_.figures())
        about["millicent_memory_mb"] = memory_mb(pid)
    medians = {
        name: {key: round(statistics.median(one[key] for one in all_rounds), 2) for key in all_rounds[0]}
        for name, all_rounds in found.items()
    }
    row: dict[str, Any] = {"clients": clients, "requests": len(lengths), "medians": medians, "rounds": found, **about}
    if len(medians) == 2:
        mine, theirs = medians["millicent"], medians["llama.cpp"]
        row["ratios"] = {key: round(mine[key] / theirs[key], 3) for key in mine}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument("--name", help="the model's public name where it differs, as for a folder")
    parser.add_argument("--clients", default="1,16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests-per-client", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=49_000)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--most-tokens", type=int, default=1024, help="of a request in the trace, scaled")
    parser.add_argument("--peer-python")
    parser.add_argument("--peer-model")
    options = parser.parse_args()
    for clients in map(int, options.clients.split(",")):
        row = measure(options, clients, options.rounds)
        print(json.dumps({key: value for key, value in row.items() if key != "rounds"}, indent=1))
        lengths = f"azure conversation, at most {options.most_tokens}" if options.trace else "128 in, 64 out"
        write("served", {"model": options.model, "lengths": lengths, **row, **environment()})


if __name__ == "__main__":
    main()
