"""A pass as the kernels read it: a few arrays of integers in one piece of memory, padded to a shape that was prepared.

Rows of single tokens come first and are computed as decoding, the longest contexts first: they take longest, and a
chip is done when its last program is. Then the rows of longer pieces, in tiles. A token that
the pass before has yet to draw is written as `-1 - i`, i being its row there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from millicent.engine.batch import Piece
from millicent.engine.sampler import Draw, uniform

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """How much a pass has room for: rows, of which the first `decodes` are single tokens; prefill tiles; rows whose
    logits are wanted."""

    rows: int
    decodes: int
    tiles: int
    samples: int

    def holds(self, other: Shape) -> bool:
        return (
            self.rows - self.decodes >= other.rows - other.decodes
            and self.decodes >= other.decodes
            and self.tiles >= other.tiles
            and self.samples >= other.samples
            and (self.tiles > 0) == (other.tiles > 0)
        )


_PREFILL_PIECES = 32  # beside how many others a prompt shares a prepared pass


def prepared_shapes(max_sequences: int, step_tokens: int, tile_rows: int) -> list[Shape]:
    """Those to capture: pure decoding in powers of two, then steps of 64; prefill in doubling sizes with none, some or
    all sequences decoding beside it. The smallest that holds a pass is taken."""
    counts = [count for count in (1, 2, 4, 8, 16, 32) if count < max_sequences]
    counts += range(64, max_sequences, 64)
    shapes = [Shape(count, count, 0, count) for count in (*counts, max_sequences)]
    rows = 64
    sizes = []
    while rows < step_tokens:
        sizes.append(rows)
        rows *= 2
    for size in (*sizes, step_tokens):
        for decodes in sorted({0, min(16, max_sequences), max_sequences}):
            tiles = -(-size // tile_rows) + _PREFILL_PIECES
            shapes.append(Shape(size + decodes, decodes, tiles, decodes + _PREFILL_PIECES))
    return shapes


class Shapes:
    """Which of the prepared shapes a pass runs in; one of its own where none holds it."""

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self._shapes = sorted(shapes)
        self._rows = [shape.rows for shape in self._shapes]

    def __iter__(self) -> Iterator[Shape]:
        return iter(self._shapes)

    def choose(self, wanted: Shape) -> Shape:
        for shape in self._shapes[bisect_left(self._rows, wanted.rows) :]:
            if shape.holds(wanted):
                return shape
        return wanted


class Layout:
    """Where each array lies in the one buffer of int32 that travels to the device, whatever the shape of a pass.

    `tables` is last, and as long as `table_blocks`: only what a pass uses of it travels.
    """

    def __init__(self, rows: int, decodes: int, tiles: int, samples: int, table_blocks: int) -> None:
        sizes = {
            "tokens": rows,
            "positions": rows,
            "slots": rows,
            "starts": decodes,
            "lengths": decodes,
            "tile_rows": tiles,
            "tile_counts": tiles,
            "tile_positions": tiles,
            "tile_starts": tiles,
            "sampled": samples,
            "top_k": samples,
            "temperature": samples,  # this and what follows are float32
            "top_p": samples,
            "min_p": samples,
            "number": samples,
            "tables": table_blocks,
        }
        self.spans: dict[str, slice] = {}
        end = 0
        for name, size in sizes.items():
            self.spans[name] = slice(end, end + size)
            end += -(-size // 4) * 4  # 16 bytes, the widest a load gets
        self.size = end

    @property
    def head(self) -> int:
        """What comes before the tables."""
        start: int = self.spans["tables"].start
        return start


TILE_PARTS = ("tile_rows", "tile_counts", "tile_positions", "tile_starts")
FLOATS = frozenset({"temperature", "top_p", "min_p", "number"})


class Tables:
    """The block tables of sequences as arrays, kept from pass to pass: they grow until they are made anew."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Sequence[int], Ints]] = {}

    def of(self, piece: Piece) -> Ints:
        blocks, array = self._known.get(piece.sequence, (None, None))
        if blocks is not piece.blocks or array is None or len(array) > len(piece.blocks):
            array = np.array(piece.blocks, dtype=np.int32)
        elif len(array) < len(piece.blocks):
            array = np.concatenate((array, np.array(piece.blocks[len(array) :], dtype=np.int32)))
        else:
            return array
        self._known[piece.sequence] = (piece.blocks, array)
        return array

    def keep(self, sequences: Collection[int]) -> None:
        """Forget all others."""
        if len(self._known) > 2 * len(sequences) + 64:
            self._known = {sequence: known for sequence, known in self._known.items() if sequence in sequences}


@dataclass(frozen=True, slots=True)
class Written:
    """A pass in the buffer: the shape it was padded to, how many integers of the buffer it takes, how many tokens it
    draws, and each piece's last row."""

    shape: Shape
    used: int
    samples: int
    last_rows: list[int]


