"""The simulator against the engine itself, against arithmetic by hand, and against what must always hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millicent.core.clock import ManualClock
from millicent.core.errors import ConfigError
from millicent.core.request import Limits, Sampling
from millicent.economics.arrivals import Arrival, busiest, read_trace, span_of, superposed, tenant_of
from millicent.economics.simulator import Course, Fate, Machine, simulate
from millicent.economics.steady import SteadyScheduler
from millicent.engine.batch import Piece
from millicent.engine.config import EngineConfig
from millicent.engine.protocol import Submit
from millicent.engine.runner import Runner
from millicent.step_time import Coefficients, Work
from support.scripted_model import ScriptedModel, opened

# Whole numbers, so that sums are exact in any order.
COSTS = Coefficients(100_000, 3_000_000, 250_000, 20_000, 250, 25)
MACHINE = Machine(coefficients=COSTS, kv_blocks=64, context_tokens=256, block_tokens=4, max_sequences=4, step_tokens=16)
MS = 1_000_000


def step_ns(rows: int, sampled: int, kv: int, pairs: int) -> float:
    return COSTS.step_ns(Work(rows, sampled, kv, pairs))


def told(course: Course) -> list[tuple[object, ...]]:
    return [(each.queue_ns, each.ttft_ns, each.total_ns, each.cached_tokens, each.refused) for each in course.fates]


def test_one_request_takes_what_its_steps_take() -> None:
    """20 prompt tokens are read in steps of 16 and 4 rows; the last gives the first token, two more steps the rest."""
    course = simulate([Arrival(5 * MS, 20, 3)], msgspec.structs.replace(MACHINE, gap_ns=7, entry_ns=11, exit_ns=13))
    (fate,) = course.fates
    first = step_ns(16, 0, 0, 16 * 17 // 2)
    second = step_ns(4, 1, 0, 4 * 16 + 4 * 5 // 2)
    third, fourth = step_ns(1, 1, 21, 0), step_ns(1, 1, 22, 0)
    assert fate.queue_ns == 11
    assert fate.ttft_ns == 11 + first + second + 2 * 7
    assert fate.total_ns == 11 + first + second + third + fourth + 4 * 7 + 13
    assert fate.serving_ns == first + second + third + fourth == course.loads[0].busy_ns
    assert fate.tpot_ns == (fate.total_ns - 13 - fate.ttft_ns) / 2
    assert (course.loads[0].steps, course.wall_ns) == (4, fate.total_ns)


def test_a_request_that_comes_during_a_step_waits_for_its_end() -> None:
    """Both decode in one step then, and share it: the even part in halves, what each reads of its own."""
    course = simulate([Arrival(0, 4, 3), Arrival(1, 8, 1)], MACHINE)
    first = step_ns(4, 1, 0, 10)
    both = step_ns(1 + 8, 2, 5, 36)
    last = step_ns(1, 1, 6, 0)
    one, other = course.fates
    assert (one.ttft_ns, one.total_ns) == (first, first + both + last)
    assert (other.queue_ns, other.ttft_ns, other.total_ns) == (first - 1, first + both - 1, first + both - 1)
    shares = COSTS.shares([Work(1, 1, 5, 0), Work(8, 1, 0, 36)])
    assert other.serving_ns == shares[1]
    assert one.serving_ns == first + shares[0] + last


def test_guesses_that_were_right_take_no_step_and_all_take_a_row() -> None:
    """Ten tokens, four of them guessed rightly: the prompt's step and five more, which check two guesses each."""
    (fate,) = simulate([Arrival(0, 4, 10, guessed=(10, 4))], MACHINE).fates
    decodes = sum(step_ns(1, 1, 5 + step, 0) + 2 * COSTS.sampled_row_ns for step in range(5))
    assert fate.total_ns == step_ns(4, 1, 0, 10) + decodes  # three rows are still hidden under reading the weights
    assert fate.serving_ns == fate.total_ns


