"""What would make it cheaper: each lever with what it would have saved of the traffic that really came.

A lever is replayed request by request: what its answer cost, less what it would have cost. Where answers are paid by
the token that is money; on machines that are paid already it is device time, and so capacity freed. The interval is
that of a block bootstrap: days (or, of a shorter time, twenty stretches) are drawn with replacement a thousand times.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from random import Random

import msgspec

from millicent.caching.config import CacheConfig
from millicent.core.clock import NS_PER_HOUR
from millicent.core.fits import StepTimeFit
from millicent.core.holdouts import Held
from millicent.core.money import Money
from millicent.core.periods import DAY_NS
from millicent.economics.arrivals import span_of
from millicent.economics.basis import Basis
from millicent.economics.outcomes import latency_of
from millicent.economics.recorded import Recorded
from millicent.economics.simulator import Course, Machine
from millicent.economics.traffic import HOURS_PER_MONTH
from millicent.meter.prices import PriceBook

NOT_EVALUATED = "not evaluated: run `millicent eval`"
SAME_ANSWERS = "the same answers"
_LEAST_DAYS = 5
_STRETCHES = 20
_DRAWS = 1000


class Estimate(msgspec.Struct, frozen=True):
    """With the ends of its 95% interval, where there is one. Negative: it would have cost more."""

    expected: Money
    low: Money | None = None
    high: Money | None = None


class Effect(msgspec.Struct, frozen=True):
    """Time until the whole answer, in nanoseconds, both simulated."""

    mean_before_ns: int
    mean_after_ns: int
    p95_before_ns: int
    p95_after_ns: int


class Lever(msgspec.Struct, frozen=True, kw_only=True):
    """One that could be switched on, or is: `on`. It would have touched `requests` of the `of` that were replayed.

    `saved` is money, of what is paid by the token; `freed` is device time at its rate, `freed_ns` of it, on machines
    that are paid already. None of both: nobody can say, and `needs` says what is missing. `share` is the part of what
    all that was replayed came to. `configuration` are the lines that switch it on; `how` is what was replayed.
    """

    name: str
    title: str
    how: str
    quality: str
    configuration: str
    requests: int = 0
    of: int = 0
    on: bool = False
    saved: Estimate | None = None
    freed: Estimate | None = None
    freed_ns: int | None = None
    share: float | None = None
    latency: Effect | None = None
    needs: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def worth(self) -> int:
        """Nano-dollars, to rank by."""
        return sum(each.expected.nanousd for each in (self.saved, self.freed) if each is not None)


class Realised(msgspec.Struct, frozen=True):
    """What a lever that is on has saved, by the receipts (estimated, against list price)."""

    name: str
    requests: int
    saved: Money


class Measured(msgspec.Struct, frozen=True):
    """What a lever has saved of `with_lever` requests, against `without` that were held out from it at random: None
    where those are too few. `reckoned` is what the receipts of the former say. The `unpriced` are in neither."""

    lever: Held
    with_lever: int
    without: int
    unpriced: int
    saved: Estimate | None
    reckoned: Money


class Ground(msgspec.Struct, frozen=True, kw_only=True):
    """What levers are replayed on. `basis` is the own engine's newest traffic, None where nothing ran on one;
    `before` is that traffic simulated as it is now. `elsewhere` was paid by the token. `fits` are all that receipts
    name, `compared` models at providers. `bill` is what a month of it costs with whole machines, and `places` what it
    would elsewhere."""

    everything: tuple[Recorded, ...]
    basis: Basis | None
    before: Course | None
    elsewhere: tuple[Recorded, ...]
    fits: tuple[StepTimeFit, ...]
    cache: CacheConfig
    prices: PriceBook
    policies: tuple[str, ...]
    compared: tuple[str, ...]
    bill: Money | None
    places: Mapping[str, Money]
    now_ns: int

    @property
    def replayed(self) -> tuple[Recorded, ...]:
        """What the figures are about, oldest first."""
        own = self.basis.recorded if self.basis is not None else ()
        return tuple(sorted((*own, *self.elsewhere), key=lambda each: each.arrival.at_ns))

    @property
    def device_ns(self) -> int:
        """What the own engine's traffic takes as it is now, simulated."""
        return 0 if self.before is None else sum(round(fate.serving_ns) for fate in self.before.fates)

    @property
    def cost(self) -> Money:
        """What it came to: device time at its rate, and what was paid by the token."""
        return self.time(self.device_ns) + Money.total(each.cost for each in self.elsewhere if each.cost is not None)

    def time(self, ns: int) -> Money:
        """Device time as money; nothing where it has no rate."""
        rate = None if self.basis is None else self.basis.rates.receipt
        return Money(0) if rate is None else Money.of_time(ns, rate)

    def run(self, machine: Machine, recorded: Sequence[Recorded] | None = None) -> Course:
        """The own engine's traffic, or a part of it, on a machine."""
        assert self.basis is not None
        arrivals = self.basis.arrivals if recorded is None else [each.arrival for each in recorded]
        return self.basis.run(arrivals, machine)[0]

    # What a lever comes to.

    def on_machine(self, lever: Lever, machine: Machine, recorded: Sequence[Recorded] | None = None) -> Lever:
        """With the own engine's traffic, or what `recorded` makes of it, on another machine."""
        assert self.before is not None
        return self.compared_with(lever, self.before, self.run(machine, recorded))

    def compared_with(self, lever: Lever, before: Course, after: Course) -> Lever:
        """With what differs between two courses of the own engine's traffic."""
        freed_ns = [
            round(was.serving_ns) - round(then.serving_ns) for was, then in zip(before.fates, after.fates, strict=True)
        ]
        totals = [[fate.total_ns for fate in course.fates] for course in (before, after)]
        return self.freeing(lever, freed_ns, effect(*totals))

    def freeing(self, lever: Lever, freed_ns: Sequence[int], latency: Effect | None) -> Lever:
        """With so much less device time for each of the own engine's requests."""
        assert self.basis is not None
        moments = [each.arrival.at_ns for each in self.basis.recorded]
        found = estimate(moments, [self.time(ns).nanousd for ns in freed_ns])
        found = msgspec.structs.replace(found, expected=self.time(sum(freed_ns)))
        priced = self.basis.rates.receipt is not None
        lever = msgspec.structs.replace(
            lever,
            freed=found if priced else None,
            freed_ns=sum(freed_ns),
            latency=latency,
            requests=lever.requests or len(freed_ns),
            of=lever.of or len(freed_ns),
        )
        return self.shared(lever)

    def saving(self, lever: Lever, recorded: Sequence[Recorded], nanousd: Sequence[int]) -> Lever:
        """With so much less paid for each of these."""
        saved = estimate([each.arrival.at_ns for each in recorded], nanousd)
        return self.shared(msgspec.structs.replace(lever, saved=saved))

    def shared(self, lever: Lever) -> Lever:
        cost = self.cost.nanousd
        return msgspec.structs.replace(lever, share=lever.worth / cost if cost else None)


