"""What this ledger's traffic is like: how much, when, how long, how quick, and where it ran.

Volumes are sums of every receipt. What a request is like is taken from the newest `LOOKED_AT` answers that the model
asked for gave at once: that many are read in a moment, however many there are.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from fractions import Fraction

import msgspec

from millicent.core.clock import NS_PER_HOUR, Clock, hour_start_ns
from millicent.core.receipts import Status
from millicent.core.tallies import nearest_rank
from millicent.core.usage import Leaf, Provenance, Usage
from millicent.ledger.queries import Answer, LedgerQueries, ReceiptFilter

LOOKED_AT = 5_000
# A year's twelfth: what a machine that is paid by the hour is paid for in a month.
HOURS_PER_MONTH = 730
DEFAULT_DAYS = 30
# Percentiles of fewer say little of the rest.
LEAST_FOR_PERCENTILES = 20


class Spread(msgspec.Struct, frozen=True):
    """Of token counts, or nanoseconds: the mean, and the percentiles (nearest rank)."""

    mean: Fraction
    p50: int
    p95: int


class Hour(msgspec.Struct, frozen=True):
    """One UTC hour of one placement, whole: `answers` that went well, and the 95th percentile of their time."""

    start_ns: int
    answers: int
    p95_ns: int | None


class Ran(msgspec.Struct, frozen=True):
    """What was seen of one placement and the model it ran, under the name it was asked for by. `serving_ns` is the mean
    device time of an answer, `tokens` how many it read and wrote."""

    placement: str
    model: str
    answers: int
    total_ns: Spread | None
    serving_ns: Fraction | None
    tokens: Fraction | None
    hours: tuple[Hour, ...]
    fit_version: str | None


class Traffic(msgspec.Struct, frozen=True):
    """`hours` are whole UTC hours from the first request to the last, `requests` those in them that had to run
    somewhere: neither refused nor answered by the response cache; `by_hour` hour by hour where there were any.

    `usages` are of the answers looked at whose tokens are known; `unknown` of the others. `whole` says whether those
    are all there are.
    """

    from_ns: int
    to_ns: int
    hours: int
    requests: int
    by_hour: tuple[int, ...]
    cost_nanousd: int
    unpriced: int
    usages: tuple[Usage, ...]
    unknown: int
    whole: bool
    input_tokens: Spread | None
    output_tokens: Spread | None
    ran: tuple[Ran, ...]

    @property
    def cached(self) -> Fraction | None:
        """The part of the input that was read from caches; None where there was none."""
        given = sum(usage.input_tokens or 0 for usage in self.usages)
        read = sum(usage.tokens(Leaf.INPUT_CACHE_READ) or 0 for usage in self.usages)
        return Fraction(read, given) if given else None

    @property
    def busiest(self) -> int:
        return max(self.by_hour, default=0)

    @property
    def monthly(self) -> int:
        """Requests a month (730 hours) at this pace."""
        return round(Fraction(self.requests * HOURS_PER_MONTH, self.hours)) if self.hours else 0

    @property
    def peak(self) -> Fraction | None:
        """The busiest hour's requests over an average hour's; None without traffic."""
        return Fraction(self.busiest * self.hours, self.requests) if self.requests else None

    @property
    def provenance(self) -> Provenance:
        """Of what a request is like."""
        return Provenance.MEASURED if self.whole and not self.unknown else Provenance.ESTIMATED


def lately(clock: Clock, where: ReceiptFilter) -> ReceiptFilter:
    """The last 30 days of it, where nothing says from when."""
    if where.from_ns is not None:
        return where
    return msgspec.structs.replace(where, from_ns=hour_start_ns(clock.now_ns()) - DEFAULT_DAYS * 24 * NS_PER_HOUR)


def read_traffic(queries: LedgerQueries, where: ReceiptFilter) -> Traffic:
    hourly = _requests_by_hour(queries, where)
    answers = queries.answers(where, LOOKED_AT)
    usages = [each.usage for each in answers if _known(each.usage)]
    everything = [each for each in queries.totals("status", where) if each.group != Status.REFUSED]
    first_ns, last_ns = (min(hourly), max(hourly)) if hourly else (where.from_ns or 0, 0)
    return Traffic(
        from_ns=first_ns,
        to_ns=last_ns + NS_PER_HOUR if hourly else first_ns,
        hours=(last_ns - first_ns) // NS_PER_HOUR + 1 if hourly else 0,
        requests=sum(hourly.values()),
        by_hour=tuple(hourly.values()),
        cost_nanousd=sum(each.cost.nanousd for each in everything),
        unpriced=sum(each.unpriced for each in everything),
        usages=tuple(usages),
        unknown=len(answers) - len(usages),
        whole=len(answers) < LOOKED_AT,
        input_tokens=spread([each.input_tokens or 0 for each in usages]),
        output_tokens=spread([each.output_tokens or 0 for each in usages]),
        ran=tuple(_ran(queries, where, answers)),
    )


def spread(values: Sequence[int]) -> Spread | None:
    """None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return Spread(Fraction(sum(ordered), len(ordered)), nearest_rank(ordered, 50), nearest_rank(ordered, 95))


