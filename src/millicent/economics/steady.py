"""The engine's scheduler, with a way to do many alike steps at once: what makes simulating quick.

Most steps of an engine are like the one before: nobody comes, nobody ends, and each sequence decodes one token more. So
many of them in a row change nothing but counts, which `skip` adds up. The result is that of calling `schedule` and
`advance` for each (a test holds one against the other), but for this: where several keys wait beside a full engine, how
often one of them was overtaken by another whose beginning is cached is counted as if whose turn it is didn't change.
"""

from __future__ import annotations

import bisect
import itertools
from typing import Any, Literal

from millicent.engine.scheduling.scheduler import Scheduler
from millicent.engine.scheduling.sequences import Sequence
from millicent.step_time import Coefficients, Work

PrefixCache = Literal["off", "tenant", "shared"]
_WINDOW = 32  # as many as the queues look at


class Contents(list[int]):
    """A sequence's tokens, of which only their number is known, and what they begin with.

    `prefix` as in Arrival. `own` names whatever nobody shares.
    """

    def __init__(self, tokens: int, prefix: tuple[tuple[int, bytes], ...], own: bytes) -> None:
        super().__init__()
        self._tokens = tokens
        self.prefix = prefix
        self.own = own

    def __len__(self) -> int:
        return self._tokens

    def __getitem__(self, index: Any) -> Any:
        """What a slice has to have is its length."""
        return [0] * len(range(*index.indices(self._tokens)))

    def append(self, token: int, /) -> None:
        del token
        self._tokens += 1

    def grow(self, tokens: int) -> None:
        self._tokens += tokens

    def name_of(self, stop: int) -> bytes:
        """Of the beginning of so many tokens."""
        for end, name in self.prefix:
            if stop <= end:
                return name
        return self.own


class SteadyScheduler(Scheduler):
    """For sequences whose tokens are `Contents`. `preemptions` counts those that had to give way."""

    def __init__(
        self,
        costs: Coefficients,
        *,
        blocks: int,
        block_tokens: int,
        context_tokens: int,
        max_sequences: int,
        step_tokens: int,
        prefix_cache: PrefixCache,
    ) -> None:
        super().__init__(
            blocks=blocks,
            block_tokens=block_tokens,
            context_tokens=context_tokens,
            max_sequences=max_sequences,
            step_tokens=step_tokens,
            prefix_cache=prefix_cache,
        )
        self.costs = self._costs = costs
        self.preemptions = 0
        self._queues: set[tuple[int, int]] = set()

    def add(self, sequence: Sequence) -> None:
        super().add(sequence)
        self._queues.add((sequence.priority, sequence.tenant))

    def decoding_now(self) -> list[Sequence]:
        """The running sequences, in their order. Each decodes where `steady_steps` says so."""
        return self._running

    def steady_steps(self, most: int) -> int:
        """How many of the next steps, at most `most`, do nothing but let every running sequence decode.

        0 where the next does something else. `most` is how many tokens the first to end has left.
        """
        running = self._running
        if not running or not all(sequence.decodes for sequence in running):
            return 0
        for sequence in running:
            self._name_computed(sequence)
        if len(self) > len(running):
            if self._waiting.better_than(running[-1].priority):
                return 0
            if len(running) < self._max_sequences and (
                len(self._queues) > 1  # whose turn it is may change from step to step
                or any(map(self._admits, itertools.islice(self._waiting, _WINDOW)))
            ):
                return 0
        return self._within_blocks(most)

    def skip(self, steps: int) -> None:
        """Do so many: at most what `steady_steps` has just said."""
        if len(self) > len(self._running):
            self._overtake(steps)
        for sequence in self._running:
            missing = self._blocks_for(sequence.computed + steps) - len(sequence.blocks)
            if missing > 0:
                sequence.blocks += self.pool.take(missing)
            self.fair.charge(sequence.tenant, self._decoding_ns(sequence.computed + 1, steps))
            assert isinstance(sequence.tokens, Contents)
            sequence.tokens.grow(steps)
            sequence.computed += steps
            sequence.reached = sequence.computed

    def _within_blocks(self, most: int) -> int:
        """So many that all grow without one having to give way."""

        def missing(steps: int) -> int:
            return sum(
                max(0, self._blocks_for(sequence.computed + steps) - len(sequence.blocks)) for sequence in self._running
            )

        available = self.pool.available
        if missing(most) <= available:
            return most
        return bisect.bisect_right(range(1, most), available, key=missing)

    def _overtake(self, steps: int) -> None:
        """In each of these steps somebody may be looked at and passed by, as often as anybody can be."""
        before = {sequence.id: sequence.overtaken for sequence in itertools.islice(self._waiting, _WINDOW)}
        self._waiting.next(self._locality)
        for sequence in itertools.islice(self._waiting, _WINDOW):
            if sequence.overtaken > before[sequence.id]:
                sequence.overtaken = min(_WINDOW, before[sequence.id] + steps)

    def _decoding_ns(self, context: int, steps: int) -> int:
        """What so many steps in a row cost a sequence, as the scheduler counts it; the first reads `context` tokens."""
        first_ns = self._costs.step_ns(Work(1, 1, context, 0))
        return int(steps * first_ns + self._costs.kv_token_ns * (steps * (steps - 1) // 2))

    def _preempt_last(self) -> Sequence:
        self.preemptions += 1
        return super()._preempt_last()

    def _extend_keys(self, sequence: Sequence, count: int) -> None:
        """A block's key names what its last token belongs to, and where it is."""
        tokens = sequence.tokens
        assert isinstance(tokens, Contents)
        tenant = 0 if self._prefix_cache == "shared" else sequence.tenant
        salt = tenant.to_bytes(8, "little", signed=True)
        for index in range(len(sequence.keys), count):
            sequence.keys.append(salt + index.to_bytes(4, "little") + tokens.name_of((index + 1) * self._block_tokens))