class Cheaper(msgspec.Struct, frozen=True, kw_only=True):
    """All levers, the one that is worth most first; then those of which nobody can say. `requests` of the ledger's `of`
    were replayed, which came to `cost` in `span_ns`."""

    requests: int
    of: int
    span_ns: int
    cost: Money
    device_ns: int
    levers: tuple[Lever, ...]
    realised: tuple[Realised, ...]
    measured: tuple[Measured, ...]

    def monthly(self, amount: Money) -> Money:
        """What it would be in a month at this pace; what came within an hour is an hour's."""
        return Money(round(Fraction(amount.nanousd * HOURS_PER_MONTH * NS_PER_HOUR, max(NS_PER_HOUR, self.span_ns))))


def ground_of(
    recorded: Sequence[Recorded],
    basis: Basis | None,
    most: int,
    *,
    fits: Sequence[StepTimeFit] = (),
    cache: CacheConfig,
    prices: PriceBook,
    policies: Sequence[str] = (),
    compared: Sequence[str] = (),
    bill: Money | None = None,
    places: Mapping[str, Money] | None = None,
    now_ns: int,
) -> Ground:
    """The newest `most` of the own engine's answers, and the newest of those that were paid by the token."""
    elsewhere = [each for each in recorded if each.receipt.prices.snapshot.get("kind") == "api"][-most:]
    if basis is not None:
        own = basis.recorded[-most:]
        basis = msgspec.structs.replace(basis, recorded=own, arrivals=tuple(each.arrival for each in own))
    return Ground(
        everything=tuple(recorded),
        basis=basis,
        before=None if basis is None else basis.run(basis.arrivals)[0],
        elsewhere=tuple(elsewhere),
        fits=tuple(fits),
        cache=cache,
        prices=prices,
        policies=tuple(policies),
        compared=tuple(compared),
        bill=bill,
        places=places or {},
        now_ns=now_ns,
    )


