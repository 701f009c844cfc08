"""Guesses change how soon an answer comes, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import llguidance
import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millicent.core.clock import ManualClock
from millicent.core.request import Limits, Sampling
from millicent.core.steps import SequenceWork, StepRecord
from millicent.engine.config import EngineConfig
from millicent.engine.grammars import Vocabulary
from millicent.engine.lookup import Lookup
from millicent.engine.protocol import Output, Step, Submit
from millicent.engine.runner import OpenModel, Runner
from millicent.step_time import Coefficients
from millicent.text.grammars import vocabulary
from support.scripted_model import EOS, Letters, ScriptedModel, letter


def characters(size: int, ends: Iterable[int]) -> llguidance.LLTokenizer:
    """Letters, digits and the like from token 2 on."""
    pad = [b"<pad>", b"<end>", *[b""] * (size - 2)]
    return vocabulary([chr(token + 30).encode() if token > EOS else b"" for token in range(size)], pad, ends)


FREE_ROWS = Coefficients(0, 1e6, 0, 0, 0, 0)
DEAR_ROWS = Coefficients(1e5, 0, 1e6, 0, 0, 0)


class Repeating(ScriptedModel):
    """What comes hangs mostly on the last two tokens, so that it repeats itself, and on all before a little."""

    def __init__(self, *, noise: float = 0.3, **settings: Any) -> None:
        super().__init__(**{"vocabulary_size": 24, **settings})
        self._noise = noise

    def logits(self, context: Iterable[int]) -> torch.Tensor:
        tokens = list(context)
        return super().logits(tokens[-2:]) * 2 + super().logits(tokens) * self._noise


def runner(
    model: ScriptedModel | None = None,
    costs: Coefficients | None = FREE_ROWS,
    *,
    blocks: int = 200,
    draft: ScriptedModel | None = None,
    vocabulary: Vocabulary | None = None,
    **configured: Any,
) -> Runner:
    model = model or Repeating()
    config = EngineConfig(**{"step_tokens": 32, "block_tokens": 4, **configured})
    subject = Runner(OpenModel(model, frozenset({EOS}), Letters, vocabulary, draft), config, blocks=blocks)
    if costs is not None:
        subject.learn("scripted", costs)
        subject.learn("draft", Coefficients(0, 1e4, 0, 0, 0, 0))
    return subject


def draft(**settings: Any) -> Repeating:
    model = Repeating(**settings)
    model.name = "draft"
    return model


def submit(number: int, prompt: int = 9, sampling: Sampling | None = None, limits: Limits | None = None) -> Submit:
    tokens = tuple((number * 5 + index * 7 % 11) % 20 + 3 for index in range(prompt))
    limits = limits or Limits(max_tokens=60, ignore_eos=True)
    return Submit(number, "scripted", tokens, sampling or Sampling(temperature=0), limits)


def drive(subject: Runner, frames: Iterable[Submit]) -> list[Step]:
    for frame in frames:
        refused = subject.submit(frame)
        assert refused is None, refused
    steps: list[Step] = []
    clock = ManualClock()
    while subject.busy:
        steps.append(subject.step("cpu", len(steps), clock))
        pool = subject.scheduler.pool
        assert pool.free + pool.cached + pool.used == pool.total
        assert len(steps) < 3000
    assert subject.scheduler.pool.used == 0
    return steps


def said(steps: list[Step]) -> dict[int, tuple[object, ...]]:
    """Everything that a client could see of each sequence."""
    found: dict[int, list[Output]] = {}
    for step in steps:
        for output in step.outputs:
            found.setdefault(output.sequence, []).append(output)
    return {
        sequence: (
            "".join(output.text for output in outputs),
            tuple(scored for output in outputs for scored in output.scored),
            tuple(scored for output in outputs for scored in output.scored_prompt),
            outputs[-1].finish,
            outputs[-1].error,
            outputs[-1].total_output_tokens,
            sum(output.tokens for output in outputs),
        )
        for sequence, outputs in found.items()
    }


def works(steps: list[Step]) -> list[SequenceWork]:
    return [work for step in steps if step.record for work in step.record.sequences]


def test_text_that_repeats_itself_takes_far_fewer_steps() -> None:
    frame = submit(1, limits=Limits(max_tokens=150, ignore_eos=True))
    with_guesses = drive(runner(Repeating(noise=0.0)), [frame])
    without = drive(runner(Repeating(noise=0.0), costs=None), [frame])
    assert said(with_guesses) == said(without)
    assert len(with_guesses) < len(without) / 2
    drafted = sum(work.drafted_tokens for work in works(with_guesses))
    accepted = sum(work.accepted_tokens for work in works(with_guesses))
    assert 0 < accepted <= drafted
    # Every output token but the first came of a step with a decode row of its own, or was a guess.
    assert accepted + len(with_guesses) == len(without)
    assert all(
        work.decode_rows == work.sampled_rows == 1 + work.drafted_tokens
        for work in works(with_guesses)
        if work.drafted_tokens
    )


SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_p=st.sampled_from([1.0, 0.8]),
    top_k=st.sampled_from([0, 3]),
    min_p=st.sampled_from([0.0, 0.05]),
    seed=st.integers(0, 2**40),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.2]),
    logit_bias=st.sampled_from([{}, {4: 1.5, 9: -3.0}]),
    logprobs=st.sampled_from([None, 0, 3]),
    prompt_logprobs=st.booleans(),
)
LIMITS = st.builds(
    Limits,
    max_tokens=st.integers(1, 50),
    min_tokens=st.sampled_from([0, 6]),
    ignore_eos=st.booleans(),
    stop=st.sampled_from([(), (letter(7) + letter(12), letter(5)), (letter(3),)]),
    stop_tokens=st.sampled_from([(), (11,)]),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), SAMPLINGS, LIMITS), min_size=1, max_size=7), st.data())
def test_answers_are_the_same_token_for_token(asked: list[tuple[int, Sampling, Limits]], data: st.DataObject) -> None:
    frames = [submit(number, *each) for number, each in enumerate(asked, 1)]
    deterministic = data.draw(st.booleans())
    noise = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    # Few blocks: sequences are preempted with guesses at hand.
    blocks = data.draw(st.sampled_from([26, 60, 400]))
    drafter = data.draw(st.sampled_from([None, {"noise": 0.0}, {"noise": 0.5, "vocabulary_size": 20}]))

    def run(costs: Coefficients | None) -> list[Step]:
        model = Repeating(noise=noise, context_tokens=100)
        by = None if drafter is None else draft(context_tokens=80, **drafter)
        return drive(runner(model, costs, draft=by, blocks=blocks, deterministic=deterministic), frames)

    assert said(run(FREE_ROWS)) == said(run(None))


def test_a_seed_draws_with_guesses_what_the_distribution_says() -> None:
    """Of many seeds, the tokens that come after a wrong or right guess are as frequent as the model says."""
    model = Repeating(noise=0.0, vocabulary_size=8)
    counts = torch.zeros(8)
    expected = torch.zeros(8)
    for seed in range(60):
        frame = submit(1, 12, Sampling(temperature=1.0, seed=seed))
        steps = drive(runner(Repeating(noise=0.0, vocabulary_size=8)), [_small(frame)])
        tokens = list(_small(frame).tokens)
        for text in said(steps)[1][0]:  # type: ignore[attr-defined]
            expected += torch.softmax(model.logits(tokens), 0)
            token = ord(text) - ord(letter(0))
            counts[token] += 1
            tokens.append(token)
    # 60 x 60 draws: a chi-square of 7 degrees of freedom is above 24 once in a thousand times. The seeds are fixed.
    assert float(((counts - expected) ** 2 / expected).sum()) < 24


def _small(frame: Submit) -> Submit:
    return Submit(1, "scripted", tuple(token % 8 for token in frame.tokens), frame.sampling, frame.limits)


def test_guesses_stop_where_a_step_has_no_room_for_them() -> None:
    frames = [submit(number, 20 + number, limits=Limits(max_tokens=30, ignore_eos=True)) for number in range(1, 7)]
    subject = runner(step_tokens=32, max_sequences=4)
    steps = drive(subject, frames)
    assert all(sum(work.rows for work in step.record.sequences) <= 32 for step in steps if step.record)
    assert any(work.drafted_tokens for work in works(steps))


def test_no_guess_is_checked_where_rows_cost_what_they_bring() -> None:
    steps = drive(runner(costs=DEAR_ROWS), [submit(1), submit(2)])
    assert not any(work.drafted_tokens for work in works(steps))


def test_nothing_is_guessed_while_nobody_knows_what_steps_cost_nor_where_it_is_off() -> None:
    assert not any(work.drafted_tokens for work in works(drive(runner(costs=None), [submit(1)])))
    assert not any(work.drafted_tokens for work in works(drive(runner(speculation="off"), [submit(1)])))


def test_wrong_guesses_lose_their_turn() -> None:
    """What came before doesn't come again more often than by chance: soon hardly anything is tried."""
    costs = Coefficients(1e6, 0, 3e5, 0, 0, 0)  # a row more is a quarter of a step more
    limits = Limits(max_tokens=200, ignore_eos=True)
    frame = Submit(1, "scripted", (5, 6, 7, 8) * 9, Sampling(temperature=50.0, seed=3), limits)
    steps = drive(runner(Repeating(noise=2.0, vocabulary_size=9), costs), [frame])
    drafted = [work.drafted_tokens for work in works(steps)]
    assert sum(drafted[len(drafted) // 2 :]) < sum(drafted[: len(drafted) // 2]) / 2


def test_cancelling_with_guesses_at_hand_gives_all_blocks_back() -> None:
    subject = runner()
    for number in (1, 2):
        subject.submit(submit(number))
    clock = ManualClock()
    records = (subject.step("cpu", index, clock).record for index in range(100))
    assert any(work.sequence == 1 and work.drafted_tokens for record in records if record for work in record.sequences)
    subject.cancel(1)
    whole = said(drive(runner(), [submit(2)]))[2]
    rest = said(drive(subject, []))[2]
    assert rest[3:6] == whole[3:6]
    assert str(whole[0]).endswith(str(rest[0]))


def test_a_pass_that_fails_while_guesses_are_checked_ends_its_sequences_only() -> None:
    failing = False

    def before(pieces: Iterable[object]) -> None:
        if failing and any(getattr(piece, "drafts", 0) for piece in pieces):
            raise RuntimeError("no")

    subject = runner(Repeating(before=before))
    subject.submit(submit(1))
    clock = ManualClock()
    for index in range(8):
        subject.step("cpu", index, clock)
    failing = True
    steps = drive(subject, [])
    assert said(steps)[1][3] == "error"
    failing = False
    assert said(drive(subject, [submit(3)])) == said(drive(runner(), [submit(3)]))


def test_the_prefix_cache_holds_nothing_of_wrong_guesses() -> None:
    """A second turn finds the first one's blocks; what it says is what it says without any cache."""
    subject = runner(Repeating(noise=1.0))
    first = submit(1, 9, Sampling(temperature=1.0, seed=4))
    answer = [ord(text) - ord(letter(0)) for text in str(said(drive(subject, [first]))[1][0])]
    second = Submit(2, "scripted", (*first.tokens, *answer, 3, 4), Sampling(temperature=0), Limits(max_tokens=30))
    steps = drive(subject, [second])
    assert next(output.cached_tokens for step in steps for output in step.outputs) == 68 // 4 * 4
    assert said(steps) == said(drive(runner(Repeating(noise=1.0), None, prefix_cache="off"), [second]))


@pytest.mark.parametrize("period", [1, 2, 3, 5])
def test_what_repeats_with_a_period_is_guessed_on_and_on(period: int) -> None:
    tokens = [index % period for index in range(12)]
    assert Lookup().guess(tokens, 7) == [(12 + index) % period for index in range(7)]


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 8))
def test_a_lookup_finds_what_followed_last_time_however_it_was_told(tokens: list[int], most: int) -> None:
    one = Lookup()
    for size in range(len(tokens)):
        one.guess(tokens[:size], 1)
    guesses = one.guess(tokens, most)
    assert guesses == Lookup().guess(tokens, most)
    ends = [end for end in range(3, len(tokens)) if tokens[end - 3 : end] == tokens[-3:]]
    assert bool(guesses) == bool(ends and most)
    if guesses:
        kept = tokens[ends[-1] : ends[-1] + most]
        assert guesses[: len(kept)] == kept
        assert len(guesses) == most


