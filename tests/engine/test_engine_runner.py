from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from millicent.core.clock import ManualClock
from millicent.core.request import Limits, Sampling
from millicent.engine.batch import Piece
from millicent.engine.config import EngineConfig
from millicent.engine.protocol import Output, Step, Submit
from millicent.engine.runner import Runner
from support.scripted_model import EOS, ScriptedModel, letter, opened

GREEDY = Sampling(temperature=0)


def runner(model: ScriptedModel | None = None, *, blocks: int = 200, **settings: int | bool) -> Runner:
    config = EngineConfig(**{"step_tokens": 16, "block_tokens": 4, **settings})  # type: ignore[arg-type]
    return Runner(opened(model or ScriptedModel()), config, blocks=blocks)


def submit(
    sequence: int, prompt: int | tuple[int, ...] = 5, sampling: Sampling = GREEDY, limits: Limits | None = None
) -> Submit:
    tokens = (
        tuple((sequence * 31 + index * 7) % 90 + 2 for index in range(prompt)) if isinstance(prompt, int) else prompt
    )
    return Submit(sequence, "scripted", tokens, sampling, limits or Limits(max_tokens=20, ignore_eos=True))


def drive(subject: Runner, clock: ManualClock | None = None) -> list[Step]:
    clock = clock or ManualClock()
    steps: list[Step] = []
    while subject.busy:
        steps.append(subject.step("cpu", len(steps), clock))
        assert len(steps) < 5000
    return steps


