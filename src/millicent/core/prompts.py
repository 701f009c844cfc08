"""A prompt without its words: keyed hashes and lengths of its segments, which is all that the ledger keeps of it.

A prompt is tools, then the system prompt, then messages, in the order in which providers put them before a model. Each
segment has a chain: a keyed hash of everything up to its end. Two prompts begin alike exactly as far as their chains
are equal.
"""

from __future__ import annotations

import struct
from typing import Literal

import msgspec

from millicent.core.money import apportion

SegmentKind = Literal["tools", "system", "user", "assistant", "tool", "text", "tokens"]
KINDS: tuple[SegmentKind, ...] = ("tools", "system", "user", "assistant", "tool", "text", "tokens")
NUMBERS = {kind: number for number, kind in enumerate(KINDS)}
CHAIN_BYTES = 8
# Of longer prompts the first and the last segments are kept: what is shared, and what was said lately.
KEPT_FIRST = 8
KEPT_LAST = 24
# English text in the tokenizers of the day: about four bytes to a token.
BYTES_PER_TOKEN = 4
# A picture's bytes say nothing of its tokens: it counts as about a thousand.
PICTURE_BYTES = 4096

_HEADER = struct.Struct("<BBHI")
_SEGMENT = struct.Struct(f"<BI{CHAIN_BYTES}s")
_VERSION = 1
_MOST_OMITTED = 2**16 - 1
_LONGEST = 2**32 - 1


class Segment(msgspec.Struct, frozen=True):
    """`length` is in bytes of UTF-8; in tokens where the prompt came as such (kind `tokens`)."""

    kind: SegmentKind
    length: int
    chain: bytes


class Prompt(msgspec.Struct, frozen=True):
    """`first` and `last` are its segments; between them, `omitted` ones of `omitted_length` were left out. `digest`
    says whether two requests ask the same thing."""

    digest: bytes
    first: tuple[Segment, ...]
    omitted: int = 0
    omitted_length: int = 0
    last: tuple[Segment, ...] = ()

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Those that are known."""
        return self.first + self.last

    @property
    def length(self) -> int:
        return sum(segment.length for segment in self.segments) + self.omitted_length

    def ends(self) -> list[int]:
        """How long the prompt is up to the end of each known segment, in `length`'s unit."""
        ends, so_far = [], 0
        for i, segment in enumerate(self.segments):
            so_far += segment.length + (self.omitted_length if i == len(self.first) else 0)
            ends.append(so_far)
        return ends

    def tokens(self, total: int | None) -> tuple[int, ...]:
        """About how many tokens each known segment has: of `total`, the whole prompt's, in proportion to lengths; at
        four bytes each where that isn't known. Estimated, except that the parts add up to `total`."""
        lengths = [segment.length for segment in self.segments]
        if total is None:
            return tuple(
                segment.length if segment.kind == "tokens" else -(-segment.length // BYTES_PER_TOKEN)
                for segment in self.segments
            )
        if not lengths:
            return ()
        return tuple(apportion(total, [*lengths, self.omitted_length])[:-1])

    def packed(self) -> bytes:
        """Its segments in as few bytes as the ledger keeps of them: 8, and 13 for each."""
        parts = [
            _HEADER.pack(
                _VERSION, len(self.first), min(self.omitted, _MOST_OMITTED), min(self.omitted_length, _LONGEST)
            )
        ]
        parts += [
            _SEGMENT.pack(NUMBERS[segment.kind], min(segment.length, _LONGEST), segment.chain)
            for segment in self.segments
        ]
        return b"".join(parts)


def unpacked(digest: bytes, packed: bytes) -> Prompt:
    """What `packed` made. Raises ValueError for what another version made."""
    version, first, omitted, omitted_length = _HEADER.unpack_from(packed)
    if version != _VERSION:
        raise ValueError(f"segments are of version {version}, and this one reads {_VERSION}")
    segments = tuple(
        Segment(KINDS[number], length, chain) for number, length, chain in _SEGMENT.iter_unpack(packed[_HEADER.size :])
    )
    return Prompt(digest, segments[:first], omitted, omitted_length, segments[first:])
