"""How well unusual figures are noticed, beside two simple ways, on labelled series; and false alarms in quiet traffic.

    PYTHONPATH=src python bench/anomalies.py DATA [--half test|tune|all] [--verbose] [--record]

DATA is a folder with NAB's `data/` and `combined_windows.json`. Series are split in two by their place in the sorted
list: what can be tuned was tuned on `tune` alone, and `test` is what is reported. An event that opens inside a labelled
window is right, the first one in each; one outside is wrong. Nothing counts within the first 15%, as NAB has it, and
nobody reports within two days. Delay is from the start of the window; NAB centres windows on the anomaly, so half of a
window is no delay at all. The simple ways are quiet for two hours after an event, as ours is.

Quiet traffic is made up: eight weeks of quarter-hours with busy days, slow nights and weekends, Poisson counts and
heavy-tailed lengths, of 5, 50 and 500 requests per busy quarter-hour, six times each. Every event there is wrong.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from results import environment, write

from millicent.watch.detector import DAY_S, HOUR_S, LEARNING_S, Detector
from millicent.watch.series import QUARTER_S, Batch, Series, SeriesState

Points = list[tuple[int, float]]
Way = Callable[[int, Points], Iterator[bool]]
_CALM_S = 2 * HOUR_S
FOLDERS = ("artificialNoAnomaly", "artificialWithAnomaly", "realAWSCloudwatch")
FIGURES = ("cost", "latency", "errors", "tokens")
WEEKS = 8
RUNS = 6


class Labelled(NamedTuple):
    step_s: int
    points: Points
    windows: list[tuple[int, int]]


class Judged(NamedTuple):
    windows: int
    found: int
    wrong: int
    delays_s: list[int]
    weeks: float


def ours(step_s: int, points: Points) -> Iterator[bool]:
    detector = Detector(step_s)
    for at_s, value in points:
        yield detector.observe(at_s, value).opened


def three_sigma(_: int, points: Points) -> Iterator[bool]:
    """Beyond three standard deviations of all before."""
    mean, squares, until = 0.0, 0.0, 0
    for count, (at_s, value) in enumerate(points, 1):
        sigma = math.sqrt(squares / (count - 1)) if count > 1 else 0.0
        unusual = at_s - points[0][0] >= LEARNING_S and abs(value - mean) > 3 * sigma
        yield unusual and at_s >= until
        until = at_s + _CALM_S if unusual else until
        step = value - mean
        mean += step / count
        squares += step * (value - mean)


def moving(step_s: int, points: Points) -> Iterator[bool]:
    """Beyond four moving deviations of a moving mean, both over six hours."""
    weight = step_s / (6 * HOUR_S)
    mean, variance, until = points[0][1], 0.0, 0
    for at_s, value in points:
        off = value - mean
        unusual = at_s - points[0][0] >= LEARNING_S and abs(off) > 4 * math.sqrt(variance)
        yield unusual and at_s >= until
        until = at_s + _CALM_S if unusual else until
        mean += weight * off
        variance = (1 - weight) * (variance + weight * off * off)


WAYS: dict[str, Way] = {"ours": ours, "three_sigma": three_sigma, "moving": moving}


def load(root: Path, half: str) -> dict[str, Labelled]:
    def seconds(text: str) -> int:
        return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())

    windows = json.loads((root / "combined_windows.json").read_text())
    found = {}
    for folder in FOLDERS:
        for number, path in enumerate(sorted((root / "data" / folder).glob("*.csv"))):
            if half != "all" and (number % 2 == 0) != (half == "tune"):
                continue
            with path.open() as file:
                points = [(seconds(row["timestamp"]), float(row["value"])) for row in csv.DictReader(file)]
            name = f"{folder}/{path.name}"
            step_s = statistics.median_low(later - at for (at, _), (later, _) in itertools.pairwise(points))
            found[name] = Labelled(step_s, points, [(seconds(start), seconds(end)) for start, end in windows[name]])
    return found


def judge(way: Way, series: Labelled) -> Judged:
    counted_from_s = series.points[int(len(series.points) * 0.15)][0]
    delays_s: dict[int, int] = {}
    wrong = 0
    for (at_s, _), opened in zip(series.points, way(series.step_s, series.points), strict=True):
        if not opened or at_s < counted_from_s:
            continue
        inside = [number for number, (start, end) in enumerate(series.windows) if start <= at_s <= end]
        wrong += not inside
        for number in inside:
            delays_s.setdefault(number, at_s - series.windows[number][0])
    weeks = (series.points[-1][0] - counted_from_s) / (7 * DAY_S)
    return Judged(len(series.windows), len(delays_s), wrong, list(delays_s.values()), weeks)


def summary(rows: list[Judged]) -> dict[str, float | None]:
    found, windows = sum(row.found for row in rows), sum(row.windows for row in rows)
    wrong = sum(row.wrong for row in rows)
    delays = [delay for row in rows for delay in row.delays_s]
    return {
        "windows": windows,
        "found": found,
        "wrong": wrong,
        "precision": round(found / (found + wrong), 3) if found + wrong else None,
        "recall": round(found / windows, 3) if windows else None,
        "median_delay_h": round(statistics.median(delays) / HOUR_S, 2) if delays else None,
        "wrong_per_week": round(wrong / sum(row.weeks for row in rows), 2),
    }


def quiet_quarters(seed: int, per_quarter: int) -> Iterator[tuple[int, Batch]]:
    """Traffic in which nothing happens but the day and the week."""
    rng = random.Random(seed)
    for at_s in range(0, WEEKS * 7 * DAY_S, QUARTER_S):
        hour, weekday = at_s % DAY_S / HOUR_S, at_s // DAY_S % 7
        day = 0.25 + 0.75 * max(0.0, math.sin((hour - 6) / 24 * 2 * math.pi) + 0.3)
        mean = per_quarter * day * (0.35 if weekday in {2, 3} else 1.0)
        count = max(0, round(rng.gauss(mean, math.sqrt(mean))))
        looked_at = min(count, 200)
        tokens = [rng.lognormvariate(6.5, 0.9) for _ in range(looked_at)]
        batch = Batch(
            requests=count,
            cost_nanousd=round(sum(tokens) * 3000 * count / max(1, looked_at)),
            looked_at=looked_at,
            failed=sum(rng.random() < 0.01 for _ in range(looked_at)),
            tokens=round(sum(tokens)),
            counted=looked_at,
            times_ns=[
                round(1e9 * rng.lognormvariate(0, 0.5) * (1 + 0.3 * mean / per_quarter)) for _ in range(looked_at)
            ],
        )
        yield at_s, batch


def quiet() -> dict[str, float]:
    """Wrong events per week and series."""
    found = {}
    for per_quarter in (5, 50, 500):
        wrong = dict.fromkeys(FIGURES, 0)
        for seed in range(RUNS):
            series = {figure: Series(figure, SeriesState(), Decimal(1)) for figure in FIGURES}  # type: ignore[arg-type] # of them
            for at_s, batch in quiet_quarters(seed, per_quarter):
                for figure, each in series.items():
                    before = each.since_s
                    each.observe(at_s, batch)
                    wrong[figure] += each.since_s is not None and before is None
        for figure, events in wrong.items():
            found[f"{figure}_{per_quarter}"] = round(events / (WEEKS * RUNS), 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--half", choices=["test", "tune", "all"], default="test")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    data = load(args.data, args.half)
    result: dict[str, object] = {"half": args.half, "series": len(data)}
    for label, way in WAYS.items():
        rows = {name: judge(way, series) for name, series in data.items()}
        result[label] = summary(list(rows.values()))
        without = [row for name, row in rows.items() if name.startswith("artificialNo")]
        result[f"{label}_on_series_without_anomaly"] = summary(without)["wrong_per_week"]
        print(label, result[label])
        if args.verbose and label == "ours":
            for name, row in rows.items():
                print(f"  {name:60} {row.found} of {row.windows}, {row.wrong} wrong")
    result["quiet_traffic_wrong_per_week"] = quiet()
    print("quiet traffic, wrong per week and series", result["quiet_traffic_wrong_per_week"])
    if args.record:
        write("anomalies", environment() | result)


if __name__ == "__main__":
    main()
