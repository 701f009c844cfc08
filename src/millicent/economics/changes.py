"""Why a cost changed: the difference between two periods, split among what it is made of, to the nano-dollar.

What a feature costs is, over its models m and the classes k of input tokens (fresh, read from a cache, written to one,
answered by the response cache),

    cost = N * sum_m s_m * (i_m * sum_k h_mk * p_mk + o_m * g_m * q_m + r_m)

N requests, s the models' shares of them, i and o the tokens per request, h the classes' shares of input and g the part
of output that a model made, which with h is the caches' factor, p and q prices per token, r what else a request costs:
retries, fallbacks, checks, retrieval, corrections and fees. Each factor's part of the difference is its Shapley value
(Shapley 1953): what switching it from the one period to the other adds, averaged over all orders of switching. So the
parts sum to the difference and no order is preferred. They are rounded to nano-dollars by largest remainder. Prices are
what was really paid per token: of a machine, the time that prefill and decode took. A feature that is in one period
only is new or gone, as a whole; a model that is, is mix alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Context, Decimal
from itertools import combinations

import msgspec

from millicent.core.money import ZERO, Money, apportion
from millicent.core.periods import DAY_NS, Period, day_of, start_ns
from millicent.core.tallies import Sums
from millicent.economics.config import EarningsConfig
from millicent.economics.tallied import summed
from millicent.economics.unit import per
from millicent.ledger.queries import LedgerQueries, ReceiptFilter

# In the order in which ties are broken.
FACTORS = ("volume", "model_mix", "input_tokens", "output_tokens", "price", "cache", "other")
NEW, GONE = "new", "gone"
# A figure per request that moved by so much, against its baseline or last week, has drifted.
DRIFT_PERCENT = 20
_WEEK_NS = 7 * DAY_NS

_CLASSES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # Leaves of usage, and the meters they are priced by.
    "fresh": (("input_fresh", "input_image", "input_audio"), ("input", "image", "audio")),
    "read": (("input_cache_read",), ("input_cached",)),
    "written": (("input_cache_write_5m", "input_cache_write_1h"), ("cache_write", "cache_storage")),
    "hit": (("input_hit",), ()),
}
_OUTPUT = ("output", "reasoning")
_EXACT = Context(prec=60)
_ZERO = Decimal(0)


class Rates(msgspec.Struct, frozen=True):
    """Priced requests, and what one is like; None where there were none, or no tokens are known."""

    requests: int
    cost_per_request: Money | None
    input_tokens: Decimal | None
    output_tokens: Decimal | None
    cached: Decimal | None
    unpriced: int


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """`effects` sum to `difference`; what had none is left out."""

    group: str | None
    before: Money
    after: Money
    difference: Money
    effects: dict[str, Money]
    was: Rates
    became: Rates


class ChangeReport(msgspec.Struct, frozen=True):
    """Features, the largest change first; `total` sums their effects."""

    before: Period
    after: Period
    features: tuple[Change, ...]
    total: Change


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """A feature's last seven days beside the seven before, and beside the week that is its baseline. `moved` names the
    figures that are a fifth off either."""

    feature: str | None
    now: Rates
    week_ago: Rates
    baseline: Rates
    baseline_from: str
    moved: tuple[str, ...]


def changes(ledger: LedgerQueries, before: Period, after: Period, where: ReceiptFilter | None = None) -> ChangeReport:
    """Of requests that are priced; `where`'s times are left aside."""
    cells = [_cells(ledger, period, where or ReceiptFilter()) for period in (before, after)]
    features = {feature for side in cells for feature in side}
    pairs = {feature: [side.get(feature, {}) for side in cells] for feature in features}
    # What has no price in either period has nothing to compare: the total says how many those are.
    found = [
        _change(feature, *pair)
        for feature, pair in pairs.items()
        if any(tally.priced for side in pair for tally in side.values())
    ]
    found.sort(key=lambda each: (-abs(each.difference.nanousd), each.group is None, each.group or ""))
    effects: dict[str, Money] = {}
    for each in found:
        for factor, amount in each.effects.items():
            effects[factor] = effects.get(factor, ZERO) + amount
    sides = [Sums.together(tally for models in side.values() for tally in models.values()) for side in cells]
    return ChangeReport(before, after, tuple(found), _told(None, sides[0], sides[1], effects))


