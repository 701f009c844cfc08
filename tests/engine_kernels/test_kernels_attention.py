"""Paged attention against torch: any heads, blocks and cuts, and that a row's bits are its own affair."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millicent.engine.batch import Piece
from millicent.engine.kernels.layers import Batch, DecoderLayers, DecoderShape, LayerWeights
from millicent.engine.kernels.library import library
from millicent.engine.kernels.weights import PackedWeight
from support.kernel_reference import ReferenceAttention

BLOCKS = 64
# Bytes keep 7 bits and a sign of a head's greatest element, bfloat16 8 bits of each.
TOLERANCE = {torch.int8: 2e-2, torch.bfloat16: 1.2e-2, torch.float32: 4e-6}
DTYPES = list(TOLERANCE)


def shape_of(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, *, interleaved: bool = False
) -> DecoderShape:
    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    return DecoderShape(32, heads, kv_heads, head_dim, 32, 1e-5, frequencies, interleaved, dtype)


def attention_of(shape: DecoderShape, block_tokens: int, norm: torch.Tensor | None = None) -> DecoderLayers:
    """One layer whose cache holds NaN wherever nothing was written, as a block's former owner might leave it."""
    blank = PackedWeight(torch.zeros(32, 32))
    ones = torch.ones(32)
    layers = DecoderLayers(shape, [LayerWeights(ones, ones, blank, blank, blank, blank, norm, norm)])
    layers.allocate(BLOCKS, block_tokens, BLOCKS * block_tokens)
    layers._cache[0].fill_(255)
    return layers


@dataclass
class Sequences:
    """Hands out blocks in random order and remembers how far each sequence is."""

    block_tokens: int
    free: list[int] = field(default_factory=lambda: random.Random(0).sample(range(BLOCKS), BLOCKS))
    tables: dict[int, list[int]] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)

    def piece(self, sequence: int, tokens: int) -> Piece:
        start = self.lengths.get(sequence, 0)
        table = self.tables.setdefault(sequence, [])
        self.lengths[sequence] = start + tokens
        while len(table) * self.block_tokens < start + tokens:
            table.append(self.free.pop())
        return Piece(sequence, [0] * tokens, start, table, True)


def qkv_of(shape: DecoderShape, pieces: list[Piece]) -> torch.Tensor:
    rows = sum(len(piece.tokens) for piece in pieces)
    return torch.randn(rows, (shape.heads + 2 * shape.kv_heads) * shape.head_dim) * 1.5


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 8),
    head_dim=st.sampled_from([16, 32, 48, 64, 80, 128]),
    block_tokens=st.sampled_from([5, 16, 24, 32, 48]),
    dtype=st.sampled_from(DTYPES),
    interleaved=st.booleans(),
    normed=st.booleans(),
    steps=st.lists(
        st.lists(st.sampled_from([0, 1, 1, 1, 2, 7, 33, 70]), min_size=3, max_size=3), min_size=1, max_size=4
    ),
)
def test_attention_is_torchs_for_any_heads_blocks_and_mixture_of_pieces(
    instruction_set: str,
    kv_heads: int,
    group: int,
    head_dim: int,
    block_tokens: int,
    dtype: torch.dtype,
    interleaved: bool,
    normed: bool,
    steps: list[list[int]],
) -> None:
    torch.manual_seed(0)
    shape = shape_of(kv_heads * group, kv_heads, head_dim, dtype, interleaved=interleaved)
    norm = torch.rand(head_dim) + 0.5 if normed else None
    layers, expected = attention_of(shape, block_tokens, norm), ReferenceAttention(shape, norm, norm)
    sequences = Sequences(block_tokens)
    for step in steps:
        pieces = [sequences.piece(number, tokens) for number, tokens in enumerate(step) if tokens]
        if not pieces:
            continue
        qkv = qkv_of(shape, pieces)
        wanted = expected(qkv.clone(), pieces)
        found = layers.attend(0, qkv, Batch(pieces))
        assert (found - wanted).norm() / wanted.norm() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 2, 128), (5, 1, 48)])