class PassWriter:
    def __init__(self, layout: Layout, shapes: Shapes, *, block_tokens: int, tile_rows: int, tiled: bool) -> None:
        """`tiled`: single tokens are computed in tiles too, which makes their bits independent of how they came."""
        self._layout = layout
        self._shapes = shapes
        self._block_tokens = block_tokens
        self._tile_rows = tile_rows
        self._tiled = tiled
        self._tables = Tables()

    def write(self, pieces: Sequence[Piece], draws: Sequence[Draw], into: Ints) -> Written:
        """`draws` are those of the pieces that sample, in their order, which is the order of the tokens drawn."""
        single = [] if self._tiled else [piece for piece in pieces if len(piece.tokens) == 1]
        single.sort(key=_context, reverse=True)
        several = pieces if self._tiled else [piece for piece in pieces if len(piece.tokens) != 1]
        tiles = [tile for piece in several for tile in self._tiles(piece)]
        prefill_rows = sum(len(piece.tokens) for piece in several)
        wanted = Shape(len(single) + prefill_rows, len(single), len(tiles), len(draws))
        shape = self._shapes.choose(wanted)
        tables = {id(piece): self._tables.of(piece) for piece in pieces}
        starts: dict[int, int] = {}
        used = self._layout.head
        for piece in pieces:
            table = tables[id(piece)]
            starts[id(piece)] = used - self._layout.head
            into[used : used + len(table)] = table
            used += len(table)
        first = self._write_single(single, starts, shape, into)
        last_rows = {id(piece): row for row, piece in enumerate(single)}
        row, at = first, 0
        for piece in several:
            self._write_rows(piece, tables[id(piece)], row, into)
            for offset, count in self._tiles(piece):
                entry = (row + offset, count, piece.start + offset, starts[id(piece)])
                for name, value in zip(
                    ("tile_rows", "tile_counts", "tile_positions", "tile_starts"), entry, strict=True
                ):
                    self._part(into, name)[at] = value
                at += 1
            row += len(piece.tokens)
            last_rows[id(piece)] = row - 1
        self._part(into, "slots")[row : shape.rows] = -1
        self._part(into, "tokens")[row : shape.rows] = 0
        self._part(into, "tile_counts")[at : shape.tiles] = 0
        self._write_draws([last_rows[id(piece)] for piece in pieces if piece.sample], draws, shape, into)
        self._tables.keep({piece.sequence for piece in pieces})
        return Written(shape, used, len(draws), [last_rows[id(piece)] for piece in pieces])

    def _tiles(self, piece: Piece) -> list[tuple[int, int]]:
        count = len(piece.tokens)
        return [(offset, min(self._tile_rows, count - offset)) for offset in range(0, count, self._tile_rows)]

    def _write_single(self, pieces: Sequence[Piece], starts: dict[int, int], shape: Shape, into: Ints) -> int:
        """The rows of single tokens, padded to as many as the shape has; the row after them. Their positions and places
        in the cache follow from how long their contexts are."""
        count = len(pieces)
        self._part(into, "lengths")[count : shape.decodes] = 0
        self._part(into, "tokens")[count : shape.decodes] = 0
        if pieces:
            self._part(into, "tokens")[:count] = [piece.tokens[0] for piece in pieces]
            self._part(into, "starts")[:count] = [starts[id(piece)] for piece in pieces]
            self._part(into, "lengths")[:count] = [piece.start + 1 for piece in pieces]
        return shape.decodes

    def _write_rows(self, piece: Piece, table: Ints, row: int, into: Ints) -> None:
        span = slice(row, row + len(piece.tokens))
        positions = np.arange(piece.start, piece.start + len(piece.tokens), dtype=np.int32)
        self._part(into, "tokens")[span] = piece.tokens
        self._part(into, "positions")[span] = positions
        self._part(into, "slots")[span] = table[positions // self._block_tokens] * self._block_tokens + (
            positions % self._block_tokens
        )

    def _write_draws(self, rows: Sequence[int], draws: Sequence[Draw], shape: Shape, into: Ints) -> None:
        count = len(draws)
        self._part(into, "sampled")[: shape.samples] = 0
        self._part(into, "temperature")[: shape.samples] = 0  # which is float32's 0 too: the first of equal maxima
        if draws:
            self._part(into, "sampled")[:count] = rows
            for name, values in draw_columns(draws).items():
                self._part(into, name)[:count] = values.view(np.int32)

    def _part(self, into: Ints, name: str) -> Ints:
        return into[self._layout.spans[name]]


def _context(piece: Piece) -> int:
    return piece.start


def draw_columns(draws: Sequence[Draw]) -> dict[str, Ints | Floats]:
    """What the drawing kernel reads of each row."""
    return {
        "top_k": np.array([min(draw.top_k, 2**31 - 1) for draw in draws], dtype=np.int32),
        "temperature": np.array([draw.temperature for draw in draws], dtype=np.float32),
        "top_p": np.array([draw.top_p for draw in draws], dtype=np.float32),
        "min_p": np.array([draw.min_p for draw in draws], dtype=np.float32),
        "number": np.array(
            [uniform(draw.seed, draw.position) if draw.temperature else 0.0 for draw in draws], dtype=np.float32
        ),
    }
