"""How well unusual figures are noticed, beside two simple ways, on labelled series; and false alarms in quiet traffic.

    PYTHONPATH=src python bench/anomalies.py DATA [--half test|tune|all] [--verbose] [--record]

DATA is a folder with NAB's `data/` and `combined_windows.json`. Series are split in two by their place in the sorted
list: what can be tuned was tuned on `tune` alone, and `test` is what is reported. An event that opens inside a labelled
window is right, the first one in each; one outside is wrong. Nothing counts within the first 15%, as NAB has it, and
nobody reports within two days. Delay is from the start of the window; NAB centres windows on the anomaly, so half of a
window is no delay at all. The simple ways are quiet for two hours after an event, as ours is.

Quiet traffic is made up: eight weeks of quarter-hours with busy days, slow nights and weekends, Poisson counts and
heavy-tailed lengths, of 1, 5, 50 and 500 requests per busy quarter-hour, six times each. Every event there is
wrong.

Incidents are what befalls such traffic at noon of the 16th day, each by itself: found where an event of its figure
opens within two days of it.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from results import environment, write

from millicent.watch.config import Figure
from millicent.watch.detector import DAY_S, HOUR_S, LEARNING_S, Detector
from millicent.watch.series import QUARTER_S, Batch, Series, SeriesState

Points = list[tuple[int, float]]
Way = Callable[[int, Points], Iterator[bool]]
_CALM_S = 2 * HOUR_S
FOLDERS = ("artificialNoAnomaly", "artificialWithAnomaly", "realAWSCloudwatch")
WEEKS = 8
RUNS = 6
PER_QUARTER = (1, 5, 50, 500)
INCIDENT_S = 15 * DAY_S + 12 * HOUR_S


class Traffic(NamedTuple):
    """What a request is like, beside the usual one."""

    cost: float = 1.0
    tokens: float = 1.0
    took: float = 1.0
    failing: float = 0.01
    cached: float = 0.6
    share: float = 0.5


USUAL = Traffic()
# Figure, and what traffic is like so many days after it began.
INCIDENTS: dict[str, tuple[Figure, Callable[[float], Traffic]]] = {
    "cost doubles": ("cost", lambda _: Traffic(cost=2)),
    "latency doubles": ("latency", lambda _: Traffic(took=2)),
    "prompts double": ("tokens", lambda _: Traffic(tokens=2)),
    "prompts grow 20% a day": ("tokens", lambda days: Traffic(tokens=1.2**days)),
    "a quarter fails for 3 hours": ("errors", lambda days: Traffic(failing=0.25) if days < 1 / 8 else USUAL),
    "the cache is lost": ("cache", lambda _: Traffic(cached=0.05)),
    "half of the model's share goes to another": ("mix", lambda _: Traffic(share=0.25)),
}
FIGURES = tuple(dict.fromkeys(figure for figure, _ in INCIDENTS.values()))


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


def quarters(
    seed: int, per_quarter: int, days: int, traffic: Callable[[int], Traffic] = lambda _: USUAL
) -> Iterator[tuple[int, Batch]]:
    """Traffic with its day and its week, of which one model has a share."""
    rng = random.Random(seed)
    for at_s in range(0, days * DAY_S, QUARTER_S):
        like = traffic(at_s)
        hour, weekday = at_s % DAY_S / HOUR_S, at_s // DAY_S % 7
        day = 0.25 + 0.75 * max(0.0, math.sin((hour - 6) / 24 * 2 * math.pi) + 0.3)
        busy = day * (0.35 if weekday in {2, 3} else 1.0)
        count, others = (poisson(rng, per_quarter * busy * share * 2) for share in (like.share, 1 - like.share))
        looked_at = min(count, 200)
        tokens = [like.tokens * rng.lognormvariate(6.5, 0.9) for _ in range(looked_at)]
        read = round(sum(tokens) * 0.8)
        batch = Batch(
            requests=count,
            cost_nanousd=round(sum(tokens) * 3000 * like.cost * count / max(1, looked_at)),
            share_of=count + others,
            looked_at=looked_at,
            failed=sum(rng.random() < like.failing for _ in range(looked_at)),
            tokens=round(sum(tokens)),
            counted=looked_at,
            input_tokens=read,
            cached_tokens=round(sum(each * 0.8 * min(1.0, like.cached * rng.uniform(0.5, 1.5)) for each in tokens)),
            times_ns=[round(1e9 * like.took * rng.lognormvariate(0, 0.5) * (1 + 0.3 * busy)) for _ in range(looked_at)],
        )
        yield at_s, batch


def poisson(rng: random.Random, mean: float) -> int:
    if mean > 50:
        return max(0, round(rng.gauss(mean, math.sqrt(mean))))
    left, count = math.exp(-mean), 0
    product = rng.random()
    while product > left:
        product *= rng.random()
        count += 1
    return count


def opened(figures: Iterable[Figure], traffic: Iterator[tuple[int, Batch]]) -> dict[Figure, list[int]]:
    """When events of each figure opened."""
    series = {figure: Series(figure, SeriesState(), Decimal(1)) for figure in figures}
    found: dict[Figure, list[int]] = {figure: [] for figure in series}
    for at_s, batch in traffic:
        for figure, each in series.items():
            before = each.since_s
            each.observe(at_s, batch)
            if each.since_s is not None and before is None:
                found[figure].append(at_s)
    return found


def quiet() -> dict[str, float]:
    """Wrong events per week and series."""
    wrong: Counter[str] = Counter()
    for per_quarter, seed in itertools.product(PER_QUARTER, range(RUNS)):
        for figure, events in opened(FIGURES, quarters(seed, per_quarter, WEEKS * 7)).items():
            wrong[f"{figure}_{per_quarter}"] += len(events)
    return {name: round(events / (WEEKS * RUNS), 2) for name, events in wrong.items()}


def incidents() -> dict[str, tuple[int, float | None]]:
    """Of `RUNS` incidents, how many were found, and the median delay in hours."""
    found = {}
    for (name, (figure, after)), per_quarter in itertools.product(INCIDENTS.items(), PER_QUARTER):

        def traffic(at_s: int, after: Callable[[float], Traffic] = after) -> Traffic:
            return USUAL if at_s < INCIDENT_S else after((at_s - INCIDENT_S) / DAY_S)

        delays_s = []
        for seed in range(RUNS):
            events = opened([figure], quarters(seed, per_quarter, 18, traffic))[figure]
            first = next((at_s for at_s in events if INCIDENT_S <= at_s < INCIDENT_S + 2 * DAY_S), None)
            delays_s += [] if first is None else [first + QUARTER_S - INCIDENT_S]
        delay_h = round(statistics.median(delays_s) / HOUR_S, 2) if delays_s else None
        found[f"{name}, {per_quarter} per quarter-hour"] = (len(delays_s), delay_h)
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
    result["incidents_found_and_delay_h"] = incidents()
    for name, (count, delay_h) in result["incidents_found_and_delay_h"].items():  # type: ignore[attr-defined]
        print(f"  {name:60} {count} of {RUNS}, after {delay_h} h")
    if args.record:
        write("anomalies", environment() | result)


if __name__ == "__main__":
    main()
