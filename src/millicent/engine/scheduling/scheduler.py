"""Continuous batching with chunked prefill: what each forward pass works on.

A step has a budget of token rows: sequences that decode take one row each and come first, prefill fills what is left,
and those that wait are admitted, in their turn (`queues`), while blocks for all their tokens are available. What their
prompts have in common with earlier ones of the same tenant isn't computed again: full blocks are found by the tokens
up to their end. A sequence whose next block another one is just computing waits for it.

When a decoding sequence needs a block and none is available, the one that runs last gives its blocks back and waits
again, to be computed again later. Running sequences are ordered by priority, then by when they began, so the first
always makes progress; one that waits with a better priority takes the place of the last.

What is left of the budget goes to guesses of what decoding sequences say next (`speculation`), in blocks that nobody
needs.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import replace

from millicent.core.errors import InvalidRequest
from millicent.core.steps import SequenceWork
from millicent.engine.batch import Piece
from millicent.engine.config import PrefixCache
from millicent.engine.scheduling.blocks import BlockPool, first_key, next_key
from millicent.engine.scheduling.queues import FairShare, WaitingQueues
from millicent.engine.scheduling.sequences import Sequence
from millicent.engine.scheduling.speculation import Offer, worthwhile
from millicent.step_time import Coefficients, Work

# Until it is known what steps take here. What counts for fairness is how work compares, not how fast a machine is:
# reading weights costs about as much as computing a dozen rows, and attention to a thousand tokens as much as one.
_NOMINAL = Coefficients(
    fixed_ns=100_000, weights_ns=3_000_000, row_ns=250_000, sampled_row_ns=20_000, kv_token_ns=250, pair_ns=25
)


def standalone_ns(work: SequenceWork, costs: Coefficients = _NOMINAL) -> int:
    """What a step with only this in it would cost."""
    return int(costs.step_ns(Work.of(work)))


class Scheduler:
    """`schedule` plans a step; the caller passes each piece to `advance`, runs it, and appends the tokens it samples,
    with a call of `accept` for each guess among them that was right. A sequence whose forward pass failed is removed as
    not `sound` before the next `schedule`.

    `deterministic` makes a sequence's pieces independent of everything else but what it finds in the prefix cache:
    prefill is cut at multiples of `step_tokens`, and rows after the prompt are computed one at a time, also when they
    are computed again. The caller then gives every piece a forward pass of its own.
    """

    def __init__(
        self,
        *,
        blocks: int,
        block_tokens: int,
        context_tokens: int,
        max_sequences: int,
        step_tokens: int,
        deterministic: bool = False,
        prefix_cache: PrefixCache = "tenant",
    ) -> None:
        self.pool = BlockPool(blocks)
        self.context_tokens = min(context_tokens, blocks * block_tokens)
        self.fair = FairShare()
        self.costs: Coefficients | None = None  # what steps take; while nobody knows, nothing is guessed
        self._block_tokens = block_tokens
        self._max_sequences = max_sequences
        self._step_tokens = step_tokens
        self._deterministic = deterministic
        self._prefix_cache = prefix_cache
        self._waiting = WaitingQueues(self.fair)
        self._running: list[Sequence] = []
        self._begun: dict[int, int] = {}  # running sequences to the order in which they began
        self._arrivals = 0
        self._beginnings = 0
        self._sequences: dict[int, Sequence] = {}
        self._computing: dict[bytes, Sequence] = {}  # keys of blocks to the running sequence that will compute them

    def __len__(self) -> int:
        """Sequences that aren't finished."""
        return len(self._sequences)

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._sequences

    @property
    def running(self) -> int:
        return len(self._running)

    def decoding(self) -> Iterator[Sequence]:
        """Those that run and only lack the row of their last token."""
        return (sequence for sequence in self._running if sequence.decodes)

    def add(self, sequence: Sequence) -> None:
        """Queue it. Raises InvalidRequest when it could never run."""
        if not sequence.tokens:
            raise InvalidRequest("the prompt has no tokens; send at least one", param="prompt")
        if len(sequence.tokens) + 1 > self.context_tokens:
            raise InvalidRequest(
                f"the prompt has {len(sequence.tokens)} tokens, which leaves no room for output in a context of"
                f" {self.context_tokens}; shorten it",
                code="context_length_exceeded",
            )
        self._arrivals += 1
        sequence.arrival = self._arrivals
        self._sequences[sequence.id] = sequence
        self.fair.enter(sequence.tenant)
        self._waiting.add(sequence)

    def remove(self, sequence: int, *, sound: bool = True) -> None:
        """Finished, cancelled or failed: nobody holds its blocks for it. Unknown numbers are ignored.

        Unless `sound`, what its last pieces computed isn't kept for others.
        """
        gone = self._sequences.pop(sequence, None)
        if gone is None:
            return
        if gone.id in self._begun:
            self._running.remove(gone)
            self._release(gone, sound=sound)
        else:
            self._waiting.remove(gone)
        self.fair.leave(gone.tenant)

    def schedule(self) -> list[Piece]:
        """The next step's work. Not empty while there are sequences."""
        for sequence in self._running:
            self._name_computed(sequence)
        self._make_way()
        plan = self._decodes()
        # With one row for each sequence in the budget, decoding can never starve a prefill, nor the reverse.
        budget = self._step_tokens
        if not self._deterministic:
            budget = max(budget, self._max_sequences) - len(plan)
        for sequence in self._running:
            if self._rows(sequence) > 1:
                budget -= self._prefill(sequence, budget, plan)
        while budget > 0:
            newcomer = self._waiting.next(self._locality)
            if newcomer is None or not self._admits(newcomer):
                break
            self._begin(newcomer)
            budget -= self._prefill(newcomer, budget, plan)
        self._add_guesses(plan, budget)
        return plan

    def advance(self, piece: Piece) -> SequenceWork:
        """Count the piece as computed, but for its guesses; what it asks of the forward pass."""
        sequence = self._sequences[piece.sequence]
        work = self._work(sequence, piece)
        sequence.guesses = []
        sequence.computed = work.kv_read_tokens - piece.drafts
        sequence.reached = max(sequence.computed, sequence.reached)
        return work

    def accept(self, sequence: Sequence) -> None:
        """The next guess was right: its row counts as computed. What wrong ones have written is written over."""
        sequence.computed += 1
        sequence.reached = max(sequence.computed, sequence.reached)

    @staticmethod
    def _work(sequence: Sequence, piece: Piece) -> SequenceWork:
        rows = len(piece.tokens)
        end = piece.start + rows
        recomputed = max(0, min(end, sequence.reached) - piece.start)
        decodes = rows - piece.drafts == 1 and recomputed == 0 and piece.start >= sequence.prompt_tokens
        return SequenceWork(
            sequence=sequence.id,
            prefill_rows=0 if decodes else rows,
            decode_rows=rows if decodes else 0,
            sampled_rows=int(piece.sample) + piece.drafts,
            kv_read_tokens=end,
            recomputed_rows=recomputed,
            drafted_tokens=piece.drafts,
        )

    # A step's pieces.

    def _decodes(self) -> list[Piece]:
        plan: list[Piece] = []
        position = 0
        while position < len(self._running):  # the list may lose its tail on the way
            sequence = self._running[position]
            position += 1
            if self._rows(sequence) == 1 and self._grow(sequence):
                plan.append(self._piece(sequence, 1))
        return plan

    def _prefill(self, sequence: Sequence, budget: int, plan: list[Piece]) -> int:
        """Plan the sequence's next chunk; the rows it takes."""
        rows = self._rows(sequence)
        if rows > budget:
            if self._deterministic:  # a chunk is never cut to what happens to be left
                return 0
            rows = budget
        if rows > 0:
            plan.append(self._piece(sequence, rows))
        return rows

    def _rows(self, sequence: Sequence) -> int:
        """How many rows the sequence would compute next, given the whole budget."""
        if not self._deterministic:
            return len(sequence.tokens) - sequence.computed
        if sequence.computed >= sequence.prompt_tokens:
            return 1
        boundary = (sequence.computed // self._step_tokens + 1) * self._step_tokens
        return min(boundary, sequence.prompt_tokens) - sequence.computed

    def _piece(self, sequence: Sequence, rows: int) -> Piece:
        end = sequence.computed + rows
        piece = Piece(
            sequence=sequence.id,
            tokens=sequence.tokens[sequence.computed : end],
            start=sequence.computed,
            blocks=sequence.blocks,
            sample=end == len(sequence.tokens),
            every_row=sequence.every_row,
        )
        self.fair.charge(sequence.tenant, self._cost_ns(self._work(sequence, piece)))
        return piece

    # Guesses.

    def _add_guesses(self, plan: list[Piece], budget: int) -> None:
        """Let decoding sequences check guesses, as many as pay, in what the step has left of rows and blocks."""
        offered = [place for place, piece in enumerate(plan) if self._offers(piece)]
        if self.costs is None or not offered:
            return
        # Under `deterministic` each piece has a pass of its own, and neither gains nor costs anything in another's.
        for places in [[place] for place in offered] if self._deterministic else [offered]:
            pieces = [plan[place] for place in places] if self._deterministic else plan
            sequences = [self._sequences[plan[place].sequence] for place in places]
            works = [(piece, Work.of(self._work(self._sequences[piece.sequence], piece))) for piece in pieces]
            taken = worthwhile(
                self.costs,
                [work for _, work in works],
                [work for piece, work in works if len(piece.tokens) == 1 and piece.sample],
                [Offer(len(sequence.guesses), sequence.acceptance) for sequence in sequences],
                most=budget,
            )
            for place, sequence, count in zip(places, sequences, taken, strict=True):
                plan[place] = self._with_guesses(plan[place], sequence, count)

    def worth_making(self, offers: list[tuple[Sequence, int]], guess_ns: float) -> list[int]:
        """Of guesses that are yet to be made, how many of each of these decoding sequences pay; making one for all of
        them takes `guess_ns`. Prompts that wait take their part of the next step."""
        if self.costs is None:
            return [0] * len(offers)
        if self._deterministic and len(offers) > 1:  # each has passes of its own
            return [count for offer in offers for count in self.worth_making([offer], guess_ns)]
        decoding = [sequence for sequence, _ in offers] if self._deterministic else list(self.decoding())
        decodes = [Work(1, 1, len(sequence.tokens), 0) for sequence in decoding]
        room = max(0, self._step_tokens - len(decodes))
        prompts = 0 if self._deterministic else sum(self._rows(each) for each in self._running if not each.decodes)
        prefill = Work(min(room, prompts), 0, 0, 0)
        return worthwhile(
            self.costs,
            [*decodes, prefill],
            decodes,
            [Offer(count, sequence.acceptance) for sequence, count in offers],
            most=room - prefill.rows,
            guess_ns=[guess_ns] * max((count for _, count in offers), default=0),
        )

    def _offers(self, piece: Piece) -> bool:
        sequence = self._sequences[piece.sequence]
        return bool(sequence.guesses) and sequence.decodes

    def reserve(self, sequence: Sequence, count: int) -> int:
        """How many guesses of a decoding sequence have room. Blocks are taken for them beyond the one that every
        running sequence keeps to grow into."""
        spare = max(0, self.pool.available - len(self._running))
        missing = self._blocks_for(len(sequence.tokens) + count) - len(sequence.blocks)
        sequence.blocks += self.pool.take(max(0, min(missing, spare)))
        return max(0, min(count, len(sequence.blocks) * self._block_tokens - len(sequence.tokens)))

    def _with_guesses(self, piece: Piece, sequence: Sequence, count: int) -> Piece:
        count = self.reserve(sequence, count)
        if count == 0:
            return piece
        checked = replace(piece, tokens=[*piece.tokens, *sequence.guesses[:count]], drafts=count)
        more_ns = self._cost_ns(self._work(sequence, checked)) - self._cost_ns(self._work(sequence, piece))
        self.fair.charge(sequence.tenant, more_ns)
        return checked

    def _cost_ns(self, work: SequenceWork) -> int:
        return standalone_ns(work, self.costs or _NOMINAL)

    # Who runs.

    def _make_way(self) -> None:
        """The last to run give way to one that waits with a better priority."""
        if not self._running or not self._waiting.better_than(self._running[-1].priority):
            return
        newcomer = self._waiting.next(self._locality)
        if newcomer is not None:
            while self._running and newcomer.priority < self._running[-1].priority and not self._admits(newcomer):
                self._preempt_last()

    def _admits(self, sequence: Sequence) -> bool:
        """Every running sequence keeps a block to grow into: a newcomer shouldn't be preempted at once."""
        if len(self._running) >= self._max_sequences:
            return False
        found = self._find_prefix(sequence)
        wanted = self._blocks_for(len(sequence.tokens)) - len(found) + sum(map(self.pool.is_cached, found))
        return self.pool.available >= wanted + len(self._running)

    def _begin(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)
        found = self._find_prefix(sequence)
        for block in found:
            self.pool.hold(block)
        sequence.blocks = found + self.pool.take(self._blocks_for(len(sequence.tokens)) - len(found))
        sequence.named = len(found)
        sequence.computed = len(found) * self._block_tokens
        sequence.reached = max(sequence.reached, sequence.computed)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed
        for key in sequence.keys[sequence.named :]:
            self._computing.setdefault(key, sequence)
        self._beginnings += 1
        self._begun[sequence.id] = self._beginnings
        bisect.insort(self._running, sequence, key=lambda other: (other.priority, self._begun[other.id]))

    def _preempt_last(self) -> Sequence:
        last = self._running.pop()
        self._release(last)
        self._waiting.add(last)
        return last

    def _grow(self, sequence: Sequence) -> bool:
        """A block for the next row, taken from the last to run if need be; False when this is that one."""
        if len(sequence.blocks) * self._block_tokens > sequence.computed:
            return True
        while not self.pool.available:
            if self._preempt_last() is sequence:
                return False
        sequence.blocks += self.pool.take(1)
        return True

    def _release(self, sequence: Sequence, *, sound: bool = True) -> None:
        if sound:
            self._name_computed(sequence)
        for key in sequence.keys[sequence.named :]:
            if self._computing.get(key) is sequence:
                del self._computing[key]
        self.pool.give_back(reversed(sequence.blocks))  # a chain's end is worth less than its beginning
        sequence.blocks = []
        sequence.computed = sequence.named = 0
        del self._begun[sequence.id]

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)

    # What needn't be computed.

    def _locality(self, sequence: Sequence) -> int | None:
        """How many of its tokens are in the prefix cache; None while another one is computing the next."""
        found = self._find_prefix(sequence)
        if len(found) < len(sequence.keys) and sequence.reuses and sequence.keys[len(found)] in self._computing:
            return None
        return len(found) * self._block_tokens

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """The blocks of its longest cached beginning, which never holds the last token: that one's logits are wanted.

        `sequence.keys` are then those of all full blocks before that token.
        """
        if self._prefix_cache == "off":
            return []
        self._extend_keys(sequence, (len(sequence.tokens) - 1) // self._block_tokens)
        found: list[int] = []
        for key in sequence.keys if sequence.reuses else ():
            block = self.pool.find(key)
            if block is None:
                break
            found.append(block)
        return found

    def _name_computed(self, sequence: Sequence) -> None:
        """Let others find the full blocks that have been computed since."""
        full = sequence.computed // self._block_tokens
        if self._prefix_cache == "off" or sequence.named >= full:
            return
        self._extend_keys(sequence, full)
        for index in range(sequence.named, full):
            key = sequence.keys[index]
            self.pool.name(sequence.blocks[index], key)
            if self._computing.get(key) is sequence:
                del self._computing[key]
        sequence.named = full

    def _extend_keys(self, sequence: Sequence, count: int) -> None:
        """Keys of the first `count` blocks, at least."""
        size = self._block_tokens
        salt = 0 if self._prefix_cache == "shared" else sequence.tenant
        for index in range(len(sequence.keys), count):
            before = sequence.keys[-1] if sequence.keys else first_key(salt)
            sequence.keys.append(next_key(before, sequence.tokens[index * size : (index + 1) * size]))
