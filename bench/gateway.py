"""The gateway beside LiteLLM's proxy: requests per second, added latency, memory, and what a stream costs.

    python -m venv ENV && ENV/bin/pip install 'litellm[proxy]'     # once, an environment of its own
    python bench/gateway.py [--litellm ENV] [--seconds 10]         # needs wrk (apt-get install wrk); under 4 minutes
    python bench/gateway.py --memory [--requests 500000]

One fake upstream (bench/gateway_upstream.py), `millicent serve` with its ledger on and durable across loss of power,
and LiteLLM's proxy with one worker and no database: same machine, same run, same load generator, one after the other,
all on loopback. `wrk` asks for whole answers of four tokens: with 32 connections that never wait, and paced at about
200, 500 and 1,000 requests/s, each against the upstream alone too; what a gateway adds at a rate (`added_ms`, by
requests/s) is its percentile less the upstream's. Connections that wait for an answer ask for nothing: where fewer
requests came than were asked for, the rate is more than the gateway can do. An
answer waits for the disk twice, so `fsync_ms` stands beside, and a run whose ledger lies in memory (/dev/shm), where
nothing does. Streams of 1,000 tokens are told by the processor time of the gateway's process: those whose tokens came
all at once, and those of which one came every 5 ms. In the end every answer must have its priced receipt.
Everything shares the machine's cores, so requests per second are what is left beside load generator and upstream;
`cpu_us_per_request` is the gateway's own processor time. Results: bench/results/gateway.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import results

CONNECTIONS = 32
PACED_PER_S = (200, 500, 1000)
STREAM_TOKENS = 1000
STREAMS = 8  # at once
_HERE = Path(__file__).parent
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_READY_S = 90

_MILLICENT = """
[server]
port = {port}
[limits]
max_concurrent = 1024
[placements.fake]
kind = "api"
server = "compatible"
base_url = "http://127.0.0.1:{upstream}/v1"
max_connections = 256
[models.bench]
placement = "fake"
[models.paced]
placement = "fake"
[prices.bench]
input = 1
output = 2
[prices.paced]
input = 1
output = 2
"""

_LITELLM = """
model_list:
  - model_name: bench
    litellm_params: {{model: openai/bench, api_base: "http://127.0.0.1:{upstream}/v1", api_key: none}}
litellm_settings: {{telemetry: false}}
"""

_WRK = """
wrk.method = "POST"
wrk.path = "/v1/chat/completions"
wrk.headers["Content-Type"] = "application/json"
wrk.body = [[{body}]]
{delay}
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('RESULT {{"requests": %d, "seconds": %.3f, "failed": %d, "p50_ms": %.3f, "p99_ms": %.3f}}\\n',
    summary.requests, summary.duration / 1e6, e.connect + e.read + e.write + e.status + e.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
"""


@dataclass(frozen=True)
class Process:
    """One that is measured: where it listens, and which it is."""

    port: int
    pid: int

    @property
    def cpu_s(self) -> float:
        """User and system time of it and all its threads."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * _TICK_S

    @property
    def resident_mb(self) -> float:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def ask(port: int, body: dict[str, Any]) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()


def chat(model: str = "bench", tokens: int = 4, *, stream: bool = False) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": "Say a word or two."}],
        "max_tokens": tokens,
        "stream": stream,
    }


