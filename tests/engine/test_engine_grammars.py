"""Answers under a grammar, in a batch with others that have none."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from millicent.core.clock import ManualClock
from millicent.core.request import Limits, Sampling
from millicent.engine.config import EngineConfig
from millicent.engine.protocol import Output, Submit
from millicent.engine.runner import OpenModel, Runner
from millicent.text.grammars import vocabulary
from support.scripted_model import EOS, ScriptedModel, opened

if TYPE_CHECKING:
    import llguidance


def character(token: int) -> str:
    return chr(token + 30) if token > EOS else ""


def characters(size: int, ends: Iterable[int]) -> llguidance.LLTokenizer:
    return vocabulary(
        [character(token).encode() for token in range(size)], [b"<pad>", b"<end>"] + [b""] * (size - 2), ends
    )


class Characters:
    stop = ""

    def push(self, token: int, *, heed_stops: bool = True) -> str:
        return character(token)

    def finish(self) -> str:
        return ""


class Bench:
    def __init__(self, *, blocks: int = 200, deterministic: bool = False, with_vocabulary: bool = True) -> None:
        base = opened(ScriptedModel(context_tokens=64))
        model = OpenModel(
            base.model, base.eos_tokens, lambda stop: Characters(), characters if with_vocabulary else None
        )
        self.woken = threading.Event()
        config = EngineConfig(step_tokens=16, block_tokens=4, deterministic=deterministic)
        self.runner = Runner(model, config, blocks=blocks, wake=self.woken.set)
        self.recomputed = 0

    def run(self, *frames: Submit) -> dict[int, tuple[str, Output]]:
        outputs = [output for frame in frames if (output := self.runner.submit(frame))]
        deadline = time.monotonic() + 60
        while True:
            outputs += self.runner.take_compiled()
            if self.runner.busy:
                step = self.runner.step("cpu", 0, ManualClock())
                outputs += step.outputs
                assert step.record is not None
                self.recomputed += sum(work.recomputed_rows for work in step.record.sequences)
            elif all(
                any(output.finish and output.sequence == frame.sequence for output in outputs) for frame in frames
            ):
                break
            assert time.monotonic() < deadline
        ends = {output.sequence: output for output in outputs if output.finish}
        return {
            sequence: ("".join(output.text for output in outputs if output.sequence == sequence), end)
            for sequence, end in ends.items()
        }


def frame(number: int, grammar: str = "", **sampling: float) -> Submit:
    tokens = tuple((number * 31 + index * 7) % 90 + 2 for index in range(9))
    limits = Limits(max_tokens=20, ignore_eos=not grammar)
    return Submit(number, "scripted", tokens, Sampling(seed=number, **sampling), limits, grammar=grammar)  # type: ignore[arg-type]


PLATE = 'start: /[A-Z]{3}-[0-9]{4}/ ("!" | "?")'


def test_an_answer_follows_its_grammar_and_ends_where_it_ends() -> None:
    frames = [frame(number, PLATE, temperature=temperature) for number, temperature in enumerate((0, 0.5, 1, 2), 1)]
    for text, end in Bench().run(*frames).values():
        assert re.fullmatch(r"[A-Z]{3}-[0-9]{4}[!?]", text)
        assert (end.finish, end.total_output_tokens) == ("stop", 9)


def test_neighbours_without_a_grammar_say_what_they_say_alone() -> None:
    alone = Bench().run(frame(2))[2][0]
    together = Bench().run(frame(1, PLATE), frame(2), frame(3, PLATE))
    assert together[2][0] == alone
    assert len(alone) == 20


def test_preemption_changes_nothing_under_a_grammar() -> None:
    for deterministic in (False, True):
        frames = [frame(number, "start: /([a-c][0-9]){9}/") for number in range(1, 6)]
        alone = {one.sequence: Bench(deterministic=deterministic).run(one)[one.sequence][0] for one in frames}
        bench = Bench(blocks=12, deterministic=deterministic)
        together = bench.run(*frames)
        assert bench.recomputed > 0
        assert {sequence: text for sequence, (text, _) in together.items()} == alone
        assert all(re.fullmatch("([a-c][0-9]){9}", text) for text in alone.values())


def test_the_end_of_sequence_comes_only_where_the_grammar_allows_it() -> None:
    for number in range(1, 20):
        text, end = Bench().run(frame(number, "start: /(ab){2,}/", temperature=2))[number]
        assert re.fullmatch("(ab)+", text) or end.finish == "length"
        assert text.startswith("abab")


def test_filters_and_biases_cannot_break_a_grammar() -> None:
    biased = frame(1, PLATE, temperature=1, top_p=0.1, top_k=2, min_p=0.5, typical_p=0.3, repetition_penalty=1.5)
    letters = {token: 100.0 for token in range(2, 97) if not character(token).isdigit()}
    biased = msgspec.structs.replace(biased, sampling=msgspec.structs.replace(biased.sampling, logit_bias=letters))
    assert re.fullmatch(r"[A-Z]{3}-[0-9]{4}[!?]", Bench().run(biased)[1][0])


def test_a_grammar_that_fails_ends_its_own_answer_only() -> None:
    ends = Bench().run(frame(1, "start: nothing"), frame(2, PLATE), frame(3))
    assert ends[1][1].finish == "error"
    assert "grammar" in ends[1][1].error
    assert ends[1][1].refused
    assert [ends[2][1].finish, ends[3][1].finish] == ["stop", "length"]


def test_one_that_becomes_too_complex_on_the_way_ends_with_an_error() -> None:
    bench = Bench()
    long = msgspec.structs.replace(frame(1, "start: e\ne: e e e | e e e e | /[a-z]/"), limits=Limits(max_tokens=50))
    text, end = bench.run(long)[1]
    assert end.finish == "error"
    assert "too complex" in end.error
    assert end.refused  # by what was asked: nothing of ours went wrong
    assert len(text) < 50


def test_a_model_without_a_vocabulary_for_grammars_says_so() -> None:
    assert "cannot follow a grammar" in Bench(with_vocabulary=False).run(frame(1, PLATE))[1][1].error


def test_cancelling_and_unloading_reach_those_that_still_compile() -> None:
    bench = Bench()
    assert bench.runner.submit(frame(1, PLATE)) is None
    assert bench.runner.submit(frame(2, PLATE)) is None
    cancelled = bench.runner.cancel(1)
    assert cancelled is not None
    assert cancelled.finish == "cancelled"
    assert [(end.sequence, end.finish) for end in bench.runner.abandon("unloaded")] == [(2, "error")]
    assert bench.runner.take_compiled() == []
    assert not bench.runner.busy


def test_whoever_waits_is_woken() -> None:
    bench = Bench()
    bench.runner.submit(frame(1, PLATE))
    assert bench.woken.wait(60)
    assert bench.runner.take_compiled() == []
    assert bench.runner.busy
