"""Each kernel against the plain formula in float64."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton isn't installed", allow_module_level=True)

from millicent.engine.cuda.kernels.attention import (
    DecodeRows,
    PrefillTiles,
    attend_decode,
    attend_prefill,
    tile_rows,
)
from millicent.engine.cuda.kernels.matmul import multiply_small
from millicent.engine.cuda.kernels.rows import (
    add_rms_norm,
    embed,
    quantize_rows,
    rotate_and_cache,
    silu_mul,
)
from millicent.engine.cuda.kernels.sampling import Draws, draw
from millicent.engine.sampler import Draw, sample, uniform

EPS = 1e-5
DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
# Triton's interpreter multiplies matrices of bfloat16 wrongly (it takes their bits for integers): float16 stands in.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
DOT_DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (HALF, 1e-2)])
# And it rounds to FP8 towards zero.
FP8_TOLERANCE = 0.04 if torch.cuda.is_available() else 0.08


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def ints(values: list[int], device: str) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """How far off, relative to the reference's norm. NaN stays NaN, which is below nothing."""
    return float((found.double().cpu() - reference.cpu()).norm() / reference.cpu().norm())


@DTYPES
def test_rows_are_looked_up_by_token_or_by_what_the_pass_before_drew(
    device: str, dtype: torch.dtype, tolerance: float
) -> None:
    table = random(11, 24, dtype=dtype, device=device)
    found = embed(ints([3, -1, 10, -3, -2], device), ints([7, -1, 2], device), table)
    assert torch.equal(
        found, table[[3, 7, 10, 2, 0]]
    )  # a row that drew nothing goes on with token 0, and is thrown away


