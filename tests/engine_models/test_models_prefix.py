"""What the prefix cache relies on: rows computed on top of another sequence's blocks are those of a whole prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from millicent.engine.batch import Model, Piece
from millicent.engine.config import Dtype
from millicent.engine.models import load_model
from support.tiny_models import TinyLlama, write_tiny_model

BLOCK_TOKENS = 4
PROMPT = [3 + (7 * index * index) % 250 for index in range(45)]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    path: Path = write_tiny_model(tmp_path_factory.mktemp("tiny"), TinyLlama(seed=3))

    def made(dtype: Dtype, *, deterministic: bool) -> Model:
        model = load_model(path, dtype=dtype, name="tiny", deterministic=deterministic)
        model.allocate(64, BLOCK_TOKENS)
        return model

    return made


def whole(model: Model, *, every_row: bool = False) -> torch.Tensor:
    return model.forward([Piece(1, PROMPT, 0, list(range(12)), True, every_row)])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("cached", [4, 16, 20, 40, 44])
def test_under_deterministic_a_cache_hit_gives_the_same_bits(
    load: Callable[..., Model], dtype: Dtype, cached: int
) -> None:
    model = load(dtype, deterministic=True)
    expected = whole(model)
    blocks = [*range(cached // BLOCK_TOKENS), *range(40, 52)]
    assert torch.equal(model.forward([Piece(2, PROMPT[cached:], cached, blocks, True)]), expected)


@pytest.mark.parametrize("cached", [4, 16, 44])
def test_elsewhere_a_cache_hit_is_as_near_as_another_batch(load: Callable[..., Model], cached: int) -> None:
    model = load("fp32", deterministic=False)
    expected = whole(model)
    blocks = [*range(cached // BLOCK_TOKENS), *range(40, 52)]
    found = model.forward([Piece(2, PROMPT[cached:], cached, blocks, True), Piece(3, [5], 0, [60], True)])
    torch.testing.assert_close(found[:1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_logits_of_every_row_are_those_after_each_beginning(
    load: Callable[..., Model], deterministic: bool
) -> None:
    model = load("fp32", deterministic=deterministic)
    rows = whole(model, every_row=True)
    assert rows.shape == (len(PROMPT), model.vocabulary_size)
    for size in (1, 15, 16, 17, 45):
        (expected,) = model.forward([Piece(2, PROMPT[:size], 0, list(range(30, 42)), True)])
        torch.testing.assert_close(rows[size - 1], expected, rtol=1e-4, atol=1e-4)
    tail = model.forward([Piece(1, PROMPT[20:], 20, list(range(12)), False, True)])
    torch.testing.assert_close(tail, rows[20:], rtol=1e-4, atol=1e-4)
