"""One request as several sequences: what its reader sees, and what it is charged for."""

from __future__ import annotations

import asyncio
from pathlib import Path

from millicent.backends.local import LocalBackend
from millicent.backends.local_models import HeldModel, LocalModel
from millicent.backends.local_runs import LocalCall, LocalRun, choice_seed
from millicent.core.chunks import Chunk, End, FinishReason, Text, merge_texts
from millicent.core.clock import SystemClock
from millicent.core.request import Limits, Sampling
from millicent.core.usage import Leaf
from millicent.engine.config import EngineConfig
from millicent.engine.protocol import Output, ScoredToken, Submit
from support.observers import Notes

PROMPT = (1, 2, 3, 4, 5)
CHOICE_SEED_OF_7 = 3839616360365740667


def run_of(choices: int, echo: str = "") -> LocalRun:
    submits = tuple(Submit(10 + index, "m", PROMPT, Sampling(), Limits(max_tokens=9)) for index in range(choices))
    return LocalRun(submits, lambda token: bytes([token]), [echo], lambda run: None)


def chunks(run: LocalRun) -> list[Chunk]:
    async def read() -> list[Chunk]:
        return [chunk async for chunk in run]

    return asyncio.run(asyncio.wait_for(read(), 10))


def test_choices_are_merged_by_index_and_the_prompt_is_counted_once() -> None:
    run = run_of(2)
    run.prefilled(10, 5)
    run.prefilled(11, 1)
    for output in (
        Output(10, 1, "a", cached_tokens=0),
        Output(11, 1, "x", cached_tokens=4),
        Output(10, 1, "b", "length"),
        Output(11, 1, "", "stop"),
    ):
        run.take(output)
    *texts, end = chunks(run)
    assert [(text.choice, text.text) for text in texts if isinstance(text, Text)] == [(0, "ab"), (1, "x")]
    assert isinstance(end, End)
    assert (end.reason, end.choices) == (FinishReason.LENGTH, (FinishReason.LENGTH, FinishReason.STOP))
    assert (end.usage.input_tokens, end.usage.tokens(Leaf.INPUT_CACHE_READ), end.usage.output_tokens) == (5, 0, 4)


def test_each_of_several_prompts_is_counted_once_and_drawn_as_if_it_were_alone() -> None:
    begun: list[LocalRun] = []

    def begin(submits: tuple[Submit, ...]) -> LocalRun:
        begun.append(LocalRun(submits, lambda token: bytes([token]), ("<", "("), lambda run: None))
        return begun[0]

    limits = [Limits(max_tokens=9), Limits(max_tokens=4)]
    prompts = [Submit(10, "m", PROMPT[: 5 - i], Sampling(seed=7), limits[i]) for i in range(2)]
    call = LocalCall(prompts, (10, 11, 12, 13), placement="here", begin=begin)
    assert (call.input_tokens, call.max_output_tokens) == (9, 26)
    run = call.start()
    assert [(one.sequence, one.sampling.seed, len(one.tokens)) for one in run.submits] == [
        (10, 7, 5), (11, CHOICE_SEED_OF_7, 5), (12, 7, 4), (13, CHOICE_SEED_OF_7, 4),
    ]  # fmt: skip
    for sequence, rows, found in ((10, 5, 0), (11, 1, 4), (12, 1, 3), (13, 1, 3)):
        run.prefilled(sequence, rows)
        run.take(Output(sequence, 1, "a", "stop", cached_tokens=found))
    *texts, end = chunks(run)
    assert [text.text for text in texts if isinstance(text, Text)] == ["<a", "<a", "(a", "(a"]
    assert isinstance(end, End)
    assert len(end.choices) == 4
    # Five read and none found of the first; one read and three found of the second.
    assert (end.usage.tokens(Leaf.INPUT_FRESH), end.usage.tokens(Leaf.INPUT_CACHE_READ)) == (6, 3)


