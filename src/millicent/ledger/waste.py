"""What was paid for that nobody had any use of, or that could have cost less: which feature, how much, and what to do.

The latest receipts are read one by one, `MOST_READ` of those asked for at most; how prompts grew over the whole time
comes from the rollups.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import NamedTuple

import msgspec

from millicent.core.clock import NS_PER_HOUR
from millicent.core.money import Money
from millicent.core.prompts import Prompt, unpacked
from millicent.core.usage import Provenance

MOST_READ = 50_000
# A prompt that is repeated counts from this many tokens on, and within this time: providers cache no others.
LEAST_REPEATED_TOKENS = 1024
REPEATED_WITHIN_NS = NS_PER_HOUR
# A system prompt is most of the bill from this part of a feature's input dollars on.
SYSTEM_PERCENT = 50
# Prompts grow when those of the last quarter of the time are longer than the first quarter's by this much; a
# conversation's, when its later turns read this much of what its first one read. With fewer requests nobody can tell.
GROWTH_PERCENT = 20
LENGTHENING_PERCENT = 200
LEAST_REQUESTS = 20
PERIODS = 4
_WEEK_NS = 7 * 24 * NS_PER_HOUR
# So many chains are remembered before those that are too old are forgotten.
_MOST_CHAINS = 200_000

_SYSTEM = frozenset({"tools", "system"})


class Advice(NamedTuple):
    """What a kind of waste is, what to do about it, and the lines of the configuration that do it, where there are."""

    what: str
    do: str
    config: str | None = None


ADVICE = {
    "cut": Advice(
        "the limit ended the output",
        "raise max_tokens where a whole answer is needed, or ask for a shorter one: what was cut is paid for too",
    ),
    "unread": Advice(
        "its caller had left",
        "answer sooner, and stream: callers that leave stop the work where it is",
        "[features.NAME]\nlatency_target_ms = 2000",
    ),
    "repeated": Advice(
        "began as a prompt before it, not from a cache",
        "let the provider cache it; where it caches by itself, put what changes behind what stays the same",
        '[placements.NAME]\nprompt_caching = "auto"',
    ),
    "system": Advice(
        "system prompt and tools are most of the input's cost",
        "shorten them, leave out tools that are never called, or use a smaller model that needs fewer words",
    ),
    "lengthening": Advice(
        "later turns read much more than the first",
        "keep fewer turns, or sum up the old ones: each turn pays for all before it",
    ),
    "growing": Advice(
        "prompts are longer than they were",
        "compare the example with an early receipt of the feature: what was added since may not be needed",
    ),
}


class Waste(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of waste in one feature. `tokens` are those it is about; `cost` is of the receipts whose cost is known,
    `unpriced` counts the others. `example` is the dearest of its receipts.

    Of repeated prompts: `model`, the mean length of what was shared, and how often in an hour. Of a system prompt: its
    mean length, and its `share` of the feature's input dollars. Of what grows: the mean input before and after, and
    tokens per week, or per turn of a conversation.
    """

    kind: str
    feature: str | None
    requests: int
    tokens: int
    cost: Money
    unpriced: int
    example: str
    model: str | None = None
    prefix_tokens: int | None = None
    per_hour: float | None = None
    share: float | None = None
    before_tokens: int | None = None
    after_tokens: int | None = None
    tokens_per_week: int | None = None
    tokens_per_turn: int | None = None

    @property
    def provenance(self) -> Provenance:
        """Whole receipts were measured; parts of prompts are estimates."""
        return Provenance.MEASURED if self.kind in {"cut", "unread"} else Provenance.ESTIMATED


class WasteReport(msgspec.Struct, frozen=True):
    """Dearest first. `read` of `of` closed receipts were looked at one by one, the oldest of them of `from_ns`."""

    found: tuple[Waste, ...] = ()
    read: int = 0
    of: int = 0
    from_ns: int | None = None


class Read(NamedTuple):
    """One closed receipt. `fresh` and `written` are input tokens at full price and into a cache, `cached` from one,
    with what each came to (nano-dollars; None where one of them is unpriced). `cached_price` is that of a token from
    the cache, in hundredths of a fresh one's; None where it has no price."""

    id: str
    at_ns: int
    feature: str | None
    key: str | None
    model: str
    conversation: str | None
    status: str
    finish_reason: str | None
    input_tokens: int | None
    output_tokens: int | None
    prompt: Prompt | None
    cost: int | None
    fresh: int
    written: int
    cached: int
    fresh_cost: int | None
    written_cost: int | None
    cached_cost: int | None
    cached_price: int | None

    @property
    def input_cost(self) -> int | None:
        parts = (self.fresh_cost, self.written_cost, self.cached_cost)
        return None if None in parts else sum(part or 0 for part in parts)


