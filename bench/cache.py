"""A hit of the response cache beside the same answer fetched anew: latency, and the gateway's processor time.

    python bench/cache.py [--requests 2000] [--dry]                # under a minute

One `millicent serve` with its ledger durable across loss of power and its cache on disk, before the fake upstream of
bench/gateway.py, on loopback; one connection, one request after another, in blocks that take turns: `no-store`, which
goes to the upstream, and the same request answered from the cache, whole and as a stream. Each waits for the disk,
an answer from the upstream twice and a hit once, so `fsync_ms` stands beside. Results: bench/results/cache.jsonl.
"""

from __future__ import annotations

import argparse
import http.client
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import gateway
import results

_CACHE = "[cache]\nenabled = true\n"
_BLOCKS = 4
_KINDS: dict[str, tuple[str, bool, str]] = {  # Cache-Control, streamed, what it must have been
    "fetched": ("no-store", False, "bypass"),
    "hit": ("max-age=3600", False, "hit"),
    "hit_streamed": ("max-age=3600", True, "hit"),
}


def block(target: gateway.Process, kind: str, requests: int) -> tuple[list[float], float]:
    """Milliseconds of each, and seconds of the gateway's processor time."""
    control, stream, expected = _KINDS[kind]
    body = json.dumps(gateway.chat(tokens=200, stream=stream) | {"temperature": 0})
    headers = {"Content-Type": "application/json", "Cache-Control": control}
    connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=60)
    took_ms, before_s = [], target.cpu_s
    for _ in range(requests):
        began_s = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", body, headers)
        response = connection.getresponse()
        response.read()
        took_ms.append((time.perf_counter() - began_s) * 1e3)
        if response.status != 200 or response.headers["X-Millicent-Cache"] != expected:
            raise SystemExit(f"{kind}: {response.status} {response.headers['X-Millicent-Cache']}")
    connection.close()
    return took_ms, target.cpu_s - before_s


def measure(requests: int, folder: Path) -> dict[str, Any]:
    took_ms: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    cpu_s = dict.fromkeys(_KINDS, 0.0)
    with gateway.upstream(folder) as behind, gateway.millicent(folder, behind, _CACHE) as ours:
        gateway.ask(ours.port, gateway.chat(tokens=200) | {"temperature": 0})
        for _ in range(_BLOCKS):
            for kind in _KINDS:
                more_ms, more_s = block(ours, kind, requests // _BLOCKS)
                took_ms[kind] += more_ms
                cpu_s[kind] += more_s
    found: dict[str, Any] = {"requests": requests, "fsync_ms": gateway.fsync_ms(folder)}
    for kind, each_ms in took_ms.items():
        each_ms.sort()
        found[kind] = {
            "p50_ms": round(each_ms[len(each_ms) // 2], 3),
            "p99_ms": round(each_ms[len(each_ms) * 99 // 100], 3),
            "cpu_us_per_request": round(cpu_s[kind] / len(each_ms) * 1e6, 1),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000, help="of each kind")
    parser.add_argument("--dry", action="store_true", help="print, and write no result")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = {**results.environment(), **measure(options.requests, Path(folder))}
    if not options.dry:
        results.write("cache", row)
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
