"""Filters and penalties keep what transformers' own keep, on the same logits; log probabilities are log_softmax's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from millicent.core.request import Limits, Sampling
from millicent.engine.logprobs import score
from millicent.engine.processors import adjustments
from millicent.engine.sampler import Draw, sample

PROMPT = [3, 9, 9, 40, 77]
OUTPUT = [9, 12, 12, 12, 300]


def random_scores(seed: int = 0, vocabulary: int = 500) -> torch.Tensor:
    return torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def adjusted(scores: torch.Tensor, sampling: Sampling, limits: Limits | None = None, ends: Any = ()) -> np.ndarray:
    adjust = adjustments(sampling, limits or Limits(), PROMPT, ends)
    assert adjust is not None
    for token in OUTPUT:
        adjust.note(token)
    result = scores.numpy().copy()
    adjust(result)
    return result


def transformed(processor: Any, scores: torch.Tensor) -> np.ndarray:
    result: np.ndarray = processor(torch.tensor([PROMPT + OUTPUT]), scores[None].clone())[0].numpy()
    return result


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_the_repetition_penalty_is_transformers(penalty: float) -> None:
    transformers = pytest.importorskip("transformers")
    scores = random_scores()
    theirs = transformed(transformers.RepetitionPenaltyLogitsProcessor(penalty), scores)
    np.testing.assert_allclose(adjusted(scores, Sampling(repetition_penalty=penalty)), theirs, rtol=1e-6)


def test_a_bias_is_transformers_sequence_bias() -> None:
    transformers = pytest.importorskip("transformers")
    scores = random_scores()
    processor = transformers.SequenceBiasLogitsProcessor([[[7], 5.0], [[12], -100.0]])
    theirs = transformed(processor, scores)
    np.testing.assert_allclose(adjusted(scores, Sampling(logit_bias={7: 5.0, 12: -100.0})), theirs, rtol=1e-6)


def test_no_end_comes_before_the_least_number_of_tokens_as_in_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    scores = random_scores()
    for least in (len(OUTPUT), len(OUTPUT) + 1):
        processor = transformers.MinNewTokensLengthLogitsProcessor(len(PROMPT), least, [1, 2], device="cpu")
        theirs = transformed(processor, scores)
        np.testing.assert_array_equal(adjusted(scores, Sampling(), Limits(min_tokens=least), (1, 2)), theirs)


def test_presence_and_frequency_penalties_count_the_output_as_openai_defines_them() -> None:
    scores = random_scores()
    expected = scores.numpy().copy()
    for token in set(OUTPUT):
        expected[token] -= 0.5 + 0.25 * OUTPUT.count(token)
    found = adjusted(scores, Sampling(presence_penalty=0.5, frequency_penalty=0.25))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("warper", "arguments", "filters"),
    [
        ("TopKLogitsWarper", (20,), {"top_k": 20}),
        ("TopPLogitsWarper", (0.8,), {"top_p": 0.8}),
        ("MinPLogitsWarper", (0.1,), {"min_p": 0.1}),
        ("TypicalLogitsWarper", (0.7,), {"typical_p": 0.7}),
    ],
)
def test_filters_keep_what_transformers_keep(warper: str, arguments: tuple[Any, ...], filters: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    for seed in range(4):
        scores = random_scores(seed, vocabulary=300)
        kept = np.flatnonzero(np.isfinite(transformed(getattr(transformers, warper)(*arguments), scores)))
        # Numbers that together hit every token with a part worth seeing.
        fields: dict[str, Any] = {"top_p": 1.0, "top_k": 0} | filters
        drawn = set()
        for position in range(1500):
            draw = Draw(1.0, seed=seed, position=position, **fields)
            drawn.update(sample(scores[None], [draw]))
        assert drawn <= set(kept.tolist())
        likely = torch.softmax(scores[torch.from_numpy(kept)], 0).numpy() > 0.01
        assert set(kept[likely].tolist()) <= drawn


def test_log_probabilities_are_log_softmaxs() -> None:
    scores = random_scores(5)
    expected = torch.log_softmax(scores.double(), 0)
    (found,) = score([scores.numpy()], [42], [5])
    assert found.logprob == pytest.approx(expected[42].item(), abs=1e-5)
    values, tokens = expected.topk(5)
    assert [token for token, _ in found.top] == tokens.tolist()
    assert [logprob for _, logprob in found.top] == pytest.approx(values.tolist(), abs=1e-5)
    none, all_there_are = score([scores.numpy()] * 2, [42, 42], [0, 10_000])
    assert none.top == ()
    assert none.logprob == all_there_are.logprob
    assert len(all_there_are.top) == 500


def test_adjusting_one_row_leaves_the_logits_and_its_neighbours_alone() -> None:
    logits = torch.stack([random_scores(seed) for seed in range(3)])
    before = logits.clone()
    best = logits[1].argmax().item()
    ban = adjustments(Sampling(logit_bias={int(best): -100.0}), Limits(), PROMPT, ())
    draws = [Draw(0.0, 1.0, 0, 0, 0), Draw(0.0, 1.0, 0, 0, 0, adjust=ban), Draw(0.0, 1.0, 0, 0, 0)]
    tokens = sample(logits, draws)
    assert tokens == [logits[0].argmax(), logits[1].topk(2).indices[1], logits[2].argmax()]
    assert torch.equal(logits, before)


def test_nothing_to_adjust_costs_nothing() -> None:
    assert adjustments(Sampling(temperature=0.5, top_p=0.5), Limits(max_tokens=3), PROMPT, (1, 2)) is None
