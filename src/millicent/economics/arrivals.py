"""Requests as the simulator takes them: when they come, how long they are, whose they are. What they say is unknown."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from hashlib import blake2b
from pathlib import Path

import msgspec

from millicent.core.clock import NS_PER_S, parse_time_ns
from millicent.core.errors import ConfigError

# By what traces call them: Azure's LLM inference traces, and plain words.
_TIMES = ("TIMESTAMP", "timestamp", "arrival_s")
_INPUTS = ("ContextTokens", "input_tokens", "input_length")
_OUTPUTS = ("GeneratedTokens", "output_tokens", "output_length")


class Arrival(msgspec.Struct, frozen=True):
    """`at_ns` is UTC, or counts from the beginning of a trace. `tenant` and `priority` as the engine knows them.

    `prefix` says which beginnings are shared: `(tokens up to here, a name for exactly these tokens)`, longest last; the
    rest of the prompt is like no other. `target_ns` is for the first token where the answer is `streamed`, else for
    its end. `guessed` are the tokens of its output that were guessed and checked, and those of them that were right and
    so took no step of their own. `key`, and the other attributes, are whose it is.
    """

    at_ns: int
    input_tokens: int
    output_tokens: int
    tenant: int = 0
    priority: int = 0
    target_ns: int | None = None
    streamed: bool = True
    prefix: tuple[tuple[int, bytes], ...] = ()
    guessed: tuple[int, int] = (0, 0)
    key: str | None = None
    user: str | None = None
    feature: str | None = None


def tenant_of(key: str | None) -> int:
    """A number for a key, the same every time. Callers without one are tenant 0."""
    if key is None:
        return 0
    return int.from_bytes(blake2b(key.encode(), digest_size=7).digest(), "little")


def read_trace(path: Path) -> list[Arrival]:
    """A CSV trace, in order of arrival: a time (a date and time, or seconds), input and output tokens.

    Raises ConfigError naming the line.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            time, given, made = (_column(path, reader.fieldnames or (), names) for names in (_TIMES, _INPUTS, _OUTPUTS))
            found = [_arrival(path, reader.line_num, row[time], row[given], row[made]) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot be read ({error}): give a CSV file of arrivals.") from error
    if not found:
        raise ConfigError(f"{path}: holds no requests: give a CSV file with a line for each.")
    return sorted(found, key=lambda each: each.at_ns)


def _column(path: Path, there: Sequence[str], names: Sequence[str]) -> str:
    for name in names:
        if name in there:
            return name
    raise ConfigError(f"{path}:1: no column {names[0]}: the first line must name it, {names[1]} or {names[2]}.")


def _arrival(path: Path, line: int, time: str | None, given: str | None, made: str | None) -> Arrival:
    what = f"{time!r}, {given!r}, {made!r} are no time, input and output tokens"
    what = f"{path}:{line}: {what}: write 2023-11-16 18:15:46.68 or seconds, and whole numbers."
    try:
        arrival = Arrival(_time_ns(time or ""), int(given or ""), int(made or ""))
    except (ValueError, InvalidOperation) as error:
        raise ConfigError(what) from error
    if arrival.input_tokens < 1 or arrival.output_tokens < 0:
        raise ConfigError(what)
    return arrival


def _time_ns(text: str) -> int:
    """Seconds, or a date and time."""
    try:
        seconds = Decimal(text)
    except InvalidOperation:
        return parse_time_ns(text)
    return int(seconds * NS_PER_S)


def superposed(arrivals: Sequence[Arrival], copies: int) -> list[Arrival]:
    """So many times the traffic: copies of it, each begun at another point and wrapped around, one on the other.

    Copy c is shifted by c/copies of the whole time. So bursts don't fall on each other, as those of independent users
    don't; lengths stay with each other and with whose they are; and in each copy the gaps between arrivals are kept,
    but for the one at its seam. Whoever grows is taken to be more users of the same kind: a copy's prefixes are shared
    with the original's, its tenants and keys too.
    """
    if copies == 1:
        return list(arrivals)
    return [msgspec.structs.replace(arrivals[i], at_ns=at_ns) for at_ns, i in moments(arrivals, copies)]


def moments(arrivals: Sequence[Arrival], copies: int) -> list[tuple[int, int]]:
    """When each copy of each comes, and which it is of; in order."""
    if not arrivals:
        return []
    start_ns, span_ns = arrivals[0].at_ns, span_of(arrivals)
    return sorted(
        (start_ns + (each.at_ns - start_ns + span_ns * copy // copies) % span_ns, i)
        for copy in range(copies)
        for i, each in enumerate(arrivals)
    )


def span_of(arrivals: Sequence[Arrival]) -> int:
    """Nanoseconds that this traffic stands for: from the first arrival to the last, and one mean gap."""
    apart_ns = arrivals[-1].at_ns - arrivals[0].at_ns
    return max(1, apart_ns + apart_ns // max(1, len(arrivals) - 1))


def busiest(arrivals: Sequence[Arrival], most: int) -> list[Arrival]:
    """The `most` requests in a row that came in the shortest time; all, where there are no more."""
    first = busiest_from(arrivals, most)
    return list(arrivals[first : first + most])


def busiest_from(arrivals: Sequence[Arrival], most: int) -> int:
    """Which is the first of them."""
    starts = range(max(1, len(arrivals) - most + 1))
    last = len(arrivals) - 1
    return min(starts, key=lambda i: arrivals[min(last, i + most - 1)].at_ns - arrivals[i].at_ns)
