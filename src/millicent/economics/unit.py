"""Unit economics: what one request, useful output, user or feature costs, how long it takes, and how that is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal

import msgspec

from millicent.core.money import ZERO, Money
from millicent.core.periods import Period
from millicent.core.receipts import Role
from millicent.core.tallies import Histogram, Tally, percentile
from millicent.economics.devices import DeviceUse, device_use, idle_shares
from millicent.economics.forecast import Forecast, month_end
from millicent.ledger.queries import GroupBy, LedgerQueries, ReceiptFilter, Totals, Usefulness

# Attributes that every request should have, with the header that gives each.
ATTRIBUTES: dict[GroupBy, str] = {"feature": "X-Millicent-Feature", "user": "X-Millicent-User"}


class Spread(msgspec.Struct, frozen=True):
    """Percentiles in nanoseconds, each within 3.2% of the exact one."""

    p50_ns: int | None
    p95_ns: int | None
    p99_ns: int | None

    @classmethod
    def of(cls, histogram: Histogram) -> Spread:
        return cls(*(percentile(histogram, percent) for percent in (50, 95, 99)))


class Took(msgspec.Struct, frozen=True):
    """Of requests that succeeded. `tpot` is per output token after the first."""

    queue: Spread
    ttft: Spread
    tpot: Spread
    total: Spread


class Unit(msgspec.Struct, frozen=True, kw_only=True):
    """One group's closed requests. `cost` is what is on their receipts; `fully_loaded` adds what the machines cost
    that no receipt carries, allocated by use over the month. `cached` is the part of prompt tokens read from a prefix
    cache, `cache_hits` the part of those that asked the response cache which it answered, `routed` the part of requests
    that a policy routed, `joules` of the `measured` requests whose energy is known. `roles` is the cost of
    predictivity. None is what nobody knows, or nobody rated; `took` and what goes with it are None where they would
    take reading too many receipts.
    """

    group: str | None
    requests: int
    input_tokens: int
    output_tokens: int
    cost: Money | None
    fully_loaded: Money | None
    unpriced: int
    cost_per_request: Money | None
    rated: int
    useful: int
    useful_rate: Decimal | None
    cost_per_useful: Money | None
    cost_per_useful_low: Money | None
    cost_per_useful_high: Money | None
    tokens_per_useful: Decimal | None
    roles: dict[str, Money]
    took: Took | None
    cached: Decimal | None
    cache_hits: Decimal | None
    routed: Decimal | None
    joules: Decimal | None
    measured: int


class Gap(msgspec.Struct, frozen=True):
    """What isn't known of some requests, how many of all those are, and what to do about it."""

    what: str
    requests: int
    share: Decimal
    cost: Money | None
    advice: str


class UnitReport(msgspec.Struct, frozen=True):
    """Dearest first, times in order. `cost_per_group` is the mean over those that have a name: users, say."""

    by: str
    from_ns: int
    to_ns: int
    zone: str
    units: tuple[Unit, ...]
    total: Unit
    cost_per_group: Money | None
    devices: tuple[DeviceUse, ...]
    forecast: Forecast | None
    gaps: tuple[Gap, ...]


def units(
    ledger: LedgerQueries,
    by: GroupBy,
    where: ReceiptFilter,
    now_ns: int,
    *,
    zone: str = "UTC",
    standard: Mapping[str, Decimal] | None = None,
    max_sequences: int | None = None,
) -> UnitReport:
    """Of the requests asked for; without a beginning or an end, of all so far. `standard` holds the utilization of
    placements whose receipts are priced by it; `max_sequences` how many of the engine's may share a step."""
    period = Period(_beginning(ledger, where, now_ns), now_ns if where.to_ns is None else where.to_ns)
    where = msgspec.structs.replace(where, from_ns=period.from_ns, to_ns=period.to_ns)
    totals = ledger.totals(by, where, zone=zone)
    loaded = _loaded(ledger, by, where, period, zone, standard or {}, now_ns)
    requests = sum(each.requests for each in totals)
    tallies = ledger.tallies((by,), where, zone=zone, requests=requests)
    # Where there is too much to read by group, there may not be for all together.
    merged = ledger.tallies((), where, requests=requests) if tallies is None else {(): Tally.together(tallies.values())}
    useful = {each.group: each for each in ledger.usefulness(by, where, zone=zone)}
    roles = {each.group: each.costs for each in ledger.role_costs(by, where, zone=zone)}

    def unit(each: Totals) -> Unit:
        tally = None if tallies is None else tallies.get((each.group,), Tally())
        own = None if loaded is None or each.known_cost is None else each.cost + loaded.get(each.group, ZERO)
        return _unit(each, useful.get(each.group), roles.get(each.group, {}), tally, own)

    found = tuple(unit(each) for each in totals)
    total = _unit(
        Totals.together(totals),
        _sum_useful(list(useful.values())),
        _sum_roles(list(roles.values())),
        None if merged is None else merged.get((), Tally()),
        None if loaded is None else Money.total(each.fully_loaded for each in found if each.fully_loaded is not None),
    )
    named = [each for each in totals if each.group is not None]
    return UnitReport(
        by=by,
        from_ns=period.from_ns,
        to_ns=period.to_ns,
        zone=zone,
        units=found,
        total=total,
        cost_per_group=per(Money.total(each.cost for each in named), len(named)),
        devices=tuple(device_use(ledger, period, max_sequences)),
        forecast=month_end(ledger, where, now_ns),
        gaps=tuple(gaps(ledger, where, {by: totals})),
    )


