"""Whose turn it is, and what needn't be computed again."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from millicent.core.steps import SequenceWork
from millicent.engine.config import PrefixCache
from millicent.engine.scheduling import scheduler as scheduling
from millicent.engine.scheduling.scheduler import Scheduler
from millicent.engine.scheduling.sequences import Sequence
from millicent.step_time import Coefficients


def scheduler(
    *, blocks: int = 256, max_sequences: int = 4, step_tokens: int = 64, prefix_cache: PrefixCache = "tenant"
) -> Scheduler:
    return Scheduler(
        blocks=blocks,
        block_tokens=4,
        context_tokens=256,
        max_sequences=max_sequences,
        step_tokens=step_tokens,
        prefix_cache=prefix_cache,
    )


class Story:
    """Runs steps, ends each sequence after `output` tokens, and writes down who did what."""

    def __init__(self, subject: Scheduler, output: int = 2) -> None:
        self.subject = subject
        self.output = output
        self.sequences: dict[int, Sequence] = {}
        self.steps: list[list[SequenceWork]] = []
        self.ended: list[int] = []

    def add(self, tokens: list[int], **fields: int | None) -> Sequence:
        sequence = Sequence(len(self.sequences) + 1, tokens, **fields)  # type: ignore[arg-type]
        self.sequences[sequence.id] = sequence
        self.subject.add(sequence)
        return sequence

    def step(self) -> list[SequenceWork]:
        works = []
        for piece in self.subject.schedule():
            works.append(self.subject.advance(piece))
            if piece.sample:
                sequence = self.sequences[piece.sequence]
                sequence.tokens.append(1000 + piece.sequence)
                if sequence.output_tokens >= self.output:
                    self.subject.remove(sequence.id)
                    self.ended.append(sequence.id)
        self.steps.append(works)
        return works

    def finish(self) -> None:
        while len(self.subject):
            self.step()

    @property
    def prefill_rows(self) -> int:
        return sum(work.prefill_rows for works in self.steps for work in works)


def distinct(number: int, size: int) -> list[int]:
    return [100 * number + index for index in range(size)]


def test_sequences_that_come_together_with_one_prefix_compute_it_once() -> None:
    story = Story(scheduler(max_sequences=8, step_tokens=1000))
    for number in range(8):
        story.add(distinct(0, 100) + [900 + number] * 3)
    story.finish()
    assert story.prefill_rows == 103 + 7 * 3
    assert [sequence.cached_tokens for sequence in story.sequences.values()] == [0] + [100] * 7


def test_the_last_token_is_always_computed() -> None:
    story = Story(scheduler())
    for _ in range(2):
        sequence = story.add(distinct(0, 32))
        story.finish()
    assert sequence.cached_tokens == 28, "the last block holds the token whose logits are wanted"


def test_an_answer_is_part_of_the_prefix_that_its_next_turn_finds() -> None:
    story = Story(scheduler(), output=9)
    first = story.add(distinct(0, 12))
    story.finish()
    again = story.add([*first.tokens, 5])
    story.finish()
    assert again.cached_tokens == 20


def test_tenants_do_not_see_each_others_prefixes_unless_they_share() -> None:
    for prefix_cache, found in (("tenant", 0), ("shared", 28), ("off", 0)):
        story = Story(scheduler(prefix_cache=prefix_cache))  # type: ignore[arg-type]
        story.add(distinct(0, 30), tenant=1)
        story.finish()
        other = story.add(distinct(0, 30), tenant=2)
        story.finish()
        assert other.cached_tokens == found, prefix_cache


def test_the_least_recently_used_prefix_gives_way_and_its_end_before_its_beginning() -> None:
    story = Story(scheduler(blocks=20))
    for number in (1, 2):
        story.add(distinct(number, 30))
        story.finish()
    story.add(distinct(3, 30))  # takes what is free, then the end of the first prompt
    story.finish()
    found = []
    for number in (2, 1):
        sequence = story.add(distinct(number, 30))
        story.step()
        found.append(sequence.cached_tokens)
        story.subject.remove(sequence.id)
    assert found[0] == 28
    assert 0 < (found[1] or 0) < 28


def test_what_a_failed_pass_computed_is_not_found() -> None:
    story = Story(scheduler())
    sequence = story.add(distinct(0, 40))
    for piece in story.subject.schedule():
        story.subject.advance(piece)
    story.subject.remove(sequence.id, sound=False)
    again = story.add(distinct(0, 40))
    story.finish()
    assert again.cached_tokens == 0


def test_whoever_waits_for_a_prefix_goes_on_when_the_one_computing_it_leaves() -> None:
    story = Story(scheduler(step_tokens=16))
    first = story.add(distinct(0, 60))
    second = story.add(distinct(0, 60))
    assert [work.sequence for work in story.step()] == [first.id]
    assert [work.sequence for work in story.step()] == [first.id]
    story.subject.remove(first.id)
    assert [work.sequence for work in story.step()] == [second.id]
    assert second.cached_tokens == 32


def test_a_better_priority_goes_first_and_takes_the_place_of_a_worse() -> None:
    story = Story(scheduler(max_sequences=2), output=6)
    for number in (1, 2, 3):
        story.add(distinct(number, 8), priority=1)
    story.step()
    urgent = story.add(distinct(4, 8), priority=0)
    assert {work.sequence for work in story.step()} == {1, urgent.id}
    story.finish()
    assert story.ended[:2] == [1, urgent.id]
    assert sum(work.recomputed_rows for works in story.steps for work in works) <= 4, "the prefix cache had most of it"


def test_an_earlier_deadline_goes_first_within_a_tenant() -> None:
    story = Story(scheduler(max_sequences=1))
    for deadline_ns in (None, 300, 100, 200):
        story.add(distinct(len(story.sequences), 8), deadline_ns=deadline_ns)
    story.finish()
    assert story.ended == [3, 4, 2, 1]


def test_a_cached_prefix_goes_before_others_but_overtakes_nobody_for_ever() -> None:
    story = Story(scheduler(max_sequences=1))
    story.add(distinct(0, 32))
    story.finish()
    stranger = story.add(distinct(7, 32))
    for _ in range(200):
        story.add(distinct(0, 32))
    story.finish()
    position = story.ended.index(stranger.id)
    assert 1 < position <= 33


def test_a_newcomer_is_served_beside_a_flood_and_not_after_it() -> None:
    story = Story(scheduler(max_sequences=2))
    for number in range(40):
        story.add(distinct(number, 20), tenant=1)
    for _ in range(6):
        story.step()
    newcomer = story.add(distinct(77, 20), tenant=2)
    before = len(story.ended)
    while newcomer.id not in story.ended:
        story.step()
    assert len(story.ended) - before <= 4


# What a large model on a slow memory takes, and a small one whose attention is dear.
MACHINES = st.sampled_from(
    [None, Coefficients(1e5, 3e7, 2e6, 2e4, 1e3, 10.0), Coefficients(1e4, 1e4, 1e4, 0.0, 2e3, 500.0)]
)


@settings(max_examples=40)
@given(data=st.data(), tenants=st.integers(2, 4), max_sequences=st.integers(1, 4), costs=MACHINES)
def test_tenants_with_work_waiting_stay_within_one_engine_full_of_each_other(
    data: st.DataObject, tenants: int, max_sequences: int, costs: Coefficients | None
) -> None:
    """Whatever their requests look like: what they were given, in what it takes on this machine, differs by less than
    what fits in at once, twice."""

    def standalone_ns(work: SequenceWork) -> int:
        return scheduling.standalone_ns(work) if costs is None else scheduling.standalone_ns(work, costs)

    story = Story(scheduler(max_sequences=max_sequences), output=6)
    story.subject.costs = costs
    serial = iter(range(1, 100_000))
    given_ns = Counter(dict.fromkeys(range(tenants), 0))
    longest = {tenant: data.draw(st.integers(4, 100)) for tenant in range(tenants)}
    one_ns = max(standalone_ns(SequenceWork(1, size, 0, 1, size)) for size in longest.values())
    one_ns += 8 * standalone_ns(SequenceWork(1, 0, 1, 1, 110)) + 10 * standalone_ns(SequenceWork(1, 1, 0, 0, 1))
    for _ in range(120):
        for tenant in range(tenants):  # always somebody waiting
            waiting = [one for one in story.subject._waiting if one.tenant == tenant]
            for _ in range(2 - len(waiting)):
                size = data.draw(st.integers(1, longest[tenant]))
                story.add([next(serial) for _ in range(size)], tenant=tenant)
        for work in story.step():
            given_ns[story.sequences[work.sequence].tenant] += standalone_ns(work)
        assert max(given_ns.values()) - min(given_ns.values()) <= 2 * max_sequences * one_ns
