"""Usage as disjoint leaves, each with how it is known. Unknown is never zero."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

import msgspec


class Provenance(StrEnum):
    """How a figure is known, from the strongest to the weakest."""

    MEASURED = "measured"  # our own engine saw it
    REPORTED = "reported"  # a provider said so
    COUNTED = "counted"  # our tokenizer counted it
    ESTIMATED = "estimated"  # computed from a model of the thing
    ASSUMED = "assumed"  # rests on a stated assumption
    UNKNOWN = "unknown"  # nobody knows; the figure is null


_STRENGTH = {provenance: rank for rank, provenance in enumerate(Provenance)}


def weakest(provenances: Iterable[Provenance]) -> Provenance:
    """What a figure made of several is known by: its weakest part."""
    return max(provenances, key=_STRENGTH.__getitem__)


class Leaf(StrEnum):
    """Tokens that are counted once each: no leaf overlaps another."""

    INPUT_FRESH = "input_fresh"
    INPUT_CACHE_READ = "input_cache_read"
    INPUT_CACHE_WRITE_5M = "input_cache_write_5m"
    INPUT_CACHE_WRITE_1H = "input_cache_write_1h"
    INPUT_IMAGE = "input_image"
    INPUT_AUDIO = "input_audio"
    OUTPUT_TEXT = "output_text"
    OUTPUT_REASONING = "output_reasoning"
    OUTPUT_IMAGE = "output_image"
    OUTPUT_AUDIO = "output_audio"

    @property
    def is_input(self) -> bool:
        return self.value.startswith("input_")


_INPUTS = frozenset(leaf for leaf in Leaf if leaf.is_input)


class Count(msgspec.Struct, frozen=True):
    """Tokens of one leaf; `tokens` is None exactly when `provenance` is unknown."""

    tokens: int | None
    provenance: Provenance

    def __post_init__(self) -> None:
        if (self.tokens is None) != (self.provenance is Provenance.UNKNOWN):
            raise ValueError(f"tokens are null exactly when unknown; got {self.tokens} {self.provenance}")
        if self.tokens is not None and self.tokens < 0:
            raise ValueError(f"a token count cannot be negative; got {self.tokens}")


class Usage(msgspec.Struct, frozen=True):
    """Leaves that apply to this answer. A leaf that is absent doesn't apply and counts as zero."""

    leaves: dict[Leaf, Count] = {}

    @classmethod
    def of(cls, provenance: Provenance, **tokens: int) -> Usage:
        """`Usage.of(Provenance.MEASURED, input_fresh=12, output_text=3)`."""
        return cls({Leaf(name): Count(count, provenance) for name, count in tokens.items()})

    def tells(self, *, of_input: bool) -> bool:
        """Whether there is anything on input, or on output."""
        return any((leaf in _INPUTS) is of_input for leaf in self.leaves)

    def tokens(self, leaf: Leaf) -> int | None:
        count = self.leaves.get(leaf)
        return 0 if count is None else count.tokens

    @property
    def input_tokens(self) -> int | None:
        return self._total(of_input=True)

    @property
    def output_tokens(self) -> int | None:
        return self._total(of_input=False)

    def _total(self, *, of_input: bool) -> int | None:
        total = 0
        for leaf, count in self.leaves.items():
            if (leaf in _INPUTS) is of_input:
                if count.tokens is None:
                    return None
                total += count.tokens
        return total
