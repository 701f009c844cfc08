from __future__ import annotations

from millicent.core.quotes import Interval
from millicent.meter.durations import Times
from millicent.meter.quotes import Answered, Quoter


def test_what_a_cache_had_teaches_nothing_of_how_long_reading_takes() -> None:
    def taught(input_tokens: int, cached_tokens: int) -> object:
        quoter = Quoter(lambda *_: None)
        times = Times(5_000_000, 4_000_000, 6_000_000)
        for _ in range(8):
            quoter.learn(Answered("m", None, input_tokens, 10, False, 1, times, cached_tokens=cached_tokens))
        return quoter._durations.predict("m", None, 500, Interval(1, 10, 20), 1)

    assert taught(1000, 960) == taught(40, 0) != taught(1000, 0)
