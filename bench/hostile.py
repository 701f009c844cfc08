"""Clients that mean no good beside one that does: connects and disconnects, aborts, prompts and grammars beyond reason.

    python bench/hostile.py [--model smollm2:135m] [--rate 200] [--seconds 60] [--url URL --log ENGINE_LOG]

Starts a server of its own unless given one's address and its engine's log. `--rate` acts begin each second, drawn from
ACTS; beside them one client asks the same question again and again. Ends with status 1 unless every answer was one that
is documented, the question's last answer is the first one, and the engine complains of no KV block that nobody holds.
One line goes to bench/results/hostile.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from results import environment, write
from served import free_port, quantile, running

DOCUMENTED = {200, 400, 413, 429, 503}
_COMPLAINT = "held by nobody"


class Clients:
    def __init__(self, url: str, model: str, seed: int) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80
        self.model = model
        self.random = random.Random(seed)
        self.statuses: Counter[int] = Counter()
        self.acts: Counter[str] = Counter()

    # What they do.

    async def connect(self) -> None:
        _, writer = await self._open()
        writer.close()

    async def half_a_head(self) -> None:
        _, writer = await self._open()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: local")
        await writer.drain()
        writer.close()

    async def leave_in_the_prompt(self) -> None:
        await self._ask(
            self._body(prompt=self._words(700), max_tokens=200, stream=True), leave_s=self.random.random() / 10
        )

    async def leave_in_the_answer(self) -> None:
        await self._ask(self._body(prompt=self._words(5), max_tokens=500, stream=True), leave_at_answer=True)

    async def too_long(self) -> None:
        await self._ask(self._body(prompt=[5] * 300_000))

    async def garbage(self) -> None:
        await self._ask(self.random.randbytes(300))

    async def grammar(self) -> None:
        definition = self.random.choice(
            ["(" * 500, "(a{1,5000}){1,5000}", "[", "(?=x)y", "start: " + "x" * 1000, "start: start start |", "\0"]
        )
        syntax = self.random.choice(["regex", "lark"])
        form = {"type": "grammar", "syntax": syntax, "definition": definition}
        await self._ask(self._body(prompt="a", max_tokens=5, response_format=form))

    async def schema(self) -> None:
        deep: dict[str, Any] = {}
        for _ in range(self.random.choice([3, 300])):
            deep = {"type": "object", "properties": {"a": deep, "b": {"not": {}}}}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": deep}}
        await self._ask(self._body(prompt="a", max_tokens=5, response_format=form))

    async def question(self) -> str | None:
        """One that is meant. Its answer; None where it was told to come again."""
        status, body = await self._ask(self._body(prompt="Once upon a time", max_tokens=16, temperature=0))
        return json.loads(body)["choices"][0]["text"] if status == 200 else None

    # How.

    def _words(self, count: int) -> str:
        return " ".join(str(self.random.randrange(10**6)) for _ in range(count))

    def _body(self, **fields: Any) -> bytes:
        return json.dumps({"model": self.model, **fields}).encode()

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.host, self.port)

    async def _ask(
        self, body: bytes, leave_s: float | None = None, *, leave_at_answer: bool = False
    ) -> tuple[int, bytes]:
        reader, writer = await self._open()
        try:
            head = (
                f"POST /v1/completions HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nContent-Type: application/json\r\n"
            )
            writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            await writer.drain()
            if leave_s is not None:
                await asyncio.sleep(leave_s)
                return 0, b""
            status = int((await reader.readline()).split()[1])
            self.statuses[status] += 1
            while await reader.readline() not in {b"\r\n", b""}:
                pass
            if leave_at_answer:
                await reader.read(1)
                return status, b""
            return status, await reader.read()
        finally:
            writer.close()


ACTS: tuple[Callable[[Clients], Awaitable[None]], ...] = (
    *[Clients.connect] * 10,
    *[Clients.half_a_head] * 4,
    *[Clients.leave_in_the_prompt] * 3,
    *[Clients.leave_in_the_answer] * 2,
    Clients.too_long,
    Clients.garbage,
    Clients.grammar,
    Clients.schema,
)


async def attack(clients: Clients, rate: int, seconds: float) -> dict[str, Any]:
    first = await patiently(clients)
    asked: list[float] = []
    wrong = 0
    stop = asyncio.Event()

    async def ask_on() -> None:
        nonlocal wrong
        while not stop.is_set():
            start = time.perf_counter()
            answer = await patiently(clients)
            asked.append(time.perf_counter() - start)
            wrong += answer != first

    async def act(one: Callable[[Clients], Awaitable[None]]) -> None:
        clients.acts[one.__name__] += 1
        with contextlib.suppress(ConnectionError, IndexError):  # the server may close first
            await one(clients)

    asking = asyncio.create_task(ask_on())
    acts: set[asyncio.Task[None]] = set()
    start = time.perf_counter()
    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, start + number / rate - time.perf_counter()))
        task = asyncio.create_task(act(clients.random.choice(ACTS)))
        acts.add(task)
        task.add_done_callback(acts.discard)
    took = time.perf_counter() - start
    await asyncio.gather(*acts)
    stop.set()
    await asking
    return {
        "acts": dict(clients.acts),
        "acts_per_s": round(rate * seconds / took, 1),
        "statuses": {str(status): count for status, count in sorted(clients.statuses.items())},
        "undocumented": sorted(set(clients.statuses) - DOCUMENTED),
        "asked": len(asked),
        "wrong": wrong,
        "asked_ms_p50": round(1000 * quantile(asked, 0.5)),
        "asked_ms_max": round(1000 * max(asked)),
        "same_afterwards": await patiently(clients) == first,
    }


async def patiently(clients: Clients) -> str:
    answer = await clients.question()
    while answer is None:
        await asyncio.sleep(0.2)
        answer = await clients.question()
    return answer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2:135m", help="to serve, or its name at --url")
    parser.add_argument("--rate", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--url")
    parser.add_argument("--log", type=Path, help="the engine's, of the server at --url")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        url, log = options.url, options.log
        if url is None:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            port = free_port()
            command = [sys.executable, "-m", "millicent", "serve", options.model, "--port", str(port)]
            stack.enter_context(running(command, port, "/ready", {"MILLICENT_HOME": str(home)}))
            url, log = f"http://127.0.0.1:{port}", home / "logs" / "engine-cpu.log"
        found = asyncio.run(attack(Clients(url, options.model, seed=1), options.rate, options.seconds))
        time.sleep(1)  # what was left behind is noticed by an engine that comes to rest
        found["blocks_left_held"] = log is not None and _COMPLAINT in log.read_text()
    row = {"model": options.model, "rate": options.rate, "seconds": options.seconds, **found}
    print(json.dumps(row, indent=1))
    if options.url is None:
        write("hostile", row | environment())
    good = found["same_afterwards"] and not (found["wrong"] or found["undocumented"] or found["blocks_left_held"])
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
