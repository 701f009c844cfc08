from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from millicent.core.errors import InvalidRequest
from millicent.core.steps import SequenceWork
from millicent.engine.batch import Piece
from millicent.engine.config import PrefixCache
from millicent.engine.scheduling.blocks import BlockPool
from millicent.engine.scheduling.scheduler import Scheduler
from millicent.engine.scheduling.sequences import Sequence


def scheduler(
    *,
    blocks: int = 64,
    block_tokens: int = 4,
    context_tokens: int = 128,
    max_sequences: int = 8,
    step_tokens: int = 16,
    deterministic: bool = False,
    prefix_cache: PrefixCache = "tenant",
) -> Scheduler:
    return Scheduler(
        blocks=blocks,
        block_tokens=block_tokens,
        context_tokens=context_tokens,
        max_sequences=max_sequences,
        step_tokens=step_tokens,
        deterministic=deterministic,
        prefix_cache=prefix_cache,
    )


def step(subject: Scheduler, sequences: dict[int, Sequence]) -> list[tuple[Piece, SequenceWork]]:
    """Run one step as the engine would, sampling token 7."""
    done = [(piece, subject.advance(piece)) for piece in subject.schedule()]
    for piece, _ in done:
        if piece.sample:
            sequences[piece.sequence].tokens.append(7)
    return done


def added(subject: Scheduler, *prompts: int) -> dict[int, Sequence]:
    """Prompts of these sizes that have nothing in common."""
    sequences = {number: Sequence(number, [number] * size) for number, size in enumerate(prompts, 1)}
    for sequence in sequences.values():
        subject.add(sequence)
    return sequences


def test_a_long_prompt_is_cut_to_the_step_budget_and_decoding_comes_first() -> None:
    subject = scheduler()
    sequences = added(subject, 2)
    step(subject, sequences)
    sequences[2] = Sequence(2, [3] * 40)
    subject.add(sequences[2])
    rows = [[(piece.sequence, len(piece.tokens)) for piece, _ in step(subject, sequences)] for _ in range(4)]
    assert rows == [[(1, 1), (2, 15)], [(1, 1), (2, 15)], [(1, 1), (2, 10)], [(1, 1), (2, 1)]]


def test_only_the_last_chunk_of_a_prompt_samples() -> None:
    subject = scheduler()
    sequences = added(subject, 20)
    samples = [[piece.sample for piece, _ in step(subject, sequences)] for _ in range(3)]
    assert samples == [[False], [True], [True]]


def test_work_says_what_was_prefilled_decoded_and_read() -> None:
    subject = scheduler()
    sequences = added(subject, 20)
    works = [work for _ in range(3) for _, work in step(subject, sequences)]
    assert works == [
        SequenceWork(1, prefill_rows=16, decode_rows=0, sampled_rows=0, kv_read_tokens=16),
        SequenceWork(1, prefill_rows=4, decode_rows=0, sampled_rows=1, kv_read_tokens=20),
        SequenceWork(1, prefill_rows=0, decode_rows=1, sampled_rows=1, kv_read_tokens=21),
    ]


def test_sequences_are_admitted_in_order_even_when_a_later_one_would_fit() -> None:
    subject = scheduler(blocks=8)
    sequences = added(subject, 20, 20, 1)
    assert {piece.sequence for piece, _ in step(subject, sequences)} == {1}
    step(subject, sequences)
    assert subject.running == 1


def test_no_more_sequences_run_than_allowed_and_the_next_takes_a_free_place() -> None:
    subject = scheduler(max_sequences=2)
    sequences = added(subject, 1, 1, 1)
    assert [piece.sequence for piece, _ in step(subject, sequences)] == [1, 2]
    subject.remove(1)
    assert [piece.sequence for piece, _ in step(subject, sequences)] == [2, 3]


def test_more_sequences_than_the_budget_still_all_move() -> None:
    subject = scheduler(max_sequences=20, step_tokens=16)
    sequences = added(subject, *[1] * 20)
    for _ in range(3):
        moved = step(subject, sequences)
    assert len(moved) == 20


