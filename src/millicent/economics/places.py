"""Where to run it: API, rented, owned, provisioned and edge, side by side for this ledger's traffic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction

import msgspec

from millicent.core.clock import NS_PER_HOUR, NS_PER_MS
from millicent.core.fits import StepTimeFit
from millicent.core.money import NANOUSD_PER_USD, Money
from millicent.core.usage import Provenance, weakest
from millicent.economics.api_cost import ApiCost, api_cost, tokens_of
from millicent.economics.capacity import Capacity, Slots, back_to_back, best, measured, modelled, stated
from millicent.economics.curves import Curve
from millicent.economics.machines import MachineConfig
from millicent.economics.traffic import HOURS_PER_MONTH, Ran, Traffic
from millicent.meter.placements import Kind, Placement
from millicent.meter.prices import PriceBook, Service


class ApiModel(msgspec.Struct, frozen=True):
    """A provider's model. Where it is deployed here, `placement` and the name it is `asked` for by."""

    model: str
    provider: str | None = None
    service: Service = "standard"
    discount: Decimal = Decimal(0)
    placement: str | None = None
    asked: str | None = None


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What is wanted: total latency that 95 in 100 must meet, spare machines, and another volume than the ledger's."""

    latency_target_ms: int | None = None
    spares: int = 0
    volume: int | None = None


class Candidates(msgspec.Struct, frozen=True):
    """Who is compared: placements of machines by name, providers' models, and machines that could be had. `busy` is the
    part of their time in which placements have worked."""

    placements: Mapping[str, Placement]
    apis: tuple[ApiModel, ...]
    machines: Mapping[str, MachineConfig]
    slots: Slots
    busy: Mapping[str, Fraction] = {}


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """One candidate at this volume. None is unknown, and `notes` say what would make it known.

    `uncached` is the month's cost were nothing read from a cache; `utilization` the part of its machines' capacity
    that this traffic uses on average, and `unused` what the rest costs; `when_needed` is the month's cost of machines
    that are rented by the hour and given back in between, starting up left out; `busy` the part of its time in which a
    placement has really worked, by the accounts. `provenance` is the cost's.
    """

    name: str
    kind: Kind
    model: str | None
    monthly: Money | None = None
    per_request: Money | None = None
    per_million_tokens: Money | None = None
    uncached: Money | None = None
    machines: int | None = None
    unused: Money | None = None
    when_needed: Money | None = None
    usd_per_hour: Decimal | None = None
    capacity: Capacity | None = None
    utilization: Fraction | None = None
    busy: Fraction | None = None
    p50_ns: int | None = None
    p95_ns: int | None = None
    latency_provenance: Provenance = Provenance.UNKNOWN
    in_time: bool | None = None
    provenance: Provenance = Provenance.UNKNOWN
    source: str = ""
    notes: tuple[str, ...] = ()
    curve: Curve | None = None


