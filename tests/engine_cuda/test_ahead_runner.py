"""Planning ahead changes no answer and no account: only when things happen."""

from __future__ import annotations

import itertools
from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millicent.core.clock import ManualClock
from millicent.core.request import Limits, Sampling
from millicent.engine.config import EngineConfig
from millicent.engine.cuda.ahead import AheadRunner
from millicent.engine.protocol import Step, Submit
from millicent.engine.runner import Runner
from support.launched_model import DeviceLost, LaunchedModel
from support.scripted_model import EOS, ScriptedModel, letter, opened

GREEDY = Sampling(temperature=0)


def ahead(model: LaunchedModel | None = None, *, blocks: int = 200, **changes: int | bool) -> AheadRunner:
    model = model or LaunchedModel()
    config = EngineConfig(**{"step_tokens": 16, "block_tokens": 4, **changes})  # type: ignore[arg-type]
    return AheadRunner(model, opened(model), config, blocks=blocks, wake=lambda: None)


def plain(*, blocks: int = 200, context_tokens: int = 256, **changes: int | bool) -> Runner:
    config = EngineConfig(**{"step_tokens": 16, "block_tokens": 4, **changes})  # type: ignore[arg-type]
    return Runner(opened(ScriptedModel(context_tokens=context_tokens)), config, blocks=blocks)


def submit(
    sequence: int, prompt: int | tuple[int, ...] = 5, sampling: Sampling = GREEDY, limits: Limits | None = None
) -> Submit:
    tokens = prompt if isinstance(prompt, tuple) else tuple((sequence * 31 + i * 7) % 90 + 2 for i in range(prompt))
    return Submit(sequence, "scripted", tokens, sampling, limits or Limits(max_tokens=12, ignore_eos=True))


def drive(subject: Runner, clock: ManualClock | None = None) -> list[Step]:
    clock = clock or (subject._launcher.clock if isinstance(subject, AheadRunner) else ManualClock())  # type: ignore[attr-defined]
    steps: list[Step] = []
    while subject.busy:
        steps.append(subject.step("cuda:0", len(steps), clock, ahead=True))
        assert len(steps) < 5000
    return steps


Said = tuple[str, str, int, int, str]


def answers(steps: list[Step]) -> dict[int, Said]:
    """Of each sequence: what it said, how it ended, how many tokens it counted on the way and in the end, and at which
    stop string it ended."""
    texts: dict[int, str] = {}
    tokens: Counter[int] = Counter()
    found = {}
    for output in (output for step in steps for output in step.outputs):
        assert output.sequence not in found, "news of a sequence that has ended"
        texts[output.sequence] = texts.get(output.sequence, "") + output.text
        tokens[output.sequence] += output.tokens
        if output.finish:
            found[output.sequence] = (
                texts[output.sequence],
                output.finish,
                tokens[output.sequence],
                output.total_output_tokens,
                output.stop,
            )
    return found


def alone(frame: Submit) -> Said:
    subject = plain()
    subject.submit(frame)
    return answers(drive(subject))[frame.sequence]


frames = st.builds(
    lambda prompt, temperature, penalty, most, least, stops, eos: (
        prompt,
        temperature,
        penalty,
        most,
        least,
        stops,
        eos,
    ),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.8, 2.0]),
    st.sampled_from([1.0, 1.0, 1.5]),
    st.integers(0, 25),
    st.sampled_from([0, 0, 3]),
    st.booleans(),
    st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(frames, min_size=1, max_size=7), st.integers(14, 60), st.integers(1, 4), st.booleans())
def test_answers_are_those_of_the_runner_that_waits(
    wanted: list[tuple[int, float, float, int, int, bool, bool]], blocks: int, arrivals: int, deterministic: bool
) -> None:
    """With stops, penalties, preemption, prefixes in common and arrivals on the way."""
    requests = [
        Submit(
            number,
            "scripted",
            tuple(i % 50 + 2 for i in range(prompt)),
            Sampling(temperature=temperature, seed=number % 3, repetition_penalty=penalty),
            Limits(
                max_tokens=most,
                min_tokens=min(least, most),
                ignore_eos=not eos,
                stop=(letter(7), letter(8)) if stops else (),
            ),
        )
        for number, (prompt, temperature, penalty, most, least, stops, eos) in enumerate(wanted, 1)
    ]
    found = []
    for subject in (
        plain(blocks=blocks, context_tokens=56, deterministic=deterministic),
        ahead(LaunchedModel(context_tokens=56), blocks=blocks, deterministic=deterministic),
    ):
        clock, waiting = ManualClock(), list(requests)
        steps: list[Step] = []
        if isinstance(subject, AheadRunner):
            clock = subject._launcher.clock  # type: ignore[attr-defined]
        while waiting or subject.busy:
            for frame in waiting[:arrivals]:
                refused = subject.submit(frame)
                assert refused is None
            waiting = waiting[arrivals:]
            steps.append(subject.step("cuda:0", len(steps), clock, ahead=True))
        assert subject.scheduler.pool.used == 0
        assert not subject.flying
        found.append(answers(steps))
    assert found[0] == found[1]