def per(amount: Money, count: int) -> Money | None:
    """An equal part of it, to the nearest nano-dollar; None of nothing."""
    return Money(round(Decimal(amount.nanousd) / count)) if count else None


def gaps(ledger: LedgerQueries, where: ReceiptFilter, known: Mapping[GroupBy, list[Totals]] | None = None) -> list[Gap]:
    """What is unattributed, and what is unpriced, with what to do; the largest first. Totals that are `known` aren't
    asked for again."""
    models = (known or {}).get("model") or ledger.totals("model", where)
    requests = sum(each.requests for each in models)
    found = []
    for by, header in ATTRIBUTES.items():
        if getattr(where, by):
            continue
        # Only what has no name is asked for: of users there may be very many.
        nameless = Totals.together(ledger.totals("status", msgspec.structs.replace(where, **{by: ""})))
        if nameless.requests:
            advice = f"send {header}, or pin it to the key: millicent keys create --{by} NAME"
            share = Decimal(nameless.requests) / requests
            found.append(Gap(f"no {by}", nameless.requests, share, nameless.known_cost, advice))
    for each in models:
        if each.unpriced:
            share = Decimal(each.unpriced) / requests
            found.append(
                Gap(
                    f"no price for {each.group}",
                    each.unpriced,
                    share,
                    None,
                    "price it in [prices.NAME], or give its machine's rate in [placements.NAME]",
                )
            )
    return sorted(found, key=lambda gap: (-gap.requests, gap.what))


def _beginning(ledger: LedgerQueries, where: ReceiptFilter, now_ns: int) -> int:
    if where.from_ns is not None:
        return where.from_ns
    return min([*ledger.first_days_ns().values(), now_ns])


def _loaded(
    ledger: LedgerQueries,
    by: GroupBy,
    where: ReceiptFilter,
    period: Period,
    zone: str,
    standard: Mapping[str, Decimal],
    now_ns: int,
) -> dict[str | None, Money] | None:
    placements = {each.placement for each in ledger.accounts(period.from_ns, period.to_ns)}

    def serving(inside: Period, placement: str) -> dict[str | None, int]:
        within = msgspec.structs.replace(where, from_ns=inside.from_ns, to_ns=inside.to_ns)
        if within.placement not in {None, placement}:
            return {}
        if len(placements) > 1:
            # With one alone all device time is its own, and rollups by user do.
            within = msgspec.structs.replace(within, placement=placement)
        return {each.group: each.serving_ns for each in ledger.totals(by, within, zone=zone)}

    return idle_shares(ledger, period, serving, standard, now_ns)


def _sum_useful(groups: Sequence[Usefulness]) -> Usefulness | None:
    if not groups:
        return None
    return msgspec.structs.replace(
        groups[0],
        group=None,
        requests=sum(each.requests for each in groups),
        priced=sum(each.priced for each in groups),
        cost=Money.total(each.cost for each in groups),
        rated=sum(each.rated for each in groups),
        useful=sum(each.useful for each in groups),
    )


def _sum_roles(groups: Sequence[Mapping[Role, Money]]) -> dict[Role, Money]:
    found: dict[Role, Money] = {}
    for each in groups:
        for role, amount in each.items():
            found[role] = found.get(role, ZERO) + amount
    return found


def _unit(
    totals: Totals,
    useful: Usefulness | None,
    roles: Mapping[Role, Money],
    tally: Tally | None,
    fully_loaded: Money | None,
) -> Unit:
    rate = None if useful is None else useful.rate
    low, high = (None, None) if useful is None else useful.cost_per_useful_interval
    tokens = Decimal(totals.input_tokens + totals.output_tokens)
    asked = 0 if tally is None else tally.cache_hits + tally.cache_misses
    read = 0 if tally is None else tally.tokens.get("input_cache_read", 0)
    return Unit(
        group=totals.group,
        requests=totals.requests,
        input_tokens=totals.input_tokens,
        output_tokens=totals.output_tokens,
        cost=totals.known_cost,
        fully_loaded=fully_loaded,
        unpriced=totals.unpriced,
        cost_per_request=per(totals.cost, totals.requests - totals.unpriced),
        rated=0 if useful is None else useful.rated,
        useful=0 if useful is None else useful.useful,
        useful_rate=rate,
        cost_per_useful=None if useful is None else useful.cost_per_useful,
        cost_per_useful_low=low,
        cost_per_useful_high=high,
        tokens_per_useful=tokens / totals.requests / rate if rate and totals.requests else None,
        roles={str(role): amount for role, amount in roles.items()},
        took=None
        if tally is None
        else Took(*(Spread.of(each) for each in (tally.queue, tally.ttft, tally.tpot, tally.total))),
        cached=Decimal(read) / tally.input_tokens if tally is not None and tally.input_tokens else None,
        cache_hits=Decimal(tally.cache_hits) / asked if tally is not None and asked else None,
        routed=Decimal(tally.routed) / tally.requests if tally is not None and tally.requests else None,
        joules=Decimal(tally.energy_uj).scaleb(-6) if tally is not None and tally.measured else None,
        measured=0 if tally is None else tally.measured,
    )
