"""What a detector promises of any series."""

from __future__ import annotations

import math
from decimal import Decimal
from random import Random

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from millicent.watch.detector import DAY_S, Detector, State
from millicent.watch.series import Batch, Series, SeriesState

STEP_S = 900


def seasonal(at_s: int, random: Random) -> float:
    return 100 + 60 * math.sin(at_s / DAY_S * 2 * math.pi) + random.gauss(0, 4)


def events(values: list[float]) -> list[int]:
    """The steps at which one opens."""
    detector = Detector(STEP_S)
    return [step for step, value in enumerate(values) if detector.observe(step * STEP_S, value).opened]


def weeks(count: int) -> list[float]:
    random = Random(7)
    return [seasonal(step * STEP_S, random) for step in range(count * 7 * 96)]


def test_a_season_is_not_unusual() -> None:
    assert len(events(weeks(4))) <= 4


def test_a_figure_of_noon_at_night_is_unusual() -> None:
    values = weeks(2)
    noon, night = 10 * 96 + 24, 10 * 96 + 72
    assert values[noon] > 2 * values[night]
    values[night : night + 8] = values[noon : noon + 8]
    assert any(night <= step < night + 4 for step in events(values))


def test_one_outlier_does_not_hide_the_next_nor_become_usual() -> None:
    values = weeks(3)
    values[12 * 96] = 10_000.0
    values[18 * 96] = 10_000.0
    assert {12 * 96, 18 * 96} <= set(events(values))


def test_a_jump_that_comes_every_night_is_soon_taken_for_granted() -> None:
    values = [value + (400 if step % 96 == 8 else 0) for step, value in enumerate(weeks(3))]
    # Twenty of them came in those two weeks.
    assert len([step for step in events(values) if step > 7 * 96]) <= 2


def test_what_stays_changed_is_told_once_and_becomes_usual() -> None:
    values = [value + (80 if step > 10 * 96 else 0) for step, value in enumerate(weeks(4))]
    after = [step for step in events(values) if step > 10 * 96]
    assert after
    assert after[0] <= 10 * 96 + 4
    assert len(after) <= 4


def test_bursts_of_thrice_the_size_are_noticed_in_a_series_that_bursts() -> None:
    random = Random(3)
    values = [random.uniform(50, 100) if random.random() < 0.05 else random.random() for _ in range(20 * 96)]
    values[15 * 96 : 15 * 96 + 4] = [300.0] * 4
    found = events(values)
    assert any(15 * 96 <= step < 15 * 96 + 4 for step in found)
    assert len(found) <= 3


def test_a_lost_cache_is_noticed_in_three_requests_an_hour() -> None:
    random, series = Random(5), Series("cache", SeriesState(), Decimal(1))
    lost_s = 15 * DAY_S
    opened = []
    for at_s in range(0, 17 * DAY_S, STEP_S):
        cached = sum(random.uniform(0, 100 if at_s >= lost_s else 1000) for _ in range(3 * (at_s % 3600 == 0)))
        requests = 3 * (at_s % 3600 == 0)
        batch = Batch(requests=requests, looked_at=requests, input_tokens=1000 * requests, cached_tokens=round(cached))
        before = series.since_s
        series.observe(at_s, batch)
        opened += [at_s] if series.since_s is not None and before is None else []
    assert [at_s // DAY_S for at_s in opened] == [15]


def test_nothing_is_told_before_two_days() -> None:
    values = weeks(1)
    values[96:100] = [10_000.0] * 4
    assert [step for step in events(values) if step < 2 * 96] == []


def test_a_constant_that_changes_is_unusual_and_one_that_does_not_is_not() -> None:
    assert events([5.0] * 7 * 96) == []
    assert events([5.0] * 7 * 96 + [9.0] * 8)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=300))
def test_any_series_leaves_finite_numbers_of_bounded_size_and_goes_on_from_what_was_written(
    values: list[float],
) -> None:
    whole, parted = Detector(STEP_S), Detector(STEP_S)
    for step, value in enumerate(values):
        verdict = whole.observe(step * STEP_S, value)
        written = msgspec.msgpack.encode(parted.state)
        parted = Detector(STEP_S, msgspec.msgpack.decode(written, type=State))
        assert parted.observe(step * STEP_S, value) == verdict
        assert math.isfinite(verdict.expected)
        assert not math.isnan(verdict.score)
    assert len(msgspec.msgpack.encode(whole.state)) < 6000
