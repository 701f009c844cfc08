"""What it costs to keep a prompt's hashes: cutting and hashing it, and the wider row.

    python bench/prompts.py

Microseconds of processor time per request, the least of many rounds, for prompts from one short message to 200; the row
is the difference between receipts opened with and without, in memory. Appended to bench/results/prompts.jsonl.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from contextlib import closing

import msgspec
import results

from millicent.caching.segments import prompt_of
from millicent.core.clock import SystemClock
from millicent.core.receipts import Attempt, Receipt, Role
from millicent.core.request import Message, Request
from millicent.ledger.schema import migrate
from millicent.ledger.store import Opening, open_receipts

SECRET = b"s" * 32
# Messages after the system prompt, and that prompt's bytes.
PROMPTS = {"one short message": (1, 0), "4 kB": (2, 4_000), "20 kB": (5, 20_000), "200 messages": (200, 20_000)}
GROUP = 200


def request(messages: int, system_bytes: int) -> Request:
    """Of messages of 120 bytes."""
    turns = tuple(Message("user" if i % 2 == 0 else "assistant", "Some words. " * 10) for i in range(messages))
    system = (Message("system", "x" * system_bytes),) if system_bytes else ()
    return Request("rcpt", "openai.chat", "m", messages=system + turns)


def least_us(work: Callable[[], object], rounds: int, each: int) -> float:
    took = []
    for _ in range(rounds):
        begun = time.process_time_ns()
        work()
        took.append((time.process_time_ns() - begun) / each / 1000)
    return round(min(took), 1)


def repeated(work: Callable[[], object], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            work()

    return run


def row_us(asked: Request, *, kept: bool) -> float:
    """Opening a receipt, in groups."""
    count = 0
    attempt = Attempt(1, "fake", "here", "m", Role.INFERENCE, 1)
    receipt = Receipt(
        id="", created_at_ns=1, model="m", dialect="openai.chat", stream=False, attempts=(attempt,),
        prompt=prompt_of(asked, SECRET) if kept else None,
    )  # fmt: skip
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        migrate(connection, SystemClock())

        def work() -> None:
            nonlocal count
            openings = []
            for _ in range(GROUP):
                count += 1
                openings.append(Opening(msgspec.structs.replace(receipt, id=f"rcpt_{count:026d}"), "gw"))
            connection.execute("BEGIN")
            open_receipts(connection, openings)
            connection.execute("COMMIT")

        return least_us(work, 30, GROUP)


def main() -> None:
    found = {}
    for name, (messages, system_bytes) in PROMPTS.items():
        asked = request(messages, system_bytes)
        hashing_us = least_us(repeated(lambda asked=asked: prompt_of(asked, SECRET), 100), 30, 100)  # type: ignore[misc]
        found[name] = {
            "hashing_us": hashing_us,
            "row_us": round(row_us(asked, kept=True) - row_us(asked, kept=False), 1),
            "kept_bytes": len(prompt_of(asked, SECRET).packed()),
        }
    results.write("prompts", results.environment() | {"prompts": found})
    for name, figures in found.items():
        print(f"{name:20} {figures}")


if __name__ == "__main__":
    main()
