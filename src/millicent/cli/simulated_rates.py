"""The gateway's own rate limiter, on the simulator's clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from millicent.config import Config
    from millicent.control.config import Rates
    from millicent.control.limits import Ticket
    from millicent.economics.arrivals import Arrival
    from millicent.economics.simulator import Gate
    from millicent.ledger.queries import LedgerQueries


class RateGate:
    """`rates_of` says what each key may have. Amounts of money aren't counted: they aren't known before the end."""

    def __init__(self, rates_of: Callable[[str | None], Rates], start_ns: int) -> None:
        from millicent.control.limits import RateLimiter
        from millicent.core.clock import ManualClock

        self._clock = ManualClock(start_ns, start_ns)
        self._limiter = RateLimiter(self._clock, rates_of)
        self._tickets: dict[int, Ticket] = {}

    def enter(self, arrival: Arrival, at_ns: int) -> str | None:
        from millicent.core.errors import RateLimited

        self._come_to(at_ns)
        try:
            ticket = self._limiter.enter(arrival.key)
        except RateLimited as error:
            return error.code
        try:
            ticket.reserve(arrival.input_tokens + arrival.output_tokens, None)
        except RateLimited as error:
            ticket.withdraw()
            return error.code
        self._tickets[id(arrival)] = ticket
        return None

    def leave(self, arrival: Arrival, at_ns: int, serving_ns: int) -> None:
        del serving_ns
        self._come_to(at_ns)
        self._tickets.pop(id(arrival)).leave(arrival.input_tokens + arrival.output_tokens, None)

    def _come_to(self, at_ns: int) -> None:
        self._clock.advance(max(0, at_ns - self._clock.monotonic_ns()))


def rate_gate(settings: Config, ledger: LedgerQueries) -> Callable[[], Gate] | None:
    """One that limits keys as the gateway does; None where nothing is limited."""
    from millicent.control.config import Rates
    from millicent.control.keys import read_keys

    keys = {key.id: key.rates for key in ledger.ask(read_keys) or ()}
    limits = settings.limits
    every = [Rates().or_else(limits), *(rates.or_else(limits) for rates in keys.values())]
    if not any(rates.requests_per_minute or rates.tokens_per_minute or rates.concurrent for rates in every):
        return None
    return lambda: RateGate(lambda key: keys.get(key or "", Rates()).or_else(limits), 0)