def answers(steps: list[Step]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for step in steps:
        for output in step.outputs:
            texts[output.sequence] = texts.get(output.sequence, "") + output.text
    return texts


def ends(steps: list[Step]) -> dict[int, Output]:
    return {output.sequence: output for step in steps for output in step.outputs if output.finish}


def alone(frame: Submit, *, deterministic: bool = False) -> str:
    subject = runner(deterministic=deterministic)
    subject.submit(frame)
    return answers(drive(subject))[frame.sequence]


def test_greedy_answers_are_what_the_model_says_one_token_at_a_time() -> None:
    model, frame = ScriptedModel(), submit(1, 33)
    context = list(frame.tokens)
    for _ in range(20):
        context.append(int(model.logits(context).argmax()))
    assert alone(frame) == "".join(map(letter, context[33:]))


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_batch_of_eight_says_what_each_says_alone(deterministic: bool) -> None:
    sampled = Sampling(temperature=0.9, top_p=0.9, seed=5)
    frames = [submit(number, 3 + 9 * number, sampled if number % 2 else GREEDY) for number in range(1, 9)]
    subject = runner(deterministic=deterministic)
    for frame in frames:
        subject.submit(frame)
    together = answers(drive(subject))
    assert together == {frame.sequence: alone(frame, deterministic=deterministic) for frame in frames}


@pytest.mark.parametrize("deterministic", [False, True])
def test_preemption_changes_no_token(deterministic: bool) -> None:
    frames = [submit(number, 12, Sampling(temperature=1, seed=number)) for number in range(1, 6)]
    subject = runner(ScriptedModel(context_tokens=64), blocks=16, deterministic=deterministic)
    for frame in frames:
        subject.submit(frame)
    steps = drive(subject)
    records = [step.record for step in steps if step.record]
    assert sum(work.recomputed_rows for record in records for work in record.sequences) > 0
    assert answers(steps) == {frame.sequence: alone(frame) for frame in frames}
    assert subject.scheduler.pool.used == 0
    assert {end.total_output_tokens for end in ends(steps).values()} == {20}


def test_a_seed_repeats_its_answer_beside_any_neighbours_and_no_seed_does_not() -> None:
    seeded = submit(1, sampling=Sampling(seed=7))
    subject = runner()
    for number in range(2, 6):
        subject.submit(submit(number, 20, Sampling(temperature=2.0)))
    subject.submit(seeded)
    assert answers(drive(subject))[1] == alone(seeded)
    assert alone(submit(1, sampling=Sampling(seed=8))) != alone(seeded)
    free = submit(1, sampling=Sampling(temperature=2.0))
    assert alone(free) != alone(free)


def test_under_deterministic_every_piece_has_a_pass_and_a_record_of_its_own() -> None:
    model = ScriptedModel()
    subject = runner(model, deterministic=True)
    for number in range(1, 5):
        subject.submit(submit(number, 40))
    steps = drive(subject)
    assert all(len(batch) == 1 for batch in model.batches)
    assert len(steps) == len(model.batches)


def test_records_cover_their_step_and_never_overlap() -> None:
    clock = ManualClock(monotonic_ns=1000)
    subject = runner(ScriptedModel(before=lambda pieces: clock.advance(50 + len(pieces))))
    for number in range(1, 4):
        subject.submit(submit(number, 30))
    records = [step.record for step in drive(subject, clock) if step.record]
    assert records[0].start_ns == 1000
    assert all(record.wall_ns == 50 + len(record.sequences) for record in records)
    assert all(after.start_ns == before.start_ns + before.wall_ns for before, after in itertools.pairwise(records))
    assert [record.index for record in records] == list(range(len(records)))


def test_max_tokens_ends_with_length_and_exactly_that_many() -> None:
    subject = runner()
    subject.submit(submit(1, limits=Limits(max_tokens=3, ignore_eos=True)))
    steps = drive(subject)
    assert (ends(steps)[1].finish, ends(steps)[1].total_output_tokens, len(answers(steps)[1])) == ("length", 3, 3)


def test_the_context_ends_an_answer_that_nothing_else_ends() -> None:
    subject = runner(ScriptedModel(context_tokens=32))
    subject.submit(submit(1, 30, limits=Limits(max_tokens=100, ignore_eos=True)))
    assert (ends(drive(subject))[1].finish, subject.scheduler.pool.used) == ("length", 0)


def find_eos(limit: int = 400) -> tuple[Submit, int]:
    """A request that meets the end token after at least two others."""
    for number in range(limit):
        frame = submit(1, 5, Sampling(temperature=2.0, seed=number), Limits(max_tokens=200, ignore_eos=True))
        text = alone(frame)
        if letter(EOS) in text[2:] and letter(EOS) not in text[:2]:
            return frame, text.index(letter(EOS))
    raise AssertionError("no seed leads to the end token")


def test_the_end_token_stops_the_answer_is_counted_and_not_shown_unless_ignored() -> None:
    ignoring, position = find_eos()
    heeding = submit(1, 5, ignoring.sampling, Limits(max_tokens=200))
    subject = runner()
    subject.submit(heeding)
    steps = drive(subject)
    assert ends(steps)[1].finish == "stop"
    assert ends(steps)[1].total_output_tokens == position + 1
    assert answers(steps)[1] == alone(ignoring)[:position]


def test_a_stop_string_ends_the_answer_in_the_step_that_completes_it() -> None:
    whole = alone(submit(1))
    subject = runner()
    subject.submit(submit(1, limits=Limits(max_tokens=20, stop=(whole[4:6],), ignore_eos=True)))
    end = ends(drive(subject))[1]
    assert (end.finish, end.total_output_tokens) == ("stop", 6)


def test_cancelling_in_the_middle_of_a_long_prefill_takes_effect_before_the_next_step() -> None:
    model = ScriptedModel()
    subject = runner(model)
    subject.submit(submit(1, 200))
    subject.submit(submit(2, 5))
    clock = ManualClock()
    for index in range(3):
        subject.step("cpu", index, clock)
    output = subject.cancel(1)
    assert output is not None
    assert (output.finish, output.total_output_tokens) == ("cancelled", 0)
    drive(subject)
    assert all(piece.sequence == 2 for batch in model.batches[3:] for piece in batch)
    assert (subject.cancel(1), subject.scheduler.pool.used) == (None, 0)


def test_cancelling_between_the_passes_of_a_deterministic_step_drops_the_planned_pass() -> None:
    model = ScriptedModel()
    subject = runner(model, deterministic=True)
    for number in (1, 2):
        subject.submit(submit(number, 4))
    clock = ManualClock()
    subject.step("cpu", 0, clock)
    subject.cancel(2)
    drive(subject)
    assert {piece.sequence for batch in model.batches for piece in batch} == {1}


def test_a_forward_pass_that_fails_ends_its_own_sequences_and_no_others() -> None:
    def fail_on_two(pieces: Sequence[Piece]) -> None:
        if any(piece.sequence == 2 for piece in pieces):
            raise RuntimeError("can't allocate memory:\n lots")

    subject = runner(ScriptedModel(before=fail_on_two), max_sequences=1)
    for number in (1, 2, 3):
        subject.submit(submit(number))
    steps = drive(subject)
    assert {number: end.finish for number, end in ends(steps).items()} == {1: "length", 2: "error", 3: "length"}
    assert "can't allocate memory: lots" in ends(steps)[2].error
    assert all(step.record is not None for step in steps), "the failed pass took time too"
    assert subject.scheduler.pool.used == 0


def test_logits_that_are_no_distribution_end_one_sequence_with_an_error() -> None:
    class Broken(ScriptedModel):
        def forward(self, pieces: Sequence[Piece]):  # type: ignore[no-untyped-def]
            logits = super().forward(pieces)
            for row, piece in enumerate(piece for piece in pieces if piece.sample):
                if piece.sequence == 2:
                    logits[row] = float("nan")
            return logits

    subject = runner(Broken())
    for number in (1, 2, 3):
        subject.submit(submit(number))
    steps = drive(subject)
    assert {number: end.finish for number, end in ends(steps).items()} == {1: "length", 2: "error", 3: "length"}
    assert answers(steps)[1] == alone(submit(1))


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [((), "no tokens"), (256, "context of 256"), ((5, 97), "token 97"), ((-1, 5), "token -1")],
)
def test_a_sequence_that_cannot_run_is_refused_alone(prompt: int | tuple[int, ...], complaint: str) -> None:
    subject = runner()
    subject.submit(submit(1))
    refused = subject.submit(submit(2, prompt))
    assert refused is not None
    assert (refused.finish, complaint in refused.error) == ("error", True)
    assert answers(drive(subject)) == {1: alone(submit(1))}
