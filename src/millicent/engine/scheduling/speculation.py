"""How many guesses a step should check: as many as give the most output for the predicted time.

A guess (a draft token) takes a row of the forward pass and brings a token if it and those before it turn out right. In
a step that mostly reads weights another row costs next to nothing; in one that is full of rows it costs its whole
computing, and then most guesses lose. So nothing is switched off by hand: where guessing loses, none is worth its row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from millicent.step_time import Coefficients, Work

# Predictions have errors, and rows that bring nothing cost others latency: a smaller gain than this isn't taken.
_WORTH_PERCENT = 5


@dataclass(frozen=True, slots=True)
class Offer:
    """So many guesses of one sequence, each right with this probability if those before it are."""

    guesses: int
    acceptance: float


def plus_rows(work: Work, rows: int) -> Work:
    """With so many more rows of sequences that are there already."""
    return Work(work.rows + rows, work.sampled_rows + rows, work.kv_read_tokens + rows, work.prefill_pairs)


def worthwhile(
    costs: Coefficients,
    step: Iterable[Work],
    decodes: Sequence[Work],
    offers: Sequence[Offer],
    *,
    most: int,
    guess_ns: Sequence[float] = (),
) -> list[int]:
    """How many of each offer's guesses to take, `most` in all.

    `step` is everything in the step, `decodes` those that give a token each. What counts is output over time, the time
    being that of a step with the decodes alone and what guesses add to this one. Where guesses have yet to be made,
    `guess_ns` is what the first guesses of all take, the second ones, and so on.
    """
    ranked = sorted(
        ((offer.acceptance**depth, -depth, place) for place, offer in enumerate(offers) for depth in _depths(offer)),
        reverse=True,
    )
    whole, alone_ns = Work.total(step), costs.step_ns(Work.total(decodes))
    before_ns = costs.step_ns(whole)
    output, guessing_ns = float(len(decodes)), 0.0
    best_rate = output / alone_ns * (1 + _WORTH_PERCENT / 100) if alone_ns else float("inf")
    best, deepest = 0, 0
    # Likelier guesses come first, and of a sequence the earlier ones: so the best set is a beginning of this list.
    for count, (probability, depth, _) in enumerate(ranked[:most], 1):
        output += probability
        if -depth > deepest:
            guessing_ns += guess_ns[deepest] if guess_ns else 0.0
            deepest = -depth
        rate = output / (alone_ns + costs.step_ns(plus_rows(whole, count)) - before_ns + guessing_ns)
        if rate > best_rate:
            best, best_rate = count, rate
    taken = [0] * len(offers)
    for _, _, place in ranked[:best]:
        taken[place] += 1
    return taken


def _depths(offer: Offer) -> range:
    return range(1, offer.guesses + 1)