GRAMMARS = ("", 'start: /([A-C][0-9]-){1,6}/ "!"', "start: /[a-d]{30}/")


@pytest.mark.parametrize("beside", [None, {"noise": 0.1}, {"noise": 0.1, "vocabulary_size": 60}])
def test_answers_under_a_grammar_are_the_same_token_for_token(beside: dict[str, Any] | None) -> None:
    """Some in a batch have one, some have penalties too."""
    sampling = Sampling(temperature=1.2, frequency_penalty=0.3, logprobs=2)
    limits = Limits(max_tokens=40, min_tokens=3)
    frames = [
        msgspec.structs.replace(
            submit(number, 8 + number, msgspec.structs.replace(sampling, seed=number), limits),
            grammar=GRAMMARS[number % 3],
        )
        for number in range(1, 9)
    ]

    def run(costs: Coefficients | None) -> tuple[dict[int, tuple[object, ...]], int]:
        model = Repeating(noise=0.2, vocabulary_size=97)
        drafting = None if beside is None or costs is None else draft(**{"vocabulary_size": 97} | beside)
        subject = runner(model, costs, draft=drafting, vocabulary=characters)
        for frame in frames:
            subject.submit(frame)
        deadline = time.monotonic() + 60
        while any(frame.sequence not in subject for frame in frames):  # all begin together
            assert time.monotonic() < deadline
            assert not subject.take_compiled()
        steps = drive(subject, [])
        return said(steps), sum(work.accepted_tokens for work in works(steps))

    (without, none), (guessed, accepted) = run(None), run(FREE_ROWS)
    assert guessed == without
    assert none == 0 < accepted


