"""A pass in its buffer says exactly what its pieces say, whatever the buffer held, and padding says nothing."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from millicent.engine.batch import Piece
from millicent.engine.cuda.passes import (
    TILE_PARTS,
    Layout,
    PassWriter,
    Shape,
    Shapes,
    Tables,
    prepared_shapes,
)
from millicent.engine.sampler import Draw, uniform

BLOCK_TOKENS, TILE_ROWS, MOST = 4, 8, 6
POISON = -12345


def layout() -> Layout:
    return Layout(rows=300, decodes=MOST, tiles=100, samples=60, table_blocks=400)


def writer(shapes: list[Shape], *, tiled: bool = False) -> PassWriter:
    return PassWriter(layout(), Shapes(shapes), block_tokens=BLOCK_TOKENS, tile_rows=TILE_ROWS, tiled=tiled)


works = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 30), st.booleans()), min_size=1, max_size=MOST)


@settings(max_examples=150)
@given(works, st.booleans(), st.booleans(), st.randoms(use_true_random=False))
def test_everything_a_pass_asks_is_in_its_buffer(
    wanted: list[tuple[int, int, bool]], prepared: bool, tiled: bool, draw: object
) -> None:
    pieces, next_block = [], 0
    for number, (count, start, sample) in enumerate(wanted):
        blocks = list(range(next_block, next_block + -(-(start + count) // BLOCK_TOKENS)))[::-1]
        next_block += len(blocks)
        tokens = [(number * 100 + i) for i in range(count)]
        tokens[-1] = -1 - number if number % 2 else tokens[-1]
        pieces.append(Piece(number, tokens, start, blocks, sample))
    draws = [Draw(0.5 + piece.sequence, 0.9, 5, piece.sequence, 3) for piece in pieces if piece.sample]
    places = layout().spans
    into = np.full(layout().size, POISON, dtype=np.int32)
    written = writer(prepared_shapes(MOST, 64, TILE_ROWS) if prepared else [], tiled=tiled).write(pieces, draws, into)
    shape = written.shape
    part = {name: into[span] for name, span in places.items()}
    tables = part["tables"]

    rows: dict[int, tuple[Piece, int]] = {}  # by row of the pass: its piece and position
    for row in range(shape.decodes):
        if part["lengths"][row]:
            table = tables[part["starts"][row] :]
            piece = next(piece for piece in pieces if piece.blocks[0] == table[0])
            assert len(piece.tokens) == 1
            assert not tiled
            assert part["lengths"][row] == piece.start + 1
            rows[row] = (piece, piece.start)
    for tile in range(shape.tiles):
        first, count, position, start = (int(part[name][tile]) for name in TILE_PARTS)
        for offset in range(count):
            piece = next(piece for piece in pieces if piece.blocks[0] == tables[start])
            assert first + offset not in rows
            rows[first + offset] = (piece, position + offset)
        assert count <= TILE_ROWS
    assert len(rows) == sum(len(piece.tokens) for piece in pieces)
    for row in range(shape.rows):
        decodes = row < shape.decodes  # whose positions and slots are told by their contexts' lengths
        if row not in rows:
            assert part["tokens"][row] == 0
            assert decodes or part["slots"][row] == -1
            continue
        piece, position = rows[row]
        block = piece.blocks[position // BLOCK_TOKENS]
        if not decodes:
            assert part["positions"][row] == position
            assert part["slots"][row] == block * BLOCK_TOKENS + position % BLOCK_TOKENS
        assert part["tokens"][row] == piece.tokens[position - piece.start]
    lengths = part["lengths"][: shape.decodes].tolist()
    assert lengths == sorted(lengths, reverse=True)  # the longest first, padding last
    sampling = [piece for piece in pieces if piece.sample]
    for index, (piece, drawn) in enumerate(zip(sampling, draws, strict=True)):
        assert rows[int(part["sampled"][index])] == (piece, piece.start + len(piece.tokens) - 1)
        assert part["top_k"][index] == drawn.top_k
        assert part["temperature"].view(np.float32)[index] == drawn.temperature
        assert part["number"].view(np.float32)[index] == np.float32(uniform(drawn.seed, drawn.position))
    assert (part["temperature"][len(draws) : shape.samples] == 0).all()
    assert written.last_rows == [
        next(row for row, place in rows.items() if place == (piece, piece.start + len(piece.tokens) - 1))
        for piece in pieces
    ]
    assert (into[written.used :] == POISON).all()


def test_the_smallest_prepared_shape_that_holds_a_pass_is_taken() -> None:
    shapes = Shapes(prepared_shapes(256, 2048, 64))
    assert [shapes.choose(Shape(count, count, 0, count)).rows for count in (1, 3, 33, 130, 256)] == [1, 4, 64, 192, 256]
    assert shapes.choose(Shape(1000, 0, 16, 1)) == Shape(1024, 0, 48, 32)
    assert shapes.choose(Shape(70, 8, 1, 9)) == Shape(80, 16, 33, 48)
    assert shapes.choose(Shape(2100, 52, 32, 53)).rows == 2048 + 256
    odd = Shape(3000, 0, 47, 1)
    assert shapes.choose(odd) is odd


def test_tables_follow_their_sequences() -> None:
    tables, blocks = Tables(), [3, 1]
    piece = Piece(1, [5], 0, blocks, sample=True)
    first = tables.of(piece)
    assert tables.of(piece) is first
    blocks.append(9)
    assert tables.of(piece).tolist() == [3, 1, 9]
    assert tables.of(Piece(1, [5], 0, [4, 4, 4], sample=True)).tolist() == [4, 4, 4]
    for number in range(200):
        tables.of(Piece(number, [5], 0, [number], sample=True))
    tables.keep({7})
    assert list(tables._known) == [7]
