"""Is a difficulty score worth routing by? RouteLLM's MMLU pairs: Mixtral-8x7B beside GPT-4, graded right or wrong.

    python bench/routing.py FOLDER

FOLDER holds `mmlu/*.csv` and `contaminated_prompts.jsonl` (github.com/lm-sys/RouteLLM). Two cross-validations: random
folds, where each subject is known from its other questions, and whole subjects left out, which is what prompts of a new
kind would be. About three minutes; a line in results/routing.jsonl.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import results

from millicent.routing.difficulty import Pair, features_of, fit, train
from millicent.routing.evaluation import Report, evaluate, held_out_scores
from millicent.routing.pairs import read_contaminated, read_pairs, without

FOLDS = 5
RESAMPLES = 300
SCORED = 2000


def by_subject(subjects: dict[str, list[Pair]]) -> tuple[list[Pair], list[float]]:
    """Scores by what was learned without the whole subject."""
    names = sorted(subjects)
    Random(0).shuffle(names)
    rows = {name: [features_of(pair.prompt) for pair in subjects[name]] for name in names}
    pairs: list[Pair] = []
    scores: list[float] = []
    for fold in range(FOLDS):
        seen = [name for number, name in enumerate(names) if number % FOLDS != fold]
        scorer = fit(
            [row for name in seen for row in rows[name]],
            [pair.strong > pair.weak for name in seen for pair in subjects[name]],
        )
        for name in names[fold::FOLDS]:
            pairs += subjects[name]
            scores += [scorer.score(pair.prompt) for pair in subjects[name]]
    return pairs, scores


def told(report: Report) -> dict[str, Any]:
    names = ("apgr", "control_apgr", "gain", "cpt50", "control_cpt50", "recommended", "why_not")
    return {name: msgspec.to_builtins(getattr(report, name)) for name in names}


def main(folder: Path) -> None:
    contaminated = read_contaminated(folder / "contaminated_prompts.jsonl")
    read = {path.stem: read_pairs([path]) for path in sorted((folder / "mmlu").glob("*.csv"))}
    subjects = {name: without(pairs, contaminated) for name, pairs in read.items()}
    pairs = [pair for each in subjects.values() for pair in each]
    began = time.perf_counter()
    scorer = train(pairs)
    train_s = time.perf_counter() - began
    taken_ms = []
    for pair in pairs[:SCORED]:
        began = time.thread_time()  # of the processor: others share the machine
        scorer.score(pair.prompt)
        taken_ms.append(1000 * (time.thread_time() - began))
    taken_ms.sort()
    within = evaluate(pairs, held_out_scores(pairs, FOLDS, 0), resamples=RESAMPLES)
    across = evaluate(*by_subject(subjects), resamples=RESAMPLES)
    row = results.environment() | {
        "pairs": len(pairs),
        "left_out": sum(map(len, read.values())) - len(pairs),
        "weak": round(within.weak, 4),
        "strong": round(within.strong, 4),
        "train_s": round(train_s, 2),
        "score_ms": {"p50": round(taken_ms[SCORED // 2], 4), "p99": round(taken_ms[SCORED * 99 // 100], 4)},
        "random_folds": told(within),
        "subjects_left_out": told(across),
    }
    results.write("routing", row)
    for name in ("random_folds", "subjects_left_out"):
        print(name, row[name])
    print({name: row[name] for name in ("pairs", "left_out", "train_s", "score_ms")})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python bench/routing.py FOLDER")
    main(Path(sys.argv[1]))