def test_two_machines_share_requests_by_how_many_they_have() -> None:
    course = simulate([Arrival(number, 4, 5) for number in range(6)], MACHINE, machines=2)
    assert [fate.machine for fate in course.fates] == [0, 1, 0, 1, 0, 1]
    assert [load.requests for load in course.loads] == [3, 3]


def test_more_than_may_run_at_once_are_refused() -> None:
    course = simulate([Arrival(0, 4, 50), Arrival(1, 4, 5), Arrival(2, 4, 5)], MACHINE, max_concurrent=2)
    assert [fate.refused for fate in course.fates] == [None, None, "too_many_requests"]
    assert course.fates[2].total_ns is None
    late = simulate([Arrival(0, 4, 5), Arrival(10**12, 4, 5)], MACHINE, max_concurrent=1)
    assert [fate.refused for fate in late.fates] == [None, None]


def test_what_could_never_fit_is_refused_and_the_others_run() -> None:
    course = simulate([Arrival(0, 250, 20), Arrival(0, 4, 2)], MACHINE)
    assert [fate.refused for fate in course.fates] == ["context_length_exceeded", None]


def test_a_gate_is_asked_and_told_of_each_end() -> None:
    class Every:
        def __init__(self) -> None:
            self.ends: list[tuple[int, int]] = []
            self.asked = 0
            gates.append(self)

        def enter(self, arrival: Arrival, at_ns: int) -> str | None:
            del arrival, at_ns
            self.asked += 1
            return "budget_exceeded" if self.asked % 2 == 0 else None

        def leave(self, arrival: Arrival, at_ns: int, serving_ns: int) -> None:
            del arrival
            self.ends.append((at_ns, serving_ns))

    gates: list[Every] = []
    course = simulate([Arrival(number, 4, 2) for number in range(4)], MACHINE, gate=Every)
    assert [fate.refused for fate in course.fates] == [None, "budget_exceeded"] * 2
    assert sorted(serving for _, serving in gates[-1].ends) == sorted(
        int(fate.serving_ns) for fate in course.fates if fate.refused is None
    )


def test_targets_are_for_the_first_token_where_it_is_streamed() -> None:
    arrival = Arrival(0, 4, 10, target_ns=10)
    assert Fate(arrival, ttft_ns=10, total_ns=99).in_time is True
    assert Fate(msgspec.structs.replace(arrival, streamed=False), ttft_ns=10, total_ns=99).in_time is False
    assert Fate(arrival, refused="too_many_requests").in_time is False
    assert Fate(Arrival(0, 4, 10), ttft_ns=10, total_ns=99).in_time is None


PREFIX = st.sampled_from([(), ((8, b"system"),), ((8, b"system"), (20, b"system, examples"))])


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Arrival], Machine]:
    """Up to a dozen requests, some at the same instant, some long after; and a machine.

    Where several keys wait beside a full engine, and prompts share beginnings, how often one is overtaken isn't counted
    exactly: so then either the engine has room for all, or nothing is cached.
    """
    several, cache = draw(st.booleans()), draw(st.sampled_from(["off", "tenant", "shared"]))
    found, at_ns = [], 0
    for _ in range(draw(st.integers(1, 12))):
        at_ns += draw(st.sampled_from([0, 1, 3 * MS, 40 * MS, 10**10]))
        prefix = draw(PREFIX)
        found.append(
            Arrival(
                at_ns,
                draw(st.integers(1 + max([0, *(end for end, _ in prefix)]), 60)),
                draw(st.integers(1, 40)),
                tenant=draw(st.integers(0, 2)) if several else 0,
                priority=draw(st.integers(0, 1)) if several else 0,
                prefix=prefix,
            )
        )
    machine = msgspec.structs.replace(
        MACHINE,
        kv_blocks=draw(st.sampled_from([26, 40, 200])),
        prefix_cache=cache,
        max_sequences=20 if several and cache != "off" else draw(st.sampled_from([1, 3, 8])),
        gap_ns=draw(st.sampled_from([0, 50_000])),
    )
    return found, machine