def test_a_rows_bits_depend_neither_on_the_batch_nor_on_how_its_prompt_was_cut(
    instruction_set: str, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> None:
    torch.manual_seed(1)
    shape = shape_of(heads, kv_heads, head_dim, dtype)
    qkv = torch.randn(150, (heads + 2 * kv_heads) * head_dim)
    outcomes: list[torch.Tensor] = []
    for cuts in ([150], [1] * 150, [64, 1, 85], [37, 100, 13]):
        layers, sequences, found, done = attention_of(shape, 16), Sequences(16), [], 0
        for cut in cuts:
            pieces = [sequences.piece(0, cut)]
            rows = qkv[done : done + cut].clone()
            if len(outcomes) % 2:  # company: another sequence in front
                pieces.insert(0, sequences.piece(1, 2))
                rows = torch.cat((torch.randn(2, rows.shape[1]), rows))
            found.append(layers.attend(0, rows, Batch(pieces))[-cut:])
            done += cut
        outcomes.append(torch.cat(found))
    for outcome in outcomes[1:]:
        assert torch.equal(outcomes[0], outcome)


def test_scores_far_apart_neither_overflow_nor_vanish(instruction_set: str) -> None:
    shape = shape_of(2, 1, 32, torch.float32)
    layers, expected = attention_of(shape, 16), ReferenceAttention(shape)
    sequences = Sequences(16)
    pieces = [sequences.piece(0, 90)]
    torch.manual_seed(2)
    qkv = qkv_of(shape, pieces) * 30
    wanted = expected(qkv.clone(), pieces)
    found = layers.attend(0, qkv, Batch(pieces))
    assert found.isfinite().all()
    assert (found - wanted).norm() / wanted.norm() < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rise", [0.02, 0.3, -0.3])
def test_scores_that_rise_or_fall_for_long_are_weighed_as_in_float64(
    instruction_set: str, dtype: torch.dtype, rise: float
) -> None:
    """A row's weights are relative to a score that later ones may exceed a little, or by far, any number of times."""
    torch.manual_seed(4)
    tokens, query = 900, torch.zeros(32)
    query[0] = 4.0
    shape = DecoderShape(32, 1, 1, 32, 32, 1e-5, torch.zeros(16), cache_dtype=dtype)
    keys, values = torch.zeros(tokens, 32), torch.randn(tokens, 32)
    keys[:, 0] = (torch.arange(tokens) * rise * 32**0.5 / 4.0).bfloat16().float()  # exactly what a cache holds
    qkv = torch.cat((query.expand(tokens, 32), keys, values), 1)
    table = Sequences(16).piece(0, tokens).blocks
    found = attention_of(shape, 16).attend(0, qkv.clone(), Batch([Piece(0, [0] * tokens, 0, table, True)]))
    scores = (keys.double() @ query.double() * 32**-0.5).expand(tokens, tokens).tril()
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    wanted = scores.masked_fill(hidden, float("-inf")).softmax(1) @ values.double()
    assert (found - wanted).norm() / wanted.norm() < TOLERANCE[dtype]


def test_a_row_that_is_not_a_number_stays_so_and_harms_no_other(instruction_set: str) -> None:
    torch.manual_seed(5)
    shape = shape_of(2, 1, 32, torch.bfloat16)
    qkv = torch.randn(80, 128)
    expected = attention_of(shape, 16).attend(0, qkv.clone(), Batch([Sequences(16).piece(0, 80)]))
    qkv[70, :32] = float("nan")  # the first query head of one token
    found = attention_of(shape, 16).attend(0, qkv, Batch([Sequences(16).piece(0, 80)]))
    assert found[70, :32].isnan().all()
    found[70, :32] = expected[70, :32]
    assert torch.equal(found, expected)


def test_a_long_context_is_attended_to_whole(instruction_set: str) -> None:
    """The middle of 9,000 tokens holds the one key that the last query looks for."""
    shape = DecoderShape(32, 1, 1, 32, 32, 1e-5, torch.zeros(16), cache_dtype=torch.bfloat16)
    layers = attention_of(shape, 160)
    table = list(range(BLOCKS))
    qkv = torch.zeros(9000, 96)
    qkv[:, 64:] = 1.0
    qkv[4321, 32:64] = 8.0
    qkv[4321, 64:] = 5.0
    layers.attend(0, qkv, Batch([Piece(0, [0] * 9000, 0, table, True)]))
    query = torch.zeros(1, 96)
    query[0, :32] = 8.0
    query[0, 64:] = 1.0
    found = layers.attend(0, query, Batch([Piece(0, [0], 9000, table, True)]))
    assert torch.allclose(found, torch.full((1, 32), 5.0), atol=0.02)


@pytest.mark.parametrize(("head_dim", "share"), [(64, 0.54), (128, 0.52)])
def test_a_cache_of_bytes_takes_half_the_memory_of_bfloat16(head_dim: int, share: float) -> None:
    bytes_of = {dtype: attention_of(shape_of(6, 2, head_dim, dtype), 16).cache_bytes for dtype in DTYPES}
    assert bytes_of[torch.int8] < share * bytes_of[torch.bfloat16]
    for dtype, found in bytes_of.items():
        assert found == BLOCKS * 16 * shape_of(6, 2, head_dim, dtype).cache_bytes_per_token


def test_memory_that_runs_out_is_an_error_of_that_call_alone() -> None:
    weight, x = PackedWeight(torch.eye(32)), torch.randn(3, 32)
    more_than_any_machine_has = 1 << 44
    with pytest.raises(MemoryError, match=r"lower \[engine\] step_tokens"):
        library().mk_linear(weight.struct, None, more_than_any_machine_has, None, 0.0, 0, None)
    assert torch.allclose(weight(x), x)