Replayed = Callable[[Ground], Sequence[Lever]]


def cheaper(
    ground: Ground,
    levers: Sequence[Replayed],
    progress: Callable[[str], object] = str,
    *,
    measured: Sequence[Measured] = (),
) -> Cheaper:
    found: list[Lever] = []
    for lever in levers:
        progress(f"Replaying: {lever.__name__.replace('_', ' ')}")
        found += lever(ground)
    replayed = ground.replayed
    return Cheaper(
        requests=len(replayed),
        of=len(ground.everything),
        span_ns=span_of([each.arrival for each in replayed]) if replayed else 0,
        cost=ground.cost,
        device_ns=ground.device_ns,
        levers=tuple(sorted(found, key=lambda each: (each.needs is not None, -each.worth))),
        realised=tuple(_realised(ground.everything)),
        measured=tuple(measured),
    )


def estimate(moments_ns: Sequence[int], nanousd: Sequence[int]) -> Estimate:
    """The sum of what requests would have saved, each at its moment, oldest first; and how far chance may have moved
    it."""
    blocks = _blocks(moments_ns, nanousd)
    draw = Random(0)  # noqa: S311 - a sample, no secret
    sums = sorted(sum(draw.choices(blocks, k=len(blocks))) for _ in range(_DRAWS)) if blocks else [0]
    cut = len(sums) * 25 // 1000
    return Estimate(Money(sum(nanousd)), Money(sums[cut]), Money(sums[-1 - cut]))


def effect(before: Iterable[float | None], after: Iterable[float | None]) -> Effect | None:
    was, then = latency_of(before), latency_of(after)
    return None if was is None or then is None else Effect(was.mean, then.mean, was.p95, then.p95)


def price_of(each: Recorded, what: str) -> Decimal | None:
    """Dollars per million, as the receipt was priced, less the contract's discount."""
    snapshot = each.receipt.prices.snapshot
    found = snapshot.get(what)
    return None if found is None else Decimal(found) * (1 - Decimal(snapshot.get("discount", "0")))


def _blocks(moments_ns: Sequence[int], nanousd: Sequence[int]) -> list[int]:
    """By UTC day where there are some, else by stretches of equally many requests."""
    days: dict[int, int] = defaultdict(int)
    for at_ns, amount in zip(moments_ns, nanousd, strict=True):
        days[at_ns // DAY_NS] += amount
    if len(days) >= _LEAST_DAYS:
        return list(days.values())
    size = max(1, -(-len(nanousd) // _STRETCHES))
    return [sum(nanousd[start : start + size]) for start in range(0, len(nanousd), size)]


def _realised(everything: Sequence[Recorded]) -> list[Realised]:
    saved: dict[str, list[Money]] = defaultdict(list)
    for each in everything:
        for lever, amount in each.receipt.saved.items():
            saved[lever].append(amount)
    found = [Realised(lever, len(amounts), Money.total(amounts)) for lever, amounts in saved.items()]
    return sorted(found, key=lambda each: -each.saved.nanousd)
