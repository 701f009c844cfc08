"""What a request may ask of its answer's end and of its log probabilities, seen through the runner."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from millicent.core.clock import ManualClock
from millicent.core.request import Limits, Sampling
from millicent.engine.config import EngineConfig
from millicent.engine.protocol import Output, ScoredToken, Submit
from millicent.engine.runner import Runner
from support.scripted_model import EOS, ScriptedModel, letter, opened

PROMPT = tuple(range(10, 31))


def runner(*, deterministic: bool = False) -> Runner:
    config = EngineConfig(step_tokens=16, block_tokens=4, deterministic=deterministic)
    return Runner(opened(ScriptedModel()), config, blocks=200)


def ask(
    limits: Limits, sampling: Sampling | None = None, subject: Runner | None = None, prompt: tuple[int, ...] = PROMPT
) -> list[Output]:
    subject = subject or runner()
    refused = subject.submit(Submit(1, "scripted", prompt, sampling or Sampling(temperature=0), limits))
    outputs = [refused] if refused else []
    while subject.busy:
        outputs += [output for output in subject.step("cpu", 0, ManualClock()).outputs if output.sequence == 1]
    return outputs


def text_of(outputs: list[Output]) -> str:
    return "".join(output.text for output in outputs)


def tokens_of(text: str) -> list[int]:
    return [ord(character) - ord(letter(0)) for character in text]


PLAIN = text_of(ask(Limits(max_tokens=20, ignore_eos=True)))


def test_a_stop_token_ends_the_answer_and_is_not_shown() -> None:
    stop = tokens_of(PLAIN)[5]
    position = tokens_of(PLAIN).index(stop)
    outputs = ask(Limits(max_tokens=20, ignore_eos=True, stop_tokens=(stop,)))
    assert (text_of(outputs), outputs[-1].finish) == (PLAIN[:position], "stop")
    assert outputs[-1].total_output_tokens == position + 1


def test_nothing_stops_an_answer_before_its_least_number_of_tokens() -> None:
    limits = Limits(max_tokens=20, ignore_eos=True, stop=(PLAIN[2], PLAIN[9]))
    assert text_of(ask(limits)) == PLAIN[:2]
    longer = text_of(ask(Limits(max_tokens=20, ignore_eos=True, stop=(PLAIN[2], PLAIN[9]), min_tokens=6)))
    assert len(longer) >= 5
    assert longer.startswith(PLAIN[:3])


def test_end_tokens_cannot_be_drawn_before_the_least_number_of_tokens() -> None:
    certain = Sampling(temperature=0, logit_bias={EOS: 100.0})
    assert ask(Limits(max_tokens=20), certain)[-1].total_output_tokens == 1
    outputs = ask(Limits(max_tokens=20, min_tokens=7), certain)
    assert (outputs[-1].finish, outputs[-1].total_output_tokens) == ("stop", 8)


def scored_tokens(outputs: list[Output]) -> list[ScoredToken]:
    return [scored for output in outputs for scored in output.scored]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_log_probabilities_are_the_models_own_whatever_the_sampling(temperature: float) -> None:
    sampling = Sampling(temperature, seed=3, logprobs=2, presence_penalty=2.0, top_k=9)
    outputs = ask(Limits(max_tokens=8, ignore_eos=True), sampling)
    context = list(PROMPT)
    for token, scored in zip(tokens_of(text_of(outputs)), scored_tokens(outputs), strict=True):
        expected = torch.log_softmax(ScriptedModel().logits(context).double(), 0)
        assert scored.token == token
        assert scored.logprob == pytest.approx(expected[token].item(), abs=1e-5)
        assert [one for one, _ in scored.top] == expected.topk(2).indices.tolist()
        context.append(token)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_prompt_is_scored_whole_over_all_its_chunks_even_if_its_prefix_is_cached(deterministic: bool) -> None:
    subject = runner(deterministic=deterministic)
    ask(Limits(max_tokens=1), subject=subject)
    sampling = Sampling(temperature=0, logprobs=1, prompt_logprobs=True)
    outputs = ask(Limits(max_tokens=2, ignore_eos=True), sampling, subject)
    scored = [entry for output in outputs for entry in output.scored_prompt]
    assert [entry.token for entry in scored] == list(PROMPT)
    assert scored[0].logprob is None
    for position in range(1, len(PROMPT)):
        expected = torch.log_softmax(ScriptedModel().logits(PROMPT[:position]).double(), 0)
        assert scored[position].logprob == pytest.approx(expected[PROMPT[position]].item(), abs=1e-5)
    assert text_of(outputs) == PLAIN[:2]
    assert outputs[-1].cached_tokens == 0


def test_a_prompt_can_be_scored_without_any_output() -> None:
    (output,) = ask(Limits(max_tokens=0), Sampling(logprobs=0, prompt_logprobs=True))
    assert (output.finish, output.tokens, output.text, output.total_output_tokens) == ("length", 0, "", 0)
    assert len(output.scored_prompt) == len(PROMPT)


def test_cached_tokens_are_told_and_change_no_token() -> None:
    subject = runner()
    first = ask(Limits(max_tokens=20, ignore_eos=True), subject=subject)
    again = ask(Limits(max_tokens=20, ignore_eos=True), subject=subject)
    assert (first[-1].cached_tokens, again[-1].cached_tokens) == (0, 20)
    assert text_of(again) == text_of(first) == PLAIN


def test_a_token_that_the_model_has_not_got_is_refused_and_named() -> None:
    for limits, sampling in (
        (Limits(max_tokens=1, stop_tokens=(97,)), Sampling()),
        (Limits(max_tokens=1), Sampling(logit_bias={97: 1.0})),
    ):
        (refused,) = ask(limits, sampling)
        assert refused.finish == "error"
        assert "token 97" in refused.error


def test_thirty_two_requests_with_one_prefix_of_512_tokens_prefill_it_once() -> None:
    config = EngineConfig(step_tokens=512, block_tokens=16)
    subject = Runner(opened(ScriptedModel(context_tokens=1024)), config, blocks=2048)
    prefix = tuple(2 + index % 80 for index in range(512))
    limits = Limits(max_tokens=3, ignore_eos=True)
    for number in range(1, 33):
        frame = Submit(number, "scripted", (*prefix, number, 5), Sampling(temperature=0), limits)
        assert subject.submit(frame) is None
    rows = 0
    cached: dict[int, int | None] = {}
    while subject.busy:
        step = subject.step("cpu", 0, ManualClock())
        assert step.record is not None
        rows += sum(work.prefill_rows for work in step.record.sequences)
        cached |= {output.sequence: output.cached_tokens for output in step.outputs}
    assert rows == 512 + 32 * 2
    assert Counter(cached.values()) == {0: 1, 512: 31}