_READ = """
    WITH chosen AS MATERIALIZED (
        SELECT id, created_at_ns, feature, key, model, conversation, status, finish_reason, input_tokens,
            output_tokens, segments, usage, price_snapshot
        FROM receipts WHERE status IS NOT NULL AND backend IS NOT 'response_cache' AND {where}
        ORDER BY created_at_ns DESC, id DESC LIMIT ?
    )
    SELECT c.id, created_at_ns, feature, key, model, conversation, status, finish_reason, input_tokens, output_tokens,
        segments, json_extract(price_snapshot, '$.input'), json_extract(price_snapshot, '$.input_cached'),
        iif(count(*) = count(amount_nanousd), sum(amount_nanousd), NULL),
        coalesce(sum(CAST(quantity AS INTEGER)) FILTER (WHERE meter = 'input'), 0),
        coalesce(sum(CAST(quantity AS INTEGER)) FILTER (WHERE meter = 'cache_write'), 0),
        coalesce(json_extract(usage, '$.leaves.input_cache_read.tokens'), 0),
        {input}, {cache_write}, {input_cached}
    FROM chosen AS c LEFT JOIN lines AS l ON l.receipt = c.id AND l.book = 'actual'
    GROUP BY c.id
"""
_AMOUNT = (
    "iif(count(*) FILTER (WHERE meter = '{0}') = count(amount_nanousd) FILTER (WHERE meter = '{0}'),"
    " coalesce(sum(amount_nanousd) FILTER (WHERE meter = '{0}'), 0), NULL)"
)
_METERS = ("input", "cache_write", "input_cached")


def latest(connection: sqlite3.Connection, where: str, values: Sequence[object], most: int = MOST_READ) -> list[Read]:
    """The latest of those asked for, oldest first."""
    sql = _READ.format(where=where, **{meter: _AMOUNT.format(meter) for meter in _METERS})
    found = []
    for (
        *described,
        segments,
        price,
        again,
        cost,
        fresh,
        written,
        cached,
        fresh_cost,
        written_cost,
        cached_cost,
    ) in connection.execute(sql, (*values, most)):
        prompt = None if segments is None else unpacked(b"", segments)
        hundredths = None
        if price is not None and again is not None and Decimal(price):
            hundredths = int(100 * Decimal(again) / Decimal(price))
        figures = (prompt, cost, fresh, written, cached, fresh_cost, written_cost, cached_cost, hundredths)
        found.append(Read._make((*described, *figures)))
    found.sort(key=lambda each: (each.at_ns, each.id))
    return found


def report(reads: Sequence[Read], of: int, grown: Iterable[Growth]) -> WasteReport:
    found = [*_ended_badly(reads), *_repeated(reads), *_systems(reads), *_lengthening(reads), *_growing(grown, reads)]
    found.sort(key=lambda each: (-each.cost.nanousd, -each.tokens, each.kind, each.feature or "", each.example))
    return WasteReport(tuple(found), len(reads), of, reads[0].at_ns if reads else None)


class _Tally:
    """What adds up to one finding."""

    def __init__(self) -> None:
        self.requests = self.tokens = self.nanousd = self.unpriced = 0
        self.example = ""
        self._dearest = (-1, -1)

    def add(self, read: Read, tokens: int, nanousd: int | None) -> None:
        self.requests += 1
        self.tokens += tokens
        self.nanousd += nanousd or 0
        self.unpriced += nanousd is None
        if (nanousd or 0, tokens) > self._dearest:
            self.example, self._dearest = read.id, (nanousd or 0, tokens)

    def waste(self, kind: str, feature: str | None) -> Waste:
        return Waste(
            kind=kind,
            feature=feature,
            requests=self.requests,
            tokens=self.tokens,
            cost=Money(self.nanousd),
            unpriced=self.unpriced,
            example=self.example,
        )


def _ended_badly(reads: Iterable[Read]) -> list[Waste]:
    """`cut`: outputs that their limit ended. `unread`: whose caller had left."""
    tallies: dict[tuple[str, str | None], _Tally] = {}
    for read in reads:
        kind = "unread" if read.status == "cancelled" else None
        if read.status == "succeeded" and read.finish_reason == "length":
            kind = "cut"
        if kind is not None:
            tallies.setdefault((kind, read.feature), _Tally()).add(read, read.output_tokens or 0, read.cost)
    return [tally.waste(kind, feature) for (kind, feature), tally in tallies.items()]


