"""When an engine that says nothing is taken for hung: it has work, and no step of it can take that long."""

from __future__ import annotations

from collections.abc import Iterable

from millicent.core.clock import NS_PER_S
from millicent.engine.protocol import Coefficients, EngineConfig

LOOK_S = 1.0
# A machine may be many times as busy as when its steps were measured, or be out of memory for a while.
_LEAST_S = 60.0
_TIMES_PREDICTED = 20
_UNMEASURED_S = 600.0


class Silence:
    """Counted in looks, one each LOOK_S, not by the clock: while this process stands still nobody is silent."""

    def __init__(self) -> None:
        self._heard = 0
        self._looks = 0

    def look(self, heard: int, *, works: bool) -> float:
        """For how many seconds an engine that works has said nothing; `heard` is how many frames came in all."""
        self._looks = self._looks + 1 if works and heard == self._heard else 0
        self._heard = heard
        return self._looks * LOOK_S


def longest_silence_s(config: EngineConfig, models: Iterable[tuple[Coefficients | None, int]]) -> float:
    """How long an engine with these models may say nothing. Each is what its steps cost, as far as that is known, and
    its context in tokens."""
    limit_s = _LEAST_S
    rows = max(config.step_tokens, config.max_sequences)
    for costs, context_tokens in models:
        if costs is None:
            limit_s = max(limit_s, _UNMEASURED_S)
        else:
            longest_ns = costs.longest_step_ns(rows, config.max_sequences, context_tokens)
            limit_s = max(limit_s, _TIMES_PREDICTED * longest_ns / NS_PER_S)
    return limit_s
