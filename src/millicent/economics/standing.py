"""Where you stand: published bands, a checklist ticked by evidence, and what outcomes cost without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Literal

import msgspec

from millicent.core.clock import Clock
from millicent.core.money import ZERO, Money
from millicent.core.periods import Period
from millicent.core.tallies import Sums
from millicent.core.usage import Leaf
from millicent.economics.alternatives import Alternative
from millicent.economics.margin import Books, MarginRow, margins
from millicent.economics.traffic import Traffic, read_traffic
from millicent.ledger.queries import LedgerQueries, ReceiptFilter

Stage = Literal["understand", "measure", "optimise", "monitor", "scale"]
Where = Literal["behind", "typical", "leading", "between behind and typical", "between typical and leading"]

# Ticks need this much, and not all: someone will always forget a header.
NAMED_PART, RATED_PART = Fraction(95, 100), Fraction(5, 100)


class Band(msgspec.Struct, frozen=True):
    """One published measure: who is behind lies beyond `behind`, the typical from `typical[0]` to `typical[1]`, both
    included, and the leading beyond `leading`. What lies in none of them was published for nobody: a gap."""

    measure: str
    industry: str
    unit: Literal["part", "usd"]
    behind: Decimal
    typical: tuple[Decimal, Decimal]
    leading: Decimal

    @property
    def more_is_better(self) -> bool:
        return self.leading > self.behind

    def where(self, value: Fraction) -> Where:
        sign = 1 if self.more_is_better else -1
        behind, leading = sign * Fraction(self.behind), sign * Fraction(self.leading)
        low, high = sorted(sign * Fraction(end) for end in self.typical)
        at = sign * value
        if at < behind:
            return "behind"
        if at > leading:
            return "leading"
        if low <= at <= high:
            return "typical"
        return "between behind and typical" if at < low else "between typical and leading"


def told(band: Band, value: Fraction | Decimal) -> str:
    """Dollars, or percent."""
    if band.unit == "usd":
        return Money(round(Fraction(value) * 10**9)).human()
    percent = round(Decimal(Fraction(value).numerator) * 100 / Fraction(value).denominator, 1)
    return f"{percent.normalize():f}%"


def band_words(band: Band) -> tuple[str, str, str]:
    """`over 40%`, `15% to 25%`, `under 10%`: as published."""
    beyond = ("under", "over") if band.more_is_better else ("over", "under")
    ends = (band.behind, *band.typical, band.leading)
    behind, low, high, leading = (f"${end:f}" if band.unit == "usd" else told(band, end) for end in ends)
    return f"{beyond[0]} {behind}", f"{low} to {high}", f"{beyond[1]} {leading}"


AI_COST = Band(
    "AI cost / revenue", "AI-first SaaS", "part", Decimal("0.40"), (Decimal("0.15"), Decimal("0.25")), Decimal("0.10")
)
REQUEST_COST = Band(
    "cost per request", "enterprise", "usd", Decimal("0.10"), (Decimal("0.01"), Decimal("0.05")), Decimal("0.005")
)
COVERAGE = Band(
    "routing coverage", "consumer", "part", Decimal("0.30"), (Decimal("0.50"), Decimal("0.70")), Decimal("0.85")
)
PROFITABLE = Band(
    "profitable features", "any", "part", Decimal("0.30"), (Decimal("0.50"), Decimal("0.60")), Decimal("0.80")
)


class Stand(msgspec.Struct, frozen=True):
    """One measure as it is here; None is unknown. `evidence` is what it is made of, or what would make it known."""

    band: Band
    value: Fraction | None
    where: Where | None
    evidence: str


class Tick(msgspec.Struct, frozen=True):
    """One item of the checklist: `done` follows from `evidence` alone. `then` is what to do where it isn't."""

    stage: Stage
    what: str
    done: bool
    evidence: str
    then: str


class WithoutModel(msgspec.Struct, frozen=True):
    """One feature's outcome without a model, and with it: a useful output, or a request where nothing was rated."""

    feature: str
    what: str | None
    without: Money
    with_model: Money | None
    of: Literal["useful output", "request"]
    outcomes: int

    @property
    def saved(self) -> Money | None:
        """By one outcome; negative where the model is dearer."""
        return None if self.with_model is None else self.without - self.with_model


