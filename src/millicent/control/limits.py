"""Rate limits: token buckets of whole numbers, one set per key. They live in this process: several gateways give each
key its rates several times over, while budgets are held in the ledger and shared.
"""

from __future__ import annotations

from collections.abc import Callable

from millicent.control.config import Rates
from millicent.core.clock import NS_PER_S, Clock
from millicent.core.errors import RateLimited
from millicent.core.limits import Allowance
from millicent.core.money import Money

_MINUTE_NS = 60 * NS_PER_S


class _Bucket:
    """Holds up to `per_minute` units and fills at that rate. Units are counted in 60e9ths, so that a nanosecond adds a
    whole number of them."""

    def __init__(self, per_minute: int, now_ns: int) -> None:
        self.per_minute = per_minute
        self._full = per_minute * _MINUTE_NS
        self._level = self._full
        self._at_ns = now_ns

    def wait_ns(self, units: int, now_ns: int) -> int:
        """How long until `units` can be taken. More than a minute's worth needs a full bucket."""
        self._fill(now_ns)
        missing = min(units * _MINUTE_NS, self._full) - self._level
        return max(0, -(-missing // self.per_minute))

    def take(self, units: int) -> None:
        """Below zero where need be: what was used was used."""
        self._level = min(self._full, self._level - units * _MINUTE_NS)

    def allowance(self, now_ns: int) -> Allowance:
        self._fill(now_ns)
        return Allowance(
            self.per_minute, max(0, self._level // _MINUTE_NS), -(-(self._full - self._level) // self.per_minute)
        )

    def _fill(self, now_ns: int) -> None:
        self._level = min(self._full, self._level + (now_ns - self._at_ns) * self.per_minute)
        self._at_ns = now_ns


class _Meters:
    """One key's buckets; None where nothing limits. Tickets hold on to it, so it stays when the key's rates change."""

    def __init__(self, rates: Rates, now_ns: int) -> None:
        self.running = 0
        self.follow(rates, now_ns)

    def follow(self, rates: Rates, now_ns: int) -> None:
        """From now on, with full buckets."""

        def bucket(per_minute: int | None) -> _Bucket | None:
            return None if per_minute is None else _Bucket(per_minute, now_ns)

        usd = rates.usd_per_minute
        self.rates = rates
        self.requests = bucket(rates.requests_per_minute)
        self.tokens = bucket(rates.tokens_per_minute)
        self.nanousd = bucket(None if usd is None else max(1, Money.from_usd(usd).nanousd))


class RateLimiter:
    """`rates_of` says what a key may have; it is asked at every request, so that a change holds at once."""

    def __init__(self, clock: Clock, rates_of: Callable[[str | None], Rates]) -> None:
        self._clock = clock
        self._rates_of = rates_of
        self._meters: dict[str | None, _Meters] = {}

    def best_priority(self, key: str | None) -> int:
        return self._rates_of(key).priority or 0

    def enter(self, key: str | None) -> Ticket:
        """Count one more request that runs. Raises RateLimited with the seconds to wait."""
        meters = self._of(key)
        most = meters.rates.concurrent
        if most is not None and meters.running >= most:
            raise RateLimited(f"{meters.running} requests of this key are running, its limit: retry in a moment.",
                              code="concurrency_limit_exceeded", retry_after_s=1)  # fmt: skip
        now_ns = self._clock.monotonic_ns()
        _demand(meters.requests, 1, now_ns, "requests")
        if meters.requests is not None:
            meters.requests.take(1)
        meters.running += 1
        return Ticket(meters, self._clock)

    def allowances(self, key: str | None) -> dict[str, Allowance]:
        """By what is limited: `requests`, `tokens`. Empty where nothing is."""
        meters, now_ns = self._of(key), self._clock.monotonic_ns()
        named = {"requests": meters.requests, "tokens": meters.tokens}
        return {name: bucket.allowance(now_ns) for name, bucket in named.items() if bucket is not None}

    def _of(self, key: str | None) -> _Meters:
        rates = self._rates_of(key)
        meters = self._meters.get(key)
        if meters is None:
            meters = self._meters[key] = _Meters(rates, self._clock.monotonic_ns())
        elif meters.rates != rates:
            meters.follow(rates, self._clock.monotonic_ns())
        return meters


class Ticket:
    """One request's use of its key's rates, from `enter` to `leave`."""

    def __init__(self, meters: _Meters, clock: Clock) -> None:
        self._meters = meters
        self._clock = clock
        self._tokens = 0
        self._nanousd = 0

    def reserve(self, tokens: int, cost: Money | None) -> None:
        """Take what the request may use at most, once that is known, and more of it where more turns out to be needed:
        of both, what isn't taken yet. Raises RateLimited."""
        now_ns = self._clock.monotonic_ns()
        tokens = max(0, tokens - self._tokens)
        nanousd = max(0, (0 if cost is None else cost.nanousd) - self._nanousd)
        _demand(self._meters.tokens, tokens, now_ns, "tokens")
        _demand(self._meters.nanousd, nanousd, now_ns, "dollars")
        self._take(tokens, nanousd)

    def leave(self, tokens: int | None, cost: Money | None) -> None:
        """It has ended, and used this: the rest is given back. None: not known, so that the reservation stays."""
        self._meters.running -= 1
        self._take(0 if tokens is None else tokens - self._tokens, 0 if cost is None else cost.nanousd - self._nanousd)

    def withdraw(self) -> None:
        """It was refused after all, and doesn't count."""
        if self._meters.requests is not None:
            self._meters.requests.take(-1)
        self.leave(0, Money(0))

    def _take(self, tokens: int, nanousd: int) -> None:
        self._tokens += tokens
        self._nanousd += nanousd
        if self._meters.tokens is not None:
            self._meters.tokens.take(tokens)
        if self._meters.nanousd is not None:
            self._meters.nanousd.take(nanousd)


def _demand(bucket: _Bucket | None, units: int, now_ns: int, what: str) -> None:
    wait_ns = 0 if bucket is None else bucket.wait_ns(units, now_ns)
    if bucket is not None and wait_ns > 0:
        wait_s = -(-wait_ns // NS_PER_S)
        most, needed = (
            f"${Money(each)}" if what == "dollars" else f"{each} {what}" for each in (bucket.per_minute, units)
        )
        raise RateLimited(
            f"This key may use {most} a minute, and this request needs {needed}: retry in {wait_s} s.",
            retry_after_s=wait_s,
        )