# A draft model.


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), SAMPLINGS, LIMITS), min_size=1, max_size=7), st.data())
def test_a_draft_that_thinks_alike_is_always_right(
    asked: list[tuple[int, Sampling, Limits]], data: st.DataObject
) -> None:
    """Its cache, which shares blocks with the other's, holds what it should: after catching up in pieces, preemption,
    a prefix that another one computed, guesses that were drawn again."""
    frames = [submit(number, *each) for number, each in enumerate(asked, 1)]
    blocks = data.draw(st.sampled_from([26, 60, 400]))
    deterministic = data.draw(st.booleans())
    step_tokens = data.draw(st.sampled_from([16, 64]))
    shape = {"noise": 1.0, "context_tokens": 100}
    subject = runner(
        Repeating(**shape), draft=draft(**shape), blocks=blocks, deterministic=deterministic, step_tokens=step_tokens
    )
    steps = drive(subject, frames)
    checked = [work for step in steps for work in (step.record.sequences if step.record else ()) if work.drafted_tokens]
    ended = {output.sequence: index for index, step in enumerate(steps) for output in step.outputs if output.finish}
    for index, step in enumerate(steps):
        for work in step.record.sequences if step.record else ():
            if ended[work.sequence] > index:  # what ends an answer leaves guesses behind it
                assert work.accepted_tokens == work.drafted_tokens
    assert checked or all(frame.limits.max_tokens is not None and frame.limits.max_tokens < 30 for frame in frames)