def prompt_of(number: int, arrival: Arrival, names: dict[bytes, int]) -> tuple[int, ...]:
    """Real tokens that are alike exactly as far as the prefixes say."""
    tokens: list[int] = []
    for end, name in arrival.prefix:
        mark = names.setdefault(name, len(names) + 2)
        tokens += [mark] * (end - len(tokens))
    return (*tokens, *([30 + number] * (arrival.input_tokens - len(tokens))))


class QuietModel(ScriptedModel):
    """Says the same whatever it reads: what matters is when."""

    def forward(self, pieces: Sequence[Piece]) -> torch.Tensor:
        return torch.zeros(sum(piece.logit_rows for piece in pieces), self.vocabulary_size)


def engines_own(arrivals: Sequence[Arrival], machine: Machine) -> list[tuple[float, float, float, int]]:
    """The real runner, told a request when the clock has come to it, and as quick as the coefficients say."""
    config = EngineConfig(
        block_tokens=machine.block_tokens,
        max_sequences=machine.max_sequences,
        step_tokens=machine.step_tokens,
        prefix_cache=machine.prefix_cache,
        speculation="off",
    )
    runner = Runner(opened(QuietModel(context_tokens=machine.context_tokens)), config, blocks=machine.kv_blocks)
    runner.learn("scripted", machine.coefficients)
    clock = ManualClock()
    queue: dict[int, float] = {}
    first: dict[int, float] = {}
    total: dict[int, float] = {}
    cached: dict[int, int] = {}
    names: dict[bytes, int] = {}
    waiting = list(enumerate(arrivals))
    while waiting or runner.busy:
        if not runner.busy:
            clock.advance(max(0, waiting[0][1].at_ns - clock.monotonic_ns()))
        while waiting and waiting[0][1].at_ns <= clock.monotonic_ns():
            number, each = waiting.pop(0)
            limits = Limits(max_tokens=each.output_tokens, ignore_eos=True)
            prompt = prompt_of(number, each, names)
            frame = Submit(number, "scripted", prompt, Sampling(temperature=0), limits, each.tenant, each.priority)
            assert runner.submit(frame) is None
        start_ns = clock.monotonic_ns()
        step = runner.step("cpu", 0, clock)
        assert step.record is not None
        works = [Work.of(work) for work in step.record.sequences]
        clock.advance(int(machine.coefficients.step_ns(Work.total(works)) + machine.gap_ns))
        for work in step.record.sequences:
            queue.setdefault(work.sequence, start_ns - arrivals[work.sequence].at_ns)
        for output in step.outputs:
            passed = clock.monotonic_ns() - arrivals[output.sequence].at_ns
            cached.setdefault(output.sequence, output.cached_tokens or 0)
            if output.tokens:
                first.setdefault(output.sequence, passed)
            if output.finish:
                total[output.sequence] = passed
    return [(queue[each], first[each], total[each], cached[each]) for each in range(len(arrivals))]


@settings(max_examples=100)
@given(cases())
def test_the_simulator_does_what_the_engine_does(case: tuple[list[Arrival], Machine]) -> None:
    """With step times as the model says, each request begins, answers and ends at the same nanosecond."""
    arrivals, machine = case
    course = simulate(arrivals, machine)
    assert [(each.queue_ns, each.ttft_ns, each.total_ns, each.cached_tokens) for each in course.fates] == engines_own(
        arrivals, machine
    )


@settings(max_examples=100)
@given(cases(), st.integers(1, 3))
def test_steps_done_at_once_are_those_done_one_by_one(case: tuple[list[Arrival], Machine], machines: int) -> None:
    arrivals, machine = case
    at_once = simulate(arrivals, machine, machines=machines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SteadyScheduler, "steady_steps", lambda *_: 0)
        one_by_one = simulate(arrivals, machine, machines=machines)
    assert told(at_once) == told(one_by_one)
    assert at_once.loads == one_by_one.loads
    for one, other in zip(at_once.fates, one_by_one.fates, strict=True):
        assert one.serving_ns == pytest.approx(other.serving_ns, rel=1e-12)