class _Seen:
    """How much of a prompt was there before, in the same model for the same key, at most an hour ago."""

    def __init__(self) -> None:
        self._chains: dict[tuple[str, str | None, bytes], int] = {}
        self._turns: dict[tuple[str | None, str], int] = {}

    def shared_tokens(self, read: Read) -> int:
        """0 where nobody can tell. Where no hashes are kept, a conversation's turns are taken to go on from each
        other."""
        if read.input_tokens is None:
            return 0
        if read.prompt is None:
            before = self._turns.get((read.conversation, read.model), 0) if read.conversation else 0
            self._turns[read.conversation, read.model] = read.input_tokens + (read.output_tokens or 0)
            return min(before, read.input_tokens)
        length, shared = read.prompt.length, 0
        for segment, end in zip(read.prompt.segments, read.prompt.ends(), strict=True):
            tokens = read.input_tokens * end // length if length else 0
            if tokens < LEAST_REPEATED_TOKENS:
                continue
            place = (read.model, read.key, segment.chain)
            if self._chains.get(place, -REPEATED_WITHIN_NS) > read.at_ns - REPEATED_WITHIN_NS:
                shared = tokens
            self._chains[place] = read.at_ns
        if len(self._chains) > _MOST_CHAINS:
            since_ns = read.at_ns - REPEATED_WITHIN_NS
            self._chains = {place: at_ns for place, at_ns in self._chains.items() if at_ns > since_ns}
        return shared


def _repeated(reads: Sequence[Read]) -> list[Waste]:
    """Prompts that began as one before them, and weren't read from a cache: by feature, model and how they begin. What
    a cache would have saved; at the full price of fresh input where cached input has no price."""
    seen = _Seen()
    tallies: dict[tuple[str | None, str, bytes], _Tally] = {}
    shared_tokens: dict[tuple[str | None, str, bytes], list[int]] = {}
    for read in reads:
        shared = seen.shared_tokens(read)
        again = min(shared - read.cached - read.written, read.fresh or shared)
        if again < LEAST_REPEATED_TOKENS:
            continue
        nanousd = None
        if read.fresh_cost is not None and read.fresh:
            nanousd = read.fresh_cost * again * (100 - (read.cached_price or 0)) // (100 * read.fresh)
        begins = read.prompt.segments[0].chain if read.prompt is not None else b""
        group = (read.feature, read.model, begins)
        tallies.setdefault(group, _Tally()).add(read, again, nanousd)
        shared_tokens.setdefault(group, []).append(shared)
    # Hours that were looked at, at least one.
    span_ns = max(NS_PER_HOUR, reads[-1].at_ns - reads[0].at_ns) if reads else NS_PER_HOUR
    return [
        msgspec.structs.replace(
            tally.waste("repeated", feature),
            model=model,
            prefix_tokens=sum(shared_tokens[feature, model, begins]) // tally.requests,
            per_hour=round(tally.requests * NS_PER_HOUR / span_ns, 1),
        )
        for (feature, model, begins), tally in tallies.items()
    ]


def _systems(reads: Iterable[Read]) -> list[Waste]:
    """Features whose tools and system prompt are most of what their input costs."""
    tallies: dict[str | None, _Tally] = {}
    whole: dict[str | None, int] = {}
    for read in reads:
        if read.prompt is None or not read.input_tokens:
            continue
        kinds = [segment.kind in _SYSTEM for segment in read.prompt.first]
        leading = kinds.index(False) if False in kinds else len(kinds)
        tokens = sum(read.prompt.tokens(read.input_tokens)[:leading])
        tallies.setdefault(read.feature, _Tally()).add(read, tokens, _cost_of_first(read, tokens))
        whole[read.feature] = whole.get(read.feature, 0) + (read.input_cost or 0)
    return [
        msgspec.structs.replace(
            tally.waste("system", feature),
            prefix_tokens=tally.tokens // tally.requests,
            share=round(tally.nanousd / whole[feature], 3),
        )
        for feature, tally in tallies.items()
        if tally.requests >= LEAST_REQUESTS and whole[feature]
        if tally.nanousd * 100 >= whole[feature] * SYSTEM_PERCENT
    ]


def _cost_of_first(read: Read, tokens: int) -> int | None:
    """Of so many tokens at the prompt's beginning: what comes from a cache is at the beginning too."""
    if read.input_cost is None or read.fresh_cost is None or read.written_cost is None:
        return None
    cached = min(tokens, read.cached)
    nanousd = (read.cached_cost or 0) * cached // read.cached if cached else 0
    rest = read.fresh + read.written
    if rest and tokens > cached:
        nanousd += (read.fresh_cost + read.written_cost) * min(tokens - cached, rest) // rest
    return nanousd