class Configured(msgspec.Struct, frozen=True):
    """What the configuration and the state say that the checklist asks for: names of each."""

    alternatives: Mapping[str, Alternative] = {}
    cost_targets: tuple[str, ...] = ()
    latency_targets: tuple[str, ...] = ()
    budgets: tuple[str, ...] = ()
    alerts: tuple[str, ...] = ()
    second_places: tuple[str, ...] = ()
    scenarios: tuple[str, ...] = ()


class Standing(msgspec.Struct, frozen=True):
    traffic: Traffic
    stands: tuple[Stand, ...]
    ticks: tuple[Tick, ...]
    next_step: Tick | None
    without: tuple[WithoutModel, ...]


def standing(
    queries: LedgerQueries,
    clock: Clock,
    chosen: ReceiptFilter,
    configured: Configured,
    books: Books,
) -> Standing:
    """Of the times chosen, as far as there was traffic."""
    traffic = read_traffic(queries, chosen)
    period = Period(traffic.from_ns, max(traffic.from_ns, min(traffic.to_ns, clock.now_ns())))
    where = ReceiptFilter(from_ns=traffic.from_ns, to_ns=traffic.to_ns)
    earned = margins(queries, "feature", period, books).rows
    sums = (queries.sums((), where) or {}).get((), Sums())
    ticks = (
        *_understand(queries, where),
        *_measure(queries, where, configured, earned),
        *_optimise(sums, traffic),
        *_monitor(configured),
        *_scale(traffic, configured),
    )
    return Standing(
        traffic,
        (_ai_cost(earned), _request_cost(traffic), _coverage(sums, traffic), _profitable(earned)),
        ticks,
        next((tick for tick in ticks if not tick.done), None),
        tuple(_without(queries, where, configured)),
    )


def _stand(band: Band, value: Fraction | None, evidence: str) -> Stand:
    return Stand(band, value, None if value is None else band.where(value), evidence)


def _ai_cost(earned: Sequence[MarginRow]) -> Stand:
    revenue, cost = (sum((getattr(each, name) or ZERO).nanousd for each in earned) for name in ("revenue", "ai_cost"))
    if not revenue:
        return _stand(AI_COST, None, "unknown: state revenue")
    return _stand(AI_COST, Fraction(cost, revenue), f"{Money(cost).human()} of {Money(revenue).human()}")


def _request_cost(traffic: Traffic) -> Stand:
    priced = traffic.requests - traffic.unpriced
    if not priced:
        return _stand(REQUEST_COST, None, "unknown: no request has a price")
    value = Fraction(traffic.cost_nanousd, priced * 10**9)
    return _stand(REQUEST_COST, value, f"{Money(traffic.cost_nanousd).human()} for {priced:,} priced requests")


def _coverage(sums: Sums, traffic: Traffic) -> Stand:
    if not traffic.requests:
        return _stand(COVERAGE, None, "unknown: no requests")
    value = min(Fraction(sums.routed, traffic.requests), Fraction(1))
    return _stand(COVERAGE, value, f"{sums.routed:,} of {traffic.requests:,} requests asked for a routing policy")


def _profitable(earned: Sequence[MarginRow]) -> Stand:
    earning = [
        each.margin
        for each in earned
        if each.group is not None and (each.revenue or ZERO) != ZERO and each.margin is not None
    ]
    if not earning:
        return _stand(PROFITABLE, None, "unknown: state revenue by feature")
    gaining = sum(margin > ZERO for margin in earning)
    return _stand(PROFITABLE, Fraction(gaining, len(earning)), f"{gaining} of {len(earning)} features with revenue")


def _understand(queries: LedgerQueries, where: ReceiptFilter) -> list[Tick]:
    features = queries.totals("feature", where)
    requests, unpriced, assumed = (
        sum(getattr(each, name) for each in features) for name in ("requests", "unpriced", "assumed")
    )
    named = sum(each.requests for each in features if each.group is not None)
    return [
        Tick(
            "understand",
            "requests say which feature they are for",
            requests > 0 and Fraction(named, requests) >= NAMED_PART,
            f"{named:,} of {requests:,} name one; it takes 95 in 100",
            "send X-Millicent-Feature with each call, or pin a feature to each key",
        ),
        Tick(
            "understand",
            "every request has a price",
            requests > 0 and not unpriced,
            f"{unpriced:,} of {requests:,} are unpriced",
            "state [placements.NAME] usd_per_hour, or [prices.NAME], for what is unpriced",
        ),
        Tick(
            "understand",
            "no price rests on an assumption",
            requests > 0 and not assumed,
            f"{assumed:,} of {requests:,} rest on a rate that nobody stated",
            "state what the machine costs: [placements.NAME] usd_per_hour",
        ),
    ]


