"""How well unusual figures are noticed, beside two simple ways: NAB's labelled series, and quiet traffic.

    PYTHONPATH=src python bench/anomalies.py DATA [--half test] [--record]

DATA is a folder with NAB's `data/` and `combined_windows.json`. Series are split in two by their place in the sorted
list: what can be tuned was tuned on `tune` alone, and `test` is what is reported. An event that opens inside a window
is right, once per window; one outside is wrong, and within the learning time (the first 15% for all three ways, as NAB
has it) nothing counts. Delay is from the start of the window, which NAB centres on the anomaly.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from results import environment, write

from millicent.watch.detector import DAY_S, LEARNING_S, Detector

Series = list[tuple[int, float]]
Way = Callable[[int, Series], Iterator[bool]]
_CALM_S = 2 * 3600
FOLDERS = ("artificialNoAnomaly", "artificialWithAnomaly", "realAWSCloudwatch")


def ours(step_s: int, series: Series) -> Iterator[bool]:
    detector = Detector(step_s)
    for at_s, value in series:
        yield detector.observe(at_s, value).opened


def three_sigma(step_s: int, series: Series) -> Iterator[bool]:
    """Beyond three standard deviations of all before."""
    count, mean, squares, until = 0, 0.0, 0.0, 0
    first = series[0][0]
    for at_s, value in series:
        sigma = math.sqrt(squares / count) if count else 0.0
        unusual = at_s - first >= LEARNING_S and abs(value - mean) > 3 * sigma
        yield unusual and at_s >= until
        until = at_s + _CALM_S if unusual else until
        count += 1
        step = value - mean
        mean += step / count
        squares += step * (value - mean)


def moving(step_s: int, series: Series) -> Iterator[bool]:
    """Beyond four moving deviations of a moving mean, both over six hours."""
    weight = step_s / (6 * 3600)
    mean, variance, until = series[0][1], 0.0, 0
    first = series[0][0]
    for at_s, value in series:
        off = value - mean
        unusual = at_s - first >= LEARNING_S and abs(off) > 4 * math.sqrt(variance)
        yield unusual and at_s >= until
        until = at_s + _CALM_S if unusual else until
        mean += weight * off
        variance = (1 - weight) * (variance + weight * off * off)


WAYS: dict[str, Way] = {"ours": ours, "three_sigma": three_sigma, "moving": moving}


def seconds(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


def load(root: Path, half: str) -> dict[str, tuple[int, Series, list[tuple[int, int]]]]:
    windows = json.loads((root / "combined_windows.json").read_text())
    found = {}
    for folder in FOLDERS:
        for number, path in enumerate(sorted((root / "data" / folder).glob("*.csv"))):
            if half != "all" and (number % 2 == 0) != (half == "tune"):
                continue
            with path.open() as file:
                series = [(seconds(row["timestamp"]), float(row["value"])) for row in csv.DictReader(file)]
            name = f"{folder}/{path.name}"
            steps = sorted(b - a for (a, _), (b, _) in zip(series, series[1:], strict=False))
            found[name] = (steps[len(steps) // 2], series, [(seconds(a), seconds(b)) for a, b in windows[name]])
    return found


def judge(name: str, way: Way, step_s: int, series: Series, windows: list[tuple[int, int]]) -> dict[str, float]:
    probation = series[int(len(series) * 0.15)][0]
    right: dict[int, int] = {}
    wrong = 0
    for (at_s, _), opened in zip(series, way(step_s, series), strict=True):
        if not opened or at_s < probation:
            continue
        inside = [n for n, (start, end) in enumerate(windows) if start <= at_s <= end]
        if not inside:
            wrong += 1
        for n in inside:
            right.setdefault(n, at_s - windows[n][0])
    return {
        "windows": len(windows),
        "found": len(right),
        "wrong": wrong,
        "delays_s": list(right.values()),
        "weeks": (series[-1][0] - probation) / (7 * DAY_S),
    }


def summary(rows: list[dict]) -> dict[str, float | None]:
    found, wrong = sum(r["found"] for r in rows), sum(r["wrong"] for r in rows)
    delays = [d for r in rows for d in r["delays_s"]]
    windows = sum(r["windows"] for r in rows)
    return {
        "windows": windows,
        "found": found,
        "wrong": wrong,
        "precision": round(found / (found + wrong), 3) if found + wrong else None,
        "recall": round(found / windows, 3) if windows else None,
        "median_delay_h": round(statistics.median(delays) / 3600, 2) if delays else None,
        "wrong_per_week": round(wrong / sum(r["weeks"] for r in rows), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--half", default="test")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    data = load(args.data, args.half)
    for label, way in WAYS.items():
        rows = {name: judge(name, way, *each) for name, each in data.items()}
        if args.verbose and label == "ours":
            for name, row in rows.items():
                print(f"{name:55} {row['found']}/{row['windows']} wrong {row['wrong']}")
        quiet = [r for n, r in rows.items() if n.startswith("artificialNo")]
        print(label, summary(list(rows.values())), "quiet/week", summary(quiet)["wrong_per_week"])


if __name__ == "__main__":
    main()
