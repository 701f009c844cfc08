"""How busy each device is, and how fast: two different things. A device that decodes one answer at a time is busy all
the while, and does a small part of what it could."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal

import msgspec

from millicent.core.accounts import Account
from millicent.core.clock import NS_PER_HOUR, NS_PER_S
from millicent.core.fits import StepTimeFit
from millicent.core.money import Money
from millicent.core.periods import DAY_NS, Period, months_of
from millicent.ledger.queries import LedgerQueries, ReceiptFilter
from millicent.step_time.model import Coefficients, Work

# How far back the fastest hour is looked for.
PEAK_DAYS = 7


class DeviceUse(msgspec.Struct, frozen=True):
    """One device and placement. `busy` and `overhead` are parts of the time it was up, `throughput` is the output
    tokens per second of that time over `maximum_tokens_per_s`, which is `maximum_from` either the `step-time model`,
    with as many sequences in a step as may be, or the `fastest hour` of the last week. None where nobody knows."""

    device: str
    placement: str
    accelerators: int
    busy: Decimal
    overhead: Decimal
    output_tokens_per_s: Decimal | None
    maximum_tokens_per_s: Decimal | None
    maximum_from: str | None
    throughput: Decimal | None
    cost: Money | None
    unused: Money | None


def device_use(ledger: LedgerQueries, period: Period, max_sequences: int | None) -> list[DeviceUse]:
    """By device and placement. `max_sequences` is how many may share a step; None where no engine is ours."""
    grouped: dict[tuple[str, str], list[Account]] = {}
    for account in ledger.accounts(period.from_ns, period.to_ns):
        grouped.setdefault((account.device, account.placement), []).append(account)
    sharing: dict[str, int] = {}
    for _, placement in grouped:
        sharing[placement] = sharing.get(placement, 0) + 1
    return [
        _use(ledger, period, accounts, max_sequences if sharing[placement] == 1 else None, sharing[placement])
        for (_, placement), accounts in sorted(grouped.items())
    ]


def _use(
    ledger: LedgerQueries, period: Period, accounts: Sequence[Account], max_sequences: int | None, sharing: int
) -> DeviceUse:
    latest = accounts[-1]
    up_ns = sum(each.wall_ns * each.accelerators - each.down_ns for each in accounts)
    serving_ns = sum(each.serving_ns for each in accounts)
    overhead_ns = sum(each.overhead_ns for each in accounts)
    rate = maximum = None
    source = None
    if sharing == 1 and up_ns:
        # Of several devices in one placement, the ledger doesn't say which of them made a token.
        where = ReceiptFilter(placement=latest.placement, from_ns=period.from_ns, to_ns=period.to_ns)
        totals = ledger.totals("placement", where)
        rate = Decimal(sum(each.output_tokens for each in totals)) * NS_PER_S / (Decimal(up_ns) / latest.accelerators)
        served = ledger.totals("model", where)
        tokens = sum(each.input_tokens + each.output_tokens for each in served)
        context = tokens // max(1, sum(each.requests for each in served))
        fits = [fit for fit in ledger.newest_fits(latest.device) if fit.model in {each.group for each in served}]
        if max_sequences is not None and fits:
            maximum, source = min(full_batch(fit, max_sequences, context) for fit in fits), "step-time model"
        else:
            maximum, source = _fastest_hour(ledger, latest.placement, period.to_ns), "fastest hour"
    costs = [each.cost for each in accounts]
    unused = [each.unused_cost for each in accounts]
    return DeviceUse(
        device=latest.device,
        placement=latest.placement,
        accelerators=latest.accelerators,
        busy=Decimal(serving_ns) / up_ns if up_ns else Decimal(0),
        overhead=Decimal(overhead_ns) / up_ns if up_ns else Decimal(0),
        output_tokens_per_s=rate,
        maximum_tokens_per_s=maximum,
        maximum_from=source if maximum else None,
        throughput=rate / maximum if maximum and rate is not None else None,
        cost=None if None in costs else Money.total(each for each in costs if each is not None),
        unused=None if None in unused else Money.total(each for each in unused if each is not None),
    )


def full_batch(fit: StepTimeFit, max_sequences: int, context_tokens: int) -> Decimal:
    """Output tokens per second when every step decodes one row of as many sequences as may share it, each attending to
    so many tokens."""
    model = Coefficients.of(fit)
    step_ns = model.step_ns(Work(max_sequences, max_sequences, max_sequences * context_tokens, 0))
    return Decimal(max_sequences) * NS_PER_S / Decimal(max(1, round(step_ns)))


def _fastest_hour(ledger: LedgerQueries, placement: str, to_ns: int) -> Decimal | None:
    where = ReceiptFilter(placement=placement, from_ns=to_ns - PEAK_DAYS * DAY_NS, to_ns=to_ns)
    most = max((each.output_tokens for each in ledger.totals("hour", where)), default=0)
    return Decimal(most) * NS_PER_S / NS_PER_HOUR if most else None


def idle_shares(
    ledger: LedgerQueries,
    period: Period,
    serving: Callable[[Period, str], Mapping[str | None, int]],
    standard: Mapping[str, Decimal],
    now_ns: int,
) -> dict[str | None, Money] | None:
    """What each group bears of the machines' cost that no receipt carries: idle, overhead, lost and down time,
    allocated by use over the calendar month, so far where it still runs. `serving` says each group's nanoseconds in a
    time at a placement; `standard` the utilization at which a placement's receipts are priced. None where a machine's
    rate isn't known. A month in which a machine served nobody is borne by nobody.
    """
    bearing: dict[str | None, int] = {}
    for month in months_of(period):
        until = Period(month.from_ns, max(month.from_ns, min(month.to_ns, now_ns)))
        inside = until.common(period)
        if inside is None:
            continue
        left: dict[str, int] = {}
        used: dict[str, int] = {}
        for account in ledger.accounts(until.from_ns, until.to_ns):
            if account.cost is None or account.usd_per_hour is None:
                return None
            name = account.placement
            rate = account.usd_per_hour / standard.get(name, Decimal(1))
            carried = Money.of_time(account.serving_ns, rate)
            left[name] = left.get(name, 0) + account.cost.nanousd - carried.nanousd
            used[name] = used.get(name, 0) + account.serving_ns
        for name, nanousd in left.items():
            groups = {group: ns for group, ns in serving(inside, name).items() if ns}
            others = max(0, used[name] - sum(groups.values()))
            if not groups:
                continue
            # What was served outside the period bears its own part.
            for group, part in zip(groups, Money(nanousd).split([*groups.values(), others]), strict=False):
                bearing[group] = bearing.get(group, 0) + part.nanousd
    return {group: Money(nanousd) for group, nanousd in bearing.items()}