def test_a_pass_is_launched_before_the_one_before_it_is_read() -> None:
    model = LaunchedModel()
    subject = ahead(model)
    subject.submit(submit(1, limits=Limits(max_tokens=4, ignore_eos=True)))
    drive(subject)
    order = ["launch 0", "launch 1", "land 0", "launch 2", "land 1", "launch 3", "land 2", "land 3"]
    assert model.log == order


def test_without_leave_steps_wait_for_each_other() -> None:
    model = LaunchedModel()
    subject = ahead(model)
    subject.submit(submit(1, limits=Limits(max_tokens=2, ignore_eos=True)))
    while subject.busy:
        subject.step("cuda:0", 0, model.clock)
    assert model.log == ["launch 0", "land 0", "launch 1", "land 1"]


def test_what_hangs_on_the_token_before_is_drawn_again_once_that_is_known() -> None:
    model = LaunchedModel()
    subject = ahead(model)
    subject.submit(submit(1, sampling=Sampling(temperature=0, repetition_penalty=1.2), limits=Limits(max_tokens=3)))
    drive(subject)
    expected = ["launch 0", "redraw 0", "launch 1", "land 0", "redraw 1", "launch 2", "land 1", "redraw 2", "land 2"]
    assert model.log == expected


def rows_of(steps: list[Step], sequence: int) -> int:
    return sum(
        work.rows for step in steps if step.record for work in step.record.sequences if work.sequence == sequence
    )


def test_an_answer_that_counts_its_tokens_computes_none_in_vain() -> None:
    subject = ahead()
    for number in (1, 2, 3):
        subject.submit(submit(number, 5, limits=Limits(max_tokens=number, ignore_eos=True)))
    steps = drive(subject)
    assert [rows_of(steps, number) for number in (1, 2, 3)] == [5, 6, 7]


def test_a_row_computed_in_vain_is_its_answers_own_and_its_end_waits_for_the_record() -> None:
    frame = next(
        frame
        for seed in range(400)
        if (frame := submit(1, 5, Sampling(temperature=2.0, seed=seed), Limits(max_tokens=50)))
        and 3 < alone(frame)[3] < 30
    )
    _, finish, _, total, _ = alone(frame)
    assert finish == "stop"
    subject = ahead()
    subject.submit(frame)
    subject.submit(submit(2, limits=Limits(max_tokens=60, ignore_eos=True)))
    steps = drive(subject)
    assert rows_of(steps, 1) == 5 + total  # the last token's row too, which nobody asked for
    last = max(index for index, step in enumerate(steps) if step.record and rows_of([step], 1))
    [told] = [
        index for index, step in enumerate(steps) for output in step.outputs if output.sequence == 1 and output.finish
    ]
    assert told == last
    assert answers(steps)[1] == alone(frame)


def test_cancelling_takes_effect_at_once_and_is_told_with_what_was_under_way() -> None:
    model = LaunchedModel()
    subject = ahead(model)
    subject.submit(submit(1, limits=Limits(max_tokens=50, ignore_eos=True)))
    steps = [subject.step("cuda:0", index, model.clock, ahead=True) for index in range(4)]
    assert subject.cancel(1) is None
    assert subject.scheduler.pool.used == 0
    assert subject.busy
    steps += drive(subject)
    assert [output.finish for output in steps[-1].outputs] == ["cancelled"]
    assert steps[-1].outputs[0].total_output_tokens == 4
    assert rows_of(steps, 1) == 5 + 4
    assert subject.cancel(1) is None


def test_what_was_cancelled_on_its_way_leaves_nothing_wrong_in_the_prefix_cache() -> None:
    model = LaunchedModel()
    subject = ahead(model)
    first = submit(1, 7, limits=Limits(max_tokens=50, ignore_eos=True))
    for count in range(1, 8):
        frame = msgspec.structs.replace(first, sequence=count)
        subject.submit(frame)
        steps = [subject.step("cuda:0", 0, model.clock, ahead=True) for _ in range(count)]
        said = "".join(output.text for step in steps for output in step.outputs)
        subject.cancel(count)
        drive(subject)
        follow = submit(100 + count, (*first.tokens, *(ord(each) - ord(letter(0)) for each in said), 5, 6))
        subject.submit(follow)
        assert answers(drive(subject))[100 + count] == alone(follow)


def test_records_follow_each_other_and_add_up_to_the_devices_time() -> None:
    clock = ManualClock(monotonic_ns=500)
    model = LaunchedModel(clock, pass_ns=2_000)
    subject = ahead(model)
    for number in (1, 2):
        subject.submit(submit(number, 9))
    records = [step.record for step in drive(subject) if step.record]
    assert records[0].start_ns == 500
    assert {record.wall_ns for record in records} == {2_000}
    assert all(after.start_ns == before.start_ns + before.wall_ns for before, after in itertools.pairwise(records))
    assert [record.index for record in records] == list(range(len(records)))


