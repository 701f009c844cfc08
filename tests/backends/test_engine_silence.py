"""When an engine that says nothing is taken for hung."""

from __future__ import annotations

from millicent.backends.engine_silence import Silence, longest_silence_s
from millicent.engine.config import EngineConfig
from millicent.step_time import Coefficients

QUICK = Coefficients(1e6, 1e6, 1e4, 1e3, 10.0, 1.0)


def test_silence_counts_only_while_there_is_work_and_nothing_comes() -> None:
    silence = Silence()
    assert [silence.look(0, works=False) for _ in range(3)] == [0, 0, 0]
    assert [silence.look(0, works=True) for _ in range(3)] == [1, 2, 3]
    assert silence.look(1, works=True) == 0
    assert [silence.look(1, works=True) for _ in range(2)] == [1, 2]
    assert silence.look(1, works=False) == 0


def test_the_longest_silence_is_many_times_the_longest_step_and_never_short() -> None:
    config = EngineConfig(step_tokens=1000, max_sequences=10)
    assert longest_silence_s(config, []) == 60
    assert longest_silence_s(config, [(QUICK, 1000)]) == 60
    # 1 ms fixed, 1,000 rows of 0.1 s and as many sampled of 1 µs; 10 contexts and 1,000 rows of 100 tokens each.
    slow = Coefficients(1e6, 0.0, 1e8, 1e3, 10.0, 1.0)
    longest_s = (1e6 + 1000 * 1e8 + 1000 * 1e3 + 10 * 100 * 10 + 1000 * 100) / 1e9
    assert longest_silence_s(config, [(QUICK, 100), (slow, 100)]) == 20 * longest_s
    assert longest_silence_s(config, [(QUICK, 1000), (None, 1000)]) == 600