@contextlib.contextmanager
def running(command: list[str], port: int, log: Path, **environment: str) -> Iterator[Process]:
    """Until it has answered a request; ended by its own identifier."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | environment)
    try:
        limit_s = time.monotonic() + _READY_S
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if ask(port, chat())[0] == 200:
                    break
            if process.poll() is not None or time.monotonic() > limit_s:
                raise SystemExit(f"{command[:3]} didn't answer: {log.read_text()[-2000:]}")
            time.sleep(0.1)
        yield Process(port, process.pid)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def load(wrk: str, target: Process, folder: Path, seconds: int, delay_ms: float | None = None) -> dict[str, Any]:
    """What wrk saw, and the processor time each request took the target."""
    delay = "" if delay_ms is None else f"function delay() return math.random() * {2 * delay_ms} end"
    script = folder / "chat.lua"
    script.write_text(_WRK.format(body=json.dumps(chat()), delay=delay))
    before_s = target.cpu_s
    out = subprocess.run(
        [wrk, "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "-s", str(script), f"http://127.0.0.1:{target.port}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    seen: dict[str, Any] = json.loads(out.partition("RESULT ")[2])
    seen["requests_per_s"] = round(seen["requests"] / seen["seconds"], 1)
    seen["cpu_us_per_request"] = round((target.cpu_s - before_s) / max(1, seen["requests"]) * 1e6, 1)
    return seen


def streams(target: Process, model: str, rounds: int) -> dict[str, Any]:
    """Processor time per stream of 1,000 tokens."""

    def read() -> None:
        for _ in range(rounds):
            status, body = ask(target.port, chat(model, STREAM_TOKENS, stream=True))
            if status != 200 or body.count(b" word") < STREAM_TOKENS or not body.endswith(b"[DONE]\n\n"):
                raise SystemExit(f"a stream came back with {status}: {body[-300:]!r}")

    before_s = target.cpu_s
    readers = [threading.Thread(target=read) for _ in range(STREAMS)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    count = rounds * STREAMS
    return {"streams": count, "cpu_ms_per_stream": round((target.cpu_s - before_s) / count * 1e3, 2)}


def check_receipts(home: Path, answered: int) -> int:
    """Closed and priced; at least as many as there were answers, some of which wrk didn't wait for."""
    with contextlib.closing(sqlite3.connect(home / "ledger.db")) as connection:
        question = (
            "SELECT count(DISTINCT receipts.id) FROM receipts JOIN lines ON lines.receipt = receipts.id"
            " WHERE status = 'succeeded' AND amount_nanousd > 0"
        )
        found = int(connection.execute(question).fetchone()[0])
    if found < answered:
        raise SystemExit(f"{answered} answers have only {found} receipts")
    return found