def test_a_drafts_passes_are_records_of_its_own_for_the_sequences_they_are_for() -> None:
    clock = ManualClock()
    target = Repeating(noise=0.0, before=lambda pieces: clock.advance(100))
    subject = runner(target, draft=draft(noise=0.0, before=lambda pieces: clock.advance(7)))
    for number in (1, 2):
        subject.submit(submit(number))
    records: list[StepRecord] = []
    while subject.busy:
        record = subject.step("cpu", len(records), clock).record
        assert record is not None
        records.append(record)
    drafts = [record for record in records if record.model == "draft"]
    assert drafts
    assert {record.wall_ns for record in drafts} == {7}
    assert {work.sequence for record in drafts for work in record.sequences} == {1, 2}
    assert all(work.drafted_tokens == 0 for record in drafts for work in record.sequences)
    ends_ns = [record.start_ns + record.wall_ns for record in records]
    assert all(record.start_ns >= end_ns for record, end_ns in zip(records[1:], ends_ns[:-1], strict=True))
    # Prompts are computed once by each of the two.
    assert sum(work.prefill_rows for record in drafts for work in record.sequences) >= 18


def test_a_draft_model_that_costs_what_it_saves_is_left_alone() -> None:
    subject = runner(draft=draft())
    subject.learn("draft", FREE_ROWS)
    steps = drive(subject, [submit(1)])
    assert {step.record.model for step in steps if step.record} == {"scripted"}


def test_a_draft_model_that_fails_is_done_without(caplog: pytest.LogCaptureFixture) -> None:
    def fail(pieces: object) -> None:
        raise RuntimeError("no")

    subject = runner(draft=draft(before=fail))
    assert said(drive(subject, [submit(1)])) == said(drive(runner(costs=None), [submit(1)]))
    assert "goes on without it" in caplog.text


def test_a_draft_model_forgets_its_wrong_guesses() -> None:
    """What it has read by the time it guesses is what was said, not what it had thought would be."""
    read: list[list[int]] = []

    class Reading(Repeating):
        def logits(self, context: Iterable[int]) -> torch.Tensor:
            tokens = list(context)
            read.append(tokens)
            return super().logits(tokens)

    model = Reading(noise=0.6)
    model.name = "draft"
    frame = submit(1, limits=Limits(max_tokens=100, ignore_eos=True))
    subject = runner(Repeating(noise=0.3), draft=model)
    assert subject.submit(frame) is None
    steps: list[Step] = []
    while subject.busy:  # now and then the answer goes on without it for a while
        subject.learn("draft", FREE_ROWS if len(steps) % 12 < 4 else Coefficients(0, 1e4, 0, 0, 0, 0))
        steps.append(subject.step("cpu", len(steps), ManualClock()))
    tokens = [*frame.tokens, *(ord(text) - ord(letter(0)) for text in str(said(steps)[1][0]))]
    assert 0 < sum(work.accepted_tokens for work in works(steps)) < sum(work.drafted_tokens for work in works(steps))
    for context in read:
        settled = max(0, len(context) - 10)  # the latest may be guesses
        assert context[:settled] == tokens[:settled]


def test_cancelling_while_a_draft_guesses_gives_all_back() -> None:
    subject = runner(draft=draft())
    subject.submit(submit(1))
    subject.submit(submit(2))
    clock = ManualClock()
    models = (step.record.model for step in (subject.step("cpu", index, clock) for index in range(50)) if step.record)
    assert "draft" in models
    subject.cancel(1)
    drive(subject, [submit(3)])