@settings(max_examples=100)
@given(cases(), st.integers(1, 3), st.sampled_from([None, 2, 5]))
def test_every_request_ends_once_and_time_and_memory_add_up(
    case: tuple[list[Arrival], Machine], machines: int, most: int | None
) -> None:
    arrivals, machine = case
    course = simulate(arrivals, machine, machines=machines, max_concurrent=most)
    assert [fate.arrival for fate in course.fates] == arrivals
    for fate in course.fates:
        if fate.refused is not None:
            assert (fate.machine, fate.ttft_ns, fate.total_ns, fate.serving_ns) == (None, None, None, 0)
            continue
        assert fate.queue_ns is not None
        assert fate.ttft_ns is not None
        assert fate.total_ns is not None
        assert 0 <= fate.queue_ns < fate.ttft_ns <= fate.total_ns <= course.wall_ns
        assert 0 <= fate.cached_tokens < fate.arrival.input_tokens
    assert sum(load.requests for load in course.loads) == sum(fate.refused is None for fate in course.fates)
    assert all(load.kv_peak <= machine.kv_blocks for load in course.loads)
    assert all(load.busy_ns <= course.wall_ns for load in course.loads)
    busy_ns = math.fsum(load.busy_ns for load in course.loads)
    assert math.fsum(fate.serving_ns for fate in course.fates) == pytest.approx(busy_ns, rel=1e-9)


def test_a_shared_prefix_is_computed_once_for_each_tenant() -> None:
    prefix = ((40, b"instructions"),)
    every = [Arrival(number * 10**9, 48, 2, tenant=number % 2, prefix=prefix) for number in range(4)]
    assert [fate.cached_tokens for fate in simulate(every, MACHINE).fates] == [0, 0, 40, 40]
    shared = msgspec.structs.replace(MACHINE, prefix_cache="shared")
    assert [fate.cached_tokens for fate in simulate(every, shared).fates] == [0, 40, 40, 40]
    off = msgspec.structs.replace(MACHINE, prefix_cache="off")
    assert [fate.cached_tokens for fate in simulate(every, off).fates] == [0, 0, 0, 0]


def test_a_hundred_copies_keep_lengths_and_rate() -> None:
    given_ = [Arrival(at, at % 7 + 1, at % 5 + 1) for at in (0, 100, 150, 900, 1000)]
    hundred = superposed(given_, 100)
    assert len(hundred) == 500
    assert hundred == sorted(hundred, key=lambda each: each.at_ns)
    lengths = sorted((each.input_tokens, each.output_tokens) for each in hundred)
    assert lengths == sorted((each.input_tokens, each.output_tokens) for each in given_ * 100)
    assert span_of(given_) == 1250
    assert all(0 <= each.at_ns < 1250 for each in hundred)
    assert superposed(given_, 1) == given_


def test_the_busiest_requests_are_those_that_came_in_the_shortest_time() -> None:
    every = [Arrival(at, 1, 1) for at in (0, 50, 60, 65, 200)]
    assert [each.at_ns for each in busiest(every, 3)] == [50, 60, 65]
    assert busiest(every, 9) == every


def test_traces_are_read_with_dates_or_seconds(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:50.9951690,396,109\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
    )
    first, second = read_trace(path)
    assert (first.input_tokens, first.output_tokens) == (374, 44)
    assert second.at_ns - first.at_ns == 4_314_579_000
    path.write_text("timestamp,input_length,output_length\n1.5,3,0\n")
    assert read_trace(path) == [Arrival(1_500_000_000, 3, 0)]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a,b\n1,2\n", "no column TIMESTAMP"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no requests"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n1,x,3\n", "trace.csv:2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nsoon,1,3\n", "trace.csv:2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n1,0,3\n", "trace.csv:2"),
    ],
)
def test_a_trace_that_is_none_is_refused_with_the_line(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        read_trace(path)


def test_keys_have_numbers_and_those_without_are_nobody() -> None:
    assert tenant_of(None) == 0
    assert tenant_of("key_a") == tenant_of("key_a") != tenant_of("key_b")