def test_the_youngest_is_preempted_and_its_repeated_rows_are_counted() -> None:
    subject = scheduler(blocks=5, block_tokens=4, context_tokens=20, prefix_cache="off")
    sequences = added(subject, 4, 4)
    seen: list[tuple[Piece, SequenceWork]] = []
    for _ in range(12):
        seen += step(subject, sequences)
        if len(sequences[1].tokens) == 14:
            subject.remove(1)
    recomputed = [work for _, work in seen if work.recomputed_rows]
    assert sequences[2].cached_tokens == 0, "its own blocks from before are no cache hit to be shown"
    assert {work.sequence for work in recomputed} == {2}
    first = recomputed[0]
    assert first.prefill_rows == first.recomputed_rows + 1  # all it had, and the token sampled last
    assert sequences[2].output_tokens == sum(work.sampled_rows for _, work in seen if work.sequence == 2)


def test_a_prompt_that_can_never_fit_is_refused_with_both_numbers() -> None:
    subject = scheduler(blocks=4, block_tokens=4, context_tokens=128)
    assert subject.context_tokens == 16
    with pytest.raises(InvalidRequest, match=r"16 tokens.*context of 16") as refused:
        subject.add(Sequence(1, [3] * 16))
    assert refused.value.code == "context_length_exceeded"
    subject.add(Sequence(2, [3] * 15))
    with pytest.raises(InvalidRequest, match="no tokens"):
        subject.add(Sequence(3, []))
    assert len(subject) == 1


def test_removing_a_waiting_or_running_sequence_frees_its_blocks_and_twice_is_harmless() -> None:
    subject = scheduler(max_sequences=1)
    sequences = added(subject, 30, 5)
    step(subject, sequences)
    for number in (1, 2, 1, 99):
        subject.remove(number)
    assert (len(subject), subject.pool.used) == (0, 0)


def test_a_block_cannot_be_given_back_twice() -> None:
    pool = BlockPool(2)
    blocks = pool.take(1)
    pool.give_back(blocks)
    with pytest.raises(AssertionError, match="twice"):
        pool.give_back(blocks)


@given(prompt=st.integers(1, 100), neighbours=st.lists(st.integers(1, 60), max_size=6), blocks=st.integers(30, 60))
def test_deterministic_cuts_depend_on_nothing_but_the_sequence_itself(
    prompt: int, neighbours: list[int], blocks: int
) -> None:
    """Whatever shares the engine, and however often it is preempted, each row is computed in the same cut (but for
    what the prefix cache has, whose bits are those that the cut would have given)."""

    def cuts(*others: int) -> dict[tuple[int, int], int]:
        subject = scheduler(blocks=blocks, block_tokens=4, context_tokens=120, deterministic=True, prefix_cache="off")
        sequences = added(subject, *others, prompt)
        watched = len(others) + 1
        seen: dict[tuple[int, int], int] = {}
        for _ in range(400):
            if watched not in subject:
                break
            for piece, _ in step(subject, sequences):
                if piece.sequence == watched:
                    seen[piece.start, len(piece.tokens)] = seen.get((piece.start, len(piece.tokens)), 0) + 1
            for number, sequence in sequences.items():
                if sequence.output_tokens >= 12:
                    subject.remove(number)
        assert watched not in subject, "it never finished"
        return seen

    assert cuts(*neighbours).keys() == cuts().keys()