@DTYPES
@pytest.mark.parametrize("adds", [False, True])
def test_norm_with_addition(device: str, dtype: torch.dtype, tolerance: float, adds: bool) -> None:
    residual, weight = random(5, 40, dtype=dtype, device=device), random(40, dtype=dtype, seed=2, device=device)
    delta = random(5, 40, dtype=dtype, seed=1, device=device) if adds else None
    total = residual.double() + (delta.double() if delta is not None else 0)
    reference = total / (total.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    picked = add_rms_norm(delta, residual, weight, EPS, picked=ints([4, 0, 4], device))
    assert error(picked, reference[[4, 0, 4]]) < tolerance
    assert error(add_rms_norm(delta, residual, weight, EPS), reference) < tolerance
    assert error(residual, total) < tolerance


@DTYPES
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("head_dim", [16, 24])
def test_rotation_norms_and_the_cache(
    device: str, dtype: torch.dtype, tolerance: float, normed: bool, head_dim: int
) -> None:
    heads, kv_heads, block_tokens, rows = 4, 2, 4, 5
    half = head_dim // 2
    qkv = random(rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype, device=device)
    norms = (
        (random(head_dim, dtype=dtype, seed=1, device=device), random(head_dim, dtype=dtype, seed=2, device=device))
        if normed
        else None
    )
    angles = torch.outer(torch.arange(64).double(), 1.0 / 100 ** (torch.arange(half).double() / half)).to(device)
    positions, slots = [7, 0, 63, 9, 30], [5, 11, -1, 0, 8]
    keys, values = (torch.full((3, kv_heads, block_tokens, head_dim), 9.0, dtype=dtype, device=device) for _ in "kv")
    before = qkv.double().view(rows, -1, head_dim)
    tables = (angles.cos().float(), angles.sin().float())
    rotate_and_cache(qkv, norms, EPS, tables, ints(positions, device), ints(slots, device), keys, values)

    expected = before.clone()
    if norms is not None:
        for span, weight in ((slice(heads), norms[0]), (slice(heads, heads + kv_heads), norms[1])):
            part = expected[:, span]
            expected[:, span] = part / (part.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    turned = expected.clone()
    cosine, sine = (each[positions][:, None] for each in (angles.cos(), angles.sin()))
    turned[..., :half] = expected[..., :half] * cosine - expected[..., half:] * sine
    turned[..., half:] = expected[..., half:] * cosine + expected[..., :half] * sine
    after = qkv.view(rows, -1, head_dim)
    real = [row for row in range(rows) if slots[row] >= 0]
    assert error(after[real, :heads], turned[real, :heads]) < tolerance
    for row in real:
        block, offset = divmod(slots[row], block_tokens)
        assert error(keys[block, :, offset], turned[row, heads : heads + kv_heads]) < tolerance
        assert torch.equal(values[block, :, offset].double(), before[row, heads + kv_heads :])
    written = torch.zeros(3, block_tokens, dtype=torch.bool)
    written.view(-1)[[slot for slot in slots if slot >= 0]] = True
    for cache in (keys, values):
        assert (cache.permute(0, 2, 1, 3)[~written.to(device)] == 9).all()


@DTYPES
def test_gate(device: str, dtype: torch.dtype, tolerance: float) -> None:
    rows = random(3, 2 * 37, dtype=dtype, device=device)
    gate, up = rows.double().chunk(2, dim=-1)
    assert error(silu_mul(rows), gate * torch.sigmoid(gate) * up) < tolerance


def test_rows_round_to_fp8_and_few_rows_multiply_fp8_weights(device: str) -> None:
    x, weight = random(3, 72, dtype=HALF, device=device), random(40, 72, seed=1, device=device)
    values, scales = quantize_rows(weight)
    rounded = values.double() * scales
    assert error(rounded, weight.double()) < FP8_TOLERANCE  # three bits after the first
    assert error(multiply_small(x, values, scales.view(-1)), x.double() @ rounded.T) < 1e-2


class Cache:
    """One layer's keys and values of some contexts, in blocks in no order, and what is left of them in poison."""

    def __init__(
        self, lengths: list[int], kv_heads: int, head_dim: int, dtype: torch.dtype, device: str, block_tokens: int = 4
    ) -> None:
        counts = [math.ceil(length / block_tokens) for length in lengths]
        order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(1)).tolist()
        self.keys, self.values = (
            torch.full((len(order), kv_heads, block_tokens, head_dim), 1e4, dtype=dtype, device=device) for _ in "kv"
        )
        self.tables = ints(order, device)
        self.starts = [sum(counts[:index]) for index in range(len(counts))]
        self.contexts = []
        for index, length in enumerate(lengths):
            pair = [random(length, kv_heads, head_dim, dtype=dtype, seed=10 * index + k, device=device) for k in (0, 1)]
            self.contexts.append(pair)
            for cache, rows in zip((self.keys, self.values), pair, strict=True):
                for at in range(length):
                    block = order[self.starts[index] + at // block_tokens]
                    cache[block, :, at % block_tokens] = rows[at]

    def reference(self, query: torch.Tensor, index: int, position: int) -> torch.Tensor:
        """float64 [heads, head_dim] for one row of queries [heads, head_dim]."""
        keys, values = (rows[: position + 1].double() for rows in self.contexts[index])
        group = len(query) // keys.shape[1]
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        scores = torch.einsum("hd,thd->ht", query.double(), keys) / query.shape[1] ** 0.5
        return torch.einsum("ht,thd->hd", scores.softmax(-1), values)


@DOT_DTYPES
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (3, 1, 24)])
def test_decode_attention(
    device: str, dtype: torch.dtype, tolerance: float, splits: int, heads: int, kv_heads: int, head_dim: int
) -> None:
    lengths = [1, 150, 64, 67]
    cache = Cache(lengths, kv_heads, head_dim, dtype, device)
    qkv = random(6, (heads + 2 * kv_heads) * head_dim, dtype=dtype, seed=5, device=device)
    out = torch.full((6, heads * head_dim), float("nan"), dtype=dtype, device=device)
    rows = DecodeRows(ints([*cache.starts, 0], device), ints([*lengths, 0], device), cache.tables, splits)
    attend_decode(qkv, cache.keys, cache.values, rows, out)
    query = qkv[:, : heads * head_dim].view(6, heads, head_dim)
    reference = torch.stack([cache.reference(query[i], i, lengths[i] - 1) for i in range(4)])
    assert error(out[:4].view(4, heads, head_dim), reference) < tolerance
    assert out[4].abs().max() == 0  # padding reads nothing
    assert out[5].isnan().all()  # and other rows are others'