class Comparing:
    """One comparison's givens, so that each candidate is made from them alike. Prices are those of `at_ns`."""

    def __init__(
        self,
        traffic: Traffic,
        asked: Asked,
        candidates: Candidates,
        prices: PriceBook,
        fits: Sequence[StepTimeFit],
        at_ns: int,
    ) -> None:
        self._at_ns = at_ns
        self._traffic = traffic
        self._tokens = tokens_of(traffic.usages)
        self._asked = asked
        self._candidates = candidates
        self._prices = prices
        self._fits = {fit.version: fit for fit in fits}
        self.volume = traffic.monthly if asked.volume is None else asked.volume
        self._target_ns = None if asked.latency_target_ms is None else asked.latency_target_ms * NS_PER_MS

    def places(self) -> list[Place]:
        """Cheapest first, what is unknown last."""
        given = self._candidates
        found = [self._api(each) for each in given.apis]
        for name, placement in given.placements.items():
            ran = [each for each in self._traffic.ran if each.placement == name]
            found += [self._here(placement, each) for each in ran] or [self._here(placement, None)]
        found += [self._machine(name, machine) for name, machine in given.machines.items()]
        return sorted(found, key=lambda each: (each.monthly is None, each.monthly or Money(0), each.name))

    def _api(self, api: ApiModel) -> Place:
        name = api.model if api.placement is None else f"{api.placement} {api.model}"
        place = Place(name=name, kind="api", model=api.model)
        if api.placement is not None:
            place = self._timed(place, self._ran_at(api.placement, api.asked))
        prices = self._prices.find(api.model, self._at_ns, api.service, api.provider)
        if prices is None:
            return _noted(place, f"nobody publishes prices for {api.model}: state them in [prices.{api.model!r}]")
        if not self._traffic.usages:
            return _noted(place, "no answer's tokens are known here: nothing to price")
        cost = api_cost(self._traffic.usages, prices.service, api.discount, self._tokens)
        if not isinstance(cost, ApiCost):
            return _noted(place, f"{prices.source}: {cost}")
        notes = [] if api.placement else ["tokens as the model here counts them; its answers are another model's"]
        place = msgspec.structs.replace(
            place, source=prices.source, notes=tuple(notes), uncached=_money(cost.uncached * self.volume)
        )
        known = self._traffic.provenance if api.placement and place.p50_ns is not None else Provenance.ESTIMATED
        return self._costed(place, Curve(name=name, per_request=cost.per_request), known)

    def _here(self, placement: Placement, ran: Ran | None) -> Place:
        """A machine that this ledger has run on."""
        name = placement.name if ran is None else f"{placement.name} {ran.model}"
        place = Place(name=name, kind=placement.kind, model=None if ran is None else ran.model)
        place = msgspec.structs.replace(self._timed(place, ran), busy=self._candidates.busy.get(placement.name))
        if placement.kind == "edge":
            return self._of_clients(place, placement, ran)
        if (unlike := self._unlike(ran)) is not None:
            place = _noted(place, unlike)
        capacity = self._capacity(ran, placement.accelerators)
        return self._of_machine(place, placement, capacity, f"placements.{placement.name}")

    def _of_clients(self, place: Place, placement: Placement, ran: Ran | None) -> Place:
        """The clients' own devices: as many as there are clients, each paid for while it answers."""
        rate = placement.usd_per_hour or Decimal(0)
        if rate and (ran is None or ran.serving_ns is None):
            return _noted(place, "nobody knows how long a request keeps a device: send traffic there first")
        serving_ns = ran.serving_ns if ran is not None and ran.serving_ns is not None else Fraction(0)
        curve = Curve(name=place.name, per_request=serving_ns * Fraction(rate) * NANOUSD_PER_USD / NS_PER_HOUR)
        place = msgspec.structs.replace(place, source=f"placements.{placement.name}", usd_per_hour=rate)
        return self._costed(place, curve, placement.rate_provenance)

    def _machine(self, name: str, machine: MachineConfig) -> Place:
        placement = machine.machine(name).at(self._at_ns)
        place = Place(name=name, kind=placement.kind, model=None)
        ran = None if machine.like is None else self._ran_at(machine.like, None)
        if ran is not None:
            place = msgspec.structs.replace(self._timed(place, ran), model=ran.model)
        if machine.p50_ms is not None or machine.p95_ms is not None:
            place = msgspec.structs.replace(
                place,
                p50_ns=None if machine.p50_ms is None else machine.p50_ms * NS_PER_MS,
                p95_ns=None if machine.p95_ms is None else machine.p95_ms * NS_PER_MS,
                latency_provenance=Provenance.ASSUMED,
                in_time=self._in_time(None if machine.p95_ms is None else machine.p95_ms * NS_PER_MS),
            )
        capacity = stated(machine, self._traffic.output_tokens)
        if machine.like is not None:
            capacity = self._capacity(ran, self._accelerators(machine.like))
        return self._of_machine(place, placement, capacity, f"machines.{name}")

    def _of_machine(self, place: Place, placement: Placement, capacity: Capacity | None, source: str) -> Place:
        rate = placement.usd_per_hour
        assumed = placement.rate_provenance is Provenance.ASSUMED
        notes = [f"its rate is assumed: set [placements.{placement.name}] usd_per_hour"] if assumed else []
        place = msgspec.structs.replace(
            place,
            source="assumption" if assumed else source,
            capacity=capacity,
            usd_per_hour=None if rate is None else rate * placement.accelerators,
            notes=(*place.notes, *notes),
        )
        if rate is None:
            return _noted(place, f"nobody knows what it costs: set [placements.{placement.name}] usd_per_hour")
        if capacity is None:
            what = "runs nothing in time" if place.p50_ns is not None else "was never measured"
            where = f"[{source}]" if source.startswith("machines.") else "[machines.NAME]"
            return _noted(
                place, f"{what}: run traffic there, or state {where} output_tokens_per_s or requests_per_hour"
            )
        # The busiest hour is what machines are counted for.
        peak = self._traffic.peak or Fraction(1)
        monthly_capacity = int(capacity.requests_per_hour * HOURS_PER_MONTH / peak)
        if monthly_capacity < 1:
            return _noted(place, "carries less than a request a month at this traffic's peak")
        curve = Curve(
            name=place.name,
            per_machine=Fraction(rate) * placement.accelerators * HOURS_PER_MONTH * NANOUSD_PER_USD,
            capacity=monthly_capacity,
            spares=self._asked.spares,
        )
        machines = curve.machines(self.volume)
        used = Fraction(self.volume, machines * capacity.requests_per_hour * HOURS_PER_MONTH)
        idle = curve.cost(self.volume) * (1 - min(used, Fraction(1)))
        place = msgspec.structs.replace(place, machines=machines, utilization=used, unused=_money(idle))
        if place.kind == "rented" and self._traffic.requests:
            hourly = Fraction(rate) * placement.accelerators * NANOUSD_PER_USD
            place = msgspec.structs.replace(place, when_needed=_money(hourly * self._machine_hours(capacity)))
        return self._costed(place, curve, weakest((placement.rate_provenance, capacity.provenance)))

    def _machine_hours(self, capacity: Capacity) -> Fraction:
        """A month of them, with as many machines in each hour as it needs, and none in an hour without requests."""
        grown = Fraction(self.volume, self._traffic.requests) * self._traffic.hours / HOURS_PER_MONTH
        needed = (-(-requests * grown // capacity.requests_per_hour) for requests in self._traffic.by_hour)
        machines = sum(int(each) + self._asked.spares for each in needed)
        return Fraction(machines * HOURS_PER_MONTH, self._traffic.hours)

    def _costed(self, place: Place, curve: Curve, provenance: Provenance) -> Place:
        month = curve.cost(self.volume)
        lengths = (self._traffic.input_tokens, self._traffic.output_tokens)
        tokens = sum((each.mean for each in lengths if each is not None), Fraction(0))
        per_request = month / self.volume if self.volume else None
        per_token = None if per_request is None or not tokens else per_request / tokens
        return msgspec.structs.replace(
            place,
            curve=curve,
            monthly=_money(month),
            per_request=None if per_request is None else _money(per_request),
            per_million_tokens=None if per_token is None else _money(per_token * 10**6),
            provenance=provenance,
        )

    def _capacity(self, ran: Ran | None, accelerators: int) -> Capacity | None:
        if ran is None:
            return None
        fit = None if ran.fit_version is None else self._fits.get(ran.fit_version)
        model = None if fit is None else modelled(fit, self._traffic.usages, self._candidates.slots, self._target_ns)
        return best(measured(ran, self._target_ns), back_to_back(ran, accelerators, self._target_ns), model)

    def _accelerators(self, placement: str) -> int:
        known = self._candidates.placements.get(placement)
        return 1 if known is None else known.accelerators

    def _unlike(self, ran: Ran | None) -> str | None:
        """Said where what ran there was of another length: then it says less of this traffic."""
        given = (self._traffic.input_tokens, self._traffic.output_tokens)
        mean = sum((each.mean for each in given if each is not None), Fraction(0))
        if ran is None or ran.tokens is None or abs(ran.tokens - mean) * 4 <= mean:
            return None
        told = f"{round(ran.tokens):,} tokens a request ran there, and {round(mean):,} are asked about"
        return f"{told}: narrow the traffic to its model or feature"

    def _ran_at(self, placement: str, model: str | None) -> Ran | None:
        """The busiest model that ran there, or this one."""
        return next(
            (each for each in self._traffic.ran if each.placement == placement and model in {None, each.model}), None
        )

    def _timed(self, place: Place, ran: Ran | None) -> Place:
        """With the latencies that were seen there."""
        if ran is None or ran.total_ns is None:
            return place
        return msgspec.structs.replace(
            place,
            p50_ns=ran.total_ns.p50,
            p95_ns=ran.total_ns.p95,
            latency_provenance=Provenance.MEASURED,
            in_time=self._in_time(ran.total_ns.p95),
        )

    def _in_time(self, p95_ns: int | None) -> bool | None:
        return None if self._target_ns is None or p95_ns is None else p95_ns <= self._target_ns


def _noted(place: Place, note: str) -> Place:
    return msgspec.structs.replace(place, notes=(*place.notes, note))


def _money(nanousd: Fraction) -> Money:
    """Rounded half-even, once."""
    return Money(round(nanousd))