class SchedulerMachine(RuleBasedStateMachine):
    """Any mix of arrivals, steps, ends, failures and cancellations, of tenants, priorities and common prefixes."""

    @initialize(
        blocks=st.integers(2, 24),
        max_sequences=st.integers(1, 6),
        step_tokens=st.integers(16, 40),
        deterministic=st.booleans(),
        prefix_cache=st.sampled_from(["off", "tenant", "shared"]),
    )
    def begin(
        self, blocks: int, max_sequences: int, step_tokens: int, deterministic: bool, prefix_cache: PrefixCache
    ) -> None:
        self.subject = scheduler(
            blocks=blocks,
            max_sequences=max_sequences,
            step_tokens=step_tokens,
            deterministic=deterministic,
            prefix_cache=prefix_cache,
        )
        self.max_sequences = max_sequences
        self.deterministic = deterministic
        self.prefix_cache = prefix_cache
        self.budget = max(step_tokens, max_sequences)
        self.sequences: dict[int, Sequence] = {}
        self.written: dict[int, tuple[int, ...]] = {}  # blocks to all tokens that their contents depend on
        self.count = 0

    @rule(
        prompt=st.lists(st.sampled_from([3, 4]), max_size=3).flatmap(
            lambda start: st.integers(0, 100).map(lambda size: (start * 9 + [5] * 100)[:size])
        ),
        tenant=st.integers(0, 2),
        priority=st.sampled_from([0, 0, 0, -1, 2]),
        deadline_ns=st.sampled_from([None, None, 10, 20]),
        reuses=st.sampled_from([True, True, False]),
    )
    def arrive(self, prompt: list[int], tenant: int, priority: int, deadline_ns: int | None, reuses: bool) -> None:
        self.count += 1
        sequence = Sequence(self.count, prompt, tenant, priority, deadline_ns, reuses)
        fits = 0 < len(prompt) < self.subject.context_tokens
        try:
            self.subject.add(sequence)
        except InvalidRequest:
            assert not fits
        else:
            assert fits
            self.sequences[sequence.id] = sequence

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.sequences)))
        self.subject.remove(number)
        del self.sequences[number]

    @precondition(lambda self: self.sequences)
    @rule(failing=st.sampled_from([False, False, False, True]))
    def run_a_step(self, failing: bool) -> None:
        before = set(self.subject._running)
        plan = self.subject.schedule()
        assert plan, "there is work and nothing was planned"
        assert len({piece.sequence for piece in plan}) == len(plan)
        if not self.deterministic:
            assert sum(len(piece.tokens) for piece in plan) <= self.budget
        stayed = [sequence for sequence in self.subject._running if sequence in before]
        if stayed:
            assert stayed[0].id in {piece.sequence for piece in plan}, "the first to run must always make progress"
        for piece in plan:
            sequence = self.sequences[piece.sequence]
            assert piece.start == sequence.computed
            assert piece.start + len(piece.tokens) <= len(piece.blocks) * 4
            work = self.subject.advance(piece)
            assert (work.prefill_rows == 0) != (work.decode_rows == 0)
            if failing:
                self.subject.remove(sequence.id, sound=False)
                del self.sequences[sequence.id]
                continue
            self.compute(sequence, piece)
            if piece.sample:
                sequence.tokens.append(7)
            if len(sequence.tokens) >= self.subject.context_tokens:
                self.subject.remove(sequence.id)
                del self.sequences[sequence.id]

    def compute(self, sequence: Sequence, piece: Piece) -> None:
        """What a model would do: read all that came before, write what is new."""
        salt = 0 if self.prefix_cache == "shared" else sequence.tenant
        for index in range(piece.start // 4):
            before = (salt, *sequence.tokens[: 4 * index + 4])
            assert self.written[piece.blocks[index]] == before, "a block holds what isn't this sequence's"
        end = piece.start + len(piece.tokens)
        for index in range(piece.start // 4, -(-end // 4)):
            self.written[piece.blocks[index]] = (salt, *sequence.tokens[: min(end, 4 * index + 4)])

    @invariant()
    def blocks_are_conserved_and_have_as_many_holders_as_they_say(self) -> None:
        if not hasattr(self, "subject"):
            return
        pool = self.subject.pool
        held = Counter(block for sequence in self.sequences.values() for block in sequence.blocks)
        assert pool._holders == [held[block] for block in range(len(pool._holders))]
        assert not any(block >= len(pool._holders) for block in held)
        assert pool.used == len(held)
        assert pool.free + pool.cached + pool.used == pool.total
        assert not held.keys() & ({*pool._given_back} | {*pool._cached})
        assert {*pool._cached} <= pool._key_of.keys()
        assert {block: key for key, block in pool._block_of.items()} == pool._key_of
        assert self.subject.running <= self.max_sequences
        if not self.sequences:
            assert not self.subject._computing
        for sequence in self.sequences.values():
            assert 0 <= sequence.computed <= sequence.reached <= len(sequence.tokens)


TestScheduler = SchedulerMachine.TestCase
