"""How good quotes are: each request of a trace is quoted from those before it, then compared with what it came to.

    python bench/quotes.py AzureLLMInferenceTrace_conv.csv

The trace is a CSV with the columns ContextTokens and GeneratedTokens, in order of arrival (Azure's LLM inference traces
of 2023 have them). Output tokens cost four times input tokens. The baselines know the past too: the answer to the
nearest input length (the newest of equals), with an interval as wide as that prediction's errors have been; and the
twenty nearest, with their middle and their span from the 5th to the 95th of a hundred.
"""

from __future__ import annotations

import bisect
import csv
import statistics
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, Protocol

from results import environment, write

from millicent.meter.lengths import OutputLengths

OUTPUT_PRICE = 4  # input tokens' worth
WARM_UP = 500  # requests that are learned from but not judged
WINDOW = 4096


class Forecaster(Protocol):
    def forecast(self, read: int) -> tuple[int, int, int]: ...
    def learn(self, read: int, written: int) -> None: ...


class Ours:
    def __init__(self) -> None:
        self._lengths = OutputLengths()

    def forecast(self, read: int) -> tuple[int, int, int]:
        tokens = self._lengths.forecast("m", None, read, None).tokens
        return tokens.low, tokens.expected, tokens.high

    def learn(self, read: int, written: int) -> None:
        self._lengths.learn("m", None, read, written, None, cut=False)


class Past:
    """The last answers, sorted by the length of their input."""

    def __init__(self) -> None:
        self.by_input: list[tuple[int, int, int]] = []
        self._order: deque[tuple[int, int, int]] = deque()
        self._count = 0

    def add(self, read: int, written: int) -> None:
        if len(self._order) == WINDOW:
            del self.by_input[bisect.bisect_left(self.by_input, self._order.popleft())]
        self._count += 1
        self._order.append((read, self._count, written))
        bisect.insort(self.by_input, self._order[-1])

    def nearest(self, read: int, count: int) -> list[int]:
        above = bisect.bisect_right(self.by_input, (read, self._count + 1, 0))
        around = self.by_input[max(0, above - count) : above + count]
        return [written for _, _, written in sorted(around, key=lambda each: (abs(each[0] - read), -each[1]))[:count]]


class Nearest:
    """One neighbour, and nine in ten of its past errors either way."""

    def __init__(self) -> None:
        self._past = Past()
        self._errors: list[int] = []

    def forecast(self, read: int) -> tuple[int, int, int]:
        found = self._past.nearest(read, 1)
        middle = found[0] if found else 256
        error = self._errors[min(len(self._errors) - 1, len(self._errors) * 9 // 10)] if self._errors else middle
        return max(0, middle - error), middle, middle + error

    def learn(self, read: int, written: int) -> None:
        bisect.insort(self._errors, abs(written - self.forecast(read)[1]))
        self._past.add(read, written)


class Twenty:
    """Twenty neighbours, uncalibrated."""

    def __init__(self) -> None:
        self._past = Past()

    def forecast(self, read: int) -> tuple[int, int, int]:
        found = sorted(self._past.nearest(read, 20)) or [256]
        return found[len(found) // 20], found[len(found) // 2], found[len(found) - 1 - len(found) // 20]

    def learn(self, read: int, written: int) -> None:
        self._past.add(read, written)


def judge(forecaster: Forecaster, trace: list[tuple[int, int]]) -> dict[str, Any]:
    """Coverage, interval width over the expected cost, and error over the actual cost."""
    inside, above, widths, errors = 0, 0, [], []
    started = time.perf_counter()
    for turn, (read, written) in enumerate(trace):
        low, expected, high = (read + OUTPUT_PRICE * tokens for tokens in forecaster.forecast(read))
        actual = read + OUTPUT_PRICE * written
        if turn >= WARM_UP:
            inside += low <= actual <= high
            above += actual > high
            widths.append((high - low) / expected)
            errors.append(abs(actual - expected) / actual)
        forecaster.learn(read, written)
    took_s = time.perf_counter() - started
    return {
        "coverage": round(inside / len(errors), 4),
        "above_the_hold": round(above / len(errors), 4),
        "median_width": round(statistics.median(widths), 4),
        "mean_width": round(statistics.mean(widths), 4),
        "median_error": round(statistics.median(errors), 4),
        "mean_error": round(statistics.mean(errors), 4),
        "us_per_request": round(took_s / len(trace) * 1e6, 1),
    }


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} TRACE.csv")
    path = Path(sys.argv[1])
    with path.open(newline="") as file:
        trace = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)]
    judged = {
        "quote": judge(Ours(), trace),
        "nearest_neighbour": judge(Nearest(), trace),
        "twenty_neighbours": judge(Twenty(), trace),
    }
    for name, figures in judged.items():
        print(f"{name:>18}  " + "  ".join(f"{figure} {value}" for figure, value in figures.items()))
    configuration = {"trace": path.name, "requests": len(trace), "warm_up": WARM_UP, "output_price": OUTPUT_PRICE}
    write("quotes", environment() | {"bench": "quotes", "configuration": configuration, "results": judged})


if __name__ == "__main__":
    main()