def _measure(
    queries: LedgerQueries, where: ReceiptFilter, configured: Configured, earned: Sequence[MarginRow]
) -> list[Tick]:
    found = queries.usefulness("feature", where)
    requests, rated = sum(each.requests for each in found), sum(each.rated for each in found)
    used = {each.group for each in found if each.group is not None}
    aimed, timed = (used & set(names) for names in (configured.cost_targets, configured.latency_targets))
    earning = sorted(each.group or "all together" for each in earned if (each.revenue or ZERO) != ZERO)
    return [
        Tick(
            "measure",
            "outputs are rated useful or not",
            requests > 0 and Fraction(rated, requests) >= RATED_PART,
            f"{rated:,} of {requests:,} are rated; it takes 5 in 100",
            "send POST /v1/feedback, or state [features.NAME.useful]",
        ),
        Tick(
            "measure",
            "features have a cost target",
            bool(used) and aimed == used,
            f"{len(aimed)} of {len(used)} features in use have one",
            "state [features.NAME] cost_target_usd",
        ),
        Tick(
            "measure",
            "features have a latency target",
            bool(used) and timed == used,
            f"{len(timed)} of {len(used)} features in use have one",
            "state [features.NAME] latency_target_ms",
        ),
        Tick(
            "measure",
            "revenue stands beside cost",
            bool(earning),
            f"revenue is known of {_names(earning)}",
            "state revenue: docs/margin.md",
        ),
    ]


def _optimise(sums: Sums, traffic: Traffic) -> list[Tick]:
    given = sum(usage.input_tokens or 0 for usage in traffic.usages)
    cached = sum(usage.tokens(Leaf.INPUT_CACHE_READ) or 0 for usage in traffic.usages)
    return [
        Tick(
            "optimise",
            "requests are routed",
            sums.routed > 0,
            f"{sums.routed:,} of {traffic.requests:,} asked for a routing policy",
            "state [routing.NAME] and ask for it like a model: docs/routing.md",
        ),
        Tick(
            "optimise",
            "prompts are read from caches",
            cached > 0,
            f"{cached:,} of {given:,} input tokens that were looked at",
            "begin prompts alike, with what changes at their end: docs/metering.md",
        ),
        Tick(
            "optimise",
            "answers that repeat come from the response cache",
            sums.cache_hits > 0,
            f"{sums.cache_hits:,} of {traffic.requests:,} requests",
            "switch it on: docs/caching.md",
        ),
    ]


def _monitor(configured: Configured) -> list[Tick]:
    return [
        Tick(
            "monitor",
            "a budget bounds what is spent",
            bool(configured.budgets),
            _names(configured.budgets),
            "state [budgets.NAME]: docs/control.md",
        ),
        Tick(
            "monitor",
            "alerts reach somebody",
            bool(configured.alerts),
            _names(configured.alerts),
            "state [alerts.NAME] webhook_env: docs/alerts.md",
        ),
    ]


def _scale(traffic: Traffic, configured: Configured) -> list[Tick]:
    fitted = [each.model for each in traffic.ran if each.fit_version is not None]
    return [
        Tick(
            "scale",
            "what a machine can carry is known",
            bool(fitted),
            f"step times are fitted of {_names(fitted)}",
            "let the embedded engine answer some requests, so that its steps are measured",
        ),
        Tick(
            "scale",
            "a model can run in a second place",
            bool(configured.second_places),
            _names(configured.second_places),
            "state [models.NAME] deployments or fallbacks: docs/reliability.md",
        ),
        Tick(
            "scale",
            "what comes next was estimated",
            bool(configured.scenarios),
            _names(configured.scenarios),
            "save one: millicent plan estimate --save NAME",
        ),
    ]


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"


def _without(queries: LedgerQueries, where: ReceiptFilter, configured: Configured) -> list[WithoutModel]:
    useful = {each.group: each for each in queries.usefulness("feature", where)}
    found = []
    for name, alternative in configured.alternatives.items():
        known = useful.get(name)
        if known is not None and known.cost_per_useful is not None:
            found.append(
                WithoutModel(
                    name, alternative.what, alternative.cost, known.cost_per_useful, "useful output", known.useful
                )
            )
            continue
        mean = None if known is None or not known.priced else Money(round(Fraction(known.cost.nanousd, known.priced)))
        found.append(
            WithoutModel(
                name, alternative.what, alternative.cost, mean, "request", 0 if known is None else known.requests
            )
        )
    return found
