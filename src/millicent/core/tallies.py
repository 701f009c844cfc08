"""What many requests took, as sums and histograms that can be added up: latencies, what each cost, by role and meter.

A histogram counts integers in buckets whose width is a sixteenth of a power of two, so that a value read from one is
within 1/32 (3.2%) of the true one. Buckets never move: histograms of different times and places can be added.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Self, TypeVar

import msgspec

Histogram = dict[int, int]
Key = TypeVar("Key")
Number = TypeVar("Number", int, float)

_SUB_BITS = 4
_STEPS = 1 << _SUB_BITS


def bucket_of(value: int) -> int:
    """Below 16 each integer has its own; what is not above zero is in the first."""
    if value < _STEPS:
        return max(value, 0)
    exponent = value.bit_length() - _SUB_BITS - 1
    return (exponent << _SUB_BITS) + (value >> exponent)


def bounds_of(bucket: int) -> tuple[int, int]:
    """The least value in it, and the first beyond it."""
    if bucket < _STEPS:
        return bucket, bucket + 1
    exponent = (bucket >> _SUB_BITS) - 1
    low = ((bucket & (_STEPS - 1)) + _STEPS) << exponent
    return low, low + (1 << exponent)


def percentile(histogram: Mapping[int, int], percent: int) -> int | None:
    """The middle of the bucket that holds the value at this rank (nearest rank); None where nothing was counted."""
    rank = -(-percent * sum(histogram.values()) // 100)
    below = 0
    for bucket in sorted(histogram):
        below += histogram[bucket]
        if below >= rank > 0:
            low, high = bounds_of(bucket)
            return (low + high - 1) // 2
    return None


def nearest_rank(ordered: Sequence[Number], percent: int) -> Number:
    """The least of them that is at least so many in a hundred of them. There must be one."""
    return ordered[-(-len(ordered) * percent // 100) - 1]


def count_at_most(histogram: Mapping[int, int], value: int) -> int:
    """How many were at most so much. Of the one bucket that the value cuts, as many as lie evenly below it."""
    count = 0
    for bucket, counted in histogram.items():
        low, high = bounds_of(bucket)
        if high - 1 <= value:
            count += counted
        elif low <= value:
            count += counted * (value - low + 1) // (high - low)
    return count


class Sums(msgspec.Struct, omit_defaults=True):
    """Closed receipts. `priced` have lines, all with an amount: `nanousd` (by "role meter") and `priced_tokens` (by
    leaf) are theirs, as are `prefill_ns` and `decode_ns`, which say how much of an accelerator's amount is for input.
    What the response cache answered is in the leaves `input_hit` and `output_hit`. `tokens` are of all others of which
    they are known. `energy_uj` are microjoules of the `measured` ones whose energy is known; `cache_hits` and
    `cache_misses` are of the response cache.
    """

    requests: int = 0
    priced: int = 0
    routed: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    prefill_ns: int = 0
    decode_ns: int = 0
    energy_uj: int = 0
    measured: int = 0
    nanousd: dict[str, int] = msgspec.field(default_factory=dict)
    tokens: dict[str, int] = msgspec.field(default_factory=dict)
    priced_tokens: dict[str, int] = msgspec.field(default_factory=dict)

    def add(self, other: Sums, sign: int = 1) -> None:
        """Take in the other's, or, with a sign of -1, take them off; what comes to nothing is dropped."""
        # Written out: a report adds up thousands.
        self.requests += sign * other.requests
        self.priced += sign * other.priced
        self.routed += sign * other.routed
        self.cache_hits += sign * other.cache_hits
        self.cache_misses += sign * other.cache_misses
        self.prefill_ns += sign * other.prefill_ns
        self.decode_ns += sign * other.decode_ns
        self.energy_uj += sign * other.energy_uj
        self.measured += sign * other.measured
        add_up(self.nanousd, other.nanousd, sign)
        add_up(self.tokens, other.tokens, sign)
        add_up(self.priced_tokens, other.priced_tokens, sign)

    @classmethod
    def together(cls, each: Iterable[Self]) -> Self:
        whole = cls()
        for one in each:
            whole.add(one)
        return whole

    @property
    def input_tokens(self) -> int:
        return sum(count for leaf, count in self.tokens.items() if leaf.startswith("input"))

    @property
    def cost_nanousd(self) -> int:
        return sum(self.nanousd.values())


class Tally(Sums, omit_defaults=True):
    """The same, with histograms of nanoseconds and nano-dollars. Latencies are of those that a model answered, `cost`
    of the priced ones; `wait` is what a caller waited for, hits too: the first token of what is streamed, else the
    whole answer."""

    queue: Histogram = msgspec.field(default_factory=dict)
    ttft: Histogram = msgspec.field(default_factory=dict)
    tpot: Histogram = msgspec.field(default_factory=dict)
    total: Histogram = msgspec.field(default_factory=dict)
    wait: Histogram = msgspec.field(default_factory=dict)
    cost: Histogram = msgspec.field(default_factory=dict)

    def add(self, other: Sums, sign: int = 1) -> None:
        Sums.add(self, other, sign)
        if isinstance(other, Tally):
            for have, more in (
                (self.queue, other.queue),
                (self.ttft, other.ttft),
                (self.tpot, other.tpot),
                (self.total, other.total),
                (self.wait, other.wait),
                (self.cost, other.cost),
            ):
                add_up(have, more, sign)


def add_up(ours: dict[Key, int], theirs: Mapping[Key, int], sign: int) -> None:
    """Add their counts to ours, or, with a sign of -1, take them off."""
    if not ours and sign > 0:
        ours.update(theirs)
        return
    # Written out: a report adds up some hundred thousand.
    have = ours.get
    for key, count in theirs.items():
        if left := have(key, 0) + sign * count:
            ours[key] = left
        else:
            ours.pop(key, None)


def add_to(ours: dict[Key, int], key: Key, count: int) -> None:
    """What comes to nothing is dropped."""
    if left := ours.get(key, 0) + count:
        ours[key] = left
    else:
        ours.pop(key, None)