@DOT_DTYPES
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (3, 1, 24)])
def test_prefill_attention(
    device: str, dtype: torch.dtype, tolerance: float, heads: int, kv_heads: int, head_dim: int
) -> None:
    """Two chunks beside each other, one of which continues a context that is there, after a row that isn't theirs."""
    lengths, firsts = [75, 90], [5, 0]
    cache = Cache(lengths, kv_heads, head_dim, dtype, device)
    size = tile_rows(heads, kv_heads, dtype)
    total = 1 + sum(lengths) - sum(firsts)
    qkv = random(total, (heads + 2 * kv_heads) * head_dim, dtype=dtype, seed=5, device=device)
    out = torch.full((total, heads * head_dim), float("nan"), dtype=dtype, device=device)
    tiles, places, row = [], [], 1
    for index, (length, first) in enumerate(zip(lengths, firsts, strict=True)):
        for position in range(first, length, size):
            count = min(size, length - position)
            tiles.append((row, count, position, cache.starts[index]))
            places += [(row + i, index, position + i) for i in range(count)]
            row += count
    tiles.append((0, 0, 0, 0))
    columns = [ints(list(column), device) for column in zip(*tiles, strict=True)]
    attend_prefill(qkv, cache.keys, cache.values, PrefillTiles(cache.tables, *columns), out)
    query = qkv[:, : heads * head_dim].view(total, heads, head_dim)
    reference = torch.stack([cache.reference(query[row], index, position) for row, index, position in places])
    assert error(out[1:].view(total - 1, heads, head_dim), reference) < tolerance
    assert out[0].isnan().all()


SETTINGS = [
    Draw(0.0, 1.0, 0, 1, 0),
    Draw(1.0, 1.0, 0, 2, 1),
    Draw(0.7, 1.0, 7, 3, 2),
    Draw(1.3, 0.8, 0, 4, 3),
    Draw(0.9, 1.0, 0, 5, 4, min_p=0.1),
    Draw(1.0, 0.5, 40, 6, 5, min_p=0.05),
    Draw(2.0, 0.0, 3, 7, 6),
    Draw(5.0, 0.999, 290, 8, 7),
]


def draw_on(device: str, logits: torch.Tensor, draws: list[Draw]) -> list[int]:
    def column(values: list[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    out = ints([-9] * len(draws), device)
    settings = Draws(
        column([each.temperature for each in draws]),
        column([each.top_k for each in draws], torch.int32),
        column([each.top_p for each in draws]),
        column([each.min_p for each in draws]),
        column([uniform(each.seed, each.position) for each in draws]),
    )
    draw(logits.to(device), settings, out)
    return out.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_are_the_processors(device: str, dtype: torch.dtype) -> None:
    logits = (random(len(SETTINGS), 300) * 3).to(dtype)
    assert draw_on(device, logits, SETTINGS) == sample(logits.float(), SETTINGS)


def test_ties_and_what_is_no_distribution(device: str) -> None:
    logits = torch.zeros(5, 300)
    logits[0, [40, 200]] = 2.0
    logits[1, 7] = float("nan")
    logits[2, 7] = float("inf")
    logits[3] = float("-inf")
    draws = [Draw(0.0, 1.0, 0, 1, 0)] * 4 + [Draw(1.0, 1.0, 1, 5, 9)]
    assert draw_on(device, logits, draws) == [40, -1, -1, -1, sample(logits[4:], draws[4:])[0]]