def fsync_ms(folder: Path, count: int = 100) -> dict[str, float]:
    """What one page takes to become durable."""
    took = []
    with (folder / "page").open("wb", buffering=0) as file:
        for _ in range(count):
            file.write(bytes(4096))
            before_s = time.perf_counter()
            os.fdatasync(file.fileno())
            took.append((time.perf_counter() - before_s) * 1e3)
    took.sort()
    return {"p50": round(took[count // 2], 3), "p99": round(took[-2], 3)}


@contextlib.contextmanager
def upstream(folder: Path) -> Iterator[Process]:
    port = free_port()
    with running([sys.executable, str(_HERE / "gateway_upstream.py"), str(port)], port, folder / "upstream.log") as one:
        yield one


@contextlib.contextmanager
def millicent(folder: Path, behind: Process, more: str = "", **environment: str) -> Iterator[Process]:
    home, port = folder / "home", free_port()
    home.mkdir()
    (home / "millicent.toml").write_text(_MILLICENT.format(port=port, upstream=behind.port) + more)
    command = [sys.executable, "-m", "millicent", "serve"]
    with running(command, port, folder / "millicent.log", MILLICENT_HOME=str(home), **environment) as one:
        yield one


@contextlib.contextmanager
def litellm(folder: Path, environment: Path, behind: Process) -> Iterator[Process]:
    config, port = folder / "litellm.yaml", free_port()
    config.write_text(_LITELLM.format(upstream=behind.port))
    command = [str(environment / "bin" / "litellm"), "--config", str(config), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--num_workers", "1"]
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "LITELLM_TELEMETRY": "False"}
    # As open on loopback as ours is without keys.
    quiet["LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY"] = "true"
    with running(command, port, folder / "litellm.log", **quiet) as one:
        yield one


def measure(target: Process, wrk: str, folder: Path, seconds: int, *, paced: bool = True) -> dict[str, Any]:
    warm = load(wrk, target, folder, 2)
    found = {"flat_out": load(wrk, target, folder, seconds)}
    for rate in PACED_PER_S if paced else ():
        found[f"paced_{rate}"] = load(wrk, target, folder, seconds, CONNECTIONS * 1000 / rate)
    answered = sum(each["requests"] - each["failed"] for each in (warm, *found.values()))
    return found | {"answered": answered, "resident_mb": round(target.resident_mb, 1)}


def compare(options: argparse.Namespace, wrk: str, folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"connections": CONNECTIONS, "seconds": options.seconds, "fsync_ms": fsync_ms(folder)}
    with upstream(folder) as behind:
        row["upstream"] = measure(behind, wrk, folder, options.seconds)
        with millicent(folder, behind) as ours:
            row["millicent"] = measured = measure(ours, wrk, folder, options.seconds)
            measured["burst_stream"] = streams(ours, "bench", 12)
            measured["paced_stream"] = streams(ours, "paced", 1)
            answered = measured["answered"] + sum(measured[f"{kind}_stream"]["streams"] for kind in ("burst", "paced"))
            measured["receipts"] = check_receipts(folder / "home", answered)
        with tempfile.TemporaryDirectory(dir="/dev/shm") as memory, millicent(Path(memory), behind) as ours:
            row["millicent_ledger_in_memory"] = measure(ours, wrk, folder, options.seconds)
        if options.litellm is not None:
            with litellm(folder, options.litellm, behind) as theirs:
                row["litellm"] = measure(theirs, wrk, folder, options.seconds, paced=False)
                row["litellm"]["version"] = installed(options.litellm)
    for name in ("millicent", "millicent_ledger_in_memory"):
        row[name]["added_ms"] = {
            rate: {
                each: round(row[name][at][f"{each}_ms"] - row["upstream"][at][f"{each}_ms"], 3)
                for each in ("p50", "p99")
            }
            for rate, at in ((rate, f"paced_{rate}") for rate in PACED_PER_S)
        }
    if options.litellm is not None:
        rates = [row[name]["flat_out"]["requests_per_s"] for name in ("millicent", "litellm")]
        row["times_litellm"] = round(rates[0] / rates[1], 1)
    return row


def installed(environment: Path) -> str:
    code = "import importlib.metadata as m; print(m.version('litellm'))"
    told = subprocess.run([str(environment / "bin" / "python"), "-c", code], capture_output=True, text=True, check=True)
    return told.stdout.strip()


def memory(options: argparse.Namespace, wrk: str, folder: Path) -> dict[str, Any]:
    """Resident memory after every part of a long run."""
    seen: list[dict[str, Any]] = []
    done = 0
    with upstream(folder) as behind, millicent(folder, behind) as ours:
        while done < options.requests:
            part = load(wrk, ours, folder, options.seconds)
            done += part["requests"] - part["failed"]
            seen.append({"requests": done, "resident_mb": round(ours.resident_mb, 1)})
            print(seen[-1], flush=True)
        counted = check_receipts(folder / "home", done)
    return {"memory": seen, "receipts": counted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--litellm", type=Path, help="the environment that litellm[proxy] is installed in")
    parser.add_argument("--seconds", type=int, default=10, help="of each part")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--requests", type=int, default=500_000)
    parser.add_argument("--dry", action="store_true", help="print, and write no result")
    options = parser.parse_args()
    wrk = shutil.which("wrk")
    if wrk is None:
        raise SystemExit("wrk isn't here: apt-get install wrk")
    with tempfile.TemporaryDirectory() as folder:
        found = (memory if options.memory else compare)(options, wrk, Path(folder))
    row = {**results.environment(), **found}
    if not options.dry:
        results.write("gateway", row)
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