def drifts(
    ledger: LedgerQueries, now_ns: int, features: Mapping[str, EarningsConfig], where: ReceiptFilter | None = None
) -> list[Drift]:
    """Of every feature with a priced request in the last seven days. A feature's baseline is the week from the day in
    its configuration, or the first week in which it was asked for."""
    where = where or ReceiptFilter()
    now, week_ago = Period(now_ns - _WEEK_NS, now_ns), Period(now_ns - 2 * _WEEK_NS, now_ns - _WEEK_NS)
    current, before = (_by_feature(ledger, period, where) for period in (now, week_ago))
    first_days = ledger.first_days_ns()
    weeks: dict[int, dict[str | None, Sums]] = {}
    found = []
    for feature, tally in sorted(current.items(), key=lambda each: (each[0] is None, each[0] or "")):
        if not tally.priced:
            continue
        own = features.get(feature or "")
        given = None if own is None or own.baseline is None else start_ns(own.baseline)
        base_ns = first_days.get(feature, now.from_ns) if given is None else given
        if base_ns not in weeks:
            weeks[base_ns] = _by_feature(ledger, Period(base_ns, base_ns + _WEEK_NS), where)
        rates = [rates_of(each) for each in (tally, *(week.get(feature, Sums()) for week in (before, weeks[base_ns])))]
        found.append(
            Drift(
                feature=feature,
                now=rates[0],
                week_ago=rates[1],
                baseline=rates[2],
                baseline_from=day_of(base_ns).isoformat(),
                moved=tuple(name for name in _MOVING if any(_moved(rates[0], then, name) for then in rates[1:])),
            )
        )
    return found


_MOVING = ("cost_per_request", "input_tokens", "output_tokens", "cached")


def _moved(now: Rates, then: Rates, name: str) -> bool:
    new, old = getattr(now, name), getattr(then, name)
    if new is None or old is None:
        return False
    if isinstance(new, Money):
        new, old = new.nanousd, old.nanousd
    # A share is compared as it is: from 1% to 2% isn't twice as much of anything.
    least = DRIFT_PERCENT * (1 if name == "cached" else abs(old))
    return bool(new != old and abs(new - old) * 100 >= least)


def rates_of(tally: Sums) -> Rates:
    count = tally.priced
    inputs = sum(tokens for leaf, tokens in tally.priced_tokens.items() if leaf.startswith("input"))
    outputs = sum(tokens for leaf, tokens in tally.priced_tokens.items() if leaf.startswith("output"))
    read = tally.priced_tokens.get("input_cache_read", 0)
    return Rates(
        requests=count,
        cost_per_request=per(Money(tally.cost_nanousd), count),
        input_tokens=Decimal(inputs) / count if count else None,
        output_tokens=Decimal(outputs) / count if count else None,
        cached=Decimal(read) / inputs if inputs else None,
        unpriced=tally.requests - tally.priced,
    )


def _by_feature(ledger: LedgerQueries, period: Period, where: ReceiptFilter) -> dict[str | None, Sums]:
    within = msgspec.structs.replace(where, from_ns=period.from_ns, to_ns=period.to_ns)
    return {feature: tally for (feature,), tally in summed(ledger, ("feature",), within).items()}


def _cells(ledger: LedgerQueries, period: Period, where: ReceiptFilter) -> dict[str | None, dict[str, Sums]]:
    """Tallies by feature and model."""
    within = msgspec.structs.replace(where, from_ns=period.from_ns, to_ns=period.to_ns)
    cells: dict[str | None, dict[str, Sums]] = {}
    for (feature, model), tally in summed(ledger, ("feature", "model"), within).items():
        cells.setdefault(feature, {})[model or ""] = tally
    return cells


def _change(feature: str | None, before: Mapping[str, Sums], after: Mapping[str, Sums]) -> Change:
    was, became = Sums.together(before.values()), Sums.together(after.values())
    difference = became.cost_nanousd - was.cost_nanousd
    if not was.priced or not became.priced:
        kind = NEW if became.priced else GONE
        return _told(feature, was, became, {kind: Money(difference)} if difference else {})
    effects = dict(zip(FACTORS, shapley(before, after), strict=True))
    return _told(feature, was, became, {factor: Money(part) for factor, part in effects.items() if part})


def _told(group: str | None, was: Sums, became: Sums, effects: dict[str, Money]) -> Change:
    before, after = Money(was.cost_nanousd), Money(became.cost_nanousd)
    return Change(
        group=group,
        before=before,
        after=after,
        difference=after - before,
        effects=effects,
        was=rates_of(was),
        became=rates_of(became),
    )


class _Cell(msgspec.Struct, frozen=True):
    """One model's part of a feature in one period; per request, and per token."""

    share: Decimal
    input_tokens: Decimal
    output_tokens: Decimal
    mix: dict[str, Decimal]
    prices: dict[str, Decimal]
    generated: Decimal
    output_price: Decimal
    other: Decimal


def shapley(before: Mapping[str, Sums], after: Mapping[str, Sums]) -> list[int]:
    """Each of `FACTORS`' part of the difference in nano-dollars; they sum to it exactly. Both have priced requests."""
    models = sorted({model for side in (before, after) for model, tally in side.items() if tally.priced})
    counts = [sum(tally.priced for tally in side.values()) for side in (before, after)]
    cells = [_paired(before.get(model, Sums()), after.get(model, Sums()), counts) for model in models]
    n = len(FACTORS)
    values = {
        chosen: _value([Decimal(count) for count in counts], cells, chosen)
        for size in range(n + 1)
        for chosen in map(frozenset, combinations(range(n), size))
    }
    parts = []
    for factor in range(n):
        part = _ZERO
        for chosen, value in values.items():
            if factor not in chosen:
                ways = math.factorial(len(chosen)) * math.factorial(n - len(chosen) - 1)
                part = _EXACT.add(part, _EXACT.multiply(ways, values[chosen | {factor}] - value))
        parts.append(_EXACT.divide(part, math.factorial(n)))
    was, became = (sum(tally.cost_nanousd for tally in side.values()) for side in (before, after))
    return _rounded(parts, became - was)