def test_a_slow_host_is_part_of_the_steps_and_idle_time_isnt() -> None:
    clock = ManualClock()
    model = LaunchedModel(clock, pass_ns=2_000, before=lambda pieces: clock.advance(5_000))
    subject = ahead(model)
    subject.submit(submit(1, limits=Limits(max_tokens=3, ignore_eos=True)))
    first = [step.record for step in drive(subject) if step.record]
    assert sum(record.wall_ns for record in first) == clock.monotonic_ns() == 3 * 5_000 + 2_000
    clock.advance(1_000_000)
    subject.submit(submit(2, limits=Limits(max_tokens=1, ignore_eos=True)))
    [step] = drive(subject)
    assert step.record is not None
    assert (step.record.start_ns, step.record.wall_ns) == (1_017_000, 7_000)


@pytest.mark.parametrize("pace", [0.8, 1.3])
def test_a_device_clock_that_drifts_is_set_right_where_the_host_waits(pace: float) -> None:
    clock = ManualClock()
    subject = ahead(LaunchedModel(clock, pass_ns=10_000_000, pace=pace))
    subject.submit(submit(1))
    records = [step.record for step in drive(subject) if step.record]
    assert all(after.start_ns == before.start_ns + before.wall_ns for before, after in itertools.pairwise(records))
    assert records[-1].start_ns + records[-1].wall_ns == clock.monotonic_ns()


def test_a_launch_that_fails_ends_its_own_sequences_and_no_other() -> None:
    def fail(pieces: object) -> None:
        if any(piece.sequence == 2 for piece in pieces):  # type: ignore[attr-defined]
            raise RuntimeError("no room for this")

    model = LaunchedModel(before=fail)
    subject = ahead(model, max_sequences=1)
    frames = [submit(number) for number in (1, 2, 3)]
    for frame in frames:
        subject.submit(frame)
    found = answers(drive(subject))
    assert found[2][1] == "error"
    assert [found[number] for number in (1, 3)] == [alone(frames[0]), alone(frames[2])]


def test_a_lost_device_ends_the_process() -> None:
    def lose(pieces: object) -> None:
        raise DeviceLost

    subject = ahead(LaunchedModel(before=lose))
    subject.submit(submit(1))
    with pytest.raises(DeviceLost):
        drive(subject)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=1, typical_p=0.5, seed=3), Sampling(temperature=0, prompt_logprobs=True)]
)
def test_what_needs_the_host_makes_steps_wait_while_it_is_there(sampling: Sampling, deterministic: bool) -> None:
    model = LaunchedModel()
    subject = ahead(model, deterministic=deterministic)
    needing, other = submit(1, 9, sampling, Limits(max_tokens=3, ignore_eos=True)), submit(2)
    subject.submit(other)
    steps = [subject.step("cuda:0", 0, model.clock, ahead=True)]
    subject.submit(needing)
    steps += drive(subject)
    assert answers(steps) == {1: alone(needing), 2: alone(other)}
    scored = [each for step in steps for output in step.outputs for each in output.scored_prompt]
    assert len(scored) == (9 if sampling.prompt_logprobs else 0)


def test_log_probabilities_are_the_models_own() -> None:
    frame = submit(1, sampling=Sampling(temperature=0, logprobs=3, repetition_penalty=1.4))
    told = []
    for subject in (plain(), ahead()):
        subject.submit(frame)
        told.append([output.scored for step in drive(subject) for output in step.outputs if output.scored])
    assert told[0] == told[1]
    assert len(told[0]) == 12


def test_a_row_that_is_no_distribution_ends_its_answer_alone() -> None:
    model = LaunchedModel()
    subject = ahead(model)
    for number in (1, 2):
        subject.submit(submit(number))
    launch = model.launch
    seen = itertools.count()

    def poisoned(pieces, draws):  # type: ignore[no-untyped-def]
        flight = launch(pieces, draws)
        if next(seen) == 3:
            model.drawn[0] = None
        return flight

    model.launch = poisoned  # type: ignore[method-assign]
    found = answers(drive(subject))
    assert sorted(each[1] for each in found.values()) == ["error", "length"]
    assert subject.scheduler.pool.used == 0


def test_calibration_runs_passes_as_they_are_run() -> None:
    model = LaunchedModel(pass_ns=3_000)
    subject = ahead(model)
    config = EngineConfig(step_tokens=16, block_tokens=4)
    [overhead] = subject.calibrate(config, model.clock)
    assert {record.wall_ns for record in overhead.steps} == {3_000}
    assert subject.calibrate(config, model.clock, own=False) == ()


def test_the_end_token_is_counted_and_not_shown() -> None:
    model = LaunchedModel()
    subject = ahead(model)
    context = list(submit(1).tokens)
    for _ in range(40):
        context.append(int(model.logits(context).argmax()))
    assert EOS not in context  # greedily it goes on; so a bias ends it
    subject.submit(submit(1, sampling=Sampling(temperature=0, logit_bias={EOS: 100.0}), limits=Limits(max_tokens=9)))
    assert answers(drive(subject))[1] == ("", "stop", 1, 1, "")
