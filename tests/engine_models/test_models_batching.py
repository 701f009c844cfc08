"""A sequence's logits don't depend on how its prompt is cut, nor on what else is in the batch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millicent.engine.batch import Model, Piece
from millicent.engine.config import Dtype
from millicent.engine.models import load_model
from support.tiny_models import TinyLlama, write_tiny_model

BLOCK_TOKENS = 4
BLOCKS = 64
PROMPTS = [
    [1, 5, 90, 17, 200, 3, 44, 45, 46, 250, 9, 9, 9, 30, 31, 32, 33, 34, 35, 36, 37, 38],
    [7],
    [1, 2, 3, 4, 5, 6, 7, 8],
    [100 + token for token in range(35)],
]
BLOCK_TABLES = [[9, 3, 17, 4, 11, 2, 8], [1, 30], [20, 21, 22], [40, 55, 41, 54, 42, 53, 43, 52, 44]]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    path = write_tiny_model(tmp_path_factory.mktemp("tiny"), TinyLlama(seed=11))
    made: dict[tuple[str, bool], Model] = {}

    def model(dtype: Dtype = "fp32", *, deterministic: bool = False) -> Model:
        """Shared: each test overwrites what it reads of the cache."""
        key = (dtype, deterministic)
        if key not in made:
            made[key] = load_model(path, dtype=dtype, name="tiny", deterministic=deterministic)
            made[key].allocate(BLOCKS, BLOCK_TOKENS)
        return made[key]

    return model


def alone(model: Model, sequence: int) -> torch.Tensor:
    return model.forward([Piece(sequence, PROMPTS[sequence], 0, BLOCK_TABLES[sequence], True)])[0]


def in_pieces(model: Model, sequence: int, cuts: list[int]) -> torch.Tensor:
    prompt = PROMPTS[sequence]
    edges = sorted({0, *[cut for cut in cuts if cut < len(prompt)], len(prompt)})
    logits = torch.empty(0)
    for start, stop in pairwise(edges):
        last = stop == len(prompt)
        logits = model.forward([Piece(sequence, prompt[start:stop], start, BLOCK_TABLES[sequence], last)])
        assert len(logits) == last
    return logits[0]


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 34), max_size=6), sequence=st.sampled_from([0, 3]))
def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(
    model_of: Callable[..., Model], cuts: list[int], sequence: int
) -> None:
    model = model_of()
    torch.testing.assert_close(in_pieces(model, sequence, cuts), alone(model, sequence), atol=1e-4, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(4)), heads=st.lists(st.integers(0, 34), min_size=4, max_size=4))
def test_a_batch_of_prefill_and_decode_rows_gives_each_what_it_gets_alone(
    model_of: Callable[..., Model], order: list[int], heads: list[int]
) -> None:
    model = model_of()
    expected = [alone(model, sequence) for sequence in range(4)]
    pieces = []
    for sequence in order:
        prompt, table = PROMPTS[sequence], BLOCK_TABLES[sequence]
        done = min(heads[sequence], len(prompt) - 1)
        if done:
            model.forward([Piece(sequence, prompt[:done], 0, table, False)])
        pieces.append(Piece(sequence, prompt[done:], done, table, True))
    torch.testing.assert_close(
        model.forward(pieces), torch.stack([expected[sequence] for sequence in order]), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_deterministic_logits_are_the_same_bits_however_the_work_was_cut_and_shared(
    model_of: Callable[..., Model], dtype: Dtype
) -> None:
    model = model_of(dtype, deterministic=True)
    expected = [alone(model, sequence) for sequence in range(4)]
    assert torch.equal(in_pieces(model, 3, [1, 2, 7, 16, 30, 33]), expected[3])
    assert torch.equal(in_pieces(model, 0, list(range(1, 22))), expected[0])
    together = model.forward([Piece(s, PROMPTS[s], 0, BLOCK_TABLES[s], True) for s in (2, 0, 3, 1)])
    assert torch.equal(together, torch.stack([expected[s] for s in (2, 0, 3, 1)]))


def test_deterministic_logits_are_those_of_the_usual_pass(model_of: Callable[..., Model]) -> None:
    for sequence in range(4):
        usual, fixed = alone(model_of(), sequence), alone(model_of(deterministic=True), sequence)
        torch.testing.assert_close(fixed, usual, atol=1e-4, rtol=1e-4)


def test_what_a_block_held_before_does_not_show(model_of: Callable[..., Model]) -> None:
    model = model_of()
    first = alone(model, 0)
    table = BLOCK_TABLES[0]
    model.forward([Piece(9, [250] * BLOCK_TOKENS * len(table), 0, table[::-1], False)])
    torch.testing.assert_close(alone(model, 0), first, atol=1e-4, rtol=1e-4)


def test_only_rows_that_sample_have_logits_and_in_the_order_of_the_pieces(model_of: Callable[..., Model]) -> None:
    model = model_of()
    expected = {sequence: alone(model, sequence) for sequence in range(4)}
    logits = model.forward([Piece(s, PROMPTS[s], 0, BLOCK_TABLES[s], s in {0, 1}) for s in (3, 1, 2, 0)])
    assert logits.shape == (2, model.vocabulary_size)
    torch.testing.assert_close(logits, torch.stack([expected[1], expected[0]]), atol=1e-4, rtol=1e-4)
    assert model.forward([Piece(2, PROMPTS[2], 0, BLOCK_TABLES[2], False)]).shape == (0, model.vocabulary_size)


def test_bf16_stays_near_fp32(model_of: Callable[..., Model]) -> None:
    for sequence in range(4):
        exact, rounded = alone(model_of("fp32"), sequence), alone(model_of("bf16"), sequence)
        assert rounded.dtype is torch.float32
        assert (exact - rounded).norm() / exact.norm() < 0.05


def test_a_model_tells_its_sizes(model_of: Callable[..., Model]) -> None:
    model = model_of()
    assert (model.name, model.context_tokens, model.vocabulary_size) == ("tiny", 512, 266)
    assert model.eos_tokens == {0, 2}
    assert model.kv_bytes_per_token == 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, width, bytes
    parameters = 266 * 32 + 2 * (32 * 8 * (4 + 2 + 2 + 4) + 3 * 32 * 48 + 2 * 32) + 32
    assert model.weight_bytes == parameters * 4
