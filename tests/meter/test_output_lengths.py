"""How long answers will be: learned online, and calibrated."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from millicent.core.quotes import Interval
from millicent.core.usage import Provenance
from millicent.meter.durations import DurationModel, Times
from millicent.meter.lengths import OutputLengths, _Answers, _window
from millicent.step_time import Coefficients


def learned(pairs: list[tuple[int, int]], *, model: str = "m", feature: str | None = None) -> OutputLengths:
    lengths = OutputLengths()
    for read, written in pairs:
        lengths.learn(model, feature, read, written, None, cut=False)
    return lengths


def test_before_anything_was_seen_the_forecast_is_assumed_and_reaches_the_limit() -> None:
    forecast = OutputLengths().forecast("m", None, 10, 100)
    assert (forecast.tokens, forecast.provenance) == (Interval(1, 100, 100), Provenance.ASSUMED)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 5000), st.booleans()), max_size=60),
    st.integers(0, 5000),
    st.integers(1, 5000),
)
def test_the_interval_is_in_order_and_never_above_the_limit(
    answers: list[tuple[int, int, bool]], read: int, limit: int
) -> None:
    lengths = OutputLengths()
    for asked, written, cut in answers:
        lengths.learn("m", None, asked, written, None, cut=cut)
    tokens = lengths.forecast("m", None, read, limit).tokens
    assert 0 <= tokens.low <= tokens.expected <= tokens.high <= limit


def test_nine_in_ten_lie_inside_even_when_traffic_changes() -> None:
    draw = random.Random(7)
    lengths = OutputLengths()
    inside = 0
    for turn in range(6_000):
        read = draw.randint(10, 2_000)
        middle = 50 + read // 10 if turn < 3_000 else 600 - read // 5
        written = max(1, round(draw.gauss(middle, 40)))
        tokens = lengths.forecast("m", None, read, None).tokens
        inside += turn >= 500 and tokens.low <= written <= tokens.high
        lengths.learn("m", None, read, written, None, cut=False)
    assert inside / 5_500 >= 0.9


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300), st.booleans()), max_size=300),
    st.integers(0, 300),
    st.none() | st.integers(0, 300),
    st.integers(0, 40),
)
def test_no_answer_that_tells_something_is_nearer_than_those_that_are_taken(
    answers: list[tuple[int, int, bool]], read: int, limit: int | None, skip: int
) -> None:
    known = _Answers()
    for asked, written, cut in answers:
        known.add(asked, written, cut=cut)
    telling = [each for each in answers if not each[2] or (limit is not None and each[1] >= limit)]
    distances = sorted(abs(asked - read) for asked, _, _ in telling)[skip:120]
    taken = known.nearest(read, limit, skip=skip)
    assert sorted(abs(asked - read) for asked, _, _ in taken) == distances
    in_order = sorted(taken, key=lambda each: abs(each[0] - read)) if skip else sorted(taken)
    assert taken == in_order
    assert not (Counter(taken) - Counter(telling))
    if not skip:
        assert sorted(abs(asked - read) for asked, _, _ in _window(taken, read, 20)) == distances[:20]


def test_a_feature_is_told_from_the_rest_of_its_model() -> None:
    lengths = learned([(100, 500)] * 100)
    for _ in range(100):
        lengths.learn("m", "titles", 100, 8, None, cut=False)
    assert lengths.forecast("m", "titles", 100, None).tokens.expected == 8
    assert lengths.forecast("m", None, 100, None).tokens.expected == 500


def test_an_unseen_model_borrows_from_the_others() -> None:
    assert learned([(100, 40)] * 30).forecast("new", "other", 100, None).tokens.expected == 40


def test_answers_cut_by_a_small_limit_do_not_make_long_ones_look_short() -> None:
    lengths = learned([(100, 300)] * 40)
    for _ in range(200):
        lengths.learn("m", None, 100, 16, 16, cut=True)
    assert lengths.forecast("m", None, 100, None).tokens.expected == 300
    assert lengths.forecast("m", None, 100, 16).tokens.expected == 16


def test_memory_is_bounded() -> None:
    lengths = learned([(turn, 5) for turn in range(4_200)])
    for turn in range(600):
        lengths.learn(f"m{turn}", None, 1, 1, None, cut=False)
    assert len(lengths._seen) == 512
    assert max(len(answers._by_input) for answers in lengths._seen.values()) == 4096


FIT = Coefficients(fixed_ns=1e6, weights_ns=4e6, row_ns=1e5, sampled_row_ns=0.0, kv_token_ns=0.0, pair_ns=0.0)


def test_times_follow_the_step_time_model_and_the_batch() -> None:
    times = DurationModel()
    output = Interval(11, 11, 11)
    alone = times.predict("m", FIT, 512, output, 1)
    # The prompt: 1 + 512 x 0.1 = 52.2 ms; ten more steps of 1 + 4 ms.
    assert alone.ttft.expected == 52_200_000
    assert alone.total.expected == alone.serving.expected == 102_200_000
    crowd = times.predict("m", FIT, 512, output, 5)
    assert crowd.serving.expected < alone.serving.expected  # weights are read for all
    assert crowd.total.expected > alone.total.expected


def test_what_predictions_were_off_by_is_made_good() -> None:
    times = DurationModel()
    for _ in range(50):
        took = Times(serving_ns=204_400_000, ttft_ns=52_200_000, total_ns=102_200_000)
        times.learn("m", FIT, 512, 11, 1, took)
    predicted = times.predict("m", FIT, 512, Interval(11, 11, 11), 1)
    assert predicted.serving.expected == 204_400_000
    assert 204_200_000 < predicted.serving.low < predicted.serving.high < 204_600_000
    assert predicted.ttft.expected == 52_200_000


def test_without_a_fit_tokens_take_what_they_took_lately() -> None:
    times = DurationModel()
    for _ in range(50):
        times.learn("m", None, 100, 11, 1, Times(serving_ns=60_000_000, ttft_ns=20_000_000, total_ns=40_000_000))
    predicted = times.predict("m", None, 200, Interval(21, 21, 21), 1)
    assert predicted.provenance is Provenance.ESTIMATED
    assert 36_000_000 < predicted.ttft.expected < 44_000_000
    assert 110_000_000 < predicted.serving.expected < 130_000_000
