"""Processor time of the gateway for each request and each streamed token, of several trees in turns.

    python bench/gateway_cpu.py [TREE ...] [--rounds 5] [--requests 1000] [--dry]

A tree is a checkout; by default, this one alone. All gateways and the fake upstream (bench/gateway_upstream.py) run
side by side, and each round asks every gateway the same in turn: whole answers of four tokens over 32 connections,
streams of 1,000 tokens that came at once, and streams of which a token came every 5 ms. What counts is the processor
time of the gateway's process, ledger included; the least of all rounds is what the work costs, and the median how busy
the machine was with other things. Results: bench/results/gateway_cpu.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any, cast

import gateway
import results
import uvloop

WARM_UP = 300
BURSTS, BURST_TOKENS = 48, 1000
PACED, PACED_TOKENS = 16, 200
STREAMS = 8  # at once


class Client(asyncio.Protocol):
    """Asks the same over and over on one connection, as long as there is something left to ask."""

    def __init__(self, request: bytes, left: list[int], done: asyncio.Future[None]) -> None:
        self._request = request
        self._left = left
        self._done = done
        self._transport: asyncio.Transport | None = None
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._ask()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        if not head.startswith(b"HTTP/1.1 200"):
            self._fail(f"an answer came back with {self._received[:300]!r}")
            return
        length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if len(body) >= int(length) if length else body.endswith(b"0\r\n\r\n"):
            self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"the connection was lost: {exc}")

    def _ask(self) -> None:
        assert self._transport is not None
        self._received = b""
        if self._left[0] == 0:
            self._done.set_result(None)
            self._transport.close()
            return
        self._left[0] -= 1
        self._transport.write(self._request)

    def _fail(self, why: str) -> None:
        if not self._done.done():
            self._done.set_exception(SystemExit(why))


async def ask(port: int, body: dict[str, Any], count: int, connections: int) -> None:
    loop = asyncio.get_running_loop()
    encoded = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(encoded)}\r\n\r\n"
    left, waits = [count], [loop.create_future() for _ in range(connections)]
    for done in waits:
        await loop.create_connection(lambda done=done: Client(head.encode() + encoded, left, done), "127.0.0.1", port)  # type: ignore[misc]
    await asyncio.gather(*waits)


def cpu_us(target: gateway.Process, body: dict[str, Any], count: int, connections: int) -> float:
    """Of the gateway, for each answer."""
    before_s = target.cpu_s
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(ask(target.port, body, count, connections))
    return (target.cpu_s - before_s) / count * 1e6


def one_round(target: gateway.Process, requests: int) -> dict[str, float]:
    burst = gateway.chat("bench", BURST_TOKENS, stream=True)
    paced = gateway.chat("paced", PACED_TOKENS, stream=True)
    return {
        "us_per_request": round(cpu_us(target, gateway.chat(), requests, gateway.CONNECTIONS), 1),
        "us_per_token_at_once": round(cpu_us(target, burst, BURSTS, STREAMS) / BURST_TOKENS, 2),
        "us_per_token_alone": round(cpu_us(target, paced, PACED, STREAMS) / PACED_TOKENS, 1),
    }


def name_of(tree: Path) -> str:
    """The commit that is checked out there."""
    asked = ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"]
    told = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return told or tree.resolve().name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="*", type=Path, default=[Path(__file__).parent.parent])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=1000, help="of each round")
    parser.add_argument("--dry", action="store_true", help="print, and write no result")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        behind = stack.enter_context(gateway.upstream(folder))
        targets = []
        for number, tree in enumerate(options.trees):
            own = folder / str(number)
            own.mkdir()
            path = str(tree.resolve() / "src")
            targets.append(stack.enter_context(gateway.millicent(own, behind, PYTHONPATH=path)))
            cpu_us(targets[-1], gateway.chat(), WARM_UP, gateway.CONNECTIONS)
        seen: list[list[dict[str, float]]] = [[] for _ in targets]
        for _ in range(options.rounds):
            for tree, target, rounds in zip(options.trees, targets, seen, strict=True):
                rounds.append(one_round(target, options.requests))
                print(tree, rounds[-1], flush=True)
        row: dict[str, Any] = {**results.environment(), "rounds": options.rounds, "trees": {}}
        for tree, target, rounds in zip(options.trees, targets, seen, strict=True):
            figures: dict[str, Any] = {"resident_mb": round(target.resident_mb, 1)}
            for name in rounds[0]:
                took = [each[name] for each in rounds]
                figures[name] = {"least": min(took), "median": statistics.median(took)}
            row["trees"][name_of(tree)] = figures
    if not options.dry:
        results.write("gateway_cpu", row)
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