def _rounded(parts: Sequence[Decimal], total: int) -> list[int]:
    """Whole numbers that sum to `total`, each within one of its part, by largest remainder."""
    floors = [math.floor(part) for part in parts]
    missing = total - sum(floors)
    by_remainder = sorted(range(len(parts)), key=lambda i: floors[i] - parts[i])
    for i in by_remainder[:missing]:
        floors[i] += 1
    return floors


def _value(counts: Sequence[Decimal], cells: Sequence[tuple[_Cell, _Cell]], chosen: frozenset[int]) -> Decimal:
    """The cost with the chosen factors as they became, and the others as they were."""
    volume, mix, inputs, outputs, price, cache, other = (int(factor in chosen) for factor in range(len(FACTORS)))
    total = _ZERO
    for pair in cells:
        prices, shares = pair[price].prices, pair[cache].mix
        per_input = sum((_EXACT.multiply(shares[name], prices[name]) for name in _CLASSES), _ZERO)
        each = _EXACT.multiply(pair[inputs].input_tokens, per_input)
        generated = _EXACT.multiply(pair[outputs].output_tokens, pair[cache].generated)
        each = _EXACT.add(each, _EXACT.multiply(generated, pair[price].output_price))
        each = _EXACT.add(each, pair[other].other)
        total = _EXACT.add(total, _EXACT.multiply(pair[mix].share, each))
    return _EXACT.multiply(counts[volume], total)


def _paired(before: Sums, after: Sums, counts: Sequence[int]) -> tuple[_Cell, _Cell]:
    """The model in both periods. What isn't known of one period, since it had none of it, is as in the other."""
    was, became = _cell(before, counts[0]), _cell(after, counts[1])
    if not before.priced:
        return msgspec.structs.replace(became, share=_ZERO), became
    if not after.priced:
        return was, msgspec.structs.replace(was, share=_ZERO)
    return _filled(was, became), _filled(became, was)


def _filled(cell: _Cell, other: _Cell) -> _Cell:
    prices = {name: cell.prices[name] if cell.mix[name] else other.prices[name] for name in _CLASSES}
    return msgspec.structs.replace(
        cell,
        mix=cell.mix if cell.input_tokens else other.mix,
        prices=prices,
        generated=cell.generated if cell.output_tokens else other.generated,
        output_price=cell.output_price if cell.output_tokens and cell.generated else other.output_price,
    )


def _cell(tally: Sums, requests: int) -> _Cell:
    count = tally.priced
    if not count:
        nothing = dict.fromkeys(_CLASSES, _ZERO)
        return _Cell(_ZERO, _ZERO, _ZERO, nothing, nothing, _ZERO, _ZERO, _ZERO)
    own = {kind.removeprefix("inference "): nanousd for kind, nanousd in tally.nanousd.items() if "inference " in kind}
    prefill, decode = apportion(own.get("accelerator", 0), [tally.prefill_ns, tally.decode_ns])
    tokens = {name: sum(tally.priced_tokens.get(leaf, 0) for leaf in leaves) for name, (leaves, _) in _CLASSES.items()}
    amounts = {name: sum(own.get(meter, 0) for meter in meters) for name, (_, meters) in _CLASSES.items()}
    amounts["fresh"] += prefill
    output_tokens = sum(count for leaf, count in tally.priced_tokens.items() if leaf.startswith("output"))
    made = output_tokens - tally.priced_tokens.get("output_hit", 0)
    output_amount = sum(own.get(meter, 0) for meter in _OUTPUT) + decode
    # What was paid for tokens that nobody counted is paid per request.
    told = sum(amount for name, amount in amounts.items() if tokens[name]) + (output_amount if made else 0)
    inputs = sum(tokens.values())
    return _Cell(
        share=_EXACT.divide(count, requests),
        input_tokens=_EXACT.divide(inputs, count),
        output_tokens=_EXACT.divide(output_tokens, count),
        mix={name: _EXACT.divide(tokens[name], inputs) if inputs else _ZERO for name in _CLASSES},
        prices={name: _EXACT.divide(amounts[name], tokens[name]) if tokens[name] else _ZERO for name in _CLASSES},
        generated=_EXACT.divide(made, output_tokens) if output_tokens else _ZERO,
        output_price=_EXACT.divide(output_amount, made) if made else _ZERO,
        other=_EXACT.divide(tally.cost_nanousd - told, count),
    )
