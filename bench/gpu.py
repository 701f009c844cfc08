"""Everything that is to be known of the engine on a GPU, in less than ten minutes, without a network.

    python bench/gpu.py [--seconds 540] [--sections machine,attention] [--usd-per-hour 3.50] [--cpu-rehearsal]

Prints one JSON line per figure as it comes, a table last, and appends all lines to bench/results/gpu.jsonl. Each
section has a process and a time limit of its own, so one that fails, hangs or loses the device costs only itself.
Weights are random numbers in the shapes of Qwen3-0.6B and Llama-3.1-8B, made on the device.

What is compared with what: bytes and operations are counted, the rates of memory and of the matrix units are measured
first (section `machine`), and `share` is the time these two would take over the time that passed.

`--cpu-rehearsal` runs the script itself, on tiny shapes in Triton's interpreter: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parent.parent
_OURS = [str(ROOT / "src"), str(ROOT / "tests"), str(Path(__file__).parent)]
sys.path[:0] = _OURS

import gpu_sections  # noqa: E402 - found by the line above
from results import environment, version, write  # noqa: E402

Line = dict[str, Any]

# Seconds a section may take at most, in the order of what is worth most if time runs out.
LIMITS = {
    "machine": 60,
    "expected": 20,
    "logits": 90,
    "qwen_single": 90,
    "qwen_many": 90,
    "transformers": 120,
    "llama_single": 90,
    "llama_many": 90,
    "profile": 90,
    "http": 100,
    "tests": 150,
    "attention": 60,
    "linears": 60,
    "kernel_tests": 150,
    "host": 30,
}
_GRACE_S = 5
_LINES = ROOT / "bench" / "results" / "gpu_lines.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(LIMITS))
    parser.add_argument("--seconds", type=float, default=540.0, help="for all sections together")
    parser.add_argument("--usd-per-hour", default="3.50", help="what the receipts of section `http` price the GPU at")
    parser.add_argument("--out", type=Path, default=_LINES, help="each line goes here at once, from the start anew")
    parser.add_argument("--cpu-rehearsal", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cpu_rehearsal:
        os.environ["TRITON_INTERPRET"] = "1"
    # Servers that a section starts find us too.
    os.environ["PYTHONPATH"] = os.pathsep.join([*_OURS, *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = gpu_sections.Settings(rehearsal=options.cpu_rehearsal, usd_per_hour=options.usd_per_hour)
    if options.one:
        gpu_sections.SECTIONS[options.one](settings)
        return 0
    os.environ.setdefault(gpu_sections.CEILINGS, str(Path(tempfile.mkdtemp()) / "ceilings.json"))
    if missing := missing_packages():
        print(f"not installed: {', '.join(missing)}; see docs/gpu.md, The script", file=sys.stderr)
        return 2
    start = time.monotonic()
    lines: list[Line] = []
    options.out.parent.mkdir(exist_ok=True)
    told = partial(_told, options.out.open("w", buffering=1))
    if options.cpu_rehearsal:
        told({"rehearsal": "tiny shapes on a processor, under the names of the real ones: no figure means anything"})
    for name in options.sections.split(","):
        left = options.seconds - (time.monotonic() - start)
        limit = min(LIMITS[name] * (4 if options.cpu_rehearsal else 1), left)
        if limit < _GRACE_S:
            lines.append(told({"section": name, "skipped": "no time was left"}))
            continue
        began = time.monotonic()
        lines += run(name, limit, told)
        lines.append(told({"section": name, "section_s": round(time.monotonic() - began, 1)}))
    print_table(lines)
    if not options.cpu_rehearsal:
        write("gpu", {**environment(), "lines": lines})
    return int(any("error" in line for line in lines))


def run(name: str, limit_s: float, told: Callable[[Line], Line]) -> list[Line]:
    """The section's lines; one more if it failed."""
    process = subprocess.Popen(
        [sys.executable, "-u", __file__, *sys.argv[1:], "--one", name],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that what it starts can be ended with it
    )
    noise: list[str] = []
    said: queue.Queue[str | None] = queue.Queue()

    def read(source: Any, take: Callable[[str], None], last: Callable[[], None]) -> None:
        for line in source:
            take(line)
        last()

    readers = [
        threading.Thread(target=read, args=(process.stdout, said.put, lambda: said.put(None)), daemon=True),
        threading.Thread(target=read, args=(process.stderr, noise.append, lambda: None), daemon=True),
    ]
    for reader in readers:
        reader.start()
    deadline = time.monotonic() + limit_s
    lines: list[Line] = []
    problem = ""
    while True:
        try:
            line = said.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            problem = f"took longer than {limit_s:.0f} s"
            break
        if line is None:
            break
        if line.startswith("{"):
            lines.append(told({"section": name, **json.loads(line)}))
    if problem:
        end_all(process.pid)
    code = process.wait()
    end_all(process.pid)  # a server or a test that it left would hold the device
    if code != 0 and not problem:
        readers[1].join(_GRACE_S)
        problem = " | ".join(line.strip() for line in noise[-12:])[-1500:] or f"exit status {process.returncode}"
    if problem:
        lines.append(told({"section": name, "error": problem}))
    return lines


def end_all(session: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)


def missing_packages() -> list[str]:
    """Of those that a plain installation and the engine need, by pyproject.toml, and Triton."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["engine"], "triton"]
    names = [re.split(r"[>=;\s]", each)[0] for each in wanted]
    return [name for name in names if version(name) is None]


def _told(file: TextIO, line: Line) -> Line:
    text = json.dumps(line)
    print(text, flush=True)
    file.write(text + "\n")
    return line


def print_table(lines: list[Line]) -> None:
    print()
    for line in lines:
        if "figure" in line:
            share = f"  {100 * line['share']:5.1f}% of the floor" if line.get("share") else ""
            target = f"  (target {line['target']:,})" if line.get("target") else ""
            print(f"{line['section']:13} {line['figure']:75} {line['value']:>12,} {line['unit']}{share}{target}")
        elif "error" in line or "skipped" in line:
            print(f"{line['section']:13} {line.get('error') or line.get('skipped')}")


if __name__ == "__main__":
    sys.exit(main())