def _lengthening(reads: Iterable[Read]) -> list[Waste]:
    """What later turns of conversations read beyond what their first one did."""
    turns: dict[tuple[str | None, str], list[Read]] = {}
    for read in reads:
        if read.conversation and read.input_tokens:
            turns.setdefault((read.feature, read.conversation), []).append(read)
    tallies: dict[str | None, _Tally] = {}
    firsts: dict[str | None, int] = {}
    lasts: dict[str | None, list[int]] = {}
    for (feature, _), conversation in turns.items():
        begun = conversation[0].input_tokens or 0
        for read in conversation[1:]:
            more = max(0, (read.input_tokens or 0) - begun)
            cost = read.input_cost
            nanousd = None if cost is None else cost * more // (read.input_tokens or 1)
            tallies.setdefault(feature, _Tally()).add(read, more, nanousd)
            firsts[feature] = firsts.get(feature, 0) + begun
        if len(conversation) > 1:
            lasts.setdefault(feature, []).append(conversation[-1].input_tokens or 0)
    return [
        msgspec.structs.replace(
            tally.waste("lengthening", feature),
            before_tokens=firsts[feature] // tally.requests,
            after_tokens=sum(lasts[feature]) // len(lasts[feature]),
            tokens_per_turn=(sum(lasts[feature]) - firsts[feature] * len(lasts[feature]) // tally.requests)
            // tally.requests,
        )
        for feature, tally in tallies.items()
        if tally.requests >= LEAST_REQUESTS
        if (tally.tokens + firsts[feature]) * 100 >= firsts[feature] * LENGTHENING_PERCENT
    ]


class Growth(NamedTuple):
    """A feature's requests with known usage and their input tokens, in each of equal periods of `period_ns`."""

    feature: str | None
    periods: tuple[tuple[int, int], ...]
    period_ns: int


def periods(from_ns: int, to_ns: int) -> list[tuple[int, int]]:
    """Equal ones that cover the time; the last has what doesn't divide."""
    each_ns = (to_ns - from_ns) // PERIODS
    starts = [from_ns + i * each_ns for i in range(PERIODS)]
    return list(zip(starts, [*starts[1:], to_ns], strict=True))


def growth(
    totals: Callable[[int, int], Mapping[str | None, tuple[int, int]]], from_ns: int, to_ns: int
) -> list[Growth]:
    """`totals` has each feature's requests and input tokens of a time."""
    spans = periods(from_ns, to_ns)
    found = [totals(*span) for span in spans]
    features = dict.fromkeys(feature for each in found for feature in each)
    return [
        Growth(feature, tuple(each.get(feature, (0, 0)) for each in found), spans[0][1] - spans[0][0])
        for feature in features
    ]


def _growing(grown: Iterable[Growth], reads: Iterable[Read]) -> list[Waste]:
    """Features whose prompts are longer at the end of the time than at its beginning, and what that costs there, at the
    price of their latest fresh input."""
    fresh: dict[str | None, list[int]] = {}
    longest: dict[str | None, Read] = {}
    for read in reads:
        if read.fresh_cost is not None and read.fresh:
            have = fresh.setdefault(read.feature, [0, 0])
            have[0] += read.fresh_cost
            have[1] += read.fresh
        if read.feature not in longest or (read.input_tokens or 0) > (longest[read.feature].input_tokens or 0):
            longest[read.feature] = read
    found = []
    for feature, counts, period_ns in grown:
        if min(requests for requests, _ in counts) < LEAST_REQUESTS or feature not in longest:
            continue
        means = [tokens // requests for requests, tokens in counts]
        # The slope of the straight line through the means, per period; times 2, 10 at four of them.
        slope = sum((2 * i - PERIODS + 1) * mean for i, mean in enumerate(means)) * 6 // (PERIODS * (PERIODS**2 - 1))
        if slope <= 0 or means[-1] * 100 < means[0] * (100 + GROWTH_PERCENT):
            continue
        requests, more = counts[-1][0], counts[-1][0] * (means[-1] - means[0])
        nanousd, tokens = fresh.get(feature, [0, 0])
        found.append(
            Waste(
                kind="growing",
                feature=feature,
                requests=requests,
                tokens=more,
                cost=Money(nanousd * more // tokens if tokens else 0),
                unpriced=0 if tokens else requests,
                example=longest[feature].id,
                before_tokens=means[0],
                after_tokens=means[-1],
                tokens_per_week=slope * _WEEK_NS // period_ns if period_ns * PERIODS >= _WEEK_NS else None,
            )
        )
    return found
