"""Whether a score is worth routing by: cost against quality, beside a random control, on prompts it wasn't trained on.

Definitions of RouteLLM (Ong et al. 2024, arXiv:2406.18665): the performance gap recovered, PGR, is the part of the way
from the weak model's mean grade to the strong one's; APGR its mean over shares of calls that go to the strong model;
CPT(x%) the smallest share at which PGR is x%.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random

import msgspec

from millicent.core.errors import ConfigError
from millicent.routing.difficulty import Pair, features_of, fit
from millicent.routing.pairs import plain

# Shares of calls to the strong model at which curves are drawn: 0%, 1%, ..., 100%.
STEPS = 100
_LEAST_PAIRS = 100


class Estimate(msgspec.Struct, frozen=True):
    """With the ends of its 95% interval."""

    value: float
    low: float
    high: float


class Report(msgspec.Struct, frozen=True):
    """`curve` and `control` are PGR at each hundredth of calls to the strong model, with 95% intervals. `gain` is
    APGR beyond a random order's in the same resamples. `recommended` is None unless the policy beats the control."""

    pairs: int
    left_out: int
    weak: float
    strong: float
    apgr: Estimate
    control_apgr: Estimate
    gain: Estimate
    cpt50: Estimate
    control_cpt50: Estimate
    curve: tuple[Estimate, ...]
    control: tuple[Estimate, ...]
    recommended: Recommendation | None
    why_not: str | None


class Recommendation(msgspec.Struct, frozen=True):
    """Where the lower end of PGR's interval reaches what was asked for, at the lowest share of strong calls."""

    threshold: float
    strong_share: float
    recovered: Estimate


def held_out_scores(
    pairs: Sequence[Pair], folds: int, seed: int, progress: Callable[[int], object] | None = None
) -> list[float]:
    """Each prompt's score by a model that was trained without it, and without its duplicates."""
    if len(pairs) < _LEAST_PAIRS:
        raise ConfigError(f"{len(pairs)} pairs are too few to judge by: give {_LEAST_PAIRS} or more")
    prompts = sorted({plain(pair.prompt) for pair in pairs})
    Random(seed).shuffle(prompts)  # noqa: S311 - an order, no secret
    fold_of = {prompt: number % folds for number, prompt in enumerate(prompts)}
    placed = [fold_of[plain(pair.prompt)] for pair in pairs]
    rows = [features_of(pair.prompt) for pair in pairs]
    labels = [pair.strong > pair.weak for pair in pairs]
    scores = [0.0] * len(pairs)
    for fold in range(folds):
        seen = [number for number, each in enumerate(placed) if each != fold]
        scorer = fit([rows[number] for number in seen], [labels[number] for number in seen], seed=seed)
        for number, each in enumerate(placed):
            if each == fold:
                scores[number] = scorer.score(pairs[number].prompt)
        if progress is not None:
            progress(fold + 1)
    return scores


def evaluate(
    pairs: Sequence[Pair],
    scores: Sequence[float],
    *,
    recover: float = 0.5,
    resamples: int = 200,
    seed: int = 0,
    left_out: int = 0,
) -> Report:
    """The intervals are those of a bootstrap over prompts (Efron 1979), the same ones for policy and control."""
    weak, strong = (math.fsum(grades) / len(pairs) for grades in zip(*((p.weak, p.strong) for p in pairs), strict=True))
    if strong <= weak:
        raise ConfigError(f"the strong model's mean grade ({strong:.3f}) isn't above the weak one's ({weak:.3f})")
    random = Random(seed)  # noqa: S311 - a bootstrap, no secret
    order = sorted(range(len(pairs)), key=lambda number: -scores[number])
    shuffled = list(order)
    random.shuffle(shuffled)
    curves, controls = [_curve(pairs, order)], [[step / STEPS for step in range(STEPS + 1)]]
    for _ in range(resamples):
        times = [0] * len(pairs)
        for number in random.choices(range(len(pairs)), k=len(pairs)):
            times[number] += 1
        random.shuffle(shuffled)
        resampled = _curve(pairs, order, times)
        if resampled:
            curves.append(resampled)
            controls.append(_curve(pairs, shuffled, times))
    gain = _estimate([_apgr(one) - _apgr(other) for one, other in zip(curves, controls, strict=True)])
    drawn = tuple(_estimate(each) for each in zip(*curves, strict=True))
    recommended, why_not = None, None
    if gain.low <= 0:
        why_not = "it doesn't beat a random control: the 95% interval of its gain in APGR reaches 0"
    else:
        step = next(step for step, each in enumerate(drawn) if each.low >= min(recover, 1.0) or step == STEPS)
        threshold = scores[order[max(0, math.ceil(step * len(order) / STEPS) - 1)]] if step < STEPS else 0.0
        recommended = Recommendation(threshold if step else 1.0, step / STEPS, drawn[step])
    return Report(
        pairs=len(pairs),
        left_out=left_out,
        weak=weak,
        strong=strong,
        apgr=_estimate([_apgr(each) for each in curves]),
        control_apgr=_estimate([_apgr(each) for each in controls]),
        gain=gain,
        cpt50=_estimate([_cpt(each, 0.5) for each in curves]),
        control_cpt50=_estimate([_cpt(each, 0.5) for each in controls]),
        curve=drawn,
        control=tuple(_estimate(each) for each in zip(*controls, strict=True)),
        recommended=recommended,
        why_not=why_not,
    )


def _curve(pairs: Sequence[Pair], order: Sequence[int], times: Sequence[int] | None = None) -> list[float]:
    """PGR when the first 0%, 1%, ... of `order` go to the strong model, each counted so many `times`. Empty where the
    strong one isn't better in this sample."""
    gains = [0.0]
    for number in order:
        pair = pairs[number]
        gain = pair.strong - pair.weak
        if times is None:
            gains.append(gains[-1] + gain)
        else:
            for _ in range(times[number]):
                gains.append(gains[-1] + gain)
    if gains[-1] <= 0:
        return []
    return [gains[round(step * (len(gains) - 1) / STEPS)] / gains[-1] for step in range(STEPS + 1)]


def _apgr(curve: Sequence[float]) -> float:
    """The area below, by trapezoids."""
    return (math.fsum(curve) - (curve[0] + curve[-1]) / 2) / STEPS


def _cpt(curve: Sequence[float], recovered: float) -> float:
    return next(step for step, each in enumerate(curve) if each >= recovered) / STEPS


def _estimate(values: Sequence[float]) -> Estimate:
    """The first is that of the sample itself, the others those of its resamples."""
    ordered = sorted(values[1:]) or [values[0]]
    last = len(ordered) - 1
    return Estimate(values[0], ordered[round(0.025 * last)], ordered[round(0.975 * last)])
