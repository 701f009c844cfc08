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
from millicent.engine.cuda.kernels.matmul import SMALL_ROWS, multiply_few
from millicent.engine.cuda.kernels.rows import (
    Norm,
    Turning,
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
    picked = add_rms_norm(delta, residual, Norm(weight, EPS), picked=ints([4, 0, 4], device))
    assert error(picked, reference[[4, 0, 4]]) < tolerance
    assert error(add_rms_norm(delta, residual, Norm(weight, EPS)), reference) < tolerance
    assert error(residual, total) < tolerance


def as_turned(rows: torch.Tensor, turning: Turning, positions: list[int], heads: int) -> torch.Tensor:
    """float64 of rows [rows, heads, then kv_heads of keys and of values, head_dim]; values aren't turned."""
    found, half = rows.clone(), rows.shape[2] // 2
    kv_heads = (rows.shape[1] - heads) // 2
    for index, span in enumerate((slice(heads), slice(heads, heads + kv_heads))):
        part = rows[:, span]
        if turning.norms is not None:
            part = part / (part.square().mean(-1, keepdim=True) + EPS).sqrt() * turning.norms[index].double()
        cosine, sine = (each.double()[positions][:, None] for each in turning.angles)
        found[:, span, :half] = part[..., :half] * cosine - part[..., half:] * sine
        found[:, span, half:] = part[..., half:] * cosine + part[..., :half] * sine
    return found


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
    turning = Turning((angles.cos().float(), angles.sin().float()), norms, EPS)
    rotate_and_cache(qkv, turning, ints(positions, device), ints(slots, device), keys, values)

    turned = as_turned(before, turning, positions, heads)
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


def test_rows_round_to_fp8(device: str) -> None:
    x = random(40, 72, seed=1, device=device)
    values, scales = quantize_rows(x)
    assert error(values.double() * scales, x.double()) < FP8_TOLERANCE  # three bits after the first


@DOT_DTYPES
@pytest.mark.parametrize("rows", [1, 3, SMALL_ROWS])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(40, 72), (2, 1100)])
def test_few_rows_are_multiplied_with_what_comes_before_and_after(
    device: str, dtype: torch.dtype, tolerance: float, rows: int, fp8: bool, outputs: int, inputs: int
) -> None:
    """Sizes that no block divides; what may not be read is poison."""
    x = torch.cat([random(rows, inputs, dtype=dtype), torch.full((2, inputs), float("nan"), dtype=dtype)]).to(device)
    weight = random(outputs, inputs, dtype=dtype, seed=1, device=device) / inputs**0.5
    bias, gain = (random(size, dtype=dtype, seed=2, device=device) for size in (outputs, inputs))
    stored, scales, read = weight, None, weight.double()
    if fp8:
        stored, scales = quantize_rows(weight)
        read, scales = stored.double() * scales, scales.view(-1)
    plain = x[:rows].double() @ read.T
    assert error(multiply_few(x[:rows], stored, scales), plain) < tolerance

    real = x[:rows].double()
    normed = real / (real.square().mean(-1, keepdim=True) + EPS).sqrt() * gain.double()
    biased = normed @ read.T + bias.double()
    norm = Norm(gain, EPS)
    assert error(multiply_few(x[:rows], stored, scales, bias, norm=norm), biased) < tolerance

    gate, up = biased.chunk(2, dim=-1)
    gated = multiply_few(x[:rows], stored, scales, bias, norm=norm, gated=True)
    assert error(gated, gate * torch.sigmoid(gate) * up) < 2 * tolerance

    held = random(rows + 1, outputs, dtype=dtype, seed=3, device=device)
    onto = held.clone()
    assert multiply_few(x[:rows], stored, scales, onto=onto) is onto
    assert error(onto[:rows], held[:rows].double() + plain) < tolerance
    assert torch.equal(onto[rows:], held[rows:])

    order = list(range(rows))[::-1]
    out = torch.full((rows, outputs), float("nan"), dtype=dtype, device=device)
    multiply_few(x, stored, scales, norm=norm, picked=ints(order, device), out=out)
    assert error(out, (normed @ read.T)[order]) < tolerance


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

    def forget(self, index: int, position: int) -> tuple[int, slice, int]:
        """Where a token's key and value are, which hold poison now."""
        size = self.keys.shape[2]
        place = (int(self.tables[self.starts[index] + position // size]), slice(None), position % size)
        self.keys[place] = self.values[place] = 1e4
        return place

    def reference(self, query: torch.Tensor, index: int, position: int) -> torch.Tensor:
        """float64 [heads, head_dim] for one row of queries [heads, head_dim]."""
        keys, values = (rows[: position + 1].double() for rows in self.contexts[index])
        group = len(query) // keys.shape[1]
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        scores = torch.einsum("hd,thd->ht", query.double(), keys) / query.shape[1] ** 0.5
        return torch.einsum("ht,thd->hd", scores.softmax(-1), values)


@DOT_DTYPES
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (3, 1, 24)])
def test_decode_attention_from_products(
    device: str, dtype: torch.dtype, tolerance: float, splits: int, normed: bool, heads: int, kv_heads: int,
    head_dim: int,
) -> None:  # fmt: skip
    """Contexts that end at, before and after the edges of blocks, turns and parts; nothing but a row's own key and
    value is written."""
    lengths = [1, 300, 64, 65, 128, 129, 257]
    count = len(lengths)
    cache = Cache(lengths, kv_heads, head_dim, dtype, device)
    qkv = random(count + 2, (heads + 2 * kv_heads) * head_dim, dtype=dtype, seed=5, device=device)
    angles = torch.outer(torch.arange(300).float(), 1.0 / 100 ** (torch.arange(head_dim // 2) / head_dim)).to(device)
    gains = (random(head_dim, dtype=dtype, seed=1, device=device), random(head_dim, dtype=dtype, seed=2, device=device))
    turning = Turning((angles.cos(), angles.sin()), gains if normed else None, EPS)
    turned = as_turned(
        qkv[:count].double().view(count, -1, head_dim), turning, [length - 1 for length in lengths], heads
    )
    before = (cache.keys.clone(), cache.values.clone())
    for index, length in enumerate(lengths):
        place = cache.forget(index, length - 1)
        new = turned[index, heads:].to(dtype).view(2, kv_heads, head_dim)
        for held, rows, row in zip(before, cache.contexts[index], new, strict=True):
            held[place] = row
            rows[length - 1] = row
    out = torch.full((count + 2, heads * head_dim), float("nan"), dtype=dtype, device=device)
    arrivals = ints([0] * (count + 1) * kv_heads, device)
    decode = DecodeRows(ints([*cache.starts, 0], device), ints([*lengths, 0], device), cache.tables, arrivals, splits)
    for _ in range(2):  # a second time as the first: what they tell each other by is as it was
        attend_decode(qkv, turning, cache.keys, cache.values, decode, out)
        reference = torch.stack([cache.reference(turned[i, :heads], i, lengths[i] - 1) for i in range(count)])
        assert error(out[:count].view(count, heads, head_dim), reference) < tolerance
        assert arrivals.abs().max() == 0
    assert out[count].abs().max() == 0  # padding reads nothing
    assert out[count + 1].isnan().all()  # and other rows are others'
    for held, found in zip(before, (cache.keys, cache.values), strict=True):
        assert error(found, held.double()) < tolerance / 10
        assert int((found != held).any(-1).sum()) <= count * kv_heads


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
@pytest.mark.parametrize("count", [300, 20_011])
def test_draws_are_the_processors(device: str, dtype: torch.dtype, count: int) -> None:
    logits = (random(len(SETTINGS), count) * 3).to(dtype)
    assert draw_on(device, logits, SETTINGS) == sample(logits.float(), SETTINGS)


def test_ties_and_what_is_no_distribution(device: str) -> None:
    logits = torch.zeros(5, 300)
    logits[0, [40, 200]] = 2.0
    logits[1, 7] = float("nan")
    logits[2, 7] = float("inf")
    logits[3] = float("-inf")
    draws = [Draw(0.0, 1.0, 0, 1, 0)] * 4 + [Draw(1.0, 1.0, 1, 5, 9)]
    assert draw_on(device, logits, draws) == [40, -1, -1, -1, sample(logits[4:], draws[4:])[0]]