def test_a_choice_that_never_began_says_nothing_about_the_cache() -> None:
    run = run_of(2)
    run.prefilled(10, 1)
    run.take(Output(10, 1, "a", cached_tokens=4))
    run.take(Output(10, 0, "", "cancelled", cached_tokens=4))
    run.take(Output(11, 0, "", "cancelled"))
    end = chunks(run)[-1]
    assert isinstance(end, End)
    assert (end.usage.tokens(Leaf.INPUT_CACHE_READ), end.usage.tokens(Leaf.INPUT_FRESH)) == (4, 1)


def test_one_choice_that_fails_fails_the_answer_once_all_have_ended() -> None:
    run = run_of(3)
    run.take(Output(11, 0, "", "error", "the model failed"))
    assert not run.ended
    assert run.unfinished == (10, 12)
    run.take(Output(10, 0, "", "cancelled"))
    run.take(Output(12, 3, "done", "stop"))
    end = chunks(run)[-1]
    assert isinstance(end, End)
    assert end.reason is FinishReason.ERROR
    assert end.error is not None
    assert (end.error.message, end.usage.output_tokens) == ("the model failed", 3)


def test_the_prompt_is_echoed_before_the_first_text_with_its_scores() -> None:
    run = run_of(1, echo="Once")
    scored = (ScoredToken(65, None), ScoredToken(66, -1.0, ((67, -0.5),)))
    run.take(Output(10, 1, "", scored_prompt=scored, scored=(ScoredToken(68, -2.0),)))
    run.take(Output(10, 1, " upon", "length", scored=(ScoredToken(69, -3.0),)))
    *texts, _ = chunks(run)
    (text,) = merge_texts(text for text in texts if isinstance(text, Text))
    assert text.text == "Once upon"
    assert [(entry.content, entry.logprob) for entry in text.logprobs] == [
        (b"A", None), (b"B", -1.0), (b"D", -2.0), (b"E", -3.0),
    ]  # fmt: skip
    assert text.logprobs[1].top[0].content == b"C"


def test_each_choice_has_a_seed_of_its_own_and_the_first_the_requests() -> None:
    assert choice_seed(7, 0) == 7
    assert choice_seed(None, 3) is None
    assert len({choice_seed(seed, choice) for seed in (7, 8, -1) for choice in range(20)}) == 60
    # Promised: another derivation would change every seeded answer.
    assert choice_seed(7, 1) == CHOICE_SEED_OF_7
    begun: list[tuple[Submit, ...]] = []

    def begin(submits: tuple[Submit, ...]) -> LocalRun:
        begun.append(submits)
        return run_of(2)

    submit = Submit(4, "m", PROMPT, Sampling(seed=7), Limits(max_tokens=9))
    call = LocalCall([submit], (4, 5), placement="here", begin=begin)
    assert (call.input_tokens, call.max_output_tokens) == (5, 18)
    call.start()
    assert [(one.sequence, one.sampling.seed) for one in begun[0]] == [(4, 7), (5, CHOICE_SEED_OF_7)]


def test_the_engine_knows_tenants_as_numbers_that_say_nothing(tmp_path: Path) -> None:
    first, second = (LocalBackend(EngineConfig(), {}, Notes(), SystemClock(), tmp_path) for _ in range(2))
    assert first._tenant(None) == 0
    assert len({first._tenant(key) for key in (None, "mk_a", "mk_b")}) == 3
    assert first._tenant("mk_a") == first._tenant("mk_a") != second._tenant("mk_a")
    assert 0 <= first._tenant("mk_a") < 2**63


def test_an_error_is_the_requests_own_only_where_the_engine_says_so() -> None:
    for refused, status in ((True, 400), (False, 500)):
        run = run_of(1)
        run.take(Output(10, 0, "", "error", "it cannot go on", refused=refused))
        end = chunks(run)[-1]
        assert isinstance(end, End)
        assert end.error is not None
        assert (end.error.status, end.error.message) == (status, "it cannot go on")


def test_calls_that_were_prepared_and_never_begin_are_forgotten() -> None:
    model = HeldModel("m", LocalModel(Path("m"), "home"))
    for now_ns in range(0, 100, 10):
        model.expect(now_ns, now_ns + 25)
    assert len(model.expected_ns) == 3
    model.begin()
    model.running = 0
    assert model.in_use(113)
    assert not model.in_use(115)