def _requests_by_hour(queries: LedgerQueries, where: ReceiptFilter) -> dict[int, int]:
    """By the hour's start. What was refused ran nowhere, nor did what the response cache answered."""
    hours = Counter(queries.requests_by_hour(where))
    if where.status is None:
        hours.subtract(queries.requests_by_hour(msgspec.structs.replace(where, status=Status.REFUSED.value)))
    if where.placement is None:
        nowhere = msgspec.structs.replace(where, status=Status.SUCCEEDED.value, placement="")
        answered = queries.requests_by_hour(nowhere)
        if answered and _any_hits(queries, where):
            hours.subtract(answered)
    return {start_ns: requests for start_ns, requests in hours.items() if requests > 0}


def _any_hits(queries: LedgerQueries, where: ReceiptFilter) -> bool:
    found = queries.sums((), where)
    if found is None:  # more than is read one by one, by what no tally tells apart
        return any(each.hits for each in queries.cache_use(where))
    return any(each.cache_hits for each in found.values())


def _known(usage: Usage) -> bool:
    return usage.input_tokens is not None and usage.output_tokens is not None


def _ran(queries: LedgerQueries, where: ReceiptFilter, answers: Sequence[Answer]) -> list[Ran]:
    """Of each placement and model, busiest first. Hours are counted whole; what they took is known of those that the
    answers cover. Where not all were looked at, the oldest hour is cut."""
    cut_ns = hour_start_ns(answers[0].created_at_ns) if len(answers) == LOOKED_AT else None
    by_place: dict[tuple[str, str], list[Answer]] = defaultdict(list)
    for each in answers:
        if each.placement is not None:
            by_place[each.placement, each.model].append(each)
    found = []
    for (placement, model), those in by_place.items():
        here = msgspec.structs.replace(where, placement=placement, model=model, status=Status.SUCCEEDED.value)
        by_hour: dict[int, list[Answer]] = defaultdict(list)
        for each in those:
            by_hour[hour_start_ns(each.created_at_ns)].append(each)
        hours = tuple(
            Hour(start_ns, count, None if start_ns == cut_ns else _p95_ns(by_hour[start_ns]))
            for start_ns, count in queries.requests_by_hour(here).items()
        )
        newest = next((each.fit for each in reversed(those) if each.fit is not None), None)
        found.append(Ran(placement, model, len(those), _took(those), _serving_ns(those), _tokens(those), hours, newest))
    return sorted(found, key=lambda each: (-each.answers, each.placement, each.model))


def _serving_ns(answers: Sequence[Answer]) -> Fraction | None:
    """Its mean, where anybody knows."""
    known = [each.serving_ns for each in answers if each.serving_ns is not None]
    return Fraction(sum(known), len(known)) if known else None


def _tokens(answers: Sequence[Answer]) -> Fraction | None:
    known = [each.usage for each in answers if _known(each.usage)]
    total = sum((usage.input_tokens or 0) + (usage.output_tokens or 0) for usage in known)
    return Fraction(total, len(known)) if known else None


def _took(answers: Sequence[Answer]) -> Spread | None:
    """Their times; None of too few."""
    times = [each.total_ns for each in answers if each.total_ns is not None]
    return spread(times) if len(times) >= LEAST_FOR_PERCENTILES else None


def _p95_ns(answers: Sequence[Answer]) -> int | None:
    took = _took(answers)
    return None if took is None else took.p95
