"""A circuit breaker: what fails again and again is left alone for a while, then tried with one call.

    closed --failures in a row, or their share of the latest calls--> open --cooldown--> half open
    half open --the probe succeeds--> closed;  --it fails--> open, for twice as long

Only what the other side does counts: a caller's own mistake, or its leaving, is no failure.
"""

from __future__ import annotations

from collections import deque
from enum import StrEnum

from millicent.core.clock import NS_PER_S, Clock
from millicent.core.errors import EngineCrashed, MillicentError, RateLimited
from millicent.pipeline.config import BreakerConfig

_LONGEST_COOLDOWN = 16  # times the first


class State(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Verdict(StrEnum):
    """What a call says of who was called."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    NEITHER = "neither"


def verdict_of(error: MillicentError | None) -> Verdict:
    """`error` None: it answered. An error of the 400s is the caller's own, but for a limit of the other side's. An
    engine of ours that ended is started again by who watches it, and says itself when it is back."""
    if error is None:
        return Verdict.SUCCEEDED
    if isinstance(error, EngineCrashed):
        return Verdict.NEITHER
    return Verdict.FAILED if error.status >= 500 or isinstance(error, RateLimited) else Verdict.NEITHER


class Breaker:
    """Call `enter` before a call, and `leave` with its ticket and verdict after it, exactly once."""

    def __init__(self, config: BreakerConfig, clock: Clock) -> None:
        self._config = config
        self._clock = clock
        self._open_until_ns: int | None = None  # None: closed
        self._probing = False
        self._openings = 0  # in a row, without a success
        self._epoch = 0  # calls that began before it last opened or closed say nothing any more
        self._failures = 0
        self._latest: deque[tuple[int, bool]] = deque(maxlen=config.window_calls)

    @property
    def state(self) -> State:
        if self._open_until_ns is None:
            return State.CLOSED
        return State.HALF_OPEN if self._clock.monotonic_ns() >= self._open_until_ns else State.OPEN

    def wait_ns(self) -> int | None:
        """How long until a call may be made; 0 is now. None while a probe runs: nobody knows."""
        if self._open_until_ns is None:
            return 0
        wait_ns = max(0, self._open_until_ns - self._clock.monotonic_ns())
        return None if self._probing and wait_ns == 0 else wait_ns

    def enter(self) -> int | None:
        """A ticket for one call; None where none may be made now."""
        if self.wait_ns() != 0:
            return None
        self._probing = self._open_until_ns is not None
        return self._epoch

    def leave(self, ticket: int, verdict: Verdict, *, retry_after_s: int | None = None) -> None:
        """The call has ended. `retry_after_s` is how long the other side asks to be left alone."""
        if ticket != self._epoch:
            return
        probed, self._probing = self._probing, False
        if verdict is Verdict.NEITHER:
            return
        now_ns = self._clock.monotonic_ns()
        if verdict is Verdict.SUCCEEDED:
            if probed:
                self._turn(None)
            self._failures = self._openings = 0
            self._latest.append((now_ns, False))
            return
        self._failures += 1
        self._latest.append((now_ns, True))
        if probed or self._fails_too_often(now_ns):
            cooldown_s = self._config.cooldown_s * min(2**self._openings, _LONGEST_COOLDOWN)
            self._openings += 1
            self._turn(now_ns + max(int(cooldown_s * NS_PER_S), (retry_after_s or 0) * NS_PER_S))

    def _turn(self, open_until_ns: int | None) -> None:
        self._open_until_ns = open_until_ns
        self._epoch += 1
        self._failures = 0
        self._latest.clear()

    def _fails_too_often(self, now_ns: int) -> bool:
        config = self._config
        if self._failures >= config.failures:
            return True
        since_ns = now_ns - int(config.window_s * NS_PER_S)
        while self._latest and self._latest[0][0] < since_ns:
            self._latest.popleft()
        failed = sum(failed for _, failed in self._latest)
        return len(self._latest) == config.window_calls and failed * 100 >= config.failed_percent * len(self._latest)
