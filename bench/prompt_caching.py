"""Marks for Anthropic's cache on recorded traffic: what its input costs without, as the gateway marks it, and if every
prompt were marked at its end.

    python bench/prompt_caching.py TRACE.jsonl [--requests N] [--speed 1.0]

The trace is one of Mooncake's (FAST'25): when a request came, how long it was, and a hash for each 512 tokens. Each
of those is a message here; what isn't a whole one is left out. Requests go through the real decision and encoder to a
model of Anthropic's cache (tests/support/fake_anthropic.py), at $3 a million fresh tokens, $0.30 read, $3.75 and $6
written; `--speed` 10 makes ten times as many come in a time. The fractions of what it costs without marks go to
bench/results/prompt_caching.jsonl, with the microseconds that deciding takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import msgspec
import results

from millicent.caching.marking import with_marks
from millicent.caching.prompt_caching import PromptCaching, Terms, marked
from millicent.caching.segments import prompt_of
from millicent.core.clock import NS_PER_MS
from millicent.core.money import Money
from millicent.core.request import Message, Request
from millicent.core.usage import Provenance, Usage
from millicent.meter.prices import PriceList
from millicent.wire.anthropic_upstream import encode
from support.fake_anthropic import PromptCache
from support.receipts import settled

BLOCK_TOKENS = 512
MODEL = "claude-sonnet-4-5"
PRICES = PriceList(
    input=Decimal(3), input_cached=Decimal("0.3"), cache_write_5m=Decimal("3.75"), cache_write_1h=Decimal(6)
)
TERMS = Terms.of(PRICES, 0)
Way = Callable[[Request, int], Usage]


class Gateway:
    """As the gateway marks requests. `decided_us` is how long each decision took."""

    def __init__(self) -> None:
        self._caching = PromptCaching()
        self._cache = PromptCache()
        self.decided_us: list[float] = []

    def __call__(self, request: Request, now_ns: int) -> Usage:
        begun = time.perf_counter_ns()
        marks = self._caching.marks(request, "there", MODEL, PRICES, now_ns)
        assert marks is not None
        self._caching.begin(request.id, marks, now_ns)
        self.decided_us.append((time.perf_counter_ns() - begun) / 1000)
        usage = used(self._cache, marked(request, marks), now_ns)
        self._caching.settle(request.id, msgspec.structs.replace(settled(request.id), usage=usage))
        return usage


class Always:
    """Every prompt is marked at its end."""

    def __init__(self) -> None:
        self._cache = PromptCache()

    def __call__(self, request: Request, now_ns: int) -> Usage:
        last = len(request.messages or ()) - 1
        return used(self._cache, with_marks(request, {last: "5m"}), now_ns)


def used(cache: PromptCache, request: Request, now_ns: int) -> Usage:
    told = cache.usage(json.loads(encode(request, MODEL, "the fake").body), now_ns)
    return Usage.of(
        Provenance.REPORTED,
        input_fresh=told["input_tokens"],
        input_cache_read=told["cache_read_input_tokens"],
        input_cache_write_5m=told["cache_creation"]["ephemeral_5m_input_tokens"],
        input_cache_write_1h=told["cache_creation"]["ephemeral_1h_input_tokens"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--requests", type=int, default=10**9)
    parser.add_argument("--speed", type=float, default=1.0)
    options = parser.parse_args()
    assert TERMS is not None
    gateway = Gateway()
    ways: dict[str, Way] = {"gateway": gateway, "always": Always()}
    paid = dict.fromkeys(ways, Money(0))
    plain, count = Money(0), 0
    for line in options.trace.read_text().splitlines()[: options.requests]:
        told = json.loads(line)
        blocks = told["hash_ids"][: told["input_length"] // BLOCK_TOKENS]
        if not blocks:
            continue
        count += 1
        messages = tuple(Message("user", f"{block} ".ljust(4 * BLOCK_TOKENS, "x")) for block in blocks)
        request = Request(f"rcpt_{count:026d}", "openai.chat", "m", messages=messages)
        request = msgspec.structs.replace(request, hashed=prompt_of(request, b"bench" * 4))
        whole = Money.price(len(blocks) * BLOCK_TOKENS, TERMS.fresh.scaleb(-6))
        plain += whole
        for name, way in ways.items():
            paid[name] += whole - TERMS.saved(way(request, int(told["timestamp"] / options.speed) * NS_PER_MS))
    row = {
        **results.environment(),
        "trace": options.trace.stem,
        "requests": count,
        "speed": options.speed,
        "plain_usd": str(plain),
        "paid": {name: round(money.nanousd / plain.nanousd, 4) for name, money in paid.items()},
        "decided_us_p50": round(statistics.median(gateway.decided_us), 1),
    }
    results.write("prompt_caching", row)
    print(msgspec.json.format(msgspec.json.encode(row), indent=2).decode())


if __name__ == "__main__":
    main()
